// Sums of products of 8-bit integers, L of them side by side. A word of 32 bits holds neighbouring
// columns: four with VNNI, whose instruction multiplies unsigned with signed bytes, so activations
// are shifted by 128; two without, as 16-bit integers, because the byte instructions of AVX2
// saturate. Either way sums are exact modulo 2^32.
namespace sparsekern {
namespace {

#if defined(SPARSEKERN_VNNI)
constexpr int64_t kPerWord = 4;
constexpr uint32_t kZeroWord = 0x80808080u;  // activations that are zero
#else
constexpr int64_t kPerWord = 2;
constexpr uint32_t kZeroWord = 0;
#endif

template <int L>
struct Lanes;

#if defined(SPARSEKERN_AVX512)

template <>
struct Lanes<16> {
  __m512i v;
  static SK_INLINE Lanes load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static SK_INLINE Lanes set(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  SK_INLINE Lanes operator-(Lanes b) const { return {_mm512_sub_epi32(v, b.v)}; }
  SK_INLINE Lanes operator+(Lanes b) const { return {_mm512_add_epi32(v, b.v)}; }
  SK_INLINE Vec floats() const { return {_mm512_cvtepi32_ps(v)}; }
  // 16 words of int8 values
  static SK_INLINE Lanes load_values(const int8_t* p) {
#if defined(SPARSEKERN_VNNI)
    return {_mm512_loadu_si512(p)};
#else
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#endif
  }
  // Lane i is p[i % W]; 16 words are read.
  template <int W>
  static SK_INLINE Lanes repeat(const int32_t* p) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_permutexvar_epi32(_mm512_and_epi32(lane, _mm512_set1_epi32(W - 1)),
                                     _mm512_loadu_si512(p))};
  }
};
// Sums of neighbouring lanes, those of a first.
SK_INLINE Lanes<16> pair_sums(Lanes<16> a, Lanes<16> b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_add_epi32(_mm512_permutex2var_epi32(a.v, even, b.v),
                           _mm512_permutex2var_epi32(a.v, odd, b.v))};
}
SK_INLINE Lanes<16> dot(Lanes<16> x, Lanes<16> w, Lanes<16> sum) {
#if defined(SPARSEKERN_VNNI)
  return {_mm512_dpbusd_epi32(sum.v, x.v, w.v)};
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(x.v, w.v))};
#endif
}
SK_INLINE Vec widen(__m256i v) {
  return {_mm512_cvtepi32_ps(_mm512_castsi256_si512(v))};
}

#elif defined(SPARSEKERN_AVX2)

SK_INLINE Vec widen(__m256i v) {
  return {_mm256_cvtepi32_ps(v)};
}

#endif

#if defined(SPARSEKERN_AVX512) || defined(SPARSEKERN_AVX2)

#if defined(SPARSEKERN_VNNI) && defined(SPARSEKERN_AVX512)
#define SK_DPBUSD(width) _mm##width##_dpbusd_epi32
#elif defined(SPARSEKERN_VNNI)
#define SK_DPBUSD(width) _mm##width##_dpbusd_avx_epi32
#endif

template <>
struct Lanes<8> {
  __m256i v;
  static SK_INLINE Lanes load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static SK_INLINE Lanes set(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  SK_INLINE Lanes operator-(Lanes b) const { return {_mm256_sub_epi32(v, b.v)}; }
  SK_INLINE Lanes operator+(Lanes b) const { return {_mm256_add_epi32(v, b.v)}; }
  SK_INLINE Vec floats() const { return widen(v); }
  static SK_INLINE Lanes load_values(const int8_t* p) {
#if defined(SPARSEKERN_VNNI)
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
#else
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#endif
  }
  template <int W>
  static SK_INLINE Lanes repeat(const int32_t* p) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                        _mm256_and_si256(lane, _mm256_set1_epi32(W - 1)))};
  }
};
SK_INLINE Lanes<8> pair_sums(Lanes<8> a, Lanes<8> b) {
  return {_mm256_permute4x64_epi64(_mm256_hadd_epi32(a.v, b.v), 0xD8)};
}
SK_INLINE Lanes<8> dot(Lanes<8> x, Lanes<8> w, Lanes<8> sum) {
#if defined(SPARSEKERN_VNNI)
  return {SK_DPBUSD(256)(sum.v, x.v, w.v)};
#else
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(x.v, w.v))};
#endif
}

