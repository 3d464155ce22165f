// A vector of floats for the instruction set this unit is compiled for. Each kernel is written once
// over `Vec`; the unit that includes this header decides what it is by its compiler flags.
#pragma once
#include <cstdint>
#if defined(SPARSEKERN_AVX512) || defined(SPARSEKERN_AVX2)
#include <immintrin.h>
#endif

#define SK_INLINE inline __attribute__((always_inline))

namespace sparsekern {
namespace {

#if defined(SPARSEKERN_AVX512)

struct Vec {
  static constexpr int64_t N = 16;
  __m512 v;
  static SK_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SK_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
  // The first n lanes; the others are zero and their memory is not touched.
  static SK_INLINE Vec load(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
  }
  SK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Around the caches; p lies on a multiple of the vector's size. `stream_end` after the last.
  SK_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  static SK_INLINE void stream_end() { _mm_sfence(); }
  // Lanes [first, end) of what lies at p; the others are zero and their memory is not touched.
  static SK_INLINE Vec load_lanes(const float* p, int64_t first, int64_t end) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << end) - (1u << first)), p)};
  }
  SK_INLINE void store(float* p, int64_t n) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  }
  // n int8 as floats
  static SK_INLINE Vec load_int8(const int8_t* p, int64_t n) {
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
  }
  SK_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
};

SK_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
SK_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
SK_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
SK_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
SK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// NaN comes through when it is the second operand, as in torch.
SK_INLINE Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
SK_INLINE Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
// v where the gate is above 0 or NaN, as torch's gradient of relu has it, else zero.
SK_INLINE Vec where_open(Vec gate, Vec v) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate.v, _mm512_setzero_ps(), _CMP_NLE_UQ), v.v)};
}
SK_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)};
}
SK_INLINE Vec exp2i(Vec a) {
  return {_mm512_scalef_ps(_mm512_set1_ps(1.f), a.v)};
}
SK_INLINE Vec abs(Vec a) {
  return {_mm512_abs_ps(a.v)};
}
SK_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN),
                                                        _mm512_castps_si512(sign.v),
                                                        _mm512_castps_si512(magnitude.v), 0xCA))};
}

// Every other lane of 2 N lanes.
SK_INLINE Vec even_lanes(Vec a, Vec b) {
  const __m512i index =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.v, index, b.v)};
}

// Transposes N vectors in place.
SK_INLINE void transpose(Vec* a) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    a[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    a[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
  }
}

// Sums of N vectors in one: lane i is the sum of a[i].
SK_INLINE Vec sum_each(const Vec* a) {
  __m512 t[8], q[4];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v),
                         _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  for (int i = 0; i < 4; ++i)
    q[i] = _mm512_add_ps(_mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0xEE));
  const __m512 lo =
      _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xDD));
  const __m512 hi =
      _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xDD));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xDD))};
}

#elif defined(SPARSEKERN_AVX2)

struct Vec {
  static constexpr int64_t N = 8;
  __m256 v;
  static SK_INLINE __m256i mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static SK_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static SK_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static SK_INLINE Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, mask(n))}; }
  SK_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  SK_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  static SK_INLINE void stream_end() { _mm_sfence(); }
  static SK_INLINE Vec load_lanes(const float* p, int64_t first, int64_t end) {
    return {_mm256_maskload_ps(p, _mm256_andnot_si256(mask(first), mask(end)))};
  }
  SK_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, mask(n), v); }
  static SK_INLINE Vec load_int8(const int8_t* p, int64_t n) {
    uint64_t word = 0;
    if (n == N) __builtin_memcpy(&word, p, N);
    else
      for (int64_t i = 0; i < n; ++i) word |= uint64_t{static_cast<uint8_t>(p[i])} << (8 * i);
    return {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(word))))};
  }
  SK_INLINE float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

SK_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
SK_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
SK_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
SK_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}
SK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
SK_INLINE Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
SK_INLINE Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}
SK_INLINE Vec where_open(Vec gate, Vec v) {
  return {_mm256_and_ps(_mm256_cmp_ps(gate.v, _mm256_setzero_ps(), _CMP_NLE_UQ), v.v)};
}
SK_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT)};
}
SK_INLINE Vec exp2i(Vec a) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a.v), _mm256_set1_epi32(127)), 23))};
}
SK_INLINE Vec abs(Vec a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)};
}
SK_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return {_mm256_or_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.f), magnitude.v),
                       _mm256_and_ps(_mm256_set1_ps(-0.f), sign.v))};
}

SK_INLINE Vec even_lanes(Vec a, Vec b) {
  const __m256 pairs = _mm256_shuffle_ps(a.v, b.v, 0x88);
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xD8))};
}

SK_INLINE void transpose(Vec* a) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    a[i].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    a[i + 4].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}

SK_INLINE Vec sum_each(const Vec* a) {
  const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
  const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31))};
}

#else

