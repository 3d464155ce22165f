// The geometry of a convolution and its padded images, shared by the convolution ops of all
// formats.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "driver.h"
#include "planes.h"
#include "reference.h"

namespace sparsekern {

struct Conv {
  int64_t images, in_channels, height, width, out_channels, out_h, out_w, kernel_h, kernel_w,
      groups;
  std::vector<int64_t> stride, padding, dilation;  // padding at the top and at the left
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t in_per_group() const { return in_channels / groups; }
  int64_t out_per_group() const { return out_channels / groups; }
  int64_t out_pixels() const { return images * out_h * out_w; }
  int64_t in_pixels() const { return images * height * width; }
  std::vector<int64_t> out_shape() const { return {images, out_channels, out_h, out_w}; }
  std::vector<int64_t> in_shape() const { return {images, in_channels, height, width}; }
  Sink out_sink(float* data) const { return {data, false, out_channels, 0, out_h * out_w, false}; }
  Sink in_sink(float* data) const { return {data, false, in_channels, 0, height * width, false}; }
  Axis forward_y() const {
    return forward_axis(height, out_h, kernel_h, stride[0], padding[0], dilation[0]);
  }
  Axis forward_x() const {
    return forward_axis(width, out_w, kernel_w, stride[1], padding[1], dilation[1]);
  }
  Axis backward_y() const {
    return backward_axis(out_h, height, kernel_h, stride[0], padding[0], dilation[0]);
  }
  Axis backward_x() const {
    return backward_axis(out_w, width, kernel_w, stride[1], padding[1], dilation[1]);
  }
};

// The taps of both directions for the float64 reference. Forward: output position p reads
// p * stride + tap * dilation - padding. The input gradient walks back: input position p takes from
// (p + padding - tap * dilation) / stride where that is whole.
inline std::vector<Tap> forward_taps(const Conv& c, int axis) {
  std::vector<Tap> taps;
  for (int64_t k = 0; k < (axis ? c.kernel_w : c.kernel_h); ++k)
    taps.push_back({c.stride[axis], k * c.dilation[axis] - c.padding[axis], 1});
  return taps;
}
inline std::vector<Tap> backward_taps(const Conv& c, int axis) {
  std::vector<Tap> taps;
  for (int64_t k = 0; k < (axis ? c.kernel_w : c.kernel_h); ++k)
    taps.push_back({1, c.padding[axis] - k * c.dilation[axis], c.stride[axis]});
  return taps;
}

// The padded planes of an image. `source` points into the layout held here and into scratch of the
// calling thread or, where nothing needs padding, into the image itself.
struct Planes {
  PlaneLayout layout;
  ImageSource source;
};

// A vector read at the end of the last plane must stay inside the buffer.
constexpr int64_t kSlack = 16;

inline void make_planes(const float* src, int64_t images, int64_t channels, const Axis& y,
                        const Axis& x, ScratchSlot slot, Planes* p) {
  p->layout = plane_layout(y, x);
  const bool plain = is_plain(y, x);
  const int64_t taps = static_cast<int64_t>(p->layout.tap_offset.size());
  const PlaneLayout& l = p->layout;
  const int64_t floats = plain ? 0 : times(times(images, channels), l.plane_size);
  float* dst = plain ? nullptr : thread_scratch(slot, plus(floats, kSlack));
  p->source = {plain ? src : dst,   channels, l.plane_size, l.pitch, 0, taps,
               l.tap_offset.data(), y.out,    x.out,        !plain};
  if (plain) {  // rows of the grid follow each other without a gap: one long row
    p->source.out_w = y.out * x.out;
    p->source.out_h = 1;
    return;
  }
  std::fill_n(dst + floats, kSlack, 0.f);
  const PlaneAxis ay = plane_axis(y), ax = plane_axis(x);
  const int64_t grain = std::max<int64_t>(1, 100000 / std::max<int64_t>(1, l.plane_size));
  torch::stable::parallel_for(0, images * channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().fill_plane({src + i * y.size * x.size, dst + i * l.plane_size, ay, ax});
  });
}

inline void check_integers(const std::string& op, const std::string& wanted, bool right_count,
                           const std::vector<int64_t>& v, int64_t least) {
  if (right_count && *std::min_element(v.begin(), v.end()) >= least) return;
  std::string have;
  for (int64_t i : v) have += (have.empty() ? "" : ", ") + std::to_string(i);
  fail(op, wanted + " integers >= " + std::to_string(least), "(" + have + ")");
}

inline void check_pair(const std::string& op, const char* name, const std::vector<int64_t>& v,
                       int64_t least) {
  check_integers(op, std::string(name) + " of two", v.size() == 2, v, least);
}

