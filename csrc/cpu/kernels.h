// The table of CPU kernels, one instance per instruction set, chosen once at run time.
// Plain pointers in, plain pointers out: the units behind this header know nothing of torch and use
// no library templates, so that code compiled for a newer CPU can never leak into a common
// function.
#pragma once
#include <cstdint>

namespace sparsekern {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };

// A row of the sparse matrix inside one block of columns: `count` values from `start` on, counted
// in the order of the CSR matrix.
struct Run {
  int32_t row, start, count;
};

// Rows of a tile hold the same columns inside their block of columns: block and vector patterns.
constexpr int kTileRows = 4;

// A schedule over a CSR matrix, see plan.h. Runs are grouped by (row block, column block). A group
// starts with its row tiles, kTileRows runs each; the other runs come in order of falling count, so
// that the exit of the inner loop is predicted.
struct PlanView {
  int64_t rows, cols, nnz;
  int64_t col_block;  // columns per column block
  int64_t n_col_blocks, n_row_blocks;
  const int32_t* row_start;  // (n_row_blocks + 1,)
  const int32_t* run_start;  // (n_row_blocks * n_col_blocks + 1,)
  const int32_t* n_tiles;    // (n_row_blocks * n_col_blocks,) row tiles at the start of a group
  // (n_row_blocks * n_col_blocks + 1,) values before each group, in the order of the runs
  const int32_t* value_start;
  const Run* runs;
  // (nnz,) column of each value from the start of its block of columns, in the order of the runs,
  // so that a kernel reads one stream
  const uint16_t* offsets;
};

// Pairs of columns for the bfloat16 kernels, see pairs.h: column j of `plan` stands for the columns
// 2j and 2j + 1 of the matrix. A value is a word of two bfloat16, the first one in the low half,
// zero where it is not stored. Run::start counts stored values of the matrix.
struct PairView {
  PlanView plan;
  // 2 bits per pair in the order of the runs: the first (low bit) and the second one is stored
  const uint8_t* stored;
};

// Where the dense operand comes from. "Token" t is a row of a matrix, or an output pixel of an
// image.
struct MatrixSource {
  const float* data;  // (tokens, cols), row-major
  int64_t stride;     // floats between two tokens
};

// An image prepared for a convolution, see planes.h: every tap reads position (y, x) of the output
// grid at plane[tap_offset + y * pitch + x], so all taps share one list of stretches.
struct ImageSource {
  const float* planes;  // (images, channels, plane_size)
  int64_t channels, plane_size, pitch;
  int64_t channel0;  // first channel of this group
  int64_t taps;
  const int64_t* tap_offset;  // (taps,)
  int64_t out_h, out_w;       // the grid of positions that a token indexes
  bool slack;                 // a vector may be read past the end of a stretch
};

struct Source {
  const MatrixSource* matrix;  // exactly one of the two is set
  const ImageSource* image;
};

struct Sink {
  float* data;
  bool token_major;    // true: (tokens, rows) with `stride`; false: (images, rows, pixels)
  int64_t stride;      // token_major: floats between tokens; else rows in all groups
  int64_t row_offset;  // added to the row of the matrix (first row of a group)
  int64_t pixels;      // positions per image, only when not token_major
  bool stream;         // too much for the caches: write around them where whole lines are written
};

// One axis of a padded plane, see planes.h.
struct PlaneAxis {
  int64_t size, phase_size;  // of the source, of a phase
  int64_t stride, pad, up;
  uint64_t phases;  // bit p % 64: a tap reads phase p
};

struct PlaneArgs {
  const float* src;  // (y.size, x.size)
  float* dst;
  PlaneAxis y, x;
};

struct SpmmArgs {
  PlanView plan;
  const float* values;  // (nnz,) in the order of the CSR matrix, or null
  const float* packed;  // (nnz,) in the order of the runs, made by pack; or null
  const float* bias;    // (rows,) or null
  Activation activation;
  Source source;
  Sink sink;
  int64_t row_block_begin, row_block_end;
  int64_t token_begin, token_end;
  int64_t vectors;  // vectors of tokens per panel: 1, 2, 4 or 8
  float* scratch;   // spmm_scratch() floats, 64-byte aligned
};

struct SddmmArgs {
  PlanView plan;
  const float* grad_panels;   // panels of the left operand made by fill_panel, one per token panel
  int64_t grad_panel_stride;  // floats between two panels
  Source source;              // the right operand
  float* out;                 // (nnz,) in the order of the runs
  int64_t row_block, col_block_begin, col_block_end;
  int64_t tokens;
  float* scratch;  // plan.col_block * panel width floats
};

// Products of bfloat16 pairs, summed in float32.
struct PairKernels {
  int64_t vectors;  // vectors of tokens per panel that run best
  // out[i] = the words of two values for the groups [group_begin, group_end)
  void (*pack)(const PairView& pairs, const uint16_t* values, float* out, int64_t group_begin,
               int64_t group_end);
  // As Kernels::spmm for a matrix: args.plan is that of the pairs, the source and `packed` hold
  // words of two bfloat16, sink.data points to bfloat16 and is counted in them.
  void (*spmm)(const SpmmArgs&);
};

struct Kernels {
  const char* name;
  int64_t width;          // floats in a vector
  int64_t spmm_vectors;   // vectors of tokens per panel of spmm that runs best
  int64_t sddmm_vectors;  // vectors of tokens per panel of sddmm
  // out[i] = values[i-th in the order of the runs] for the groups [group_begin, group_end); with
  // `perm`, values[perm[i]].
  void (*pack)(const PlanView& plan, const float* values, const int32_t* perm, float* out,
               int64_t group_begin, int64_t group_end);
  // values[i-th in the order of the runs] = packed[i] for the groups [group_begin, group_end)
  void (*unpack)(const PlanView& plan, const float* packed, float* values, int64_t group_begin,
                 int64_t group_end);
  // out[t, r] = act(sum_k values[r, k] * source[t, k] + bias[r])
  void (*spmm)(const SpmmArgs&);
  // out[i] = sum_t grad[t, row(i)] * source[t, col(i)]
  void (*sddmm)(const SddmmArgs&);
  // Panel of `vectors` vectors of tokens for columns [col_begin, col_end): dst[(k -
  // col_begin)][token]
  void (*fill_panel)(const Source&, float* dst, int64_t vectors, int64_t token_begin,
                     int64_t token_end, int64_t col_begin, int64_t col_end);
  // Pads one channel of one image and splits it into phases, see planes.h.
  void (*fill_plane)(const PlaneArgs&);
  // y[r] = act(sum_k values[r, k] * x[k] + bias[r]) for rows [row_begin, row_end)
  void (*spmv)(const int32_t* crow, const int32_t* col, const float* values, const float* x,
               const float* bias, Activation activation, float* y, int64_t row_begin,
               int64_t row_end);
  const PairKernels* pairs;  // null where the instructions are missing
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const PairKernels pair_kernels_avx512bf16;
#endif

inline int64_t spmm_scratch(const PlanView& plan, int64_t panel) {
  const int64_t blocks = plan.n_row_blocks > 1 ? plan.n_col_blocks : 1;
  int64_t rows = 0;
  for (int64_t b = 0; b < plan.n_row_blocks; ++b) {
    const int64_t n = plan.row_start[b + 1] - plan.row_start[b];
    rows = n > rows ? n : rows;
  }
  return (blocks * plan.col_block + rows) * panel;
}

}  // namespace sparsekern
