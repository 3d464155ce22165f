// CPU registrations of the block ops. The schemas, fakes and gradients are in
// sparsekern/ops/block.py and block_conv.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "block.h"
#include "conv.h"

namespace sparsekern {
namespace {

// Up to this many tokens the lanes lie better along the blocks than along the tokens.
int64_t spmv_tokens(const BlockView& v) {
  const int64_t lanes = v.block_cols == 1 ? v.block_rows : v.block_cols;
  return std::max<int64_t>(2, std::min(lanes, kernels().width) / 4);
}

void spmv_rows(const BlockView& v, const float* values, const float* x, const float* bias,
               Activation activation, float* y, int64_t tokens) {
  const int64_t rows = v.block_rows_per_group(), per_row = v.n_blocks * v.block_rows * v.block_cols;
  const int64_t grain = std::max<int64_t>(1, 30000 * rows / std::max<int64_t>(1, per_row));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    BlockArgs a{};
    a.view = v, a.values = values, a.bias = bias, a.activation = activation;
    for (int64_t b = begin; b < end; ++b)
      for (int64_t t = 0; t < tokens; ++t) {
        a.begin = b, a.end = b + 1;
        kernels().block_spmv(a, x + t * v.channels, y + t * v.rows);
      }
  });
}

Tensor block_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& crow,
                        const Tensor& col, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& plan, const std::optional<Tensor>&,
                        int64_t out_features, const std::string& activation) {
  const std::string op = "block_linear";
  check_operand(op, "x", x, x);
  if (x.dim() < 1) fail(op, "x of shape (..., in_features)", "a scalar");
  check_block_values(op, values, x, col);
  const Activation act = parse_activation(op, activation);
  const int64_t cols = x.size(x.dim() - 1), tokens = tokens_of(x);
  const BlockPattern p = check_block_pattern(
      op, crow, col, {out_features, cols, values.size(1), values.size(2), 1, 1});
  const std::optional<Tensor> b = check_bias(op, bias, x, out_features, "out_features");
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor(with_last(x, out_features), type);
  Sink sink{nullptr, true, out_features, 0, 0};
  if (type == ScalarType::Double) {
    block_spmm_reference(p.view, vc.const_data_ptr<double>(), double_or_null(b), act,
                         {xc.const_data_ptr<double>(), cols}, sink, y.mutable_data_ptr<double>(),
                         tokens);
    return y;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const float* v = vc.const_data_ptr<float>();
  sink.data = y.mutable_data_ptr<float>();
  if (tokens <= spmv_tokens(p.view))
    spmv_rows(p.view, v, matrix.data, data_or_null(b), act, sink.data, tokens);
  else
    run_block_spmm(p.view,
                   {v, nullptr, data_or_null(b), act, {&matrix, nullptr}, sink, tokens, 1, 0});
  return to_dtype(y, x.scalar_type());
}

Tensor block_linear_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& crow,
                                   const Tensor& col, const std::optional<Tensor>& plan_t,
                                   int64_t in_features) {
  const std::string op = "block_linear_grad_input";
  check_operand(op, "grad", grad, grad);
  check_block_values(op, values, grad, col);
  const int64_t rows = grad.size(grad.dim() - 1), tokens = tokens_of(grad);
  const BlockPattern p =
      check_block_pattern(op, crow, col, {rows, in_features, values.size(1), values.size(2), 1, 1});
  const BlockTransposed t = get_block_transposed(op, p, plan_t);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor(with_last(grad, in_features), type);
  const Tensor vt = empty_tensor({values.numel()}, type);
  Sink sink{nullptr, true, in_features, 0, 0};
  if (type == ScalarType::Double) {
    turn_blocks(vc.const_data_ptr<double>(), t, vt.mutable_data_ptr<double>());
    block_spmm_reference(t.view, vt.const_data_ptr<double>(), nullptr, kNone,
                         {gc.const_data_ptr<double>(), rows}, sink, out.mutable_data_ptr<double>(),
                         tokens);
    return out;
  }
  turn_blocks(vc.const_data_ptr<float>(), t, vt.mutable_data_ptr<float>());
  const MatrixSource matrix{gc.const_data_ptr<float>(), rows};
  sink.data = out.mutable_data_ptr<float>();
  run_block_spmm(t.view, {vt.const_data_ptr<float>(),
                          nullptr,
                          nullptr,
                          kNone,
                          {&matrix, nullptr},
                          sink,
                          tokens,
                          1,
                          0});
  return to_dtype(out, grad.scalar_type());
}

