// Parts of x W^T for few tokens and an unstructured weight of 16 bits, by gathers from shared
// memory.
//
// The weight is a list of 4-byte words, value above column, per slice of columns and row; lists
// begin at 16 bytes (sparsekern/ops/csr_packed.py). Eight lanes take a row, four words a lane at a
// time. A block holds a slice of x in shared memory with the tokens of a column side by side, so
// that one load brings all of them; the lists are ordered such that the eight lanes then mostly
// meet different banks. Words that fill up a list name the column behind the slice, which is 0.
#include "decode_epilogue.h"

namespace sparsekern {
namespace gpu {
namespace {

constexpr int kThreads = 256, kLanes = 8, kRowsAtOnce = kThreads / kLanes;
constexpr int kAhead = 2;  // loads under way in a lane

struct Csr {
  DecodeTask task;
  const unsigned char* words;
  const int32_t* starts;  // (slices * rows + 1), in units of 16 bytes
  int width, rows_of_block;
};

// The tokens of a column, one after the other in 32-bit words.
template <int kTokens>
struct Column {
  uint32_t w[(kTokens + 1) / 2];
};
template <>
struct alignas(8) Column<4> {
  uint32_t w[2];
};
template <>
struct alignas(16) Column<8> {
  uint32_t w[4];
};

template <int kTokens>
SPARSEKERN_DEVICE void store_column(int i, const Column<kTokens>& column) {
  reinterpret_cast<Column<kTokens>*>(shared())[i] = column;
}
template <>
SPARSEKERN_DEVICE void store_column<1>(int i, const Column<1>& column) {
  reinterpret_cast<uint16_t*>(shared())[i] = static_cast<uint16_t>(column.w[0]);
}

// x of kTokens tokens and the columns of a slice, transposed, and a column of zeros. In the place
// of tokens that are not there stands the first one again: what comes of them is not stored.
template <int kTokens>
SPARSEKERN_DEVICE void stage_slice(const DecodeTask& t, int width, int first, int token) {
  const uint16_t* x = static_cast<const uint16_t*>(t.x);
  int from[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j)
    from[j] = (token + j < t.tokens ? token + j : token) * t.cols + first;
  for (int i = thread(); i <= width; i += kThreads) {
    Column<kTokens> column = {};
    if (i < width && first + i < t.cols) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j)
        column.w[j / 2] |= static_cast<uint32_t>(x[from[j] + i]) << (j % 2 * 16);
    }
    store_column(i, column);
  }
}

template <class T, int kTokens>
SPARSEKERN_DEVICE void add_word(float (&sum)[kTokens], uint32_t word) {
  const unsigned char* at = shared() + (word & 0xffffu) * (2 * kTokens);
  const float value = T::high(word);
  if constexpr (kTokens == 1) {
    sum[0] += value * T::low(*reinterpret_cast<const uint16_t*>(at));
  } else {
    const Column<kTokens> x = *reinterpret_cast<const Column<kTokens>*>(at);
#pragma unroll
    for (int j = 0; j < kTokens; j += 2) {
      sum[j] += value * T::low(x.w[j / 2]);
      sum[j + 1] += value * T::high(x.w[j / 2]);
    }
  }
}

// Adds the sums of eight lanes up. Lanes give half of their tokens away while they have several:
// in the end lane l has token l * kTokens / 8, at 0.
template <int kTokens>
SPARSEKERN_DEVICE void add_lanes(float (&sum)[kTokens], int lane) {
  int left = kTokens;
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    if (left == 1) {
      sum[0] += shuffle_xor(sum[0], mask);
      continue;
    }
    left /= 2;
    const bool upper = lane & mask;
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) {
      if (j >= left) break;
      const float keep = upper ? sum[j + left] : sum[j], give = upper ? sum[j] : sum[j + left];
      sum[j] = keep + shuffle_xor(give, mask);
    }
  }
}

