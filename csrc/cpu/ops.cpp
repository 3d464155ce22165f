// CPU registrations of the linear ops: check, allocate, hand over to the driver.
// The schemas, fakes and gradients are in sparsekern/ops/csr.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "driver.h"
#include "reference.h"

namespace sparsekern {
namespace {

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape.push_back(t.size(i));
  shape.push_back(last);
  return shape;
}

int64_t tokens_of(const Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) n *= x.size(i);
  return n;
}

// The words of two bfloat16 of each token; copied with a zero at the end where the columns are odd.
const float* paired_tokens(const Tensor& x, int64_t tokens, int64_t cols) {
  const uint16_t* data = static_cast<const uint16_t*>(x.const_data_ptr());
  if (cols % 2 == 0) return reinterpret_cast<const float*>(data);
  float* out = thread_scratch(kPlanes, tokens * (cols + 1) / 2);
  uint16_t* words = reinterpret_cast<uint16_t*>(out);
  for (int64_t t = 0; t < tokens; ++t, words += cols + 1) {
    std::copy_n(data + t * cols, cols, words);
    words[cols] = 0;
  }
  return out;
}

// bfloat16 as it is: the products of pairs of columns are summed in float32 and rounded once.
Tensor linear_pairs(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                    const PairView& pairs, Activation activation) {
  const Tensor xc = as_contiguous(x, ScalarType::BFloat16);
  const Tensor vc = as_contiguous(values, ScalarType::BFloat16);
  const int64_t cols = x.size(x.dim() - 1), tokens = tokens_of(x);
  const Tensor y = empty_tensor(with_last(x, pairs.plan.rows), ScalarType::BFloat16);
  Tensor bc;
  if (bias) bc = as_contiguous(*bias, ScalarType::Float);
  const MatrixSource matrix{paired_tokens(xc, tokens, cols), (cols + 1) / 2};
  const Sink sink{static_cast<float*>(y.mutable_data_ptr()), true, pairs.plan.rows, 0, 0, false};
  run_spmm_pairs(pairs, static_cast<const uint16_t*>(vc.const_data_ptr()),
                 {nullptr,
                  nullptr,
                  bias ? bc.const_data_ptr<float>() : nullptr,
                  activation,
                  {&matrix, nullptr},
                  sink,
                  tokens,
                  1,
                  0});
  return y;
}

Tensor csr_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                      const std::optional<Tensor>&, const std::string& activation) {
  const std::string op = "csr_linear";
  check_operand(op, "x", x, x);
  if (x.dim() < 1) fail(op, "x of shape (..., in_features)", "a scalar");
  check_operand(op, "values", values, x);
  check_dim(op, "values", values, 1);
  const Activation act = parse_activation(op, activation);
  const int64_t cols = x.size(x.dim() - 1), tokens = tokens_of(x);
  const Pattern p = check_pattern(op, crow, col, values.size(0), cols);
  if (bias) {
    check_operand(op, "bias", *bias, x);
    check_dim(op, "bias", *bias, 1);
    check_size(op, "bias.size(0) = out_features", bias->size(0), p.rows);
  }
  const PlanHolder holder = get_plan(op, p, plan);
  if (holder.pairs && kernels().pairs && x.scalar_type() == ScalarType::BFloat16 && tokens > 2)
    return linear_pairs(x, values, bias, *holder.pairs, act);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const std::optional<Tensor> bc =
      bias ? std::optional<Tensor>(as_contiguous(*bias, type)) : std::nullopt;
  const Tensor y = empty_tensor(with_last(x, p.rows), type);
  MatrixSource matrix{nullptr, cols};
  Sink sink{nullptr, true, p.rows, 0, 0};
  if (type == ScalarType::Double) {
    spmm_reference(p.crow_data(), p.col_data(), vc.const_data_ptr<double>(),
                   bc ? bc->const_data_ptr<double>() : nullptr, act,
                   {xc.const_data_ptr<double>(), cols}, sink, y.mutable_data_ptr<double>(), 0,
                   p.rows, tokens);
    return y;
  }
  matrix.data = xc.const_data_ptr<float>();
  sink.data = y.mutable_data_ptr<float>();
  const float* b = bc ? bc->const_data_ptr<float>() : nullptr;
  const Operands operands{
      vc.const_data_ptr<float>(), nullptr, b, act, {&matrix, nullptr}, sink, tokens, 1, 0};
  if (few_tokens(holder.view, tokens)) run_few(holder.view, p.crow_data(), operands);
  else run_spmm(holder.view, operands);
  return to_dtype(y, x.scalar_type());
}

