// A sparse matrix times few tokens. Every weight is read once, so the aim is the speed of memory:
// a small index (spmv_plan.h), several streams of weights at once, no gathers, which lose to single
// loads on AMD. See bench/NOTES.md, "One token".
namespace sparsekern {
namespace {

// Values fetched into L1 this far ahead of use: about 100 ns at the speed of memory.
constexpr int64_t kFetchAhead = 512;
constexpr int64_t kColumnStreams = 4;
constexpr int64_t kNarrow = 6144;  // floats of x that stay in L1 while weights stream through it

// One bit at a time: for rows at the very end of the values, where vectors would read past them,
// and for machines without an instruction that spreads values over lanes.
SK_INLINE float bitmap_row(const int32_t* words, int64_t n_words, const float* v, const float* x) {
  float even = 0.f, odd = 0.f;
  for (int64_t w = 0; w < n_words; ++w, x += 32)
    for (uint32_t bits = static_cast<uint32_t>(words[w]); bits; bits &= bits - 1) {
      const float sum = even + *v++ * x[__builtin_ctz(bits)];
      even = odd, odd = sum;
    }
  return even + odd;
}

void bitmap_rows_by_bits(const SpmvArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t n = (a.cols + 63) / 64 * 2;
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int64_t t = 0; t < a.tokens; ++t)
      a.y[t * a.rows + r] =
          bitmap_row(a.index.words + r * n, n, a.values + a.crow[r], a.x + t * a.cols);
}

#if defined(SPARSEKERN_AVX512)

constexpr int64_t kValueStreams = 4;
constexpr int64_t kSpreadTokens = 8;  // at once: as many as the registers hold sums for

// The next stored values, each in the lane of its column; v moves past them.
struct Spread {
  __m512 w;
  __mmask16 mask;
  SK_INLINE Spread(const int32_t* words, int64_t group, const float*& v) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(words) + group;
    // From memory straight into a mask register, and the result into a cleared register: compilers
    // take detours to the first, and vexpandps waits for what its result register held before.
    asm("kmovw %1, %0" : "=k"(mask) : "m"(*bits));
    __m512 packed = _mm512_loadu_ps(v), cleared = _mm512_setzero_ps();
    asm("" : "+v"(packed), "+v"(cleared));
    w = _mm512_mask_expand_ps(cleared, mask, packed);
    v += __builtin_popcount(*bits);
  }
  // Lanes that store nothing stay as they are, whatever x holds there.
  SK_INLINE Vec fma(Vec x, Vec sum) const { return {_mm512_mask3_fmadd_ps(w, x.v, sum.v, mask)}; }
};

#elif defined(SPARSEKERN_AVX2)

constexpr int64_t kValueStreams = 2;
constexpr int64_t kSpreadTokens = 4;

// For each mask of 8 columns the number of the value of each column, bit 7 set where there is one.
struct SpreadTable {
  alignas(64) int8_t lane[256][8];
  constexpr SpreadTable() : lane() {
    for (int m = 0; m < 256; ++m)
      for (int c = 0, n = 0; c < 8; ++c)
        lane[m][c] = m >> c & 1 ? static_cast<int8_t>(-128 + n++) : static_cast<int8_t>(0);
  }
};
constexpr SpreadTable kSpread;

struct Spread {
  __m256 w;
  __m256 stored;  // sign bit set where a weight is stored
  SK_INLINE Spread(const int32_t* words, int64_t group, const float*& v) {
    const uint8_t bits = reinterpret_cast<const uint8_t*>(words)[group];
    const __m256i lane =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.lane[bits])));
    w = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), lane);
    stored = _mm256_castsi256_ps(lane);
    v += __builtin_popcount(bits);
  }
  SK_INLINE Vec fma(Vec x, Vec sum) const {
    return {_mm256_blendv_ps(sum.v, _mm256_fmadd_ps(w, x.v, sum.v), stored)};
  }
};

#endif

#if defined(SPARSEKERN_AVX512) || defined(SPARSEKERN_AVX2)

