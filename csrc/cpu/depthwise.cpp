// Runs depthwise convolutions, those of groups of one input channel.
#include "conv.h"

namespace sparsekern {

bool is_depthwise(const Conv& c) {
  return c.groups > 1 && c.in_per_group() == 1;
}

// The size of a kernel that is multiplied straight from the image, see DepthwiseArgs.
static int64_t square(const Conv& c) {
  const bool equal = c.kernel_h == c.kernel_w && c.stride[0] == c.stride[1] && c.stride[0] <= 2;
  const bool known = c.kernel_h == 3 || c.kernel_h == 5;
  return equal && known && c.dilation[0] == 1 && c.dilation[1] == 1 ? c.kernel_h : 0;
}

void run_depthwise(const Conv& c, const Pattern& p, const Operands& o, const float* x) {
  const Axis ay = c.forward_y(), ax = c.forward_x();
  const PlaneLayout layout = plane_layout(ay, ax);
  const PlaneAxis py = plane_axis(ay), px = plane_axis(ax);
  const int32_t *crow = p.crow_data(), *col = p.col_data();
  const int64_t rows = c.out_per_group(), pixels = c.out_h * c.out_w;
  const int64_t work = std::max<int64_t>(1, p.nnz * pixels / std::max<int64_t>(1, c.groups));
  const int64_t grain = std::max<int64_t>(1, kSerialWork / work);
  torch::stable::parallel_for(0, c.images * c.groups, grain, [&](int64_t begin, int64_t end) {
    float* plane = thread_scratch(kPlanes, layout.plane_size + kSlack);
    std::fill_n(plane + layout.plane_size, kSlack, 0.f);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % c.groups * rows, at = (i / c.groups * c.out_channels + row) * pixels;
      kernels().depthwise({{x + i * c.height * c.width, plane, py, px},
                           square(c),
                           layout.tap_offset.data(),
                           layout.pitch,
                           c.out_h,
                           c.out_w,
                           rows,
                           crow + row,
                           col,
                           o.values,
                           o.bias ? o.bias + row : nullptr,
                           o.activation,
                           o.sink.data + at,
                           o.residual ? o.residual + at : nullptr});
    }
  });
}

}  // namespace sparsekern
