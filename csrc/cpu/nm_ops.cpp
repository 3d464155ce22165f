// CPU registrations of the N:M ops. The schemas, fakes and gradients are in sparsekern/ops/nm.py
// and nm_conv.py.
#include <torch/csrc/stable/library.h>

#include "conv.h"
#include "nm.h"

namespace sparsekern {
namespace {

// Up to this many tokens each runs alone.
constexpr int64_t kSpmvTokens = 2;

void run_nm_spmv(const NmView& v, const Operands& o) {
  const int64_t grain = std::max<int64_t>(1, 30000 / std::max<int64_t>(1, v.slots()));
  torch::stable::parallel_for(0, v.rows, grain, [&](int64_t begin, int64_t end) {
    NmArgs a{};
    a.view = v, a.values = o.values, a.bias = o.bias, a.activation = o.activation;
    a.row_begin = begin, a.row_end = end;
    for (int64_t t = 0; t < o.tokens; ++t)
      kernels().nm_spmv(a, o.source.matrix->data + t * v.channels, o.sink.data + t * v.rows);
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
  const int64_t cols = check_features(op, "x", "in_features", x, x), tokens = tokens_of(x);
  const Activation act = parse_activation(op, activation);
  const NmPattern p = check_nm_pattern(op, index, {index.size(0), cols, n, m, 1, 1});
  const NmView& v = p.view;
  check_nm_values(op, values, x, v);
  const std::optional<Tensor> b = check_bias(op, bias, x, v.rows, "out_features");
  const NmPlan holder = get_nm_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(with_last(x, v.rows), type);
  if (type == ScalarType::Double) {
    nm_spmm_reference(v, vc.const_data_ptr<double>(), double_or_null(b), act,
                      {xc.const_data_ptr<double>(), cols}, matrix_sink(nullptr, v.rows),
                      y.mutable_data_ptr<double>(), tokens);
    return y;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  Operands o = matrix_operands(&matrix, matrix_sink(y.mutable_data_ptr<float>(), v.rows), tokens);
  o.values = vc.const_data_ptr<float>(), o.bias = data_or_null(b), o.activation = act;
  if (tokens <= kSpmvTokens) run_nm_spmv(v, o);
  else run_nm_spmm(v, holder.offset, o);
  return to_dtype(y, x.scalar_type());
}

Tensor nm_linear_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& index,
                                const std::optional<Tensor>& plan_t, int64_t in_features, int64_t n,
                                int64_t m) {
  const std::string op = "nm_linear_grad_input";
  const int64_t rows = check_features(op, "grad", "out_features", grad, grad);
  const int64_t tokens = tokens_of(grad);
  const NmPattern p = check_nm_pattern(op, index, {rows, in_features, n, m, 1, 1});
  check_nm_values(op, values, grad, p.view);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor(with_last(grad, in_features), type);
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    nm_grad_input_reference(p.view, vc.const_data_ptr<double>(),
                            {gc.const_data_ptr<double>(), rows}, matrix_sink(nullptr, in_features),
                            out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  const MatrixSource matrix{gc.const_data_ptr<float>(), rows};
  const Sink sink = matrix_sink(out.mutable_data_ptr<float>(), in_features);
  Operands o = matrix_operands(&matrix, sink, tokens);
  o.values = vc.const_data_ptr<float>(), o.perm = twin.transposed.perm;
  run_spmm(twin.transposed.plan, o);
  return to_dtype(out, grad.scalar_type());
}

Tensor nm_linear_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& index,
                                 const std::optional<Tensor>& plan_t, int64_t n, int64_t m) {
  const std::string op = "nm_linear_grad_values";
  const int64_t cols = check_features(op, "x", "in_features", x, x), tokens = tokens_of(x);
  const int64_t rows = check_features(op, "grad", "out_features", grad, x);
  const NmPattern p = check_nm_pattern(op, index, {rows, cols, n, m, 1, 1});
  check_size(op, "tokens of grad = tokens of x", tokens_of(grad), tokens);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({rows, p.view.slots()}, type);
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    nm_grad_values_reference(p.view, {xc.const_data_ptr<double>(), cols},
                             matrix_sink(nullptr, rows), gc.const_data_ptr<double>(),
                             out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const MatrixSource grad_matrix{gc.const_data_ptr<float>(), rows};
  // One tap: the slots are sorted already.
  run_sddmm(twin.plan, matrix_operands(&matrix, {}, tokens), {&grad_matrix, nullptr},
            out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

NmPattern check_conv_pattern(const std::string& op, const Tensor& index, const Conv& c, int64_t n,
                             int64_t m) {
  return check_nm_pattern(op, index, {c.out_channels, c.in_per_group(), n, m, c.groups, c.taps()});
}

Tensor nm_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& index,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                     const std::optional<Tensor>&, int64_t n, int64_t m,
                     const std::vector<int64_t> kernel, const std::vector<int64_t> stride,
                     const std::vector<int64_t> padding, const std::vector<int64_t> dilation,
                     int64_t groups, const std::string& activation) {
  const std::string op = "nm_conv2d";
  const Conv c = conv_of_input(op, x, index.size(0), {kernel, stride, padding, dilation, groups});
  const Activation act = parse_activation(op, activation);
  const NmPattern p = check_conv_pattern(op, index, c, n, m);
  check_nm_values(op, values, x, p.view);
  const std::optional<Tensor> b = check_bias(op, bias, x, c.out_channels, "out_channels");
  const NmPlan holder = get_nm_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(c.out_shape(), type);
  if (type == ScalarType::Double) {
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    nm_spmm_reference(p.view, vc.const_data_ptr<double>(), double_or_null(b), act, r.source,
                      c.out_sink(nullptr), y.mutable_data_ptr<double>(), c.out_pixels());
    return y;
  }
  Planes planes;
  Operands o = forward_operands(c, xc, y.mutable_data_ptr<float>(), &planes);
  o.values = vc.const_data_ptr<float>(), o.bias = data_or_null(b), o.activation = act;
  run_nm_spmm(p.view, holder.offset, o);
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
  const Conv c = conv_of_grad(op, grad, {in_channels, height, width}, index.size(0),
                              {kernel, stride, padding, dilation, groups});
  const NmPattern p = check_conv_pattern(op, index, c, n, m);
  check_nm_values(op, values, grad, p.view);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor(c.in_shape(), type);
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    const Reference r = make_reference(c, gc.const_data_ptr<double>(), true);
    nm_grad_input_reference(p.view, vc.const_data_ptr<double>(), r.source, c.in_sink(nullptr),
                            out.mutable_data_ptr<double>(), c.in_pixels());
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  run_backward(c, twin.transposed.plan, {vc.const_data_ptr<float>(), twin.transposed.perm}, gc,
               out);
  return to_dtype(out, grad.scalar_type());
}

Tensor nm_conv2d_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& index,
                                 const std::optional<Tensor>& plan_t, int64_t n, int64_t m,
                                 const std::vector<int64_t> kernel,
                                 const std::vector<int64_t> stride,
                                 const std::vector<int64_t> padding,
                                 const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "nm_conv2d_grad_values";
  const Conv c = conv_of_input(op, x, index.size(0), {kernel, stride, padding, dilation, groups});
  check_grad(op, grad, x, c);
  const NmPattern p = check_conv_pattern(op, index, c, n, m);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({c.out_channels, p.view.slots()}, type);
  if (type == ScalarType::Double) {
    check_positions(op, p.view);
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    nm_grad_values_reference(p.view, r.source, c.out_sink(nullptr), gc.const_data_ptr<double>(),
                             out.mutable_data_ptr<double>(), c.out_pixels());
    return out;
  }
  const NmTwin twin = get_nm_twin(op, p, plan_t);
  Planes planes, grad_planes;
  std::vector<float> sorted(out.numel());
  run_sddmm(twin.plan, forward_operands(c, xc, nullptr, &planes), grad_source(c, gc, &grad_planes),
            sorted.data());
  unsort(sorted, twin.order, out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

Tensor nm_plan_cpu(const Tensor& index, int64_t rows, int64_t channels, int64_t n, int64_t m,
                   int64_t groups, int64_t taps, bool transpose) {
  const std::string op = "nm_plan";
  const NmPattern p = check_nm_pattern(op, index, {rows, channels, n, m, groups, taps});
  return sealed_plan(
      transpose ? get_nm_twin(op, p, std::nullopt).own : get_nm_plan(op, p, std::nullopt).own,
      {p.index});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  SPARSEKERN_IMPL(m, "nm_linear", nm_linear_cpu);
  SPARSEKERN_IMPL(m, "nm_linear_grad_input", nm_linear_grad_input_cpu);
  SPARSEKERN_IMPL(m, "nm_linear_grad_values", nm_linear_grad_values_cpu);
  SPARSEKERN_IMPL(m, "nm_conv2d", nm_conv2d_cpu);
  SPARSEKERN_IMPL(m, "nm_conv2d_grad_input", nm_conv2d_grad_input_cpu);
  SPARSEKERN_IMPL(m, "nm_conv2d_grad_values", nm_conv2d_grad_values_cpu);
  SPARSEKERN_IMPL(m, "nm_plan", nm_plan_cpu);
}

}  // namespace sparsekern
