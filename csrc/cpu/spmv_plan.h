// The index of the one-token kernels, the last part of a plan. With one token every weight is read
// once and used once, so the bytes of the index count: a bitmap (an eighth of a byte per dense
// weight) where much is stored, 16-bit columns (two bytes per nonzero) where little is. The values
// stay where they are: row by row, columns rising, they already are what a bitmap packs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace sparsekern {

constexpr int64_t kPlanSpmv = 15;  // where the header of a plan names the kind of index

// Columns are counted from the start of a block, so that the block of x that a row reads stays in
// the L1 cache, and 16 bits are enough for matrices of any width.
constexpr int64_t kSpmvBlock = 16384;  // floats of x: 1 MiB for 16 tokens
constexpr int64_t kSpmvMaxBlock = 65536;
constexpr int64_t kSpmvBlockValues = 48;  // of a row, below which a block does not pay for its loop

inline int64_t spmv_blocks(int64_t cols, int64_t rows, int64_t nnz) {
  const int64_t per_row = rows ? nnz / rows : 0;
  const int64_t wanted = std::min((cols + kSpmvBlock - 1) / kSpmvBlock, per_row / kSpmvBlockValues);
  return std::max({int64_t{1}, wanted, (cols + kSpmvMaxBlock - 1) / kSpmvMaxBlock});
}

inline int64_t bitmap_words(int64_t cols) {
  return (cols + 63) / 64;
}

// How many int32 the index takes.
inline int64_t spmv_size(SpmvIndex kind, int64_t rows, int64_t cols, int64_t nnz) {
  switch (kind) {
    case kSpmvColumns: return rows * (spmv_blocks(cols, rows, nnz) - 1) + (nnz + 1) / 2;
    case kSpmvBitmap: return rows * bitmap_words(cols) * 2;
    default: return 0;
  }
}

inline std::vector<int32_t> build_bitmap(const int32_t* crow, const int32_t* col, int64_t rows,
                                         int64_t cols) {
  std::vector<int32_t> out(spmv_size(kSpmvBitmap, rows, cols, crow[rows]), 0);
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* bits = out.data() + r * bitmap_words(cols) * 2;
    for (int32_t i = crow[r]; i < crow[r + 1]; ++i)
      bits[col[i] / 32] |= static_cast<int32_t>(1u << (col[i] % 32));
  }
  return out;
}

inline std::vector<int32_t> build_columns(const int32_t* crow, const int32_t* col, int64_t rows,
                                          int64_t cols) {
  const int64_t nnz = crow[rows], blocks = spmv_blocks(cols, rows, nnz);
  const int64_t width = spmv_width(cols, blocks);
  std::vector<int32_t> out(spmv_size(kSpmvColumns, rows, cols, nnz), 0);
  uint16_t* columns = reinterpret_cast<uint16_t*>(out.data() + rows * (blocks - 1));
  for (int64_t r = 0; r < rows; ++r) {
    int32_t i = crow[r];
    for (int64_t b = 0; b < blocks; ++b) {
      for (; i < crow[r + 1] && col[i] < (b + 1) * width; ++i)
        columns[i] = static_cast<uint16_t>(col[i] - b * width);
      if (b + 1 < blocks) out[r * (blocks - 1) + b] = i;
    }
  }
  return out;
}

// Appends the index to a plan; `bitmap_density` is the share of stored weights from which on the
// bitmap is the faster one.
inline void append_spmv(std::vector<int32_t>* plan, const int32_t* crow, const int32_t* col,
                        int64_t rows, int64_t cols, double bitmap_density) {
  const double dense = static_cast<double>(rows) * static_cast<double>(cols);
  const SpmvIndex kind = crow[rows] >= bitmap_density * dense ? kSpmvBitmap : kSpmvColumns;
  const std::vector<int32_t> index = kind == kSpmvBitmap ? build_bitmap(crow, col, rows, cols)
                                                         : build_columns(crow, col, rows, cols);
  (*plan)[kPlanSpmv] = kind;
  plan->insert(plan->end(), index.begin(), index.end());
}

// The index at the end of a plan of `size` int32, `used` of them without it. False when it does not
// fit this matrix.
inline bool view_spmv(const int32_t* plan, int64_t size, int64_t used, int64_t rows, int64_t cols,
                      int64_t nnz, SpmvView* v) {
  const int32_t kind = plan[kPlanSpmv];
  if (kind < kSpmvNone || kind > kSpmvBitmap) return false;
  *v = {static_cast<SpmvIndex>(kind), 1, plan + used, nullptr};
  if (v->kind == kSpmvColumns) {
    v->blocks = spmv_blocks(cols, rows, nnz);
    v->columns = reinterpret_cast<const uint16_t*>(plan + used + rows * (v->blocks - 1));
  }
  return size - used == spmv_size(v->kind, rows, cols, nnz);
}

}  // namespace sparsekern