// The arguments of nn.Conv2d; padding of four integers is (top, left, bottom, right).
struct Geometry {
  const std::vector<int64_t>&kernel, &stride, &padding, &dilation;
  int64_t groups;
};

// Positions of a kernel; each costs some bytes of a table.
constexpr int64_t kMostTaps = int64_t{1} << 24;

// The height (axis 0) or width of the result; nn.Conv2d's formula.
inline int64_t conv_size(const std::string& op, int64_t n, int axis, const Geometry& g) {
  const int64_t after = g.padding[g.padding.size() - 2 + axis];
  const int64_t padded = plus(n, plus(g.padding[axis], after));
  const int64_t reach = times(g.dilation[axis], g.kernel[axis] - 1);
  if (padded > INT32_MAX) fail(op, "a padded input below 2^31", std::to_string(padded));
  if (reach >= padded)
    fail(op, "an input at least as large as the kernel",
         "input size " + std::to_string(n) + " with kernel_size " + std::to_string(g.kernel[axis]));
  return (padded - reach - 1) / g.stride[axis] + 1;
}

inline Conv make_conv(const std::string& op, const std::vector<int64_t>& input, int64_t rows,
                      const Geometry& g) {
  check_pair(op, "kernel_size", g.kernel, 1);
  check_pair(op, "stride", g.stride, 1);
  check_integers(op, "padding of two or four", g.padding.size() == 2 || g.padding.size() == 4,
                 g.padding, 0);
  check_pair(op, "dilation", g.dilation, 1);
  for (auto [name, i] :
       {std::pair{"in_channels", 1}, std::pair{"height", 2}, std::pair{"width", 3}})
    check_int32(op, name, input[i]);
  check_int32(op, "out_channels", rows);
  if (g.kernel[0] > kMostTaps || g.kernel[1] > kMostTaps / g.kernel[0])
    fail(op, "kernel_size of at most 2^24 positions", shape_text(g.kernel));
  // Without outputs every number divides them.
  const bool fits = g.groups >= 1 && g.groups <= std::max<int64_t>(1, rows);
  if (!fits || input[1] % g.groups || rows % g.groups)
    fail(op,
         "groups that divide in_channels = " + std::to_string(input[1]) +
             " and out_channels = " + std::to_string(rows),
         std::to_string(g.groups));
  Conv c{input[0],    input[1],    input[2], input[3], rows,      0,         0,
         g.kernel[0], g.kernel[1], g.groups, g.stride, g.padding, g.dilation};
  c.out_h = conv_size(op, c.height, 0, g), c.out_w = conv_size(op, c.width, 1, g);
  // A single position never takes a step; one as large as the caller likes would pad the image.
  if (c.out_h == 1) c.stride[0] = 1;
  if (c.out_w == 1) c.stride[1] = 1;
  return c;
}

// The convolution of input x, which is checked.
inline Conv conv_of_input(const std::string& op, const Tensor& x, int64_t rows, const Geometry& g) {
  check_dim(op, "x", x, 4);
  check_operand(op, "x", x, x);
  return make_conv(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, rows, g);
}

// Checks the gradient of the output of c.
inline void check_grad(const std::string& op, const Tensor& grad, const Tensor& like,
                       const Conv& c) {
  check_dim(op, "grad", grad, 4);
  check_operand(op, "grad", grad, like);
  check_size(op, "grad.size(0) = images", grad.size(0), c.images);
  check_size(op, "grad.size(1) = out_channels", grad.size(1), c.out_channels);
  check_size(op, "grad.size(2) = output height", grad.size(2), c.out_h);
  check_size(op, "grad.size(3) = output width", grad.size(3), c.out_w);
}

// The convolution whose output gradient is `grad`, which is checked. `input`: (channels, height,
// width).
inline Conv conv_of_grad(const std::string& op, const Tensor& grad,
                         const std::vector<int64_t>& input, int64_t rows, const Geometry& g) {
  check_dim(op, "grad", grad, 4);
  const Conv c = make_conv(op, {grad.size(0), input[0], input[1], input[2]}, rows, g);
  check_grad(op, grad, grad, c);
  return c;
}

// Of a product with padded planes; the values, and what comes after it, are left to the caller.
inline Operands image_operands(const Conv& c, const Planes& planes, const Sink& sink,
                               int64_t tokens, int64_t channels_per_group) {
  Operands o{};
  o.source = {nullptr, &planes.source};
  o.sink = sink, o.tokens = tokens;
  o.groups = c.groups, o.channels_per_group = channels_per_group;
  return o;
}