// 64 columns of U rows times T tokens. Each vector of x serves all rows.
template <int T, int U>
SK_INLINE void spread_word(const int32_t* const* words, const float** v, const float* x,
                           int64_t x_stride, Vec sum[U][T][2]) {
  for (int u = 0; u < U; ++u) {
    __builtin_prefetch(v[u] + kFetchAhead);
    __builtin_prefetch(v[u] + kFetchAhead + 16);
  }
#pragma GCC unroll 8
  for (int g = 0; g < 64 / Vec::N; ++g) {
    Vec in[T];
    for (int t = 0; t < T; ++t) in[t] = Vec::load(x + t * x_stride + g * Vec::N);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const Spread s(words[u], g, v[u]);
      for (int t = 0; t < T; ++t) {
        Vec& to = sum[u][t][T == 1 ? g % 2 : 0];
        to = s.fma(in[t], to);
      }
    }
  }
}

// Rows [row0 + u * stretch, + stretch) for u < U side by side: each u is a stream of its own
// through memory, which the machine fetches better than one.
template <int T, int U>
void bitmap_stretches(const SpmvArgs& a, const float* x, const float* x_tail, float* y,
                      int64_t row0, int64_t stretch) {
  const int64_t full = a.cols / 64, n = (a.cols + 63) / 64 * 2;
  const int32_t* words[U];
  const float* v[U];
  for (int u = 0; u < U; ++u) {
    words[u] = a.index.words + (row0 + u * stretch) * n;
    v[u] = a.values + a.crow[row0 + u * stretch];
  }
  for (int64_t r = row0; r < row0 + stretch; ++r) {
    Vec sum[U][T][2];
    for (int u = 0; u < U; ++u)
      for (int t = 0; t < T; ++t) sum[u][t][0] = sum[u][t][1] = Vec::set(0.f);
    for (int64_t w = 0; w < full; ++w) {
      spread_word<T, U>(words, v, x + w * 64, a.cols, sum);
      for (int u = 0; u < U; ++u) words[u] += 2;
    }
    if (full * 64 < a.cols) {
      spread_word<T, U>(words, v, x_tail, 64, sum);
      for (int u = 0; u < U; ++u) words[u] += 2;
    }
    for (int u = 0; u < U; ++u)
      for (int t = 0; t < T; ++t)
        y[t * a.rows + r + u * stretch] =
            (T == 1 ? sum[u][t][0] + sum[u][t][1] : sum[u][t][0]).sum();
  }
}

template <int T>
void bitmap_tokens(const SpmvArgs& a, int64_t t0, int64_t row_end) {
  constexpr int64_t U = T <= 4 ? kValueStreams : 2;
  const float* x = a.x + t0 * a.cols;
  float* y = a.y + t0 * a.rows;
  alignas(64) float tail[T * 64] = {};  // the columns after the last full word, then zeros
  const int64_t full = a.cols / 64 * 64;
  for (int t = 0; t < T; ++t)
    for (int64_t k = full; k < a.cols; ++k) tail[t * 64 + k - full] = x[t * a.cols + k];
  const int64_t stretch = (row_end - a.row_begin) / U;
  bitmap_stretches<T, U>(a, x, tail, y, a.row_begin, stretch);
  const int64_t rest = a.row_begin + stretch * U;
  bitmap_stretches<T, 1>(a, x, tail, y, rest, row_end - rest);
}

void bitmap_rows(const SpmvArgs& a) {
  int64_t end = a.row_end;  // behind it, a vector could read past the values
  while (end > a.row_begin && a.crow[end] + Vec::N > a.nnz) --end;
  const int64_t parts = (a.tokens + kSpreadTokens - 1) / kSpreadTokens;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t t = a.tokens * part / parts, n = a.tokens * (part + 1) / parts - t;
    switch (n) {
      case 1: bitmap_tokens<1>(a, t, end); break;
      case 2: bitmap_tokens<2>(a, t, end); break;
      case 3: bitmap_tokens<3>(a, t, end); break;
      case 4: bitmap_tokens<4>(a, t, end); break;
#if defined(SPARSEKERN_AVX512)
      case 5: bitmap_tokens<5>(a, t, end); break;
      case 6: bitmap_tokens<6>(a, t, end); break;
      case 7: bitmap_tokens<7>(a, t, end); break;
      case 8: bitmap_tokens<8>(a, t, end); break;
#endif
    }
  }
  bitmap_rows_by_bits(a, end, a.row_end);
}

