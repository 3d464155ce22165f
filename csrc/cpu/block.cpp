// Block patterns: checks, plans and how the work is split over threads.
#include "block.h"

namespace sparsekern {
namespace {

constexpr int32_t kBlockMagic = 0x534b4231;            // "SKB1"
constexpr int32_t kBlockTransposedMagic = 0x534b4331;  // "SKC1"

// Measured in bench/NOTES.md. Tiles of several rows are bound by the multiply-adds, so their panel
// may come from the L2 cache; one row alone needs it in L1.
constexpr int64_t kPanelCols = 1024, kPanelColsOneRow = 128;
constexpr int64_t kRowsKept = 512;
constexpr int64_t kSddmmCols = 256;

Header header_of(const BlockView& v, int32_t magic) {
  return plan_header(
      magic, {v.rows, v.channels, v.block_rows, v.block_cols, v.n_blocks, v.groups, v.taps});
}

void validate(const std::string& op, const BlockView& v) {
  check_csr(v.crow, v.col, v.groups * v.block_rows_per_group(), v.channel_blocks() * v.taps,
            v.n_blocks,
            [&](const std::string& wanted, const std::string& have) { fail(op, wanted, have); });
}

BlockView transposed_view(const BlockView& v) {
  return {nullptr,  nullptr,    v.channels * v.groups, v.rows_per_group(), v.taps,
          v.groups, v.n_blocks, v.block_cols,          v.block_rows};
}

std::vector<int32_t> build_block_transposed(const BlockView& v) {
  const BlockView t = transposed_view(v);
  const int64_t rows = t.groups * t.block_rows_per_group(), per_group = v.block_rows_per_group();
  const Header header = header_of(t, kBlockTransposedMagic);
  std::vector<int32_t> out(header.begin(), header.end());
  out.resize(kPlanHeader + rows + 1 + 2 * v.n_blocks);
  int32_t *crow = out.data() + kPlanHeader, *col = crow + rows + 1, *perm = col + v.n_blocks;
  const auto row_of = [&](int64_t b, int32_t c) {
    return b / per_group * t.block_rows_per_group() + c / v.taps;
  };
  for (int64_t b = 0; b < v.groups * per_group; ++b)
    for (int32_t i = v.crow[b]; i < v.crow[b + 1]; ++i) ++crow[row_of(b, v.col[i]) + 1];
  for (int64_t r = 0; r < rows; ++r) crow[r + 1] += crow[r];
  std::vector<int32_t> next(crow, crow + rows);
  for (int64_t b = 0; b < v.groups * per_group; ++b)
    for (int32_t i = v.crow[b]; i < v.crow[b + 1]; ++i) {
      const int32_t at = next[row_of(b, v.col[i])]++;
      col[at] = static_cast<int32_t>(b % per_group * v.taps + v.col[i] % v.taps);
      perm[at] = i;
    }
  return out;
}

template <class F>
void for_each_value(const BlockView& v, F f) {
  for (int64_t b = 0; b < v.groups * v.block_rows_per_group(); ++b)
    for (int32_t i = v.crow[b]; i < v.crow[b + 1]; ++i) {
      const int64_t rows = v.rows_in(b, b + 1), channel0 = v.col[i] / v.taps * v.block_cols;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < v.block_cols && channel0 + c < v.channels; ++c)
          f(v.row_of(b) + r, (channel0 + c) * v.taps + v.col[i] % v.taps,
            (i * v.block_rows + r) * v.block_cols + c);
    }
}

}  // namespace

