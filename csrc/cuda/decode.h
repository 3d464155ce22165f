// The kernels for few tokens, as the glue sees them: plain pointers to memory of the device, sizes,
// and what went wrong. Numbers are bfloat16 or float16 (`half`), sums float32.
#pragma once
#include <cstdint>

namespace sparsekern {

// The order of `ACTIVATIONS` in sparsekern/ops/own_cuda.py.
enum class Activation : int { kNone, kRelu, kRelu6, kGelu, kGeluTanh };

// What all of them take. Where `parts` is given, sums go there, (parts, tokens, rows) float32, from
// part `first_part` on, and neither bias nor activation is applied; `finish` does that.
struct DecodeTask {
  const void* x;     // (tokens, cols)
  const void* bias;  // (rows) or null
  void* y;           // (tokens, rows)
  float* parts;
  int first_part;
  int tokens, rows, cols;
  Activation activation;
  bool half;
  int device;
  void* stream;
};

// 2:4 weights in the order of fragments (see decode_nm.cu); K is cut into `split` parts. As a
// `cluster`, at most 8 of them, blocks add their parts up themselves: no `parts`, no `finish`.
const char* nm_decode(const DecodeTask& task, const void* packed, int split, bool cluster);
constexpr int kMaxCluster = 8;
constexpr int kNmTokens = 64;

// Lists of single weights by slices of `width` columns (see decode_csr.cu); a part per slice.
const char* csr_decode(const DecodeTask& task, const void* words, const int32_t* starts, int width,
                       int slices);

// y = act(sum of the parts, in their order, + bias).
const char* finish(const DecodeTask& task, int parts);

}  // namespace sparsekern
