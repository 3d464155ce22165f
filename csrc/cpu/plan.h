// The schedule of a CSR matrix: which stretch of which row runs next. Columns are cut into blocks
// whose panel fits the L1 cache; rows into blocks whose sums fit the L2 cache; inside a pair of
// blocks rows come in order of falling count. It holds indices only, so it depends on the pattern,
// not on the values, and lives in one int32 tensor: a header, then row_start, run_start, n_tiles,
// value_start, the runs and the offsets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "spmv_plan.h"

namespace sparsekern {

constexpr int32_t kPlanMagic = 0x534b5034;  // "SKP4", changes with the layout
constexpr int64_t kPlanHeader = 16;
constexpr int64_t kRunPadding = 32;  // the kernels fetch this far ahead

struct PlanShape {
  int64_t col_block, row_block;
};

// Blocks for a matrix of this density and panels of `tokens`, from the sweep in bench/NOTES.md: the
// fewer values a column has, the more columns a run needs, so that starting and storing its sums is
// paid for, even when part of the panel then comes from L2.
inline PlanShape plan_shape(int64_t cols, double nnz_per_row, int64_t tokens) {
  const double density = cols ? nnz_per_row / static_cast<double>(cols) : 0;
  const int64_t panel_kib = density > 0.25 ? 32 : density > 0.07 ? 48 : density > 0.03 ? 64 : 128;
  const int64_t col_block = std::min<int64_t>(512, panel_kib * 1024 / (tokens * 4));
  return {std::min(std::max<int64_t>(cols, 1), col_block), 512};
}

// Throws when crow and col are no CSR matrix of this shape. The kernels trust what went through
// here.
template <class Fail>
void check_csr(const int32_t* crow, const int32_t* col, int64_t rows, int64_t cols, int64_t nnz,
               Fail fail) {
  if (crow[0] != 0 || crow[rows] != nnz)
    fail("crow to start at 0 and end at nnz = " + std::to_string(nnz),
         "start " + std::to_string(crow[0]) + ", end " + std::to_string(crow[rows]));
  for (int64_t r = 0; r < rows; ++r) {
    if (crow[r + 1] < crow[r] || crow[r + 1] > nnz)
      fail("crow to be non-decreasing", std::to_string(crow[r]) + " before " +
                                            std::to_string(crow[r + 1]) + " at row " +
                                            std::to_string(r));
    for (int32_t i = crow[r]; i < crow[r + 1]; ++i) {
      const int32_t before = i > crow[r] ? col[i - 1] : -1;
      if (col[i] <= before || col[i] >= cols)
        fail("col to rise strictly inside each row and stay in [0, " + std::to_string(cols) + ")",
             "col[" + std::to_string(i) + "] = " + std::to_string(col[i]) + " in row " +
                 std::to_string(r));
    }
  }
}

// Rows of one group of a grouped convolution never share a block with rows of another.
inline std::vector<int32_t> row_blocks(int64_t rows, int64_t groups, int64_t row_block) {
  std::vector<int32_t> start{0};
  const int64_t per_group = groups ? rows / groups : rows;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < per_group; r += row_block)
      start.push_back(static_cast<int32_t>(g * per_group + std::min(per_group, r + row_block)));
  return start;
}

// Orders the runs of one group: row tiles first, then the rest by falling count. Returns the number
// of tiles.
inline int32_t order_runs(std::vector<Run>& runs, const int32_t* col, int64_t first_col) {
  struct Keyed {
    uint64_t hash;
    Run run;
  };
  std::vector<Keyed> keyed;
  for (const Run& r : runs) {
    uint64_t hash = 1469598103934665603ull;  // FNV-1a over the columns
    for (int32_t i = r.start; i < r.start + r.count; ++i)
      hash = (hash ^ static_cast<uint64_t>(col[i] - first_col)) * 1099511628211ull;
    keyed.push_back({hash, r});
  }
  std::stable_sort(keyed.begin(), keyed.end(), [](const Keyed& a, const Keyed& b) {
    return a.run.count != b.run.count ? a.run.count > b.run.count : a.hash < b.hash;
  });
  const auto same = [&](const Keyed& a, const Keyed& b) {
    return a.hash == b.hash && a.run.count == b.run.count &&
           std::equal(col + a.run.start, col + a.run.start + a.run.count, col + b.run.start);
  };
  std::vector<Run> single;
  runs.clear();
  for (size_t i = 0; i < keyed.size();) {
    size_t n = 1;
    while (n < kTileRows && i + n < keyed.size() && same(keyed[i], keyed[i + n])) ++n;
    std::vector<Run>& to = n == kTileRows && keyed[i].run.count > 0 ? runs : single;
    for (size_t j = 0; j < n; ++j) to.push_back(keyed[i + j].run);
    i += n;
  }
  const int32_t tiles = static_cast<int32_t>(runs.size() / kTileRows);
  runs.insert(runs.end(), single.begin(), single.end());
  return tiles;
}

