// int8 blocks times int8 activations, sums in int32. Lanes lie along the rows of a block, the sums
// of U tokens stay in registers over all blocks of a row of blocks, and what is broadcast from
// memory is a word of a token: on CPUs that run 512-bit operations in two halves a broadcast costs
// a load less than a vector does, so every multiply may have one, and neither activations nor
// results are transposed as floats. See bench/NOTES.md, Low precision.
#include "dynamic.h"

namespace sparsekern {
namespace {

void quantize(const float* x, int64_t n, int32_t* words, int64_t n_words, float* scale) {
  // As integers: not a number is larger than infinity is larger than the rest.
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    bits &= INT32_MAX;
    largest = bits > largest ? bits : largest;
  }
  constexpr int32_t kInfinity = 0x7f800000;
  Quantized* out = reinterpret_cast<Quantized*>(words);
  int64_t i = 0;
  if (largest >= kInfinity) {
    *scale = __builtin_nanf("");
  } else {
    float top;
    __builtin_memcpy(&top, &largest, sizeof(top));
    *scale = top / 127.f > 1.17549435e-38f ? top / 127.f : 1.17549435e-38f;
    const Vec inverse = Vec::set(1.f / *scale);
    for (; i + Vec::N <= n; i += Vec::N) store_rounded(Vec::load(x + i) * inverse, Vec::N, out + i);
    if (i < n) store_rounded(Vec::load(x + i, n - i) * inverse, n - i, out + i);
    i = n;
  }
  for (; i < n_words * kPerWord; ++i) out[i] = static_cast<Quantized>(kZeroWord);
}

template <int U>
struct Width {
  static constexpr int value = U;
};

// Tokens [t, t + n) as (words, U), beyond n whatever.
template <int U>
SK_INLINE void fill_tile(const DynamicArgs& a, Width<U>, int64_t t, int64_t n, int32_t* tile) {
  const int32_t* x = a.x + t * a.words;
  if constexpr (U == Vec::N) {
    for (int64_t k = 0; k < a.words; k += U) {
      const int64_t cols = a.words - k < U ? a.words - k : U;
      transpose_tile(reinterpret_cast<const float*>(x + k), a.words, n,
                     reinterpret_cast<float*>(tile + k * U), U, cols, true);
    }
  } else {
    for (int64_t k = 0; k < a.words; ++k)
      for (int64_t u = 0; u < U; ++u) tile[k * U + u] = u < n ? x[u * a.words + k] : 0;
  }
}

SK_INLINE int32_t word_of(const int8_t* p) {
  uint32_t word;
#if defined(SPARSEKERN_VNNI)
  __builtin_memcpy(&word, p, sizeof(word));
#else
  word = static_cast<uint16_t>(int16_t{p[0]}) | uint32_t{static_cast<uint16_t>(int16_t{p[1]})}
                                                    << 16;
#endif
  return static_cast<int32_t>(word);
}

#if defined(SPARSEKERN_AVX512) && defined(SPARSEKERN_VNNI)
// 16 rows of 16 columns as 4 vectors.
SK_INLINE void pack_16x16(const int8_t* p, int64_t stride, int32_t* out) {
  const __m512i by_column = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i r[4], t[4];
  for (int i = 0; i < 4; ++i, p += 4 * stride) {
    const auto row = [&](int64_t j) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * stride));
    };
    __m512i rows = _mm512_castsi128_si512(row(0));
    if (stride == 16) {
      rows = _mm512_loadu_si512(p);
    } else {
      rows = _mm512_inserti32x4(rows, row(1), 1);
      rows = _mm512_inserti32x4(rows, row(2), 2);
      rows = _mm512_inserti32x4(rows, row(3), 3);
    }
    r[i] = _mm512_permutexvar_epi32(by_column, rows);
  }
  for (int i = 0; i < 2; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[2 * i], r[2 * i + 1], 0x44);
    t[i + 2] = _mm512_shuffle_i32x4(r[2 * i], r[2 * i + 1], 0xEE);
  }
  for (int i = 0; i < 4; i += 2) {
    _mm512_storeu_si512(out + 16 * i, _mm512_shuffle_i32x4(t[i], t[i + 1], 0x88));
    _mm512_storeu_si512(out + 16 * i + 16, _mm512_shuffle_i32x4(t[i], t[i + 1], 0xDD));
  }
}
#endif

// Rows [0, n) of a block from its row `p` on as (words, L), rows beyond are zero.
template <int L>
SK_INLINE void pack_block(const int8_t* p, int64_t cols, int64_t n, int32_t* out) {
#if defined(SPARSEKERN_AVX512) && defined(SPARSEKERN_VNNI)
  if (L == 16 && n == 16 && cols % 16 == 0) {
    for (int64_t k = 0; k < cols; k += 16) pack_16x16(p + k, cols, out + k * 4);
    return;
  }
#endif
  for (int64_t k = 0; k < cols; k += kPerWord, out += L)
    for (int64_t l = 0; l < L; ++l) out[l] = l < n ? word_of(p + l * cols + k) : 0;
}

