// CPU registration of the linear op with int8 values: they are spread to float32 in front of the
// product, where many tokens pack them anyhow, so it runs as that of float32 values and what is
// kept takes a byte for each. The schema and the fake are in sparsekern/ops/csr_int8.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "driver.h"

namespace sparsekern {
namespace {

struct Int8Rows {
  const int8_t* values;
  const float* scales;
};

void check_float(const std::string& op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, {ScalarType::Float, ScalarType::BFloat16});
}

// As run_few for int8 values: all of them as float32, in the order of the CSR matrix.
void run_few_int8(const PlanView& plan, const int32_t* crow, const Int8Rows& w, Operands o) {
  if (o.tokens == 0 || plan.rows == 0) return;
  float* spread = thread_scratch(kPacked, plan.nnz);
  const int64_t grain = std::max<int64_t>(1, 65536 * plan.rows / std::max<int64_t>(1, plan.nnz));
  torch::stable::parallel_for(0, plan.rows, grain, [&](int64_t begin, int64_t end) {
    kernels().spread_int8(crow + begin, w.values, w.scales + begin, spread, end - begin);
  });
  o.values = spread;
  run_few(plan, crow, o);
}

Tensor csr_linear_int8_cpu(const Tensor& x, const Tensor& values, const Tensor& scales,
                           const Tensor& crow, const Tensor& col, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& plan, const std::string& activation) {
  const std::string op = "csr_linear_int8";
  check_float(op, "x", x);
  if (x.dim() < 1) fail(op, "x of shape (..., in_features)", "a scalar");
  check_cpu(op, "values", values);
  check_dtype(op, "values", values, {ScalarType::Char});
  check_dim(op, "values", values, 1);
  const Activation act = parse_activation(op, activation);
  const int64_t cols = x.size(x.dim() - 1), tokens = tokens_of(x);
  const Pattern p = check_pattern(op, crow, col, values.size(0), cols);
  check_cpu(op, "scales", scales);
  check_dtype(op, "scales", scales, {ScalarType::Float});
  check_dim(op, "scales", scales, 1);
  check_size(op, "scales.size(0) = out_features", scales.size(0), p.rows);
  std::optional<Tensor> bc;  // in float32 or in the dtype of x, whatever x is
  if (bias) {
    check_float(op, "bias", *bias);
    check_dim(op, "bias", *bias, 1);
    check_size(op, "bias.size(0) = out_features", bias->size(0), p.rows);
    bc = as_contiguous(*bias, ScalarType::Float);
  }
  const PlanHolder holder = get_plan(op, p, plan);
  const Tensor xc = as_contiguous(x, ScalarType::Float);
  const Tensor vc = as_contiguous(values, ScalarType::Char);
  const Tensor sc = as_contiguous(scales, ScalarType::Float);
  const Tensor y = empty_tensor(with_last(x, p.rows), ScalarType::Float);
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const Sink sink{y.mutable_data_ptr<float>(), true, p.rows, 0, 0, false};
  const Operands o{nullptr, nullptr, data_or_null(bc), act, {&matrix, nullptr}, sink, tokens, 1, 0};
  const Int8Rows w{vc.const_data_ptr<int8_t>(), sc.const_data_ptr<float>()};
  if (few_tokens(holder.view, tokens)) run_few_int8(holder.view, p.crow_data(), w, o);
  else run_spmm_int8(holder.view, w.values, w.scales, o);
  return to_dtype(y, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("csr_linear_int8", TORCH_BOX(&csr_linear_int8_cpu));
}

}  // namespace sparsekern
