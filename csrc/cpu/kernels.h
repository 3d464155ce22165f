// The table of CPU kernels, one instance per instruction set, chosen once at run time.
// Plain pointers in, plain pointers out: the units behind this header know nothing of torch and use
// no library templates, so that code compiled for a newer CPU can never leak into a common
// function.
#pragma once
#include <cstdint>

namespace sparsekern {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kRelu6 = 4 };

// A row of the sparse matrix inside one block of columns: `count` values from `start` on, counted
// in the order of the CSR matrix.
struct Run {
  int32_t row, start, count;
};

// Rows of a tile hold the same columns inside their block of columns: block and vector patterns.
constexpr int kTileRows = 4;

// What the one-token kernels read instead of int32 columns, see spmv_plan.h.
enum SpmvIndex : int32_t { kSpmvNone = 0, kSpmvColumns = 1, kSpmvBitmap = 2 };

struct SpmvView {
  SpmvIndex kind;
  int64_t blocks;           // blocks of columns of kSpmvColumns
  const int32_t* words;     // bitmap: (rows, words of 64 bits); columns: (rows, blocks - 1) ends
  const uint16_t* columns;  // (nnz,) counted from the start of the block
};

// Columns in each block but the last: whole cache lines of x.
inline int64_t spmv_width(int64_t cols, int64_t blocks) {
  return ((cols + blocks - 1) / blocks + 15) / 16 * 16;
}

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
  SpmvView spmv;
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

// Channels copied into lines, see lines.h. y.phase_size counts the rows of a phase that are filled.
struct LineFill {
  const float* src;  // (channels, y.size, x.size)
  float* dst;
  PlaneAxis y, x;
  const int64_t* shift;  // (copies,)
  int64_t channels, copies, copy_lines, pitch, phase_rows;
  int64_t row0;  // of the strip, in the grid
};

// Where the vectors of a panel belong in a row of the result, and how many lanes of them.
struct LineOut {
  int64_t at[8], lanes[8];
};

// The product of a strip, see lines.h.
struct LineArgs {
  PlanView plan;
  const float* packed;    // (nnz,) in the order of the runs
  const uint16_t* lines;  // (nnz,) from the first channel of the block of columns
  const float* bias;      // (rows,) or null
  Activation activation;
  // One of the two: the first line of the strip in the first channel of the group, as the image
  // lies; or how to copy (fill.dst not null), with src of the first channel.
  const float* source;
  LineFill fill;
  int64_t channel_lines, taps;
  int64_t row_block_begin, row_block_end;
  int64_t n_lines, pitch, out_w;  // of the strip; lines and floats of a row
  float* out;                     // first row of the strip, of row 0 of the matrix
  int64_t pixels;                 // floats between two rows of the matrix
  const float* residual;          // laid out as `out`, added before the activation; or null
  bool stream;                    // write around the caches; every line of `out` is whole
  int64_t vectors;                // lines per panel
  float* sums;                    // (rows of a block, n_lines) lines
};

// A depthwise convolution: one channel of one image, and the rows of the matrix that read it. The
// channel is padded into a plane, see planes.h, where it cannot be read as it lies.
struct DepthwiseArgs {
  PlaneArgs plane;
  // 3 or 5: a square kernel of this size, not dilated, of equal strides 1 or 2; 0: any other
  int64_t square;
  const int64_t* tap_offset;  // (taps,)
  int64_t pitch, out_h, out_w;
  int64_t rows;
  const int32_t* crow;  // of the first of these rows
  const int32_t* col;   // tap of each value
  const float* values;
  const float* bias;  // of the first row, or null
  Activation activation;
  float* out;             // (rows, out_h, out_w)
  const float* residual;  // the same, added before the activation; or null
};

struct SpmmArgs {
  PlanView plan;
  const float* values;  // (nnz,) in the order of the CSR matrix, or null
  const float* packed;  // (nnz,) in the order of the runs, made by pack; or null
  const float* bias;    // (rows,) or null
  Activation activation;
  const float* residual;  // laid out as sink.data, added before the activation; or null
  Source source;
  Sink sink;
  int64_t row_block_begin, row_block_end;
  int64_t token_begin, token_end;
  int64_t vectors;  // vectors of tokens per panel: 1, 2, 4 or 8
  float* scratch;   // spmm_scratch() floats, 64-byte aligned
};

// Tokens side by side in the panel of spmv.
inline int64_t spmv_panel(int64_t tokens) {
  return tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16;
}

