// int8 blocks times int8 activations: what the ops hand to the kernels. See dynamic.inl.
#pragma once
#include "kernels.h"

namespace sparsekern {

// Activations as the instructions of a table want them: words of 32 bits, `per_word` neighbouring
// columns each. Columns up to the end of the last block stand for zero.
struct DynamicArgs {
  BlockView view;         // of a matrix; block_cols a multiple of 4
  const int8_t* values;   // (n_blocks, block_rows, block_cols)
  const float* scales;    // (rows,)
  const float* bias;      // (rows,) or null
  const int32_t* x;       // (tokens, words)
  const float* x_scales;  // (tokens,)
  int64_t words;
  Activation activation;
  float* y;            // (tokens, rows)
  int64_t begin, end;  // rows of blocks
  int64_t token_begin, token_end;
  int64_t panel;     // tokens that share what is packed, a multiple of the vector's width
  int32_t* scratch;  // dynamic_scratch() words, 64-byte aligned
};

struct DynamicKernels {
  int64_t per_word;
  // One token: x (n,) -> words of x / scale, rounded to nearest (ties to even); scale = largest
  // |x| / 127, NaN where an x is not finite.
  void (*quantize)(const float* x, int64_t n, int32_t* words, int64_t n_words, float* scale);
  // y = act(scales * x_scales * (values * x) + bias)
  void (*spmm)(const DynamicArgs&);
};

constexpr int64_t kMaxLanes = 16;

// Words of a row of blocks, packed: a chunk of up to kMaxLanes rows at a time.
inline int64_t dynamic_packed(const DynamicArgs& a) {
  return a.words * kMaxLanes;
}
inline int64_t dynamic_scratch(const DynamicArgs& a) {
  return a.panel * a.words + dynamic_packed(a);
}

}  // namespace sparsekern