// Column of every value from the start of its block of columns, in the order of the runs.
inline std::vector<uint16_t> run_offsets(const std::vector<Run>& runs, const int32_t* col,
                                         int64_t nnz, int64_t col_block) {
  std::vector<uint16_t> offsets;
  offsets.reserve(nnz + 1);
  for (const Run& r : runs)
    for (int32_t i = r.start; i < r.start + r.count; ++i)
      offsets.push_back(static_cast<uint16_t>(col[i] % col_block));
  if (offsets.size() % 2) offsets.push_back(0);  // whole int32
  return offsets;
}

// The runs of rows [begin, end), one list for each block of columns.
inline std::vector<std::vector<Run>> find_runs(const int32_t* crow, const int32_t* col,
                                               int32_t begin, int32_t end, int64_t n_col,
                                               int64_t col_block) {
  std::vector<std::vector<Run>> found(n_col);
  for (int32_t r = begin; r < end; ++r) {
    int32_t i = crow[r];
    for (int64_t k = 0; k < n_col; ++k) {
      const int32_t first = i;
      while (i < crow[r + 1] && col[i] < (k + 1) * col_block) ++i;
      // The first block starts every row from its bias and the last one stores it, also when it is
      // empty.
      if (i > first || k == 0 || k + 1 == n_col) found[k].push_back({r, first, i - first});
    }
  }
  return found;
}

inline std::vector<int32_t> build_plan(const int32_t* crow, const int32_t* col, int64_t rows,
                                       int64_t cols, int64_t groups, PlanShape shape) {
  const int64_t nnz = crow[rows], kb = shape.col_block;
  const int64_t n_col = std::max<int64_t>(1, (cols + kb - 1) / kb);
  const std::vector<int32_t> row_start = row_blocks(rows, groups, shape.row_block);
  const int64_t n_row = static_cast<int64_t>(row_start.size()) - 1;
  std::vector<int32_t> run_start{0}, n_tiles, value_start{0};
  std::vector<Run> runs;
  for (int64_t b = 0; b < n_row; ++b) {
    std::vector<std::vector<Run>> found =
        find_runs(crow, col, row_start[b], row_start[b + 1], n_col, kb);
    for (int64_t k = 0; k < n_col; ++k) {
      n_tiles.push_back(order_runs(found[k], col, k * kb));
      runs.insert(runs.end(), found[k].begin(), found[k].end());
      run_start.push_back(static_cast<int32_t>(runs.size()));
      value_start.push_back(value_start.back());
      for (const Run& r : found[k]) value_start.back() += r.count;
    }
  }
  const std::vector<uint16_t> offsets = run_offsets(runs, col, nnz, kb);
  runs.resize(runs.size() + kRunPadding, Run{0, 0, 0});
  std::vector<int32_t> out{kPlanMagic};
  for (int64_t n : {rows, cols, nnz, kb, n_col, n_row, static_cast<int64_t>(runs.size()), groups})
    out.push_back(static_cast<int32_t>(n));
  out.resize(kPlanHeader);
  const auto append = [&](const void* data, size_t count) {
    const int32_t* p = static_cast<const int32_t*>(data);
    out.insert(out.end(), p, p + count);
  };
  append(row_start.data(), row_start.size());
  append(run_start.data(), run_start.size());
  append(n_tiles.data(), n_tiles.size());
  append(value_start.data(), value_start.size());
  append(runs.data(), runs.size() * 3);
  append(offsets.data(), offsets.size() / 2);
  return out;
}

// Reads a plan; false when it was not made for a matrix of this shape.
inline bool view_plan(const int32_t* p, int64_t size, int64_t rows, int64_t cols, int64_t nnz,
                      int64_t groups, PlanView* v) {
  if (size < kPlanHeader || p[0] != kPlanMagic || p[1] != rows || p[2] != cols || p[3] != nnz ||
      p[8] != groups)
    return false;
  *v = {rows,    cols,    nnz,     p[4],    p[5],    p[6], p + kPlanHeader,
        nullptr, nullptr, nullptr, nullptr, nullptr, {}};
  const int64_t groups_of_runs = v->n_row_blocks * v->n_col_blocks;
  v->run_start = v->row_start + v->n_row_blocks + 1;
  v->n_tiles = v->run_start + groups_of_runs + 1;
  v->value_start = v->n_tiles + groups_of_runs;
  const int32_t* runs = v->value_start + groups_of_runs + 1;
  v->runs = reinterpret_cast<const Run*>(runs);
  const int32_t* offsets = runs + static_cast<int64_t>(p[7]) * 3;
  v->offsets = reinterpret_cast<const uint16_t*>(offsets);
  const int64_t used = offsets + (nnz + 1) / 2 - p;
  return view_spmv(p, size, used, rows, cols, nnz, &v->spmv);
}