// Stores rows [row, row + rows) of token t.
template <int L>
SK_INLINE void finish(const DynamicArgs& a, Lanes<L> sums, Vec scale, Vec bias, int64_t t,
                      int64_t row, int64_t rows) {
  const Vec y = activate(fma(sums.floats() * scale, Vec::set(a.x_scales[t]), bias), a.activation);
  float* out = a.y + t * a.view.rows + row;
  // A masked store is slow on some CPUs.
  if (rows == Vec::N) y.store(out);
  else y.store(out, rows);
}

// One chunk of L rows of a row of blocks.
template <int L>
struct Chunk {
  const int32_t* col;
  const int8_t* values;  // of the first row of the chunk in the first block
  int64_t count, block_cols, block_size;
  int64_t filled;     // rows of a block from the first one on, up to L
  int64_t row, rows;  // of the matrix, up to L

  SK_INLINE int64_t block_words() const { return block_cols / kPerWord; }
  SK_INLINE void pack(int64_t i, int32_t* out) const {
    pack_block<L>(values + i * block_size, block_cols, filled, out);
  }
};

// Adds what the shift of the activations brings into the sums of a block.
template <int L>
SK_INLINE Lanes<L> add_shift(const int32_t* packed, int64_t words, Lanes<L> sum) {
  const Lanes<L> zero = Lanes<L>::set(kZeroWord);
  if constexpr (kZeroWord != 0)
    for (int64_t k = 0; k < words; ++k) sum = dot(zero, Lanes<L>::load(packed + k * L), sum);
  return sum;
}

// Whatever type the word was written as.
SK_INLINE uint32_t word_at(const int32_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return word;
}

// Words of a block times U tokens.
template <int L, int U>
SK_INLINE void block_products(const int32_t* w, const int32_t* x, int64_t words, Lanes<L>* acc) {
  for (int64_t k = 0; k < words; ++k, w += L, x += U) {
    const Lanes<L> wv = Lanes<L>::load(w);
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) acc[u] = dot(Lanes<L>::set(word_at(x + u)), wv, acc[u]);
  }
}

template <int L, int U>
SK_INLINE void finish_tile(const DynamicArgs& a, const Chunk<L>& c, const Lanes<L>* acc, int64_t t,
                           int64_t n) {
  const Vec scale = Vec::load(a.scales + c.row, c.rows);
  const Vec bias = a.bias ? Vec::load(a.bias + c.row, c.rows) : Vec::set(0.f);
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u) {
    if (u >= n) break;
    finish(a, acc[u], scale, bias, t + u, c.row, c.rows);
  }
}

// U tokens from t on, n of them real; `packed` holds all blocks.
template <int L, int U>
SK_INLINE void chunk_tile(const DynamicArgs& a, const Chunk<L>& c, const int32_t* packed,
                          Lanes<L> start, const int32_t* tile, int64_t t, int64_t n) {
  const int64_t words = c.block_words();
  Lanes<L> acc[U];
  for (int u = 0; u < U; ++u) acc[u] = start;
  for (int64_t i = 0; i < c.count; ++i)
    block_products<L, U>(packed + i * words * L, tile + c.col[i] * words * U, words, acc);
  finish_tile<L, U>(a, c, acc, t, n);
}

// The only tile of a panel: each block is packed right before it is used, and stays in L1.
template <int L, int U>
SK_INLINE void only_tile(const DynamicArgs& a, const Chunk<L>& c, int32_t* packed,
                         const int32_t* tile, int64_t t, int64_t n) {
  const int64_t words = c.block_words();
  Lanes<L> acc[U], shift = Lanes<L>::set(0);
  for (int u = 0; u < U; ++u) acc[u] = Lanes<L>::set(0);
  for (int64_t i = 0; i < c.count; ++i) {
    c.pack(i, packed);
    shift = add_shift(packed, words, shift);
    block_products<L, U>(packed, tile + c.col[i] * words * U, words, acc);
  }
  for (int u = 0; u < U; ++u) acc[u] = acc[u] - shift;
  finish_tile<L, U>(a, c, acc, t, n);
}

// Calls f(Width<U>, token, tokens) for tiles that cover [t, end); the last may be narrower or have
// tokens to spare.
template <int U, class F>
SK_INLINE void for_tiles(int64_t t, int64_t end, F f) {
  for (; end - t > U / 2; t += U) f(Width<U>{}, t, end - t < U ? end - t : U);
  if constexpr (U > 1) {
    if (t < end) for_tiles<U / 2>(t, end, f);
  }
}

