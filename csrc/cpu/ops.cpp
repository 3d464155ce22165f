// CPU registrations of the linear ops: check, allocate, hand over to the driver.
// The schemas, fakes and gradients are in sparsekern/ops/csr.py.
#include <torch/csrc/stable/library.h>

#include "driver.h"
#include "reference.h"

namespace sparsekern {
namespace {

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
  const MatrixSource matrix{paired_tokens(xc, tokens, cols), (cols + 1) / 2};
  const Sink sink = matrix_sink(static_cast<float*>(y.mutable_data_ptr()), pairs.plan.rows);
  Operands o = matrix_operands(&matrix, sink, tokens);
  o.bias = data_or_null(bias), o.activation = activation;
  run_spmm_pairs(pairs, static_cast<const uint16_t*>(vc.const_data_ptr()), o);
  return y;
}

// float64 by plain loops.
void linear_double(const int32_t* crow, const int32_t* col, const double* values,
                   const double* bias, Activation activation, const Tensor& x, const Tensor& y) {
  const int64_t rows = y.size(y.dim() - 1);
  spmm_reference(crow, col, values, bias, activation,
                 {x.const_data_ptr<double>(), x.size(x.dim() - 1)}, matrix_sink(nullptr, rows),
                 y.mutable_data_ptr<double>(), 0, rows, tokens_of(x));
}

Tensor csr_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                      const std::optional<Tensor>&, const std::string& activation) {
  const std::string op = "csr_linear";
  const int64_t cols = check_features(op, "x", "in_features", x, x), tokens = tokens_of(x);
  check_csr_values(op, values, x);
  const Activation act = parse_activation(op, activation);
  const Pattern p = check_pattern(op, crow, col, values.size(0), cols);
  const std::optional<Tensor> b = check_bias(op, bias, x, p.rows, "out_features");
  const PlanHolder holder = get_plan(op, p, plan);
  if (holder.pairs && kernels().pairs && x.scalar_type() == ScalarType::BFloat16 && tokens > 2)
    return linear_pairs(x, values, b, *holder.pairs, act);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(with_last(x, p.rows), type);
  if (type == ScalarType::Double) {
    linear_double(p.crow_data(), p.col_data(), vc.const_data_ptr<double>(), double_or_null(b), act,
                  xc, y);
    return y;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  Operands o = matrix_operands(&matrix, matrix_sink(y.mutable_data_ptr<float>(), p.rows), tokens);
  o.values = vc.const_data_ptr<float>(), o.bias = data_or_null(b), o.activation = act;
  if (few_tokens(holder.view, tokens)) run_few(holder.view, p.crow_data(), o);
  else run_spmm(holder.view, o);
  return to_dtype(y, x.scalar_type());
}

Tensor csr_linear_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& crow,
                                 const Tensor& col, const std::optional<Tensor>& plan_t,
                                 int64_t in_features) {
  const std::string op = "csr_linear_grad_input";
  const int64_t rows = check_features(op, "grad", "out_features", grad, grad);
  check_csr_values(op, values, grad);
  const Pattern p = check_pattern(op, crow, col, values.size(0), in_features);
  check_size(op, "grad.size(-1) = out_features", rows, p.rows);
  const TransposedHolder holder = get_transposed(op, p, plan_t);
  const Transposed& t = holder.view;
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor(with_last(grad, in_features), type);
  if (type == ScalarType::Double) {
    const std::vector<double> w = permuted(vc.const_data_ptr<double>(), t.perm, p.nnz);
    linear_double(t.crow, t.col, w.data(), nullptr, kNone, gc, out);
    return out;
  }
  const MatrixSource matrix{gc.const_data_ptr<float>(), p.rows};
  const Sink sink = matrix_sink(out.mutable_data_ptr<float>(), in_features);
  Operands o = matrix_operands(&matrix, sink, tokens_of(grad));
  o.values = vc.const_data_ptr<float>(), o.perm = t.perm;
  run_spmm(t.plan, o);
  return to_dtype(out, grad.scalar_type());
}

Tensor csr_linear_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& crow,
                                  const Tensor& col, const std::optional<Tensor>& plan_t) {
  const std::string op = "csr_linear_grad_values";
  const int64_t cols = check_features(op, "x", "in_features", x, x), tokens = tokens_of(x);
  const int64_t rows = check_features(op, "grad", "out_features", grad, x);
  const Pattern p = check_pattern(op, crow, col, col.numel(), cols);
  check_size(op, "grad.size(-1) = out_features", rows, p.rows);
  check_size(op, "tokens of grad = tokens of x", tokens_of(grad), tokens);
  const PlanHolder holder = get_values_plan(op, p, plan_t);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.nnz}, type);
  if (type == ScalarType::Double) {
    sddmm_reference(p.crow_data(), p.col_data(), {xc.const_data_ptr<double>(), cols},
                    matrix_sink(nullptr, p.rows), gc.const_data_ptr<double>(),
                    out.mutable_data_ptr<double>(), 0, p.rows, tokens);
    return out;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const MatrixSource grad_matrix{gc.const_data_ptr<float>(), p.rows};
  run_sddmm(holder.view, matrix_operands(&matrix, {}, tokens), {&grad_matrix, nullptr},
            out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

Tensor csr_plan_cpu(const Tensor& crow, const Tensor& col, int64_t cols, int64_t groups,
                    int64_t taps, bool transpose, bool pairs) {
  const std::string op = "csr_plan";
  if (cols < 0) fail(op, "cols >= 0", std::to_string(cols));
  if (groups < 1 || taps < 1)
    fail(op, "groups and taps >= 1", std::to_string(std::min(groups, taps)));
  const Pattern p = check_pattern(op, crow, col, col.numel(), cols, groups, taps);
  if (p.rows % groups || groups > std::max<int64_t>(1, p.rows))
    fail(op, "rows divisible by groups = " + std::to_string(groups), std::to_string(p.rows));
  if (cols % taps)
    fail(op, "cols divisible by taps = " + std::to_string(taps), std::to_string(cols));
  if (pairs && (transpose || groups > 1 || taps > 1))
    fail(op, "pairs only for the forward plan of a linear layer",
         "transpose, groups or taps besides");
  const auto words = [&] {
    if (pairs) return make_pairs_plan(op, p);
    return transpose ? get_transposed(op, p, std::nullopt).own : get_plan(op, p, std::nullopt).own;
  };
  return sealed_plan(words(), {p.crow, p.col});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  SPARSEKERN_IMPL(m, "csr_linear", csr_linear_cpu);
  SPARSEKERN_IMPL(m, "csr_linear_grad_input", csr_linear_grad_input_cpu);
  SPARSEKERN_IMPL(m, "csr_linear_grad_values", csr_linear_grad_values_cpu);
  SPARSEKERN_IMPL(m, "csr_plan", csr_plan_cpu);
}

}  // namespace sparsekern