// Any architecture: four lanes that the compiler maps to what the machine has.
struct Vec {
  static constexpr int64_t N = 4;
  float v[4];
  static SK_INLINE Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static SK_INLINE Vec set(float x) { return {{x, x, x, x}}; }
  static SK_INLINE Vec load(const float* p, int64_t n) {
    Vec r = set(0.f);
    for (int64_t i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  SK_INLINE void store(float* p) const { store(p, 4); }
  SK_INLINE void stream(float* p) const { store(p); }
  static SK_INLINE void stream_end() {}
  static SK_INLINE Vec load_lanes(const float* p, int64_t first, int64_t end) {
    Vec r = set(0.f);
    for (int64_t i = first; i < end; ++i) r.v[i] = p[i];
    return r;
  }
  SK_INLINE void store(float* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
  static SK_INLINE Vec load_int8(const int8_t* p, int64_t n) {
    Vec r = set(0.f);
    for (int64_t i = 0; i < n; ++i) r.v[i] = static_cast<float>(p[i]);
    return r;
  }
  SK_INLINE float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
};

template <class F>
SK_INLINE Vec map(Vec a, Vec b, F f) {
  return {{f(a.v[0], b.v[0]), f(a.v[1], b.v[1]), f(a.v[2], b.v[2]), f(a.v[3], b.v[3])}};
}
SK_INLINE Vec operator+(Vec a, Vec b) {
  return map(a, b, [](float x, float y) { return x + y; });
}
SK_INLINE Vec operator-(Vec a, Vec b) {
  return map(a, b, [](float x, float y) { return x - y; });
}
SK_INLINE Vec operator*(Vec a, Vec b) {
  return map(a, b, [](float x, float y) { return x * y; });
}
SK_INLINE Vec operator/(Vec a, Vec b) {
  return map(a, b, [](float x, float y) { return x / y; });
}
SK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
SK_INLINE Vec max(Vec a, Vec b) {
  return map(a, b, [](float x, float y) { return x > y ? x : y; });
}
SK_INLINE Vec min(Vec a, Vec b) {
  return map(a, b, [](float x, float y) { return x < y ? x : y; });
}
SK_INLINE Vec where_open(Vec gate, Vec v) {
  return map(gate, v, [](float g, float x) { return g <= 0 ? 0 : x; });
}
SK_INLINE Vec round(Vec a) {
  return map(a, a, [](float x, float) { return __builtin_rintf(x); });
}
SK_INLINE Vec exp2i(Vec a) {
  return map(a, a, [](float x, float) { return __builtin_ldexpf(1.f, static_cast<int>(x)); });
}
SK_INLINE Vec abs(Vec a) {
  return map(a, a, [](float x, float) { return __builtin_fabsf(x); });
}
SK_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return map(magnitude, sign, [](float m, float s) { return __builtin_copysignf(m, s); });
}
SK_INLINE Vec even_lanes(Vec a, Vec b) {
  return {{a.v[0], a.v[2], b.v[0], b.v[2]}};
}
SK_INLINE void transpose(Vec* a) {
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j) {
      const float t = a[i].v[j];
      a[i].v[j] = a[j].v[i];
      a[j].v[i] = t;
    }
}
SK_INLINE Vec sum_each(const Vec* a) {
  return {{a[0].sum(), a[1].sum(), a[2].sum(), a[3].sum()}};
}

#endif

// Transposes a tile of `rows` x `cols` floats (each at most N) from memory to memory. With `pad`
// the written rows are full vectors, zero from `rows` on; without it nothing past the tile is
// touched.
SK_INLINE void transpose_tile(const float* src, int64_t src_stride, int64_t rows, float* dst,
                              int64_t dst_stride, int64_t cols, bool pad) {
  Vec r[Vec::N];
  if (rows == Vec::N && cols == Vec::N) {
    for (int i = 0; i < Vec::N; ++i) r[i] = Vec::load(src + i * src_stride);
    transpose(r);
    for (int i = 0; i < Vec::N; ++i) r[i].store(dst + i * dst_stride);
    return;
  }
  for (int64_t i = 0; i < Vec::N; ++i)
    r[i] = i < rows ? Vec::load(src + i * src_stride, cols) : Vec::set(0.f);
  transpose(r);
  for (int64_t i = 0; i < cols; ++i) r[i].store(dst + i * dst_stride, pad ? Vec::N : rows);
}

#if defined(SPARSEKERN_BF16)

// A lane of w and x holds two bfloat16: both products are added to the float32 sum. Subnormal
// numbers count as zero.
SK_INLINE Vec add_product(Vec w, Vec x, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)x.v)};
}
// Through a general register: a broadcast from memory would take the place of a load of x.
SK_INLINE Vec broadcast(float word) {
  int32_t bits;
  __builtin_memcpy(&bits, &word, sizeof(bits));
  asm("" : "+r"(bits));
  return {_mm512_castsi512_ps(_mm512_set1_epi32(bits))};
}
constexpr int kSums = 8;  // independent sums that hide the latency of add_product

// As transpose_tile into a bfloat16 matrix, from element `offset` on; rounds to nearest, ties to
// even.
SK_INLINE void store_tile(const float* src, int64_t src_stride, int64_t rows, float* matrix,
                          int64_t offset, int64_t stride, int64_t cols) {
  Vec r[Vec::N];
  for (int64_t i = 0; i < Vec::N; ++i)
    r[i] = i < rows ? Vec::load(src + i * src_stride, cols) : Vec::set(0.f);
  transpose(r);
  uint16_t* dst = reinterpret_cast<uint16_t*>(matrix) + offset;
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  for (int64_t i = 0; i < cols; ++i)
    _mm256_mask_storeu_epi16(dst + i * stride, mask, (__m256i)_mm512_cvtneps_pbh(r[i].v));
}

#else

SK_INLINE Vec add_product(Vec w, Vec x, Vec sum) {
  return fma(w, x, sum);
}
SK_INLINE Vec broadcast(float x) {
  return Vec::set(x);
}
constexpr int kSums = 4;

SK_INLINE void store_tile(const float* src, int64_t src_stride, int64_t rows, float* matrix,
                          int64_t offset, int64_t stride, int64_t cols) {
  transpose_tile(src, src_stride, rows, matrix + offset, stride, cols, false);
}

#endif

}  // namespace
}  // namespace sparsekern
