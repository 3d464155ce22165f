// CPU registrations of the N:M ops. The schemas, fakes and gradients are in sparsekern/ops/nm.py
// and nm_conv.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "conv.h"
#include "nm.h"

namespace sparsekern {
namespace {

// Up to this many tokens each runs alone.
constexpr int64_t kSpmvTokens = 2;

void spmv_rows(const NmView& v, const float* values, const float* x, const float* bias,
               Activation activation, float* y, int64_t tokens) {
  const int64_t grain = std::max<int64_t>(1, 30000 / std::max<int64_t>(1, v.slots()));
  torch::stable::parallel_for(0, v.rows, grain, [&](int64_t begin, int64_t end) {
    NmArgs a{};
    a.view = v, a.values = values, a.bias = bias, a.activation = activation;
    a.row_begin = begin, a.row_end = end;
    for (int64_t t = 0; t < tokens; ++t) kernels().nm_spmv(a, x + t * v.channels, y + t * v.rows);
  });
}

// The weight gradient comes in the order of the CSR twin.
void unsort(const std::vector<float>& sorted, const int32_t* order, float* out) {
  for (size_t i = 0; i < sorted.size(); ++i) out[order[i]] = sorted[i];
}

Tensor nm_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& index,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                     const std::optional<Tensor>&, int64_t n, int64_t m,
                     const std::string& activation) {
  const std::string op = "nm_linear";
  check_operand(op, "x", x, x);
  if (x.dim() < 1) fail(op, "x of shape (..., in_features)", "a scalar");
  const Activation act = parse_activation(op, activation);
  const int64_t cols = x.size(x.dim() - 1), tokens = tokens_of(x);
  const NmPattern p = check_nm_pattern(op, index, {index.size(0), cols, n, m, 1, 1});
  const NmView& v = p.view;
  check_nm_values(op, values, x, v);
  const std::optional<Tensor> b = check_bias(op, bias, x, v.rows, "out_features");
  const NmPlan holder = get_nm_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(with_last(x, v.rows), type);
  Sink sink{nullptr, true, v.rows, 0, 0};
  if (type == ScalarType::Double) {
    nm_spmm_reference(v, vc.const_data_ptr<double>(), double_or_null(b), act,
                      {xc.const_data_ptr<double>(), cols}, sink, y.mutable_data_ptr<double>(),
                      tokens);
    return y;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const float* w = vc.const_data_ptr<float>();
  sink.data = y.mutable_data_ptr<float>();
  if (tokens <= kSpmvTokens) spmv_rows(v, w, matrix.data, data_or_null(b), act, sink.data, tokens);
  else
    run_nm_spmm(v, holder.offset,
                {w, nullptr, data_or_null(b), act, {&matrix, nullptr}, sink, tokens, 1, 0});
  return to_dtype(y, x.scalar_type());
}

Tensor nm_linear_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& index,
                                const std::optional<Tensor>& plan_t, int64_t in_features, int64_t n,
                                int64_t m) {
  const std::string op = "nm_linear_grad_input";
  check_operand(op, "grad", grad, grad);
  const int64_t rows = grad.size(grad.dim() - 1), tokens = tokens_of(grad);
  const NmPattern p = check_nm_pattern(op, index, {rows, in_features, n, m, 1, 1});
  check_nm_values(op, values, grad, p.view);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor(with_last(grad, in_features), type);
  Sink sink{nullptr, true, in_features, 0, 0};
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    nm_grad_input_reference(p.view, vc.const_data_ptr<double>(),
                            {gc.const_data_ptr<double>(), rows}, sink,
                            out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  const MatrixSource matrix{gc.const_data_ptr<float>(), rows};
  sink.data = out.mutable_data_ptr<float>();
  run_spmm(twin.transposed.plan, {vc.const_data_ptr<float>(),
                                  twin.transposed.perm,
                                  nullptr,
                                  kNone,
                                  {&matrix, nullptr},
                                  sink,
                                  tokens,
                                  1,
                                  0});
  return to_dtype(out, grad.scalar_type());
}

Tensor nm_linear_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& index,
                                 const std::optional<Tensor>& plan_t, int64_t n, int64_t m) {
  const std::string op = "nm_linear_grad_values";
  check_operand(op, "x", x, x);
  check_operand(op, "grad", grad, x);
  const int64_t cols = x.size(x.dim() - 1), rows = grad.size(grad.dim() - 1), tokens = tokens_of(x);
  const NmPattern p = check_nm_pattern(op, index, {rows, cols, n, m, 1, 1});
  check_size(op, "tokens of grad = tokens of x", tokens_of(grad), tokens);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({rows, p.view.slots()}, type);
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    nm_grad_values_reference(p.view, {xc.const_data_ptr<double>(), cols},
                             {nullptr, true, rows, 0, 0}, gc.const_data_ptr<double>(),
                             out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const MatrixSource grad_matrix{gc.const_data_ptr<float>(), rows};
  // One tap: the slots are sorted already.
  run_sddmm(twin.plan, {nullptr, nullptr, nullptr, kNone, {&matrix, nullptr}, {}, tokens, 1, 0},
            {&grad_matrix, nullptr}, out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

NmShape nm_shape(const Conv& c, int64_t n, int64_t m) {
  return {c.out_channels, c.in_per_group(), n, m, c.groups, c.taps()};
}

Tensor nm_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& index,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                     const std::optional<Tensor>&, int64_t n, int64_t m,
                     const std::vector<int64_t> kernel, const std::vector<int64_t> stride,
                     const std::vector<int64_t> padding, const std::vector<int64_t> dilation,
                     int64_t groups, const std::string& activation) {
  const std::string op = "nm_conv2d";
  check_dim(op, "x", x, 4);
  check_operand(op, "x", x, x);
  const Activation act = parse_activation(op, activation);
  const Conv c = make_conv(op, x.size(0), x.size(1), x.size(2), x.size(3), index.size(0), kernel,
                           stride, padding, dilation, groups);
  const NmPattern p = check_nm_pattern(op, index, nm_shape(c, n, m));
  check_nm_values(op, values, x, p.view);
  const std::optional<Tensor> b = check_bias(op, bias, x, c.out_channels, "out_channels");
  const NmPlan holder = get_nm_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor({c.images, c.out_channels, c.out_h, c.out_w}, type);
  const int64_t pixels = c.out_h * c.out_w, tokens = c.images * pixels;
  Sink sink{nullptr, false, c.out_channels, 0, pixels};
  if (type == ScalarType::Double) {
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    nm_spmm_reference(p.view, vc.const_data_ptr<double>(), double_or_null(b), act, r.source, sink,
                      y.mutable_data_ptr<double>(), tokens);
    return y;
  }
  Planes planes;
  make_planes(xc.const_data_ptr<float>(), c.images, c.in_channels, c.forward_y(), c.forward_x(),
              kPlanes, &planes);
  sink.data = y.mutable_data_ptr<float>();
  run_nm_spmm(p.view, holder.offset,
              {vc.const_data_ptr<float>(),
               nullptr,
               data_or_null(b),
               act,
               {nullptr, &planes.source},
               sink,
               tokens,
               groups,
               c.in_per_group()});
  return to_dtype(y, x.scalar_type());
}

Tensor nm_conv2d_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& index,
                                const std::optional<Tensor>& plan_t, int64_t in_channels,
                                int64_t height, int64_t width, int64_t n, int64_t m,
                                const std::vector<int64_t> kernel,
                                const std::vector<int64_t> stride,
                                const std::vector<int64_t> padding,
                                const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "nm_conv2d_grad_input";
  check_dim(op, "grad", grad, 4);
  check_operand(op, "grad", grad, grad);
  const Conv c = make_conv(op, grad.size(0), in_channels, height, width, index.size(0), kernel,
                           stride, padding, dilation, groups);
  check_grad(op, grad, c);
  const NmPattern p = check_nm_pattern(op, index, nm_shape(c, n, m));
  check_nm_values(op, values, grad, p.view);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor({c.images, in_channels, height, width}, type);
  const int64_t pixels = height * width, tokens = c.images * pixels;
  Sink sink{nullptr, false, in_channels, 0, pixels};
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    const Reference r = make_reference(c, gc.const_data_ptr<double>(), true);
    nm_grad_input_reference(p.view, vc.const_data_ptr<double>(), r.source, sink,
                            out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  Planes planes;
  make_planes(gc.const_data_ptr<float>(), c.images, c.out_channels, c.backward_y(), c.backward_x(),
              kPlanes, &planes);
  sink.data = out.mutable_data_ptr<float>();
  run_spmm(twin.transposed.plan, {vc.const_data_ptr<float>(),
                                  twin.transposed.perm,
                                  nullptr,
                                  kNone,
                                  {nullptr, &planes.source},
                                  sink,
                                  tokens,
                                  groups,
                                  c.out_per_group()});
  return to_dtype(out, grad.scalar_type());
}

Tensor nm_conv2d_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& index,
                                 const std::optional<Tensor>& plan_t, int64_t n, int64_t m,
                                 const std::vector<int64_t> kernel,
                                 const std::vector<int64_t> stride,
                                 const std::vector<int64_t> padding,
                                 const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "nm_conv2d_grad_values";
  check_dim(op, "x", x, 4);
  check_operand(op, "x", x, x);
  check_operand(op, "grad", grad, x);
  const Conv c = make_conv(op, x.size(0), x.size(1), x.size(2), x.size(3), index.size(0), kernel,
                           stride, padding, dilation, groups);
  check_grad(op, grad, c);
  const NmPattern p = check_nm_pattern(op, index, nm_shape(c, n, m));
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({c.out_channels, p.view.slots()}, type);
  const int64_t pixels = c.out_h * c.out_w, tokens = c.images * pixels;
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    nm_grad_values_reference(p.view, r.source, {nullptr, false, c.out_channels, 0, pixels},
                             gc.const_data_ptr<double>(), out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  Planes planes, grad_planes;
  make_planes(xc.const_data_ptr<float>(), c.images, c.in_channels, c.forward_y(), c.forward_x(),
              kPlanes, &planes);
  const auto as_it_is = [](int64_t size) { return forward_axis(size, size, 1, 1, 0, 1); };
  make_planes(gc.const_data_ptr<float>(), c.images, c.out_channels, as_it_is(c.out_h),
              as_it_is(c.out_w), kGradPlanes, &grad_planes);
  std::vector<float> sorted(out.numel());
  run_sddmm(twin.plan,
            {nullptr,
             nullptr,
             nullptr,
             kNone,
             {nullptr, &planes.source},
             {},
             tokens,
             groups,
             c.in_per_group()},
            {nullptr, &grad_planes.source}, sorted.data());
  unsort(sorted, twin.order, out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

Tensor nm_plan_cpu(const Tensor& index, int64_t rows, int64_t channels, int64_t n, int64_t m,
                   int64_t groups, int64_t taps, bool transpose) {
  const std::string op = "nm_plan";
  const NmPattern p = check_nm_pattern(op, index, {rows, channels, n, m, groups, taps});
  const std::vector<int32_t> own =
      transpose ? get_nm_twin(op, p, std::nullopt).own : get_nm_plan(op, p, std::nullopt).own;
  const Tensor out = empty_tensor({static_cast<int64_t>(own.size())}, ScalarType::Int);
  std::copy(own.begin(), own.end(), out.mutable_data_ptr<int32_t>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("nm_linear", TORCH_BOX(&nm_linear_cpu));
  m.impl("nm_linear_grad_input", TORCH_BOX(&nm_linear_grad_input_cpu));
  m.impl("nm_linear_grad_values", TORCH_BOX(&nm_linear_grad_values_cpu));
  m.impl("nm_conv2d", TORCH_BOX(&nm_conv2d_cpu));
  m.impl("nm_conv2d_grad_input", TORCH_BOX(&nm_conv2d_grad_input_cpu));
  m.impl("nm_conv2d_grad_values", TORCH_BOX(&nm_conv2d_grad_values_cpu));
  m.impl("nm_plan", TORCH_BOX(&nm_plan_cpu));
}

}  // namespace sparsekern
