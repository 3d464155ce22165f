// CPU registrations of the block ops. The schemas, fakes and gradients are in
// sparsekern/ops/block.py and block_conv.py.
#include <torch/csrc/stable/library.h>

#include "block.h"
#include "conv.h"

namespace sparsekern {
namespace {

// Blocks as the transposed pattern wants them.
template <class T>
void turn_blocks(const Tensor& values, const BlockTransposed& t, const Tensor& out) {
  const T* from = values.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t r = t.view.block_cols, c = t.view.block_rows;  // of the original
  torch::stable::parallel_for(0, t.view.n_blocks, 65536 / (r * c) + 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i)
                                  for (int64_t k = 0; k < c; ++k)
                                    for (int64_t j = 0; j < r; ++j)
                                      to[(i * c + k) * r + j] = from[(t.perm[i] * r + j) * c + k];
                              });
}

Tensor turned_values(const Tensor& values, const BlockTransposed& t, ScalarType type) {
  const Tensor vc = as_contiguous(values, type), out = empty_tensor({values.numel()}, type);
  if (type == ScalarType::Double) turn_blocks<double>(vc, t, out);
  else turn_blocks<float>(vc, t, out);
  return out;
}

Tensor block_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& crow,
                        const Tensor& col, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& plan, const std::optional<Tensor>&,
                        int64_t out_features, const std::string& activation) {
  const std::string op = "block_linear";
  const int64_t cols = check_features(op, "x", "in_features", x, x), tokens = tokens_of(x);
  check_block_values(op, values, x, col);
  const Activation act = parse_activation(op, activation);
  const BlockPattern p = check_block_pattern(
      op, crow, col, {out_features, cols, values.size(1), values.size(2), 1, 1});
  const std::optional<Tensor> b = check_bias(op, bias, x, out_features, "out_features");
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(with_last(x, out_features), type);
  if (type == ScalarType::Double) {
    block_spmm_reference(p.view, vc.const_data_ptr<double>(), double_or_null(b), act,
                         {xc.const_data_ptr<double>(), cols}, matrix_sink(nullptr, out_features),
                         y.mutable_data_ptr<double>(), tokens);
    return y;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const Sink sink = matrix_sink(y.mutable_data_ptr<float>(), out_features);
  Operands o = matrix_operands(&matrix, sink, tokens);
  o.values = vc.const_data_ptr<float>(), o.bias = data_or_null(b), o.activation = act;
  run_block_linear(p.view, o);
  return to_dtype(y, x.scalar_type());
}

Tensor block_linear_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& crow,
                                   const Tensor& col, const std::optional<Tensor>& plan_t,
                                   int64_t in_features) {
  const std::string op = "block_linear_grad_input";
  const int64_t rows = check_features(op, "grad", "out_features", grad, grad);
  check_block_values(op, values, grad, col);
  const int64_t tokens = tokens_of(grad);
  const BlockPattern p =
      check_block_pattern(op, crow, col, {rows, in_features, values.size(1), values.size(2), 1, 1});
  const BlockTransposed t = get_block_transposed(op, p, plan_t);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vt = turned_values(values, t, type);
  const Tensor out = empty_tensor(with_last(grad, in_features), type);
  if (type == ScalarType::Double) {
    block_spmm_reference(t.view, vt.const_data_ptr<double>(), nullptr, kNone,
                         {gc.const_data_ptr<double>(), rows}, matrix_sink(nullptr, in_features),
                         out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const MatrixSource matrix{gc.const_data_ptr<float>(), rows};
  const Sink sink = matrix_sink(out.mutable_data_ptr<float>(), in_features);
  Operands o = matrix_operands(&matrix, sink, tokens);
  o.values = vt.const_data_ptr<float>();
  run_block_spmm(t.view, o);
  return to_dtype(out, grad.scalar_type());
}

Tensor block_linear_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& crow,
                                    const Tensor& col, const std::optional<Tensor>& plan,
                                    int64_t block_rows, int64_t block_cols) {
  const std::string op = "block_linear_grad_values";
  const int64_t cols = check_features(op, "x", "in_features", x, x), tokens = tokens_of(x);
  const int64_t rows = check_features(op, "grad", "out_features", grad, x);
  const BlockPattern p =
      check_block_pattern(op, crow, col, {rows, cols, block_rows, block_cols, 1, 1});
  check_size(op, "tokens of grad = tokens of x", tokens_of(grad), tokens);
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.view.n_blocks, block_rows, block_cols}, type);
  if (type == ScalarType::Double) {
    block_sddmm_reference(p.view, {xc.const_data_ptr<double>(), cols}, matrix_sink(nullptr, rows),
                          gc.const_data_ptr<double>(), out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const MatrixSource grad_matrix{gc.const_data_ptr<float>(), rows};
  run_block_sddmm(p.view, matrix_operands(&matrix, {}, tokens), {&grad_matrix, nullptr},
                  out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

BlockPattern check_conv_pattern(const std::string& op, const Tensor& crow, const Tensor& col,
                                const Conv& c, int64_t block_rows, int64_t block_cols) {
  return check_block_pattern(
      op, crow, col,
      {c.out_channels, c.in_per_group(), block_rows, block_cols, c.groups, c.taps()});
}

Tensor block_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& crow,
                        const Tensor& col, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& plan, const std::optional<Tensor>&,
                        int64_t out_channels, const std::vector<int64_t> kernel,
                        const std::vector<int64_t> stride, const std::vector<int64_t> padding,
                        const std::vector<int64_t> dilation, int64_t groups,
                        const std::string& activation) {
  const std::string op = "block_conv2d";
  const Conv c = conv_of_input(op, x, out_channels, {kernel, stride, padding, dilation, groups});
  check_block_values(op, values, x, col);
  const Activation act = parse_activation(op, activation);
  const BlockPattern p = check_conv_pattern(op, crow, col, c, values.size(1), values.size(2));
  const std::optional<Tensor> b = check_bias(op, bias, x, out_channels, "out_channels");
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(c.out_shape(), type);
  if (type == ScalarType::Double) {
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    block_spmm_reference(p.view, vc.const_data_ptr<double>(), double_or_null(b), act, r.source,
                         c.out_sink(nullptr), y.mutable_data_ptr<double>(), c.out_pixels());
    return y;
  }
  Planes planes;
  Operands o = forward_operands(c, xc, y.mutable_data_ptr<float>(), &planes);
  o.values = vc.const_data_ptr<float>(), o.bias = data_or_null(b), o.activation = act;
  run_block_spmm(p.view, o);
  return to_dtype(y, x.scalar_type());
}

Tensor block_conv2d_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& crow,
                                   const Tensor& col, const std::optional<Tensor>& plan_t,
                                   int64_t in_channels, int64_t height, int64_t width,
                                   const std::vector<int64_t> kernel,
                                   const std::vector<int64_t> stride,
                                   const std::vector<int64_t> padding,
                                   const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "block_conv2d_grad_input";
  check_dim(op, "grad", grad, 4);
  const Conv c = conv_of_grad(op, grad, {in_channels, height, width}, grad.size(1),
                              {kernel, stride, padding, dilation, groups});
  check_block_values(op, values, grad, col);
  const BlockPattern p = check_conv_pattern(op, crow, col, c, values.size(1), values.size(2));
  const BlockTransposed t = get_block_transposed(op, p, plan_t);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vt = turned_values(values, t, type);
  const Tensor out = empty_tensor(c.in_shape(), type);
  if (type == ScalarType::Double) {
    const Reference r = make_reference(c, gc.const_data_ptr<double>(), true);
    block_spmm_reference(t.view, vt.const_data_ptr<double>(), nullptr, kNone, r.source,
                         c.in_sink(nullptr), out.mutable_data_ptr<double>(), c.in_pixels());
    return out;
  }
  Planes planes;
  Operands o = backward_operands(c, gc, out.mutable_data_ptr<float>(), &planes);
  o.values = vt.const_data_ptr<float>();
  run_block_spmm(t.view, o);
  return to_dtype(out, grad.scalar_type());
}

Tensor block_conv2d_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& crow,
                                    const Tensor& col, const std::optional<Tensor>& plan,
                                    int64_t block_rows, int64_t block_cols,
                                    const std::vector<int64_t> kernel,
                                    const std::vector<int64_t> stride,
                                    const std::vector<int64_t> padding,
                                    const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "block_conv2d_grad_values";
  check_dim(op, "grad", grad, 4);
  const Conv c = conv_of_input(op, x, grad.size(1), {kernel, stride, padding, dilation, groups});
  check_grad(op, grad, x, c);
  const BlockPattern p = check_conv_pattern(op, crow, col, c, block_rows, block_cols);
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.view.n_blocks, block_rows, block_cols}, type);
  if (type == ScalarType::Double) {
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    block_sddmm_reference(p.view, r.source, c.out_sink(nullptr), gc.const_data_ptr<double>(),
                          out.mutable_data_ptr<double>(), c.out_pixels());
    return out;
  }
  Planes planes, grad_planes;
  run_block_sddmm(p.view, forward_operands(c, xc, nullptr, &planes),
                  grad_source(c, gc, &grad_planes), out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

Tensor block_plan_cpu(const Tensor& crow, const Tensor& col, int64_t rows, int64_t channels,
                      int64_t block_rows, int64_t block_cols, int64_t groups, int64_t taps,
                      bool transpose) {
  const std::string op = "block_plan";
  const BlockPattern p =
      check_block_pattern(op, crow, col, {rows, channels, block_rows, block_cols, groups, taps});
  return sealed_plan(
      transpose ? get_block_transposed(op, p, std::nullopt).own : make_block_plan(op, p),
      {p.crow, p.col});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  SPARSEKERN_IMPL(m, "block_linear", block_linear_cpu);
  SPARSEKERN_IMPL(m, "block_linear_grad_input", block_linear_grad_input_cpu);
  SPARSEKERN_IMPL(m, "block_linear_grad_values", block_linear_grad_values_cpu);
  SPARSEKERN_IMPL(m, "block_conv2d", block_conv2d_cpu);
  SPARSEKERN_IMPL(m, "block_conv2d_grad_input", block_conv2d_grad_input_cpu);
  SPARSEKERN_IMPL(m, "block_conv2d_grad_values", block_conv2d_grad_values_cpu);
  SPARSEKERN_IMPL(m, "block_plan", block_plan_cpu);
}

}  // namespace sparsekern