// What the gradients need: the transpose of a pattern (its own CSR, where each value sits in the
// original, and its plan) for the gradient of the input, and another plan of the pattern itself,
// cut for the wider panels of the weight gradient. For a convolution weight (out, in / groups, kh,
// kw) it is the matrix of the input gradient, (in, out / groups * kh * kw); a matrix is the case of
// one tap and one group.
constexpr int32_t kTransposedMagic = 0x534b5434;  // "SKT4"

struct Transposed {
  const int32_t *crow, *col, *perm;
  PlanView plan;
};

// Tokens per panel, which decide how many columns a block holds.
struct PanelTokens {
  int64_t spmm, sddmm;
};

inline PlanShape plan_shape(const int32_t* crow, int64_t rows, int64_t cols, int64_t tokens) {
  const double per_row = rows ? static_cast<double>(crow[rows]) / static_cast<double>(rows) : 0;
  return plan_shape(cols, per_row, tokens);
}

struct TransposedShape {
  int64_t rows, cols;
};

inline TransposedShape transposed_shape(int64_t rows, int64_t cols, int64_t groups, int64_t taps) {
  return {cols / taps * groups, rows / groups * taps};
}

inline std::vector<int32_t> build_transposed(const int32_t* crow, const int32_t* col, int64_t rows,
                                             int64_t cols, int64_t groups, int64_t taps,
                                             PanelTokens tokens) {
  const TransposedShape t = transposed_shape(rows, cols, groups, taps);
  const int64_t nnz = crow[rows], per_group = rows / groups, in_per_group = cols / taps;
  std::vector<int32_t> out(kPlanHeader + t.rows + 1 + 2 * nnz, 0);
  int32_t* tcrow = out.data() + kPlanHeader;
  int32_t *tcol = tcrow + t.rows + 1, *perm = tcol + nnz;
  const auto row_of = [&](int64_t r, int32_t c) { return r / per_group * in_per_group + c / taps; };
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t i = crow[r]; i < crow[r + 1]; ++i) ++tcrow[row_of(r, col[i]) + 1];
  for (int64_t r = 0; r < t.rows; ++r) tcrow[r + 1] += tcrow[r];
  std::vector<int32_t> next(tcrow, tcrow + t.rows);
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t i = crow[r]; i < crow[r + 1]; ++i) {
      const int32_t at = next[row_of(r, col[i])]++;
      tcol[at] = static_cast<int32_t>(r % per_group * taps + col[i] % taps);
      perm[at] = i;
    }
  const std::vector<int32_t> plan = build_plan(tcrow, tcol, t.rows, t.cols, groups,
                                               plan_shape(tcrow, t.rows, t.cols, tokens.spmm));
  const std::vector<int32_t> values_plan =
      build_plan(crow, col, rows, cols, groups, plan_shape(crow, rows, cols, tokens.sddmm));
  const int32_t header[] = {kTransposedMagic, static_cast<int32_t>(t.rows),
                            static_cast<int32_t>(t.cols), static_cast<int32_t>(nnz),
                            static_cast<int32_t>(plan.size())};
  std::copy(header, header + 5, out.begin());
  out.insert(out.end(), plan.begin(), plan.end());
  out.insert(out.end(), values_plan.begin(), values_plan.end());
  return out;
}

inline bool view_transposed(const int32_t* p, int64_t size, TransposedShape t, int64_t nnz,
                            int64_t groups, Transposed* v) {
  if (size < kPlanHeader || p[0] != kTransposedMagic || p[1] != t.rows || p[2] != t.cols ||
      p[3] != nnz)
    return false;
  v->crow = p + kPlanHeader;
  v->col = v->crow + t.rows + 1;
  v->perm = v->col + nnz;
  const int32_t* plan = v->perm + nnz;
  return size - (plan - p) > p[4] && view_plan(plan, p[4], t.rows, t.cols, nnz, groups, &v->plan);
}

// The plan of the weight gradient inside of what build_transposed made.
inline bool view_values_plan(const int32_t* p, int64_t size, int64_t rows, int64_t cols,
                             int64_t nnz, int64_t groups, int64_t taps, PlanView* v) {
  Transposed t;
  const TransposedShape shape = transposed_shape(rows, cols, groups, taps);
  if (!view_transposed(p, size, shape, nnz, groups, &t)) return false;
  const int32_t* plan = t.perm + nnz + p[4];
  return view_plan(plan, size - (plan - p), rows, cols, nnz, groups, v);
}

}  // namespace sparsekern
