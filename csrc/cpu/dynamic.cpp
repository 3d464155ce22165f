// CPU registration of the linear op with int8 blocks and int8 activations. The schema and the fake
// are in sparsekern/ops/block_int8_dynamic.py.
#include "dynamic.h"

#include <torch/csrc/stable/library.h>

#include "block.h"
#include "int8.h"

namespace sparsekern {
namespace {

constexpr int64_t kPanelWords = 128 * 1024;  // 512 KiB of activations: half of a usual L2 cache
constexpr int64_t kSlackWords = 16;          // whole vectors may be read past the last token
// Sums of this many products of -128 and 127 fit an int32.
constexpr int64_t kMostColumns = INT32_MAX / (128 * 127);

// Activations of all tokens as words, and their scales.
struct QuantizedTokens {
  int32_t* words;
  float* scales;
};

QuantizedTokens quantize_tokens(const float* x, int64_t tokens, int64_t cols, int64_t words) {
  const int64_t size = tokens * words + kSlackWords;
  float* memory = thread_scratch(kPacked, size + tokens);
  const QuantizedTokens q{reinterpret_cast<int32_t*>(memory), memory + size};
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cols));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      kernels().dynamic->quantize(x + t * cols, cols, q.words + t * words, words, q.scales + t);
  });
  return q;
}

// y = act(scales * x_scales * (values * x) + bias), split over threads.
void run_dynamic(const BlockView& v, const Operands& o) {
  if (o.tokens == 0 || v.rows == 0) return;
  const int64_t words = v.channel_blocks() * v.block_cols / kernels().dynamic->per_word;
  const QuantizedTokens q = quantize_tokens(o.source.matrix->data, o.tokens, v.channels, words);
  const int64_t width = kernels().width, most = kPanelWords / std::max<int64_t>(1, words);
  const int64_t panel = std::max<int64_t>(1, most / width) * width;
  const int64_t work = v.n_blocks * v.block_rows * v.block_cols;
  const Split s = split_rows(work, o.tokens, width, 1, v.block_rows_per_group());
  for_each_task(s, o, [&](const Task& t) {
    DynamicArgs a{v,         o.quantized,   o.scales,     o.bias,      q.words,
                  q.scales,  words,         o.activation, o.sink.data, t.row_begin,
                  t.row_end, t.token_begin, t.token_end,  panel,       nullptr};
    a.panel = std::min(panel, (t.token_end - t.token_begin + width - 1) / width * width);
    a.scratch = reinterpret_cast<int32_t*>(thread_scratch(kTaskScratch, dynamic_scratch(a)));
    kernels().dynamic->spmm(a);
  });
}

Tensor block_linear_int8_dynamic_cpu(const Tensor& x, const Tensor& values, const Tensor& scales,
                                     const Tensor& crow, const Tensor& col,
                                     const std::optional<Tensor>& bias,
                                     const std::optional<Tensor>& plan, int64_t out_features,
                                     const std::string& activation) {
  const std::string op = "block_linear_int8_dynamic";
  const int64_t cols = check_int8(op, x, values);
  check_block_sizes(op, values, col);
  if (values.size(2) % 4)
    fail(op, "blocks of a multiple of 4 columns", std::to_string(values.size(2)));
  if (cols > kMostColumns)
    fail(op, "at most " + std::to_string(kMostColumns) + " in_features", std::to_string(cols));
  const Activation act = parse_activation(op, activation);
  const BlockPattern p = check_block_pattern(
      op, crow, col, {out_features, cols, values.size(1), values.size(2), 1, 1});
  Int8Linear l;
  prepare_int8(op, x, values, scales, bias, out_features, act, &l);
  check_block_plan(op, p, plan);
  run_dynamic(p.view, l.operands);
  return to_dtype(l.y, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  SPARSEKERN_IMPL(m, "block_linear_int8_dynamic", block_linear_int8_dynamic_cpu);
}

}  // namespace sparsekern
