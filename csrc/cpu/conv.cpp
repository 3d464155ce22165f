// CPU registrations of the convolution ops. A "token" is an output pixel, a column of the matrix is
// (input channel, kernel row, kernel column); panels are cut straight from the image.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "driver.h"
#include "planes.h"
#include "reference.h"

namespace sparsekern {
namespace {

struct Conv {
  int64_t images, in_channels, height, width, out_channels, out_h, out_w, kernel_h, kernel_w,
      groups;
  std::vector<int64_t> stride, padding, dilation;
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t in_per_group() const { return in_channels / groups; }
  int64_t out_per_group() const { return out_channels / groups; }
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
std::vector<Tap> forward_taps(const Conv& c, int axis) {
  std::vector<Tap> taps;
  for (int64_t k = 0; k < (axis ? c.kernel_w : c.kernel_h); ++k)
    taps.push_back({c.stride[axis], k * c.dilation[axis] - c.padding[axis], 1});
  return taps;
}
std::vector<Tap> backward_taps(const Conv& c, int axis) {
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

void make_planes(const Tensor& image, int64_t images, int64_t channels, const Axis& y,
                 const Axis& x, ScratchSlot slot, Planes* p) {
  p->layout = plane_layout(y, x);
  const bool plain = is_plain(y, x);
  const int64_t taps = static_cast<int64_t>(p->layout.tap_offset.size());
  const PlaneLayout& l = p->layout;
  const float* src = image.const_data_ptr<float>();
  const int64_t floats = images * channels * l.plane_size;
  float* dst = plain ? nullptr : thread_scratch(slot, floats + kSlack);
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

void check_pair(const std::string& op, const char* name, const std::vector<int64_t>& v,
                int64_t least) {
  if (v.size() != 2 || v[0] < least || v[1] < least) {
    std::string have;
    for (int64_t i : v) have += (have.empty() ? "" : ", ") + std::to_string(i);
    fail(op, std::string(name) + " of two integers >= " + std::to_string(least), "(" + have + ")");
  }
}

Conv make_conv(const std::string& op, int64_t images, int64_t in_channels, int64_t height,
               int64_t width, int64_t rows, const std::vector<int64_t>& kernel,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& dilation, int64_t groups) {
  check_pair(op, "kernel_size", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  if (groups < 1 || in_channels % groups || rows % groups)
    fail(op,
         "groups that divide in_channels = " + std::to_string(in_channels) +
             " and out_channels = " + std::to_string(rows),
         std::to_string(groups));
  const auto size = [&](int64_t n, int i) {
    const int64_t span = n + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    if (span < 0)
      fail(op, "an input at least as large as the kernel",
           "input size " + std::to_string(n) + " with kernel_size " + std::to_string(kernel[i]));
    return span / stride[i] + 1;
  };
  return {images,    in_channels, height, width,  rows,    size(height, 0), size(width, 1),
          kernel[0], kernel[1],   groups, stride, padding, dilation};
}

// float64 by plain loops, group by group. `backward` walks from the output to the input.
struct Reference {
  std::vector<Tap> tap_y, tap_x;
  ReferenceSource source;
  int64_t rows, channels;  // per group: of the result, of the source
};

Reference make_reference(const Conv& c, const double* data, bool backward) {
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

void spmm_double(const Conv& c, Reference r, const int32_t* crow, const int32_t* col,
                 const double* values, const double* bias, Activation act, const Sink& sink,
                 double* out) {
  const int64_t tokens = c.images * r.source.out_h * r.source.out_w;
  for (int64_t g = 0; g < c.groups; ++g) {
    r.source.channel0 = g * r.channels;
    spmm_reference(crow, col, values, bias, act, r.source, sink, out, g * r.rows, (g + 1) * r.rows,
                   tokens);
  }
}

void sddmm_double(const Conv& c, Reference r, const Pattern& p, const Sink& layout,
                  const double* grad, double* out) {
  for (int64_t g = 0; g < c.groups; ++g) {
    r.source.channel0 = g * r.channels;
    sddmm_reference(p.crow_data(), p.col_data(), r.source, layout, grad, out, g * r.rows,
                    (g + 1) * r.rows, c.images * c.out_h * c.out_w);
  }
}

Tensor csr_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                      const std::optional<Tensor>&, const std::vector<int64_t> kernel,
                      const std::vector<int64_t> stride, const std::vector<int64_t> padding,
                      const std::vector<int64_t> dilation, int64_t groups,
                      const std::string& activation) {
  const std::string op = "csr_conv2d";
  check_dim(op, "x", x, 4);
  check_operand(op, "x", x, x);
  check_operand(op, "values", values, x);
  const Activation act = parse_activation(op, activation);
  const Conv c = make_conv(op, x.size(0), x.size(1), x.size(2), x.size(3), crow.numel() - 1, kernel,
                           stride, padding, dilation, groups);
  const Pattern p =
      check_pattern(op, crow, col, values.numel(), c.in_per_group() * c.taps(), groups, c.taps());
  if (bias) {
    check_operand(op, "bias", *bias, x);
    check_size(op, "bias.size(0) = out_channels", bias->numel(), p.rows);
  }
  const PlanHolder holder = get_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const std::optional<Tensor> bc =
      bias ? std::optional<Tensor>(as_contiguous(*bias, type)) : std::nullopt;
  const Tensor y = empty_tensor({c.images, p.rows, c.out_h, c.out_w}, type);
  const int64_t pixels = c.out_h * c.out_w, tokens = c.images * pixels;
  Sink sink{nullptr, false, p.rows, 0, pixels};
  if (type == ScalarType::Double) {
    spmm_double(c, make_reference(c, xc.const_data_ptr<double>(), false), p.crow_data(),
                p.col_data(), vc.const_data_ptr<double>(),
                bc ? bc->const_data_ptr<double>() : nullptr, act, sink,
                y.mutable_data_ptr<double>());
    return y;
  }
  Planes planes;
  make_planes(xc, c.images, c.in_channels, c.forward_y(), c.forward_x(), kPlanes, &planes);
  sink.data = y.mutable_data_ptr<float>();
  run_spmm(holder.view, {vc.const_data_ptr<float>(),
                         nullptr,
                         bc ? bc->const_data_ptr<float>() : nullptr,
                         act,
                         {nullptr, &planes.source},
                         sink,
                         tokens,
                         groups,
                         c.in_per_group()});
  return to_dtype(y, x.scalar_type());
}

void check_grad(const std::string& op, const Tensor& grad, const Conv& c) {
  check_dim(op, "grad", grad, 4);
  check_size(op, "grad.size(0) = images", grad.size(0), c.images);
  check_size(op, "grad.size(1) = out_channels", grad.size(1), c.out_channels);
  check_size(op, "grad.size(2) = output height", grad.size(2), c.out_h);
  check_size(op, "grad.size(3) = output width", grad.size(3), c.out_w);
}

Tensor csr_conv2d_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& crow,
                                 const Tensor& col, const std::optional<Tensor>& plan_t,
                                 int64_t in_channels, int64_t height, int64_t width,
                                 const std::vector<int64_t> kernel,
                                 const std::vector<int64_t> stride,
                                 const std::vector<int64_t> padding,
                                 const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "csr_conv2d_grad_input";
  check_operand(op, "grad", grad, grad);
  check_operand(op, "values", values, grad);
  const Conv c = make_conv(op, grad.size(0), in_channels, height, width, crow.numel() - 1, kernel,
                           stride, padding, dilation, groups);
  check_grad(op, grad, c);
  const Pattern p =
      check_pattern(op, crow, col, values.numel(), c.in_per_group() * c.taps(), groups, c.taps());
  const TransposedHolder holder = get_transposed(op, p, plan_t);
  const Transposed& t = holder.view;
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor({c.images, in_channels, height, width}, type);
  const int64_t pixels = height * width, tokens = c.images * pixels;
  Sink sink{nullptr, false, in_channels, 0, pixels};
  if (type == ScalarType::Double) {
    const double* v = vc.const_data_ptr<double>();
    std::vector<double> w(p.nnz);
    for (int64_t i = 0; i < p.nnz; ++i) w[i] = v[t.perm[i]];
    spmm_double(c, make_reference(c, gc.const_data_ptr<double>(), true), t.crow, t.col, w.data(),
                nullptr, kNone, sink, out.mutable_data_ptr<double>());
    return out;
  }
  Planes planes;
  make_planes(gc, c.images, c.out_channels, c.backward_y(), c.backward_x(), kPlanes, &planes);
  sink.data = out.mutable_data_ptr<float>();
  run_spmm(t.plan, {vc.const_data_ptr<float>(),
                    t.perm,
                    nullptr,
                    kNone,
                    {nullptr, &planes.source},
                    sink,
                    tokens,
                    groups,
                    c.out_per_group()});
  return to_dtype(out, grad.scalar_type());
}

Tensor csr_conv2d_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& crow,
                                  const Tensor& col, const std::optional<Tensor>& plan_t,
                                  const std::vector<int64_t> kernel,
                                  const std::vector<int64_t> stride,
                                  const std::vector<int64_t> padding,
                                  const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "csr_conv2d_grad_values";
  check_dim(op, "x", x, 4);
  check_operand(op, "x", x, x);
  check_operand(op, "grad", grad, x);
  const Conv c = make_conv(op, x.size(0), x.size(1), x.size(2), x.size(3), crow.numel() - 1, kernel,
                           stride, padding, dilation, groups);
  check_grad(op, grad, c);
  const Pattern p =
      check_pattern(op, crow, col, col.numel(), c.in_per_group() * c.taps(), groups, c.taps());
  const PlanHolder holder = get_values_plan(op, p, plan_t);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.nnz}, type);
  const int64_t pixels = c.out_h * c.out_w, tokens = c.images * pixels;
  if (type == ScalarType::Double) {
    const Sink layout{nullptr, false, p.rows, 0, pixels};
    sddmm_double(c, make_reference(c, xc.const_data_ptr<double>(), false), p, layout,
                 gc.const_data_ptr<double>(), out.mutable_data_ptr<double>());
    return out;
  }
  Planes planes, grad_planes;
  make_planes(xc, c.images, c.in_channels, c.forward_y(), c.forward_x(), kPlanes, &planes);
  const auto as_it_is = [](int64_t n) { return forward_axis(n, n, 1, 1, 0, 1); };
  make_planes(gc, c.images, p.rows, as_it_is(c.out_h), as_it_is(c.out_w), kGradPlanes,
              &grad_planes);
  run_sddmm(holder.view,
            {nullptr,
             nullptr,
             nullptr,
             kNone,
             {nullptr, &planes.source},
             {},
             tokens,
             groups,
             c.in_per_group()},
            {nullptr, &grad_planes.source}, out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("csr_conv2d", TORCH_BOX(&csr_conv2d_cpu));
  m.impl("csr_conv2d_grad_input", TORCH_BOX(&csr_conv2d_grad_input_cpu));
  m.impl("csr_conv2d_grad_values", TORCH_BOX(&csr_conv2d_grad_values_cpu));
}

}  // namespace sparsekern