template <class T, int kTokens>
SPARSEKERN_KERNEL(kThreads, 4)
csr_decode_kernel(Csr a) {
  const int slice = static_cast<int>(block().y), token = static_cast<int>(block().z) * kTokens;
  stage_slice<kTokens>(a.task, a.width, slice * a.width, token);
  barrier();
  const int lane = thread() % kLanes;
  const int first = static_cast<int>(block().x) * a.rows_of_block;
  for (int base = first; base < first + a.rows_of_block; base += kRowsAtOnce) {
    const int row = base + thread() / kLanes;
    const unsigned char* at = a.words;
    int left = 0;  // loads of the list, less those of the lanes before
    if (row < a.task.rows) {
      const int64_t list = static_cast<int64_t>(slice) * a.task.rows + row;
      const int begin = a.starts[list];
      left = a.starts[list + 1] - begin - lane;
      at += (static_cast<int64_t>(begin) + lane) * 16;
    }
    float sum[kTokens] = {};
    Words word[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (left > k * kLanes) word[k] = load_stream(at + k * kLanes * 16);
    for (; left > 0; left -= kAhead * kLanes, at += kAhead * kLanes * 16)
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (left <= k * kLanes) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) add_word<T, kTokens>(sum, word[k].w[i]);
        const int ahead = kAhead + k;
        if (left > ahead * kLanes) word[k] = load_stream(at + ahead * kLanes * 16);
      }
    add_lanes<kTokens>(sum, lane);
    const int mine = lane * kTokens / kLanes;
    if (lane % (kLanes / kTokens) == 0 && row < a.task.rows && token + mine < a.task.tokens)
      store_sum<T>(sum[0], a.task, a.task.first_part + slice, token + mine, row);
  }
}

template <class T, int kTokens>
const char* launch_tokens(const DecodeTask& task, const void* words, const int32_t* starts,
                          int width, int slices) {
  const int tiles = (task.tokens + kTokens - 1) / kTokens;
  // Few blocks share the reading of x, many fill the device.
  int rows = 4 * kRowsAtOnce;
  while (rows > kRowsAtOnce && (task.rows + rows - 1) / rows * slices * tiles < 512) rows /= 2;
  const Csr a{task, static_cast<const unsigned char*>(words), starts, width, rows};
  const Grid grid{static_cast<unsigned>((task.rows + rows - 1) / rows),
                  static_cast<unsigned>(slices), static_cast<unsigned>(tiles)};
  return launch(csr_decode_kernel<T, kTokens>, grid, kThreads, (width + 1) * kTokens * 2,
                task.device, task.stream, a);
}

template <class T>
const char* launch_csr(const DecodeTask& task, const void* words, const int32_t* starts, int width,
                       int slices) {
  if (task.tokens == 1) return launch_tokens<T, 1>(task, words, starts, width, slices);
  if (task.tokens == 2) return launch_tokens<T, 2>(task, words, starts, width, slices);
  if (task.tokens <= 4) return launch_tokens<T, 4>(task, words, starts, width, slices);
  return launch_tokens<T, 8>(task, words, starts, width, slices);
}

struct Finish {
  DecodeTask task;
  int parts;
};

template <class T>
SPARSEKERN_KERNEL(kThreads, 4)
finish_kernel(Finish a) {
  const int64_t size = static_cast<int64_t>(a.task.tokens) * a.task.rows;
  const int64_t at = static_cast<int64_t>(block().x) * kThreads + thread();
  if (at >= size) return;
  float sum = 0;
  for (int part = 0; part < a.parts; ++part) sum += a.task.parts[part * size + at];
  static_cast<uint16_t*>(a.task.y)[at] =
      finished<T>(sum, a.task, static_cast<int>(at % a.task.rows));
}

}  // namespace
}  // namespace gpu

const char* csr_decode(const DecodeTask& task, const void* words, const int32_t* starts, int width,
                       int slices) {
  return task.half ? gpu::launch_csr<gpu::Float16>(task, words, starts, width, slices)
                   : gpu::launch_csr<gpu::Bfloat16>(task, words, starts, width, slices);
}

const char* finish(const DecodeTask& task, int parts) {
  const int64_t size = static_cast<int64_t>(task.tokens) * task.rows;
  const gpu::Grid grid{static_cast<unsigned>((size + gpu::kThreads - 1) / gpu::kThreads), 1, 1};
  const auto kernel =
      task.half ? gpu::finish_kernel<gpu::Float16> : gpu::finish_kernel<gpu::Bfloat16>;
  return gpu::launch(kernel, grid, gpu::kThreads, 0, task.device, task.stream,
                     gpu::Finish{task, parts});
}

}  // namespace sparsekern