// From an input x, contiguous float32, to the output y.
inline Operands forward_operands(const Conv& c, const Tensor& x, float* y, Planes* planes) {
  make_planes(x.const_data_ptr<float>(), c.images, c.in_channels, c.forward_y(), c.forward_x(),
              kPlanes, planes);
  return image_operands(c, *planes, c.out_sink(y), c.out_pixels(), c.in_per_group());
}

// From the gradient of the output to that of the input.
inline Operands backward_operands(const Conv& c, const Tensor& grad, float* out, Planes* planes) {
  make_planes(grad.const_data_ptr<float>(), c.images, c.out_channels, c.backward_y(),
              c.backward_x(), kPlanes, planes);
  return image_operands(c, *planes, c.in_sink(out), c.in_pixels(), c.out_per_group());
}

// The gradient of the output as it is, for the weight gradient.
inline Source grad_source(const Conv& c, const Tensor& grad, Planes* planes) {
  const auto as_it_is = [](int64_t n) { return forward_axis(n, n, 1, 1, 0, 1); };
  make_planes(grad.const_data_ptr<float>(), c.images, c.out_channels, as_it_is(c.out_h),
              as_it_is(c.out_w), kGradPlanes, planes);
  return {nullptr, &planes->source};
}

// The dense operand of a convolution, contiguous (images, channels, height, width).
struct ConvImage {
  const float* data;
  int64_t images, channels, height, width;
};

// out = act(conv(image, values) + bias), split over threads; makes the source of the operands.
void run_conv(const PlanView& plan, Operands operands, const ConvImage& image, const Axis& y,
              const Axis& x);

// From an input x, contiguous float32, to the output y; the operands hold values, bias, activation.
inline void run_forward(const Conv& c, const PlanView& plan, Operands o, const Tensor& x,
                        const Tensor& y) {
  o.sink = c.out_sink(y.mutable_data_ptr<float>());
  o.tokens = c.out_pixels(), o.groups = c.groups, o.channels_per_group = c.in_per_group();
  run_conv(plan, o, {x.const_data_ptr<float>(), c.images, c.in_channels, c.height, c.width},
           c.forward_y(), c.forward_x());
}

// From the gradient of the output to that of the input; the operands hold values and perm.
inline void run_backward(const Conv& c, const PlanView& plan, Operands o, const Tensor& grad,
                         const Tensor& out) {
  o.sink = c.in_sink(out.mutable_data_ptr<float>());
  o.tokens = c.in_pixels(), o.groups = c.groups, o.channels_per_group = c.out_per_group();
  run_conv(plan, o, {grad.const_data_ptr<float>(), c.images, c.out_channels, c.out_h, c.out_w},
           c.backward_y(), c.backward_x());
}

// Groups of one input channel, which have a kernel of their own.
bool is_depthwise(const Conv& c);

// As run_forward, for x (images, channels, height, width) and a pattern that has a plan.
void run_depthwise(const Conv& c, const Pattern& p, const Operands& operands, const float* x);

// What is added to the result before the activation: of its shape, contiguous in the type that is
// computed in.
inline std::optional<Tensor> check_residual(const std::string& op,
                                            const std::optional<Tensor>& residual, const Tensor& x,
                                            const Conv& c) {
  if (!residual) return std::nullopt;
  check_operand(op, "residual", *residual, x);
  check_dim(op, "residual", *residual, 4);
  const std::vector<int64_t> shape = c.out_shape();
  for (int64_t i = 0; i < 4; ++i)
    check_size(op, "residual.size(" + std::to_string(i) + ") = that of the result",
               residual->size(i), shape[i]);
  return as_contiguous(*residual, compute_type(x));
}

// float64 by plain loops, group by group. `backward` walks from the output to the input.
struct Reference {
  std::vector<Tap> tap_y, tap_x;
  ReferenceSource source;
  int64_t rows, channels;  // per group: of the result, of the source
};

inline Reference make_reference(const Conv& c, const double* data, bool backward) {
  Reference r;
  r.tap_y = backward ? backward_taps(c, 0) : forward_taps(c, 0);
  r.tap_x = backward ? backward_taps(c, 1) : forward_taps(c, 1);
  r.source = {data,       0,          c.in_channels, c.height, c.width,        0,
              c.kernel_h, c.kernel_w, c.out_h,       c.out_w,  r.tap_y.data(), r.tap_x.data()};
  r.rows = c.out_per_group(), r.channels = c.in_per_group();
  if (backward) {
    std::swap(r.rows, r.channels);
    r.source.channels = c.out_channels;
    std::swap(r.source.height, r.source.out_h);
    std::swap(r.source.width, r.source.out_w);
  }
  return r;
}

}  // namespace sparsekern