BlockPattern check_block_pattern(const std::string& op, const Tensor& crow, const Tensor& col,
                                 const BlockShape& s) {
  if (s.block_rows < 1 || s.block_cols < 1)
    fail(op, "blocks of at least 1 x 1",
         std::to_string(s.block_rows) + " x " + std::to_string(s.block_cols));
  if (s.groups < 1 || s.taps < 1)
    fail(op, "groups and taps >= 1", std::to_string(std::min(s.groups, s.taps)));
  check_int32(op, "rows", s.rows);
  check_int32(op, "channels", s.channels);
  check_int32(op, "taps", s.taps);
  check_int32(op, "weights of a block, at all kernel positions",
              times(times(s.block_rows, s.block_cols), s.taps));
  if (s.rows % s.groups || s.groups > std::max<int64_t>(1, s.rows))
    fail(op, "rows divisible by groups = " + std::to_string(s.groups), std::to_string(s.rows));
  check_int32(op, "out / groups * kernel positions", times(s.rows / s.groups, s.taps));
  check_int32(op, "in_channels", times(s.channels, s.groups));
  const Pattern p = check_pattern(op, crow, col, col.numel(), times(s.channels, s.taps));
  const BlockView v{p.crow_data(), p.col_data(), s.rows,       s.channels,  s.taps,
                    s.groups,      p.nnz,        s.block_rows, s.block_cols};
  check_size(op, "crow.size(0) = rows of blocks + 1", p.rows + 1,
             s.groups * v.block_rows_per_group() + 1);
  return {p.crow, p.col, v};
}

void check_block_values(const std::string& op, const Tensor& values, const Tensor& like,
                        const Tensor& col) {
  check_operand(op, "values", values, like);
  check_block_sizes(op, values, col);
}

void check_block_sizes(const std::string& op, const Tensor& values, const Tensor& col) {
  check_dim(op, "values", values, 3);
  check_size(op, "values.size(0) = col.size(0)", values.size(0), col.numel());
}

void check_block_plan(const std::string& op, const BlockPattern& p,
                      const std::optional<Tensor>& plan) {
  if (!plan || plan->numel() == 0) return validate(op, p.view);
  const Tensor given = check_sealed(op, "plan", "block_plan", *plan, {p.crow, p.col});
  const int32_t* have = given.const_data_ptr<int32_t>();
  const Header want = header_of(p.view, kBlockMagic);
  const bool ours = given.numel() == kPlanHeader && have[0] == kBlockMagic;
  if (ours && p.view.taps == 1 && have[2] != want[2])
    fail(op, "x.size(-1) = in_features = " + std::to_string(have[2]), std::to_string(want[2]));
  if (!ours || !same_header(want, have))
    fail(op, "plan made by block_plan for this pattern", "a plan of another pattern");
}

std::vector<int32_t> make_block_plan(const std::string& op, const BlockPattern& p) {
  validate(op, p.view);
  const Header header = header_of(p.view, kBlockMagic);
  return {header.begin(), header.end()};
}

BlockTransposed get_block_transposed(const std::string& op, const BlockPattern& p,
                                     const std::optional<Tensor>& plan_t) {
  BlockTransposed t;
  const int32_t* data;
  int64_t size;
  if (plan_t && plan_t->numel() > 0) {
    t.given = check_sealed(op, "plan_t", "block_plan", *plan_t, {p.crow, p.col});
    data = t.given.const_data_ptr<int32_t>(), size = t.given.numel();
  } else {
    validate(op, p.view);
    t.own = build_block_transposed(p.view);
    data = t.own.data(), size = static_cast<int64_t>(t.own.size());
  }
  t.view = transposed_view(p.view);
  const Header want = header_of(t.view, kBlockTransposedMagic);
  const int64_t rows = t.view.groups * t.view.block_rows_per_group();
  if (size != kPlanHeader + rows + 1 + 2 * t.view.n_blocks || !same_header(want, data))
    fail(op, "plan_t made by block_plan(transpose=True) for this pattern",
         "a plan of another pattern");
  t.view.crow = data + kPlanHeader;
  t.view.col = t.view.crow + rows + 1;
  t.perm = t.view.col + t.view.n_blocks;
  return t;
}

// What does not depend on the task.
static BlockArgs block_args(const BlockView& v, const Operands& o) {
  BlockArgs a{};
  a.view = v, a.values = o.values, a.quantized = o.quantized, a.scales = o.scales;
  a.bias = o.bias, a.activation = o.activation, a.sink = o.sink;
  return a;
}

