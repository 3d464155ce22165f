// CPU registrations of the convolution ops. A "token" is an output pixel, a column of the matrix is
// (input channel, kernel row, kernel column); panels are cut straight from the image.
#include <torch/csrc/stable/library.h>

#include "conv.h"

namespace sparsekern {
namespace {

// y = act(y + residual)
void finish_double(const std::optional<Tensor>& residual, Activation act, const Tensor& y) {
  const double* from = double_or_null(residual);
  double* to = y.mutable_data_ptr<double>();
  for (int64_t i = 0; i < y.numel(); ++i) to[i] = activate_reference(to[i] + from[i], act);
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

Pattern check_conv_pattern(const std::string& op, const Tensor& crow, const Tensor& col,
                           int64_t nnz, const Conv& c) {
  return check_pattern(op, crow, col, nnz, c.in_per_group() * c.taps(), c.groups, c.taps());
}

Tensor csr_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                      const std::optional<Tensor>&, const std::vector<int64_t> kernel,
                      const std::vector<int64_t> stride, const std::vector<int64_t> padding,
                      const std::vector<int64_t> dilation, int64_t groups,
                      const std::string& activation, const std::optional<Tensor>& residual) {
  const std::string op = "csr_conv2d";
  const Conv c =
      conv_of_input(op, x, csr_rows(op, crow), {kernel, stride, padding, dilation, groups});
  check_csr_values(op, values, x);
  const Activation act = parse_activation(op, activation);
  const Pattern p = check_conv_pattern(op, crow, col, values.numel(), c);
  const std::optional<Tensor> b = check_bias(op, bias, x, p.rows, "out_channels");
  const std::optional<Tensor> more = check_residual(op, residual, x, c);
  const PlanHolder holder = get_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(c.out_shape(), type);
  if (type == ScalarType::Double) {
    spmm_double(c, make_reference(c, xc.const_data_ptr<double>(), false), p.crow_data(),
                p.col_data(), vc.const_data_ptr<double>(), double_or_null(b), more ? kNone : act,
                c.out_sink(nullptr), y.mutable_data_ptr<double>());
    if (more) finish_double(more, act, y);
    return y;
  }
  Operands o{vc.const_data_ptr<float>(), nullptr, data_or_null(b), act};
  o.residual = data_or_null(more);
  if (is_depthwise(c)) {
    o.sink = c.out_sink(y.mutable_data_ptr<float>());
    run_depthwise(c, p, o, xc.const_data_ptr<float>());
  } else {
    run_forward(c, holder.view, o, xc, y);
  }
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
  const Conv c = conv_of_grad(op, grad, {in_channels, height, width}, csr_rows(op, crow),
                              {kernel, stride, padding, dilation, groups});
  check_csr_values(op, values, grad);
  const Pattern p = check_conv_pattern(op, crow, col, values.numel(), c);
  const TransposedHolder holder = get_transposed(op, p, plan_t);
  const Transposed& t = holder.view;
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor(c.in_shape(), type);
  if (type == ScalarType::Double) {
    const std::vector<double> w = permuted(vc.const_data_ptr<double>(), t.perm, p.nnz);
    spmm_double(c, make_reference(c, gc.const_data_ptr<double>(), true), t.crow, t.col, w.data(),
                nullptr, kNone, c.in_sink(nullptr), out.mutable_data_ptr<double>());
    return out;
  }
  run_backward(c, t.plan, {vc.const_data_ptr<float>(), t.perm}, gc, out);
  return to_dtype(out, grad.scalar_type());
}

Tensor csr_conv2d_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& crow,
                                  const Tensor& col, const std::optional<Tensor>& plan_t,
                                  const std::vector<int64_t> kernel,
                                  const std::vector<int64_t> stride,
                                  const std::vector<int64_t> padding,
                                  const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "csr_conv2d_grad_values";
  const Conv c =
      conv_of_input(op, x, csr_rows(op, crow), {kernel, stride, padding, dilation, groups});
  check_grad(op, grad, x, c);
  const Pattern p = check_conv_pattern(op, crow, col, col.numel(), c);
  const PlanHolder holder = get_values_plan(op, p, plan_t);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.nnz}, type);
  if (type == ScalarType::Double) {
    sddmm_double(c, make_reference(c, xc.const_data_ptr<double>(), false), p, c.out_sink(nullptr),
                 gc.const_data_ptr<double>(), out.mutable_data_ptr<double>());
    return out;
  }
  Planes planes, grad_planes;
  run_sddmm(holder.view, forward_operands(c, xc, nullptr, &planes),
            grad_source(c, gc, &grad_planes), out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  SPARSEKERN_IMPL(m, "csr_conv2d", csr_conv2d_cpu);
  SPARSEKERN_IMPL(m, "csr_conv2d_grad_input", csr_conv2d_grad_input_cpu);
  SPARSEKERN_IMPL(m, "csr_conv2d_grad_values", csr_conv2d_grad_values_cpu);
}

}  // namespace sparsekern