struct SpmvArgs {
  SpmvView index;
  int64_t rows, cols, nnz;
  const int32_t* crow;
  const float* values;
  const float* x;      // (tokens, cols)
  const float* panel;  // x as (cols, spmv_panel(tokens)), only for columns and several tokens
  const float* bias;   // (rows,) or null
  Activation activation;
  float* y;  // (tokens, rows)
  int64_t row_begin, row_end;
  int64_t tokens;
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

// A matrix in blocks of block_rows x block_cols, compressed by rows of blocks. For a convolution a
// block lies at one kernel position: its column number is channel block * taps + tap. Rows and
// channels need not be multiples of the block; what a block has beyond them is never read. Rows of
// blocks start anew in each group.
struct BlockView {
  const int32_t* crow;             // (groups * block_rows_per_group() + 1,)
  const int32_t* col;              // (n_blocks,), rising inside a row of blocks
  int64_t rows, channels;          // rows of all groups, channels of one group
  int64_t taps, groups, n_blocks;  // taps 1 for a matrix
  int64_t block_rows, block_cols;
  int64_t cols() const { return channels * taps; }
  int64_t rows_per_group() const { return rows / groups; }
  int64_t block_rows_per_group() const { return (rows_per_group() + block_rows - 1) / block_rows; }
  int64_t channel_blocks() const { return (channels + block_cols - 1) / block_cols; }
  // First row of row of blocks b, counted over all groups.
  int64_t row_of(int64_t b) const {
    const int64_t per_group = block_rows_per_group();
    return b / per_group * rows_per_group() + b % per_group * block_rows;
  }
  // Rows of the matrix in rows of blocks [begin, end) of one group.
  int64_t rows_in(int64_t begin, int64_t end) const {
    const int64_t group_end = (begin / block_rows_per_group() + 1) * rows_per_group();
    const int64_t full = (end - begin) * block_rows, left = group_end - row_of(begin);
    return full < left ? full : left;
  }
};

struct BlockArgs {
  BlockView view;
  const float* values;      // (n_blocks, block_rows, block_cols)
  const int8_t* quantized;  // what takes its place where `scales` is set:
  const float* scales;      // (rows,) what to multiply the sums by, or null
  const float* bias;        // (rows,) or null
  Activation activation;
  Source source;
  Sink sink;
  int64_t begin, end;  // rows of blocks, all of one group
  int64_t token_begin, token_end;
  int64_t vectors;          // vectors of tokens per panel: 1, 2, 4 or 8
  int64_t channel_blocks;   // per panel, so that it stays in the cache
  int64_t row_blocks;       // rows of blocks whose sums are kept at once
  float* scratch;           // block_scratch() floats, 64-byte aligned
  int64_t panels() const {  // at least one, which starts the sums
    const int64_t n = (view.channel_blocks() + channel_blocks - 1) / channel_blocks;
    return n > 1 ? n : 1;
  }
};

struct BlockSddmmArgs {
  BlockView view;
  const float* grad_panels;   // panels of the left operand made by fill_panel, one per token panel
  int64_t grad_panel_stride;  // floats between two panels
  Source source;              // the right operand
  float* out;                 // (n_blocks, block_rows, block_cols), added to
  int64_t begin, end;         // rows of blocks, all of one group
  int64_t channel_block_begin, channel_block_end;
  int64_t tokens;
  float* scratch;  // columns of the range x panel width floats, then 2 * (end - begin) int32
};

// A matrix of which every group of `m` columns of a row keeps n. For a convolution the columns of a
// group are input channels at one kernel position, and the slots of a row count (group of channels,
// kernel position, n). `bits` bits of the index hold where in its group the value of a slot lies.
struct NmView {
  const uint8_t* index;    // (rows, row_bytes()), lowest bits first
  int64_t rows, channels;  // rows of all groups of the convolution, channels of one
  int64_t taps, groups, n, m;
  int64_t bits() const { return m <= 4 ? 2 : 4; }
  int64_t cols() const { return channels * taps; }
  int64_t channel_groups() const { return (channels + m - 1) / m; }
  int64_t slots() const { return channel_groups() * taps * n; }
  int64_t row_bytes() const { return (slots() * bits() + 7) / 8; }
  int64_t position(const uint8_t* row, int64_t slot) const {
    const int64_t bit = slot * bits();
    return row[bit >> 3] >> (bit & 7) & ((1 << bits()) - 1);
  }
};

struct NmArgs {
  NmView view;
  const uint16_t* offset;  // (panels, rows, slots of a panel): column of a slot within its panel
  const float* values;     // (rows, slots())
  const float* bias;       // (rows,) or null
  Activation activation;
  Source source;
  Sink sink;
  int64_t row_begin, row_end;  // of one group
  int64_t token_begin, token_end;
  int64_t vectors;         // vectors of tokens per panel: 1, 2, 4 or 8
  int64_t channel_groups;  // per panel, so that it stays in the L1 cache
  int64_t row_block;       // rows whose sums are kept at once
  float* scratch;          // nm_scratch() floats, 64-byte aligned
};

// One channel of a batch of images: `images` rows of `pixels` floats, `stride` floats apart.
struct NormArgs {
  const float *x, *grad;  // grad: of what norm_apply gives, only for norm_grad
  float* out;
  int64_t images, pixels, stride;
  float mean, scale, shift;  // out = act((x - mean) * scale + shift)
  Activation activation;     // none, relu or relu6
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

struct DynamicKernels;  // products of int8 with int8, see dynamic.h

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
  // As spmm, of a strip of an image that lies in lines or is copied into them, see lines.h.
  void (*spmm_lines)(const LineArgs&);
  // Pads one channel of one image and splits it into phases, see planes.h.
  void (*fill_plane)(const PlaneArgs&);
  void (*depthwise)(const DepthwiseArgs&);
  // y[t, r] = act(sum_k values[r, k] * x[t, k] + bias[r]) for rows [row_begin, row_end), few tokens
  void (*spmv)(const SpmvArgs&);
  double bitmap_density;  // share of stored weights from which on spmv runs faster from a bitmap
  // The same three for blocks; sddmm adds to its output.
  void (*block_spmm)(const BlockArgs&);
  void (*block_spmv)(const BlockArgs&, const float* x, float* y);
  void (*block_sddmm)(const BlockSddmmArgs&);
  // The first two for N:M.
  void (*nm_spmm)(const NmArgs&);
  void (*nm_spmv)(const NmArgs&, const float* x, float* y);
  // As pack, of int8 values times the scale of their row.
  void (*pack_int8)(const PlanView& plan, const int8_t* values, const float* scales, float* out,
                    int64_t group_begin, int64_t group_end);
  // out[i] = scales[row] * values[i] for the values of `rows` rows, in the order of the CSR matrix
  void (*spread_int8)(const int32_t* crow, const int8_t* values, const float* scales, float* out,
                      int64_t rows);
  // Batch normalisation of one channel, see norm.inl: out[0] = mean of x, out[1] = its variance,
  // biased
  void (*norm_moments)(const NormArgs&, double* out);
  void (*norm_apply)(const NormArgs&);
  // The gradient of x, given the reciprocal of the deviation; sums[0] = sum of the gradient before
  // the activation, sums[1] = its dot product with x - mean
  void (*norm_grad)(const NormArgs&, double rstd, double* sums);
  const PairKernels* pairs;  // null where the instructions are missing
  const DynamicKernels* dynamic;
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const PairKernels pair_kernels_avx512bf16;
extern const DynamicKernels dynamic_kernels_avxvnni, dynamic_kernels_avx512vnni;
#endif

inline int64_t largest_row_block(const PlanView& plan) {
  int64_t rows = 0;
  for (int64_t b = 0; b < plan.n_row_blocks; ++b) {
    const int64_t n = plan.row_start[b + 1] - plan.row_start[b];
    rows = n > rows ? n : rows;
  }
  return rows;
}

inline int64_t spmm_scratch(const PlanView& plan, int64_t panel) {
  const int64_t blocks = plan.n_row_blocks > 1 ? plan.n_col_blocks : 1;
  return (blocks * plan.col_block + largest_row_block(plan)) * panel;
}

inline int64_t nm_scratch(const NmArgs& a, int64_t panel) {
  const int64_t per_panel = a.channel_groups * a.view.m * a.view.taps;
  const int64_t panels = (a.view.channel_groups() + a.channel_groups - 1) / a.channel_groups;
  return (panels * per_panel + a.row_block) * panel;
}

inline int64_t block_scratch(const BlockArgs& a, int64_t panel) {
  const int64_t per_panel = a.channel_blocks * a.view.block_cols * a.view.taps;
  // int8 blocks of one row of blocks in one panel, spread to float32
  const int64_t spread = a.scales ? per_panel * a.view.block_rows : 0;
  return (a.panels() * per_panel + a.row_blocks * a.view.block_rows) * panel + a.row_blocks +
         spread;
}

}  // namespace sparsekern
