// The schedule of a bfloat16 matrix whose columns are taken in pairs, for the instruction that adds
// two products to a float32 sum. A row-major bfloat16 input (tokens, cols) with an even number of
// columns is a matrix of (tokens, cols / 2) words, so panels are made by the same transposes as for
// float32. The sparse matrix becomes one over pairs of columns: a random pattern of density d has
// d (2 - d) / 2 pairs per weight, 0.095 at 90 % zeros.
//
// Made together with the plan of the matrix itself, in one int32 tensor: a header, that plan, the
// plan of the pairs, and two bits per pair.
#pragma once
#include "plan.h"

namespace sparsekern {

constexpr int32_t kPairsMagic = 0x534b5131;  // "SKQ1", changes with the layout
constexpr int64_t kBitsPadding = 2;          // words that pack may read past the end

// The matrix of the pairs as CSR: `start` counts the stored values before each pair.
struct Pairs {
  std::vector<int32_t> crow{0}, col, start;
  std::vector<uint8_t> stored;
};

inline Pairs find_pairs(const int32_t* crow, const int32_t* col, int64_t rows) {
  Pairs p;
  for (int64_t r = 0; r < rows; ++r) {
    for (int32_t i = crow[r]; i < crow[r + 1];) {
      const int32_t pair = col[i] / 2;
      p.col.push_back(pair);
      p.start.push_back(i);
      p.stored.push_back(static_cast<uint8_t>(1 << col[i] % 2));
      if (++i < crow[r + 1] && col[i] / 2 == pair) p.stored.back() = 3, ++i;
    }
    p.crow.push_back(static_cast<int32_t>(p.col.size()));
  }
  p.start.push_back(crow[rows]);
  return p;
}

// The plan of the matrix as it is, followed by that of its pairs.
inline std::vector<int32_t> append_pairs(const std::vector<int32_t>& matrix_plan,
                                         const int32_t* crow, const int32_t* col, int64_t rows,
                                         int64_t cols, int64_t tokens) {
  const Pairs p = find_pairs(crow, col, rows);
  const int64_t n_pairs = p.crow.back(), pair_cols = (cols + 1) / 2;
  std::vector<int32_t> plan = build_plan(p.crow.data(), p.col.data(), rows, pair_cols, 1,
                                         plan_shape(p.crow.data(), rows, pair_cols, tokens));
  PlanView view{};
  view_plan(plan.data(), static_cast<int64_t>(plan.size()), rows, pair_cols, n_pairs, 1, &view);
  Run* runs = const_cast<Run*>(view.runs);  // of `plan`, which is ours
  std::vector<uint32_t> bits((n_pairs + 15) / 16 + kBitsPadding, 0);
  int64_t at = 0;
  for (int64_t r = 0; r < view.run_start[view.n_row_blocks * view.n_col_blocks]; ++r) {
    for (int32_t i = runs[r].start; i < runs[r].start + runs[r].count; ++i, ++at)
      bits[at / 16] |= static_cast<uint32_t>(p.stored[i]) << (2 * (at % 16));
    runs[r].start = p.start[runs[r].start];
  }
  std::vector<int32_t> out(kPlanHeader, 0);
  const int64_t header[] = {kPairsMagic, static_cast<int64_t>(matrix_plan.size()),
                            static_cast<int64_t>(plan.size()), n_pairs};
  for (int i = 0; i < 4; ++i) out[i] = static_cast<int32_t>(header[i]);
  out.insert(out.end(), matrix_plan.begin(), matrix_plan.end());
  out.insert(out.end(), plan.begin(), plan.end());
  out.insert(out.end(), bits.begin(), bits.end());
  return out;
}

// Splits what append_pairs made: moves `p` and `size` to the plan of the matrix and reads that of
// the pairs. False when it was not made for a matrix of this shape; the caller checks the plan of
// the matrix.
inline bool view_pairs(const int32_t** p, int64_t* size, int64_t rows, int64_t cols, PairView* v) {
  const int32_t* header = *p;
  const int64_t matrix_words = header[1], pair_words = header[2], n_pairs = header[3];
  if (*size != kPlanHeader + matrix_words + pair_words + (n_pairs + 15) / 16 + kBitsPadding)
    return false;
  const int32_t* plan = header + kPlanHeader + matrix_words;
  *p += kPlanHeader;
  *size = matrix_words;
  v->stored = reinterpret_cast<const uint8_t*>(plan + pair_words);
  return view_plan(plan, pair_words, rows, (cols + 1) / 2, n_pairs, 1, &v->plan);
}

}  // namespace sparsekern
