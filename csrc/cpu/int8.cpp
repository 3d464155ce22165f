// CPU registrations of the linear ops with int8 values and a scale per output. Products and sums
// are float32: csr spreads the values in front of the product, where many tokens pack them anyhow;
// blocks are spread once for all tokens of a panel, and the sums scaled. The schemas and the fakes
// are in sparsekern/ops/csr_int8.py and block_int8.py.
#include "int8.h"

#include <torch/csrc/stable/library.h>

#include "block.h"

namespace sparsekern {
namespace {

void check_float(const std::string& op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, {ScalarType::Float, ScalarType::BFloat16});
}

}  // namespace

int64_t check_int8(const std::string& op, const Tensor& x, const Tensor& values) {
  check_float(op, "x", x);
  check_cpu(op, "values", values);
  check_dtype(op, "values", values, {ScalarType::Char});
  return check_features(op, "x", "in_features", x, x);
}

void prepare_int8(const std::string& op, const Tensor& x, const Tensor& values,
                  const Tensor& scales, const std::optional<Tensor>& bias, int64_t rows,
                  Activation activation, Int8Linear* l) {
  check_cpu(op, "scales", scales);
  check_dtype(op, "scales", scales, {ScalarType::Float});
  check_dim(op, "scales", scales, 1);
  check_size(op, "scales.size(0) = out_features", scales.size(0), rows);
  if (bias) {
    check_float(op, "bias", *bias);
    check_dim(op, "bias", *bias, 1);
    check_size(op, "bias.size(0) = out_features", bias->size(0), rows);
    l->bias = as_contiguous(*bias, ScalarType::Float);
  }
  l->x = as_contiguous(x, ScalarType::Float);
  l->values = as_contiguous(values, ScalarType::Char);
  l->scales = as_contiguous(scales, ScalarType::Float);
  l->y = empty_tensor(with_last(x, rows), ScalarType::Float);
  l->matrix = {l->x.const_data_ptr<float>(), x.size(x.dim() - 1)};
  const Sink sink = matrix_sink(l->y.mutable_data_ptr<float>(), rows);
  l->operands = matrix_operands(&l->matrix, sink, tokens_of(x));
  l->operands.quantized = l->values.const_data_ptr<int8_t>();
  l->operands.scales = l->scales.const_data_ptr<float>();
  l->operands.bias = data_or_null(l->bias), l->operands.activation = activation;
}

namespace {

// As run_few for int8 values: all of them as float32, in the order of the CSR matrix.
void run_few_int8(const PlanView& plan, const int32_t* crow, Operands o) {
  if (o.tokens == 0 || plan.rows == 0) return;
  float* spread = thread_scratch(kPacked, plan.nnz);
  const int64_t grain = std::max<int64_t>(1, 65536 * plan.rows / std::max<int64_t>(1, plan.nnz));
  torch::stable::parallel_for(0, plan.rows, grain, [&](int64_t begin, int64_t end) {
    kernels().spread_int8(crow + begin, o.quantized, o.scales + begin, spread, end - begin);
  });
  o.values = spread;
  run_few(plan, crow, o);
}

Tensor csr_linear_int8_cpu(const Tensor& x, const Tensor& values, const Tensor& scales,
                           const Tensor& crow, const Tensor& col, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& plan, const std::string& activation) {
  const std::string op = "csr_linear_int8";
  const int64_t cols = check_int8(op, x, values);
  check_dim(op, "values", values, 1);
  const Activation act = parse_activation(op, activation);
  const Pattern p = check_pattern(op, crow, col, values.size(0), cols);
  Int8Linear l;
  prepare_int8(op, x, values, scales, bias, p.rows, act, &l);
  const PlanHolder holder = get_plan(op, p, plan);
  if (few_tokens(holder.view, l.operands.tokens))
    run_few_int8(holder.view, p.crow_data(), l.operands);
  else run_spmm_int8(holder.view, l.operands);
  return to_dtype(l.y, x.scalar_type());
}

Tensor block_linear_int8_cpu(const Tensor& x, const Tensor& values, const Tensor& scales,
                             const Tensor& crow, const Tensor& col,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& plan,
                             int64_t out_features, const std::string& activation) {
  const std::string op = "block_linear_int8";
  const int64_t cols = check_int8(op, x, values);
  check_block_sizes(op, values, col);
  const Activation act = parse_activation(op, activation);
  const BlockPattern p = check_block_pattern(
      op, crow, col, {out_features, cols, values.size(1), values.size(2), 1, 1});
  Int8Linear l;
  prepare_int8(op, x, values, scales, bias, out_features, act, &l);
  check_block_plan(op, p, plan);
  run_block_linear(p.view, l.operands);
  return to_dtype(l.y, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  SPARSEKERN_IMPL(m, "csr_linear_int8", csr_linear_int8_cpu);
  SPARSEKERN_IMPL(m, "block_linear_int8", block_linear_int8_cpu);
}

}  // namespace sparsekern