// Four elements of x, in one register.
struct Four {
  __m128 v;
  static SK_INLINE Four zero() { return {_mm_setzero_ps()}; }
  static SK_INLINE Four load(const float* p) { return {_mm_loadu_ps(p)}; }
  static SK_INLINE Four pick(const float* x, const uint16_t* column) {
    uint64_t c;
    __builtin_memcpy(&c, column, 8);
    __m128 r = _mm_load_ss(x + (c & 0xffff));
    // Straight from memory; compilers load into a register first.
    asm("vinsertps $0x10, %1, %0, %0" : "+x"(r) : "m"(x[(c >>= 16) & 0xffff]));
    asm("vinsertps $0x20, %1, %0, %0" : "+x"(r) : "m"(x[(c >>= 16) & 0xffff]));
    asm("vinsertps $0x30, %1, %0, %0" : "+x"(r) : "m"(x[c >> 16]));
    return {r};
  }
  SK_INLINE Four add_product(Four a, Four b) const { return {_mm_fmadd_ps(a.v, b.v, v)}; }
  SK_INLINE Four operator+(Four o) const { return {_mm_add_ps(v, o.v)}; }
  SK_INLINE float sum() const {
    const __m128 pairs = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
  }
};

#else

void bitmap_rows(const SpmvArgs& a) {
  bitmap_rows_by_bits(a, a.row_begin, a.row_end);
}

struct Four {
  Vec v;
  static SK_INLINE Four zero() { return {Vec::set(0.f)}; }
  static SK_INLINE Four load(const float* p) { return {Vec::load(p)}; }
  static SK_INLINE Four pick(const float* x, const uint16_t* c) {
    return {{{x[c[0]], x[c[1]], x[c[2]], x[c[3]]}}};
  }
  SK_INLINE Four add_product(Four a, Four b) const { return {fma(a.v, b.v, v)}; }
  SK_INLINE Four operator+(Four o) const { return {v + o.v}; }
  SK_INLINE float sum() const { return v.sum(); }
};

#endif

// Fetches ahead of a line of values, as many lines as there are blocks of columns, since only the
// first block of a row fetches.
SK_INLINE void fetch_stretch(const float* v, const uint16_t* column, int64_t lines) {
  for (int64_t l = 0; l < lines; ++l) {
    __builtin_prefetch(v + kFetchAhead + 16 * l);
    __builtin_prefetch(column + kFetchAhead + 16 * l);
  }
}

// <values, x[column]> over one stretch of a row.
SK_INLINE float pick_dot(const float* v, const uint16_t* column, int64_t n, const float* x,
                         int64_t lines) {
  Four sum[4] = {Four::zero(), Four::zero(), Four::zero(), Four::zero()};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    fetch_stretch(v + i * lines, column + i * lines, lines);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[j] = sum[j].add_product(Four::load(v + i + 4 * j), Four::pick(x, column + i + 4 * j));
  }
  for (; i + 4 <= n; i += 4)
    sum[0] = sum[0].add_product(Four::load(v + i), Four::pick(x, column + i));
  float rest = 0.f;
  for (; i < n; ++i) rest += v[i] * x[column[i]];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum() + rest;
}

// Where block b of row r starts among the values.
SK_INLINE int64_t block_start(const SpmvArgs& a, int64_t r, int64_t b) {
  if (b == 0) return a.crow[r];
  if (b == a.index.blocks) return a.crow[r + 1];
  return a.index.words[r * (a.index.blocks - 1) + b - 1];
}

// W tokens side by side: a row of a.panel, (cols, W).
template <int W>
struct Tokens {
  typedef float Lanes __attribute__((vector_size(W * 4)));
  Lanes v;
  SK_INLINE void add_product(float w, const float* panel, uint16_t column) {
    Lanes x;
    __builtin_memcpy(&x, panel + column * static_cast<int64_t>(W), sizeof(x));
    v += w * x;
  }
};

// out += values times the panel rows of their columns. `lines` as in fetch_stretch.
template <int W>
SK_INLINE void panel_dot(const float* v, const uint16_t* column, int64_t n, const float* panel,
                         int64_t lines, Tokens<W>* out) {
  Tokens<W> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    if (i % 16 == 0) fetch_stretch(v + i * lines, column + i * lines, lines);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j].add_product(v[i + j], panel, column[i + j]);
  }
  for (; i < n; ++i) sum[0].add_product(v[i], panel, column[i]);
  out->v += (sum[0].v + sum[1].v) + (sum[2].v + sum[3].v);
}

