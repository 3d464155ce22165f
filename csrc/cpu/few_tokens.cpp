// Few tokens: the weights are read once or twice, at the speed of memory; see spmv.inl.
#include "driver.h"

namespace sparsekern {
namespace {

constexpr int64_t kAtOnce = 16;  // tokens of one pass over the weights

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kSerialWork = 100000;

// x (tokens, cols) as (cols, w) with zeros behind the tokens.
const float* token_panel(const float* x, int64_t tokens, int64_t cols) {
  const int64_t w = spmv_panel(tokens);
  float* panel = thread_scratch(kTaskScratch, cols * w);
  for (int64_t k = 0; k < cols; ++k)
    for (int64_t t = 0; t < w; ++t) panel[k * w + t] = t < tokens ? x[t * cols + k] : 0.f;
  return panel;
}

// The first row of part `part` of `parts` that cost the same. A bitmap is walked whole, beside its
// values; a row of columns costs a few values more than it has.
int64_t row_at(const SpmvArgs& a, int64_t part, int64_t parts) {
  const int64_t per_row = a.index.kind == kSpmvBitmap ? a.cols / 16 : 8;
  const auto cost = [&](int64_t r) { return a.crow[r] + r * per_row; };
  int64_t low = 0, high = a.rows;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (cost(mid) * parts < cost(a.rows) * part) low = mid + 1;
    else high = mid;
  }
  return low;
}

void run_pass(SpmvArgs a) {
  if (a.index.kind == kSpmvColumns && a.tokens > 1) a.panel = token_panel(a.x, a.tokens, a.cols);
  const int64_t threads =
      a.nnz * a.tokens < kSerialWork ? 1 : int64_t{torch::stable::get_num_threads()};
  if (threads == 1) return kernels().spmv(a);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    SpmvArgs part = a;
    part.row_begin = row_at(a, begin, threads), part.row_end = row_at(a, end, threads);
    kernels().spmv(part);
  });
}

}  // namespace

// Measured, see bench/NOTES.md. Spreading a bitmap costs the same whatever is stored, plus a third
// of that for each token; a panel with every lane in use costs by what is stored. Beyond the cache
// run_spmm waits longer for its runs, which come from all over the matrix.
bool few_tokens(const PlanView& plan, int64_t tokens) {
  const bool beyond_cache = plan.nnz >= int64_t{1} << 20;
  switch (plan.spmv.kind) {
    case kSpmvColumns: return tokens <= (beyond_cache ? 24 : 12);
    case kSpmvBitmap:
      return tokens <= kAtOnce &&
             tokens * plan.rows * plan.cols <= (beyond_cache ? 48 : 32) * plan.nnz;
    default: return false;
  }
}

void run_few(const PlanView& plan, const int32_t* crow, const Operands& o) {
  for (int64_t t = 0; t < o.tokens; t += kAtOnce)
    run_pass({plan.spmv, plan.rows, plan.cols, plan.nnz, crow, o.values,
              o.source.matrix->data + t * plan.cols, nullptr, o.bias, o.activation,
              o.sink.data + t * plan.rows, 0, plan.rows, std::min(kAtOnce, o.tokens - t)});
}

}  // namespace sparsekern
