// CPU registrations of the convolution ops. A "token" is an output pixel, a column of the matrix is
// (input channel, kernel row, kernel column); panels are cut straight from the image.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "conv.h"
#include "driver.h"
#include "reference.h"

namespace sparsekern {
namespace {

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
  sink.data = y.mutable_data_ptr<float>();
  run_conv(holder.view,
           {vc.const_data_ptr<float>(),
            nullptr,
            bc ? bc->const_data_ptr<float>() : nullptr,
            act,
            {},
            sink,
            tokens,
            groups,
            c.in_per_group()},
           {xc.const_data_ptr<float>(), c.images, c.in_channels, c.height, c.width}, c.forward_y(),
           c.forward_x());
  return to_dtype(y, x.scalar_type());
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
  sink.data = out.mutable_data_ptr<float>();
  run_conv(t.plan,
           {vc.const_data_ptr<float>(),
            t.perm,
            nullptr,
            kNone,
            {},
            sink,
            tokens,
            groups,
            c.out_per_group()},
           {gc.const_data_ptr<float>(), c.images, c.out_channels, c.out_h, c.out_w}, c.backward_y(),
           c.backward_x());
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
  make_planes(xc.const_data_ptr<float>(), c.images, c.in_channels, c.forward_y(), c.forward_x(),
              kPlanes, &planes);
  const auto as_it_is = [](int64_t n) { return forward_axis(n, n, 1, 1, 0, 1); };
  make_planes(gc.const_data_ptr<float>(), c.images, p.rows, as_it_is(c.out_h), as_it_is(c.out_w),
              kGradPlanes, &grad_planes);
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