Tensor csr_linear_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& crow,
                                 const Tensor& col, const std::optional<Tensor>& plan_t,
                                 int64_t in_features) {
  const std::string op = "csr_linear_grad_input";
  check_operand(op, "grad", grad, grad);
  check_operand(op, "values", values, grad);
  const Pattern p = check_pattern(op, crow, col, values.size(0), in_features);
  check_size(op, "grad.size(-1) = out_features", grad.size(grad.dim() - 1), p.rows);
  const TransposedHolder holder = get_transposed(op, p, plan_t);
  const Transposed& t = holder.view;
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor(with_last(grad, in_features), type);
  MatrixSource matrix{nullptr, p.rows};
  Sink sink{nullptr, true, in_features, 0, 0};
  const int64_t tokens = tokens_of(grad);
  if (type == ScalarType::Double) {
    const double* v = vc.const_data_ptr<double>();
    std::vector<double> w(p.nnz);
    for (int64_t i = 0; i < p.nnz; ++i) w[i] = v[t.perm[i]];
    spmm_reference(t.crow, t.col, w.data(), nullptr, kNone, {gc.const_data_ptr<double>(), p.rows},
                   sink, out.mutable_data_ptr<double>(), 0, in_features, tokens);
    return out;
  }
  matrix.data = gc.const_data_ptr<float>();
  sink.data = out.mutable_data_ptr<float>();
  run_spmm(
      t.plan,
      {vc.const_data_ptr<float>(), t.perm, nullptr, kNone, {&matrix, nullptr}, sink, tokens, 1, 0});
  return to_dtype(out, grad.scalar_type());
}

Tensor csr_linear_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& crow,
                                  const Tensor& col, const std::optional<Tensor>& plan_t) {
  const std::string op = "csr_linear_grad_values";
  check_operand(op, "x", x, x);
  check_operand(op, "grad", grad, x);
  const int64_t cols = x.size(x.dim() - 1), tokens = tokens_of(x);
  const Pattern p = check_pattern(op, crow, col, col.numel(), cols);
  check_size(op, "grad.size(-1) = out_features", grad.size(grad.dim() - 1), p.rows);
  check_size(op, "tokens of grad = tokens of x", tokens_of(grad), tokens);
  const PlanHolder holder = get_values_plan(op, p, plan_t);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.nnz}, type);
  MatrixSource matrix{nullptr, cols}, grad_matrix{nullptr, p.rows};
  const Sink layout{nullptr, true, p.rows, 0, 0};
  if (type == ScalarType::Double) {
    sddmm_reference(p.crow_data(), p.col_data(), {xc.const_data_ptr<double>(), cols}, layout,
                    gc.const_data_ptr<double>(), out.mutable_data_ptr<double>(), 0, p.rows, tokens);
    return out;
  }
  matrix.data = xc.const_data_ptr<float>();
  grad_matrix.data = gc.const_data_ptr<float>();
  run_sddmm(holder.view, {nullptr, nullptr, nullptr, kNone, {&matrix, nullptr}, {}, tokens, 1, 0},
            {&grad_matrix, nullptr}, out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

Tensor csr_plan_cpu(const Tensor& crow, const Tensor& col, int64_t cols, int64_t groups,
                    int64_t taps, bool transpose, bool pairs) {
  const std::string op = "csr_plan";
  if (cols < 0) fail(op, "cols >= 0", std::to_string(cols));
  if (groups < 1 || taps < 1)
    fail(op, "groups and taps >= 1", std::to_string(std::min(groups, taps)));
  const Pattern p = check_pattern(op, crow, col, col.numel(), cols, groups, taps);
  if (p.rows % groups)
    fail(op, "rows divisible by groups = " + std::to_string(groups), std::to_string(p.rows));
  if (cols % taps)
    fail(op, "cols divisible by taps = " + std::to_string(taps), std::to_string(cols));
  if (pairs && (transpose || groups > 1 || taps > 1))
    fail(op, "pairs only for the forward plan of a linear layer",
         "transpose, groups or taps besides");
  std::vector<int32_t> own = pairs       ? make_pairs_plan(op, p)
                             : transpose ? get_transposed(op, p, std::nullopt).own
                                         : get_plan(op, p, std::nullopt).own;
  const Tensor out = empty_tensor({static_cast<int64_t>(own.size())}, ScalarType::Int);
  std::copy(own.begin(), own.end(), out.mutable_data_ptr<int32_t>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("csr_linear", TORCH_BOX(&csr_linear_cpu));
  m.impl("csr_linear_grad_input", TORCH_BOX(&csr_linear_grad_input_cpu));
  m.impl("csr_linear_grad_values", TORCH_BOX(&csr_linear_grad_values_cpu));
  m.impl("csr_plan", TORCH_BOX(&csr_plan_cpu));
}

}  // namespace sparsekern