// The sums of one stretch of a row, for W tokens at once.
template <int W>
SK_INLINE void add_stretch(const SpmvArgs& a, int64_t r, int64_t b, int64_t width) {
  const int64_t i = block_start(a, r, b), n = block_start(a, r, b + 1) - i;
  const float* v = a.values + i;
  const uint16_t* column = a.index.columns + i;
  const int64_t lines = b ? 0 : a.index.blocks;
  if constexpr (W == 1) {
    const float dot = pick_dot(v, column, n, a.x + b * width, lines);
    a.y[r] = b ? a.y[r] + dot : dot;
  } else {
    Tokens<W> sum = {};
    panel_dot<W>(v, column, n, a.panel + b * width * W, lines, &sum);
    for (int64_t t = 0; t < a.tokens; ++t)
      a.y[t * a.rows + r] = b ? a.y[t * a.rows + r] + sum.v[t] : sum.v[t];
  }
}

// Rows r + u * stretch for u < U side by side, one token: their columns rise together, so that a
// line of x fetched for one row serves all, and x is swept through L1 once for U rows; and each row
// is a stream of its own through memory.
template <int U>
SK_INLINE void pick_rows(const SpmvArgs& a, int64_t r, int64_t stretch) {
  const float* v[U];
  const uint16_t* column[U];
  int64_t n[U], common = a.cols, i = 0;
  Four sum[U][2];
  for (int u = 0; u < U; ++u) {
    const int64_t first = a.crow[r + u * stretch];
    n[u] = a.crow[r + u * stretch + 1] - first;
    v[u] = a.values + first, column[u] = a.index.columns + first;
    common = n[u] < common ? n[u] : common;
    sum[u][0] = sum[u][1] = Four::zero();
  }
  for (; i + 16 <= common; i += 16) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      fetch_stretch(v[u] + i, column[u] + i, 1);
#pragma GCC unroll 4
      for (int j = 0; j < 16; j += 4)
        sum[u][j / 4 % 2] = sum[u][j / 4 % 2].add_product(Four::load(v[u] + i + j),
                                                          Four::pick(a.x, column[u] + i + j));
    }
  }
  for (int u = 0; u < U; ++u) {
    int64_t k = i;
    for (; k + 4 <= n[u]; k += 4)
      sum[u][0] = sum[u][0].add_product(Four::load(v[u] + k), Four::pick(a.x, column[u] + k));
    float rest = 0.f;
    for (; k < n[u]; ++k) rest += v[u][k] * a.x[column[u][k]];
    a.y[r + u * stretch] = (sum[u][0] + sum[u][1]).sum() + rest;
  }
}

void one_token_rows(const SpmvArgs& a) {
  constexpr int64_t U = kColumnStreams;
  const int64_t stretch = (a.row_end - a.row_begin) / U;
  for (int64_t r = a.row_begin; r < a.row_begin + stretch; ++r) pick_rows<U>(a, r, stretch);
  for (int64_t r = a.row_begin + stretch * U; r < a.row_end; ++r) pick_rows<1>(a, r, 0);
}

// A few rows at a time, block by block of columns: the block of x stays in L1, and the rows,
// fetched by the first block, in L2.
template <int W>
void column_rows(const SpmvArgs& a) {
  constexpr int64_t kChunkValues = 16384;
  const int64_t width = spmv_width(a.cols, a.index.blocks);
  for (int64_t r0 = a.row_begin, r1; r0 < a.row_end; r0 = r1) {
    for (r1 = r0 + 1; r1 < a.row_end && a.crow[r1] - a.crow[r0] < kChunkValues;) ++r1;
    for (int64_t b = 0; b < a.index.blocks; ++b)
      for (int64_t r = r0; r < r1; ++r) add_stretch<W>(a, r, b, width);
  }
}

void few_tokens(const SpmvArgs& a) {
  if (a.index.kind == kSpmvBitmap) return bitmap_rows(a);
  if (a.tokens == 1 && a.index.blocks == 1 && a.cols > kNarrow) return one_token_rows(a);
  if (a.tokens == 1) return column_rows<1>(a);
  if (a.tokens <= 4) return column_rows<4>(a);
  if (a.tokens <= 8) return column_rows<8>(a);
  column_rows<16>(a);
}

void spmv(const SpmvArgs& a) {
  few_tokens(a);
  if (!a.bias && a.activation == kNone) return;
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t r = a.row_begin; r < a.row_end; r += Vec::N) {
      const int64_t n = a.row_end - r < Vec::N ? a.row_end - r : Vec::N;
      float* y = a.y + t * a.rows + r;
      const Vec b = a.bias ? Vec::load(a.bias + r, n) : Vec::set(0.f);
      activate(Vec::load(y, n) + b, a.activation).store(y, n);
    }
}

}  // namespace
}  // namespace sparsekern