// All tokens of a panel times the rows [row, row + rows) of row of blocks b.
template <int L>
void chunk_panel(const DynamicArgs& a, int64_t b, int64_t row, int64_t rows, int64_t t0,
                 int64_t t1) {
  const BlockView& v = a.view;
  int32_t* packed = a.scratch + a.panel * a.words;
  const Chunk<L> c{
      v.col + v.crow[b],           a.values + (v.crow[b] * v.block_rows + row) * v.block_cols,
      v.crow[b + 1] - v.crow[b],   v.block_cols,
      v.block_rows * v.block_cols, v.block_rows - row < L ? v.block_rows - row : L,
      v.row_of(b) + row,           rows};
  if (t1 - t0 <= Vec::N)
    return for_tiles<Vec::N>(t0, t1, [&](auto width, int64_t t, int64_t n) {
      only_tile<L, decltype(width)::value>(a, c, packed, a.scratch, t, n);
    });
  const int64_t words = c.block_words();
  Lanes<L> shift = Lanes<L>::set(0);
  for (int64_t i = 0; i < c.count; ++i) {
    c.pack(i, packed + i * words * L);
    shift = add_shift(packed + i * words * L, words, shift);
  }
  const Lanes<L> start = Lanes<L>::set(0) - shift;
  for_tiles<Vec::N>(t0, t1, [&](auto width, int64_t t, int64_t n) {
    const int32_t* tile = a.scratch + (t - t0) * a.words;
    chunk_tile<L, decltype(width)::value>(a, c, packed, start, tile, t, n);
  });
}

template <int L>
void dynamic_rows(const DynamicArgs& a) {
  const BlockView& v = a.view;
  for (int64_t t0 = a.token_begin; t0 < a.token_end; t0 += a.panel) {
    const int64_t t1 = a.token_end - t0 < a.panel ? a.token_end : t0 + a.panel;
    for_tiles<Vec::N>(t0, t1, [&](auto width, int64_t t, int64_t n) {
      fill_tile(a, width, t, n, a.scratch + (t - t0) * a.words);
    });
    for (int64_t b = a.begin; b < a.end; ++b) {
      const int64_t rows = v.rows_in(b, b + 1);
      for (int64_t r = 0; r < rows; r += L)
        chunk_panel<L>(a, b, r, rows - r < L ? rows - r : L, t0, t1);
    }
  }
}

// Sums of W neighbouring lanes of W vectors, in order.
template <int W>
SK_INLINE Lanes<Vec::N> sums_of(const Lanes<Vec::N>* v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    Lanes<Vec::N> half[W / 2];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) half[i] = pair_sums(v[2 * i], v[2 * i + 1]);
    return sums_of<W / 2>(half);
  }
}

// One token, blocks of W words: lanes along the words of as many rows as a vector holds, which
// reads the blocks as they lie.
template <int W>
__attribute__((noinline)) void one_token(const DynamicArgs& a, int64_t t) {
  constexpr int64_t N = Vec::N;
  const BlockView& v = a.view;
  const int64_t block = v.block_rows * v.block_cols;
  const Lanes<N> zero = Lanes<N>::set(kZeroWord);
  for (int64_t b = a.begin; b < a.end; ++b) {
    const int64_t rows = v.rows_in(b, b + 1);
    for (int64_t r = 0; r < rows; r += N) {
      Lanes<N> sum[W], shift[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) sum[i] = shift[i] = Lanes<N>::set(0);
      for (int64_t i = v.crow[b]; i < v.crow[b + 1]; ++i) {
        const int8_t* values = a.values + i * block + r * v.block_cols;
        const Lanes<N> x = Lanes<N>::template repeat<W>(a.x + t * a.words + v.col[i] * W);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
          const Lanes<N> w = Lanes<N>::load_values(values + j * N * kPerWord);
          sum[j] = dot(x, w, sum[j]);
          if constexpr (kZeroWord != 0) shift[j] = dot(zero, w, shift[j]);
        }
      }
      const int64_t row = v.row_of(b) + r, n = rows - r < N ? rows - r : N;
      finish(a, sums_of<W>(sum) - sums_of<W>(shift), Vec::load(a.scales + row, n),
             a.bias ? Vec::load(a.bias + row, n) : Vec::set(0.f), t, row, n);
    }
  }
}

// Whether one_token took the work.
SK_INLINE bool run_one_token(const DynamicArgs& a) {
  if (a.token_end - a.token_begin != 1 || a.view.block_rows % Vec::N) return false;
  const int64_t words = a.view.block_cols / kPerWord;
  if (words == 2) one_token<2>(a, a.token_begin);
  else if (words == 4) one_token<4>(a, a.token_begin);
  else if (words == 8 && Vec::N >= 8) one_token<8>(a, a.token_begin);
  else return false;
  return true;
}

// As many lanes as the rows of a block fill.
void dynamic_spmm(const DynamicArgs& a) {
  if (run_one_token(a)) return;
  [[maybe_unused]] const int64_t rows = a.view.block_rows;
#if defined(SPARSEKERN_AVX512)
  if (rows % 16 == 0 || (rows > 8 && rows % 4)) return dynamic_rows<16>(a);
#endif
#if defined(SPARSEKERN_AVX512) || defined(SPARSEKERN_AVX2)
  if (rows % 8 == 0 || (rows > 4 && rows % 4)) return dynamic_rows<8>(a);
#endif
  dynamic_rows<4>(a);
}

const DynamicKernels dynamic_kernels = {kPerWord, quantize, dynamic_spmm};

}  // namespace
}  // namespace sparsekern