template <>
struct Lanes<4> {
  __m128i v;
  static SK_INLINE Lanes load(const int32_t* p) {
    return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
  }
  static SK_INLINE Lanes set(uint32_t x) { return {_mm_set1_epi32(static_cast<int>(x))}; }
  SK_INLINE Lanes operator-(Lanes b) const { return {_mm_sub_epi32(v, b.v)}; }
  SK_INLINE Lanes operator+(Lanes b) const { return {_mm_add_epi32(v, b.v)}; }
  SK_INLINE Vec floats() const { return widen(_mm256_castsi128_si256(v)); }
};
SK_INLINE Lanes<4> dot(Lanes<4> x, Lanes<4> w, Lanes<4> sum) {
#if defined(SPARSEKERN_VNNI)
  return {SK_DPBUSD()(sum.v, x.v, w.v)};
#else
  return {_mm_add_epi32(sum.v, _mm_madd_epi16(x.v, w.v))};
#endif
}

#else

// Sums wrap, as those of the vector instructions do.
template <>
struct Lanes<4> {
  uint32_t v[4];
  static SK_INLINE Lanes load(const int32_t* p) {
    Lanes r;
    __builtin_memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static SK_INLINE Lanes set(uint32_t x) { return {{x, x, x, x}}; }
  SK_INLINE Lanes operator-(Lanes b) const {
    return {{v[0] - b.v[0], v[1] - b.v[1], v[2] - b.v[2], v[3] - b.v[3]}};
  }
  SK_INLINE Lanes operator+(Lanes b) const {
    return {{v[0] + b.v[0], v[1] + b.v[1], v[2] + b.v[2], v[3] + b.v[3]}};
  }
  SK_INLINE Vec floats() const {
    Vec r;
    for (int i = 0; i < 4; ++i) r.v[i] = static_cast<float>(static_cast<int32_t>(v[i]));
    return r;
  }
  static SK_INLINE Lanes load_values(const int8_t* p) {
    Lanes r;
    for (int i = 0; i < 4; ++i)
      r.v[i] = static_cast<uint16_t>(int16_t{p[2 * i]}) |
               uint32_t{static_cast<uint16_t>(int16_t{p[2 * i + 1]})} << 16;
    return r;
  }
  template <int W>
  static SK_INLINE Lanes repeat(const int32_t* p) {
    Lanes r;
    for (int i = 0; i < 4; ++i) r.v[i] = static_cast<uint32_t>(p[i % W]);
    return r;
  }
};
SK_INLINE Lanes<4> pair_sums(Lanes<4> a, Lanes<4> b) {
  return {{a.v[0] + a.v[1], a.v[2] + a.v[3], b.v[0] + b.v[1], b.v[2] + b.v[3]}};
}
SK_INLINE Lanes<4> dot(Lanes<4> x, Lanes<4> w, Lanes<4> sum) {
  const auto low = [](uint32_t a) { return static_cast<int16_t>(a); };
  const auto high = [](uint32_t a) { return static_cast<int16_t>(a >> 16); };
  for (int i = 0; i < 4; ++i)
    sum.v[i] += static_cast<uint32_t>(low(x.v[i]) * low(w.v[i]) + high(x.v[i]) * high(w.v[i]));
  return sum;
}

#endif

// The first n of N floats of at most 127, rounded to nearest (ties to even), as the instructions
// want activations; returns where the next ones go.
#if defined(SPARSEKERN_VNNI)
using Quantized = uint8_t;
#else
using Quantized = int16_t;
#endif
SK_INLINE void store_rounded(Vec x, int64_t n, Quantized* out) {
#if defined(SPARSEKERN_AVX512)
  const __m512i q = _mm512_cvtps_epi32(x.v);
#if defined(SPARSEKERN_VNNI)
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128)));
  const __m128i words = bytes;
  if (n == Vec::N) _mm_storeu_si128(reinterpret_cast<__m128i*>(out), words);
  else _mm_mask_storeu_epi8(out, static_cast<__mmask16>((1u << n) - 1), words);
#else
  const __m256i words = _mm512_cvtepi32_epi16(q);
  if (n == Vec::N) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
  else _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1u << n) - 1), words);
#endif
#elif defined(SPARSEKERN_AVX2)
  const __m256i q = _mm256_cvtps_epi32(x.v);
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
#if defined(SPARSEKERN_VNNI)
  words = _mm_add_epi16(words, _mm_set1_epi16(128));
  words = _mm_packus_epi16(words, words);
#endif
  Quantized all[16 / sizeof(Quantized)];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), words);
  if (n == Vec::N) __builtin_memcpy(out, all, Vec::N * sizeof(Quantized));
  else __builtin_memcpy(out, all, n * sizeof(Quantized));
#else
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Quantized>(__builtin_rintf(x.v[i]));
#endif
}

}  // namespace
}  // namespace sparsekern