void run_block_spmm(const BlockView& v, const Operands& o) {
  if (o.tokens == 0 || v.rows == 0) return;
  const int64_t vectors = v.block_rows >= 4 ? 4 : 8, panel = vectors * kernels().width;
  const int64_t per_group = v.block_rows_per_group(), block = v.block_cols * v.taps;
  const int64_t panel_blocks = (v.block_rows > 1 ? kPanelCols : kPanelColsOneRow) / block;
  const Split s =
      split_rows(v.n_blocks * v.block_rows * v.block_cols, o.tokens, panel, v.groups, per_group);
  for_each_task(s, o, [&](const Task& t) {
    BlockArgs a = block_args(v, o);
    a.source = t.source, a.begin = t.row_begin, a.end = t.row_end;
    a.token_begin = t.token_begin, a.token_end = t.token_end, a.vectors = vectors;
    a.channel_blocks = std::max<int64_t>(1, std::min(panel_blocks, v.channel_blocks()));
    a.row_blocks = std::min(std::max<int64_t>(1, kRowsKept / v.block_rows), per_group);
    a.scratch = thread_scratch(kTaskScratch, block_scratch(a, panel));
    kernels().block_spmm(a);
  });
}

// Up to this many tokens the lanes lie better along the blocks than along the tokens.
static int64_t spmv_tokens(const BlockView& v) {
  const int64_t lanes = v.block_cols == 1 ? v.block_rows : v.block_cols;
  return std::max<int64_t>(2, std::min(lanes, kernels().width) / 4);
}

void run_block_linear(const BlockView& v, const Operands& o) {
  if (o.tokens > spmv_tokens(v)) return run_block_spmm(v, o);
  const int64_t rows = v.block_rows_per_group(), per_row = v.n_blocks * v.block_rows * v.block_cols;
  const int64_t grain = std::max<int64_t>(1, 30000 * rows / std::max<int64_t>(1, per_row));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    BlockArgs a = block_args(v, o);
    for (a.begin = begin; a.begin < end; ++a.begin)
      for (int64_t t = 0; t < o.tokens; ++t) {
        a.end = a.begin + 1;
        kernels().block_spmv(a, o.source.matrix->data + t * v.channels, o.sink.data + t * v.rows);
      }
  });
}

void run_block_sddmm(const BlockView& v, const Operands& o, const Source& grad, float* out) {
  std::fill_n(out, v.n_blocks * v.block_rows * v.block_cols, 0.f);
  if (o.tokens == 0 || v.n_blocks == 0) return;
  const GradPanels panels = grad_panels(grad, v.rows, o.tokens);
  const int64_t chunk = std::max<int64_t>(1, kSddmmCols / (v.block_cols * v.taps));
  const int64_t parts = (v.channel_blocks() + chunk - 1) / chunk;
  const int64_t per_group = v.block_rows_per_group();
  torch::stable::parallel_for(0, v.groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / parts, first = task % parts * chunk;
      ImageSource image;
      BlockSddmmArgs a{v,
                       panels.data,
                       panels.stride,
                       shifted(o.source, &image, group * o.channels_per_group),
                       out,
                       group * per_group,
                       (group + 1) * per_group,
                       first,
                       std::min(v.channel_blocks(), first + chunk),
                       o.tokens,
                       nullptr};
      a.scratch = thread_scratch(kTaskScratch,
                                 chunk * v.block_cols * v.taps * panels.width + 2 * per_group + 64);
      kernels().block_sddmm(a);
    }
  });
}

void block_spmm_reference(const BlockView& v, const double* values, const double* bias,
                          Activation activation, ReferenceSource source, const Sink& sink,
                          double* out, int64_t tokens) {
  for (int64_t r = 0; r < v.rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) out[sink_at(sink, t, r)] = bias ? bias[r] : 0;
  for_each_value(v, [&](int64_t row, int64_t column, int64_t i) {
    source.channel0 = row / v.rows_per_group() * v.channels;
    for (int64_t t = 0; t < tokens; ++t)
      out[sink_at(sink, t, row)] += values[i] * source_at(source, t, column);
  });
  for (int64_t i = 0; i < v.rows * tokens; ++i) out[i] = activate_reference(out[i], activation);
}

void block_sddmm_reference(const BlockView& v, ReferenceSource source, const Sink& grad_layout,
                           const double* grad, double* out, int64_t tokens) {
  std::fill_n(out, v.n_blocks * v.block_rows * v.block_cols, 0.0);
  for_each_value(v, [&](int64_t row, int64_t column, int64_t i) {
    source.channel0 = row / v.rows_per_group() * v.channels;
    for (int64_t t = 0; t < tokens; ++t)
      out[i] += grad[sink_at(grad_layout, t, row)] * source_at(source, t, column);
  });
}

}  // namespace sparsekern