Tensor block_linear_grad_values_cpu(const Tensor& grad, const Tensor& x, const Tensor& crow,
                                    const Tensor& col, const std::optional<Tensor>& plan,
                                    int64_t block_rows, int64_t block_cols) {
  const std::string op = "block_linear_grad_values";
  check_operand(op, "x", x, x);
  check_operand(op, "grad", grad, x);
  const int64_t cols = x.size(x.dim() - 1), rows = grad.size(grad.dim() - 1), tokens = tokens_of(x);
  const BlockPattern p =
      check_block_pattern(op, crow, col, {rows, cols, block_rows, block_cols, 1, 1});
  check_size(op, "tokens of grad = tokens of x", tokens_of(grad), tokens);
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.view.n_blocks, block_rows, block_cols}, type);
  if (type == ScalarType::Double) {
    block_sddmm_reference(p.view, {xc.const_data_ptr<double>(), cols}, {nullptr, true, rows, 0, 0},
                          gc.const_data_ptr<double>(), out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  const MatrixSource matrix{xc.const_data_ptr<float>(), cols};
  const MatrixSource grad_matrix{gc.const_data_ptr<float>(), rows};
  run_block_sddmm(p.view, {nullptr, nullptr, nullptr, kNone, {&matrix, nullptr}, {}, tokens, 1, 0},
                  {&grad_matrix, nullptr}, out.mutable_data_ptr<float>());
  return to_dtype(out, x.scalar_type());
}

BlockShape block_shape(const Conv& c, int64_t block_rows, int64_t block_cols) {
  return {c.out_channels, c.in_per_group(), block_rows, block_cols, c.groups, c.taps()};
}

Tensor block_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& crow,
                        const Tensor& col, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& plan, const std::optional<Tensor>&,
                        int64_t out_channels, const std::vector<int64_t> kernel,
                        const std::vector<int64_t> stride, const std::vector<int64_t> padding,
                        const std::vector<int64_t> dilation, int64_t groups,
                        const std::string& activation) {
  const std::string op = "block_conv2d";
  check_dim(op, "x", x, 4);
  check_operand(op, "x", x, x);
  check_block_values(op, values, x, col);
  const Activation act = parse_activation(op, activation);
  const Conv c = make_conv(op, x.size(0), x.size(1), x.size(2), x.size(3), out_channels, kernel,
                           stride, padding, dilation, groups);
  const BlockPattern p =
      check_block_pattern(op, crow, col, block_shape(c, values.size(1), values.size(2)));
  const std::optional<Tensor> b = check_bias(op, bias, x, out_channels, "out_channels");
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor xc = as_contiguous(x, type), vc = as_contiguous(values, type);
  const Tensor y = empty_tensor({c.images, out_channels, c.out_h, c.out_w}, type);
  const int64_t pixels = c.out_h * c.out_w, tokens = c.images * pixels;
  Sink sink{nullptr, false, out_channels, 0, pixels};
  if (type == ScalarType::Double) {
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    block_spmm_reference(p.view, vc.const_data_ptr<double>(), double_or_null(b), act, r.source,
                         sink, y.mutable_data_ptr<double>(), tokens);
    return y;
  }
  Planes planes;
  make_planes(xc.const_data_ptr<float>(), c.images, c.in_channels, c.forward_y(), c.forward_x(),
              kPlanes, &planes);
  sink.data = y.mutable_data_ptr<float>();
  run_block_spmm(p.view, {vc.const_data_ptr<float>(),
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

Tensor block_conv2d_grad_input_cpu(const Tensor& grad, const Tensor& values, const Tensor& crow,
                                   const Tensor& col, const std::optional<Tensor>& plan_t,
                                   int64_t in_channels, int64_t height, int64_t width,
                                   const std::vector<int64_t> kernel,
                                   const std::vector<int64_t> stride,
                                   const std::vector<int64_t> padding,
                                   const std::vector<int64_t> dilation, int64_t groups) {
  const std::string op = "block_conv2d_grad_input";
  check_dim(op, "grad", grad, 4);
  check_operand(op, "grad", grad, grad);
  check_block_values(op, values, grad, col);
  const Conv c = make_conv(op, grad.size(0), in_channels, height, width, grad.size(1), kernel,
                           stride, padding, dilation, groups);
  check_grad(op, grad, c);
  const BlockPattern p =
      check_block_pattern(op, crow, col, block_shape(c, values.size(1), values.size(2)));
  const BlockTransposed t = get_block_transposed(op, p, plan_t);
  const ScalarType type = compute_type(grad);
  const Tensor gc = as_contiguous(grad, type), vc = as_contiguous(values, type);
  const Tensor out = empty_tensor({c.images, in_channels, height, width}, type);
  const Tensor vt = empty_tensor({values.numel()}, type);
  const int64_t pixels = height * width, tokens = c.images * pixels;
  Sink sink{nullptr, false, in_channels, 0, pixels};
  if (type == ScalarType::Double) {
    turn_blocks(vc.const_data_ptr<double>(), t, vt.mutable_data_ptr<double>());
    const Reference r = make_reference(c, gc.const_data_ptr<double>(), true);
    block_spmm_reference(t.view, vt.const_data_ptr<double>(), nullptr, kNone, r.source, sink,
                         out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  turn_blocks(vc.const_data_ptr<float>(), t, vt.mutable_data_ptr<float>());
  Planes planes;
  make_planes(gc.const_data_ptr<float>(), c.images, c.out_channels, c.backward_y(), c.backward_x(),
              kPlanes, &planes);
  sink.data = out.mutable_data_ptr<float>();
  run_block_spmm(t.view, {vt.const_data_ptr<float>(),
                          nullptr,
                          nullptr,
                          kNone,
                          {nullptr, &planes.source},
                          sink,
                          tokens,
                          groups,
                          c.out_per_group()});
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
  check_dim(op, "x", x, 4);
  check_dim(op, "grad", grad, 4);
  check_operand(op, "x", x, x);
  check_operand(op, "grad", grad, x);
  const Conv c = make_conv(op, x.size(0), x.size(1), x.size(2), x.size(3), grad.size(1), kernel,
                           stride, padding, dilation, groups);
  check_grad(op, grad, c);
  const BlockPattern p = check_block_pattern(op, crow, col, block_shape(c, block_rows, block_cols));
  check_block_plan(op, p, plan);
  const ScalarType type = compute_type(x);
  const Tensor gc = as_contiguous(grad, type), xc = as_contiguous(x, type);
  const Tensor out = empty_tensor({p.view.n_blocks, block_rows, block_cols}, type);
  const int64_t pixels = c.out_h * c.out_w, tokens = c.images * pixels;
  if (type == ScalarType::Double) {
    const Reference r = make_reference(c, xc.const_data_ptr<double>(), false);
    block_sddmm_reference(p.view, r.source, {nullptr, false, c.out_channels, 0, pixels},
                          gc.const_data_ptr<double>(), out.mutable_data_ptr<double>(), tokens);
    return out;
  }
  Planes planes, grad_planes;
  make_planes(xc.const_data_ptr<float>(), c.images, c.in_channels, c.forward_y(), c.forward_x(),
              kPlanes, &planes);
  const auto as_it_is = [](int64_t n) { return forward_axis(n, n, 1, 1, 0, 1); };
  make_planes(gc.const_data_ptr<float>(), c.images, c.out_channels, as_it_is(c.out_h),
              as_it_is(c.out_w), kGradPlanes, &grad_planes);
  run_block_sddmm(p.view,
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

Tensor block_plan_cpu(const Tensor& crow, const Tensor& col, int64_t rows, int64_t channels,
                      int64_t block_rows, int64_t block_cols, int64_t groups, int64_t taps,
                      bool transpose) {
  const std::string op = "block_plan";
  const BlockPattern p =
      check_block_pattern(op, crow, col, {rows, channels, block_rows, block_cols, groups, taps});
  const std::vector<int32_t> own =
      transpose ? get_block_transposed(op, p, std::nullopt).own : make_block_plan(op, p);
  const Tensor out = empty_tensor({static_cast<int64_t>(own.size())}, ScalarType::Int);
  std::copy(own.begin(), own.end(), out.mutable_data_ptr<int32_t>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("block_linear", TORCH_BOX(&block_linear_cpu));
  m.impl("block_linear_grad_input", TORCH_BOX(&block_linear_grad_input_cpu));
  m.impl("block_linear_grad_values", TORCH_BOX(&block_linear_grad_values_cpu));
  m.impl("block_conv2d", TORCH_BOX(&block_conv2d_cpu));
  m.impl("block_conv2d_grad_input", TORCH_BOX(&block_conv2d_grad_input_cpu));
  m.impl("block_conv2d_grad_values", TORCH_BOX(&block_conv2d_grad_values_cpu));
  m.impl("block_plan", TORCH_BOX(&block_plan_cpu));
}

}  // namespace sparsekern
