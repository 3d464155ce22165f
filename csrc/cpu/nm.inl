// N:M rows times dense panels. Every row holds the same number of values in every group of columns,
// so there are no runs to look up and no exit of a loop to mispredict.
// Limit, as for csr.inl: one load from the L1 cache for each multiply-add.
namespace sparsekern {
namespace {

constexpr int64_t kRowsAhead = 8;  // of the values, which lie a whole row apart

// Adds U rows' products over slots [begin, end), whose columns lie in one panel; `offsets` are that
// panel's, `step` apart for each row.
template <int U, int R>
SK_INLINE void nm_rows(const NmArgs& a, const uint16_t* offsets, int64_t step, int64_t row,
                       int64_t begin, int64_t end, const float* panel, float* sums) {
  constexpr int64_t P = R * Vec::N;
  const uint16_t* offset[U];
  const float* v[U];
  Vec acc[U][R];
  for (int u = 0; u < U; ++u) {
    offset[u] = offsets + (row + u) * step;
    v[u] = a.values + (row + u) * a.view.slots() + begin;
    for (int j = 0; j < R; ++j)
      acc[u][j] = begin == 0 ? Vec::set(a.bias ? a.bias[row + u] : 0.f)
                             : Vec::load(sums + u * P + j * Vec::N);
  }
  for (int64_t i = 0; i < end - begin; ++i) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const Vec w = Vec::set(v[u][i]);
      const float* x = panel + offset[u][i] * P;
      asm("" : "+r"(x));  // one address for all vectors, not an index in every load
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) acc[u][j] = fma(w, Vec::load(x + j * Vec::N), acc[u][j]);
    }
  }
  for (int u = 0; u < U; ++u)
    for (int j = 0; j < R; ++j) acc[u][j].store(sums + u * P + j * Vec::N);
}

template <int R>
void nm_panel(const NmArgs& a, int64_t t0, int64_t t1) {
  constexpr int64_t P = R * Vec::N;
  constexpr int U = R >= 8 ? 1 : 8 / R;  // enough sums to hide the latency when R is small
  const NmView& v = a.view;
  const int64_t panel_cols = a.channel_groups * v.m * v.taps, groups = v.channel_groups();
  const int64_t panels = (groups + a.channel_groups - 1) / a.channel_groups;
  float* sums = a.scratch + panels * panel_cols * P;
  SpmmArgs out{};
  out.activation = a.activation, out.sink = a.sink;
  for (int64_t r0 = a.row_begin; r0 < a.row_end; r0 += a.row_block) {
    const int64_t r1 = r0 + a.row_block < a.row_end ? r0 + a.row_block : a.row_end;
    for (int64_t k = 0; k < panels; ++k) {
      float* panel = a.scratch + k * panel_cols * P;
      const int64_t c0 = k * panel_cols;
      const int64_t c1 = c0 + panel_cols < v.cols() ? c0 + panel_cols : v.cols();
      if (r0 == a.row_begin) fill_panel(a.source, panel, R, t0, t1, c0, c1);
      const int64_t g0 = k * a.channel_groups;
      const int64_t g1 = g0 + a.channel_groups < groups ? g0 + a.channel_groups : groups;
      const int64_t begin = g0 * v.taps * v.n, end = g1 * v.taps * v.n;
      const int64_t step = a.channel_groups * v.taps * v.n;
      const uint16_t* offsets = a.offset + k * v.rows * step;
      int64_t r = r0;
      for (; r + U <= r1; r += U) {
        for (int u = 0; u < U; ++u)  // the values of a panel are short stretches, a row apart
          for (int64_t i = begin; i < end; i += 16)
            __builtin_prefetch(a.values + (r + kRowsAhead * U + u) * v.slots() + i);
        nm_rows<U, R>(a, offsets, step, r, begin, end, panel, sums + (r - r0) * P);
      }
      for (; r < r1; ++r)
        nm_rows<1, R>(a, offsets, step, r, begin, end, panel, sums + (r - r0) * P);
    }
    store_rows<R>(out, sums, r0, r1 - r0, t0, t1 - t0);
  }
}

void nm_spmm(const NmArgs& a) {
  for (int64_t t = a.token_begin; t < a.token_end;) {
    const int64_t left = a.token_end - t, need = (left + Vec::N - 1) / Vec::N;
    int64_t r = a.vectors;
    while (r > 1 && need < r - r / 4) r /= 2;  // as for spmm: a narrow panel reads all values again
    const int64_t end = left < r * Vec::N ? a.token_end : t + r * Vec::N;
    switch (r) {
      case 8: nm_panel<8>(a, t, end); break;
      case 4: nm_panel<4>(a, t, end); break;
      case 2: nm_panel<2>(a, t, end); break;
      default: nm_panel<1>(a, t, end);
    }
    t = end;
  }
}

// One token. Where N lanes hold whole groups and these span at most two vectors of x, the elements
// are picked from registers by the bits of the index: no gather, and x is read in order.
struct NmPicker {
#if defined(SPARSEKERN_AVX512)
  using Bits2 = uint32_t;  // positions of N slots, of 2 and of 4 bits
  using Bits4 = uint64_t;
  __m512i shift, base, mask;
  bool wide;  // two words of bits
  SK_INLINE Vec pick(Vec lo, Vec hi, uint64_t code) const {
    __m512i word = _mm512_set1_epi32(static_cast<int>(code));
    if (wide) word = _mm512_mask_set1_epi32(word, 0xFF00, static_cast<int>(code >> 32));
    const __m512i at = _mm512_and_si512(_mm512_srlv_epi32(word, shift), mask);
    return {_mm512_permutex2var_ps(lo.v, _mm512_add_epi32(at, base), hi.v)};
  }
#elif defined(SPARSEKERN_AVX2)
  using Bits2 = uint16_t;
  using Bits4 = uint32_t;
  __m256i shift, base, mask;
  SK_INLINE Vec pick(Vec lo, Vec hi, uint64_t code) const {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(code));
    const __m256i at =
        _mm256_add_epi32(_mm256_and_si256(_mm256_srlv_epi32(word, shift), mask), base);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(lo.v, at), _mm256_permutevar8x32_ps(hi.v, at),
                             _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)))};
  }
#else
  using Bits2 = uint8_t;
  using Bits4 = uint16_t;
  int32_t shift[4], base[4], mask[4];
  SK_INLINE Vec pick(Vec lo, Vec hi, uint64_t code) const {
    Vec r = lo;
    for (int l = 0; l < 4; ++l) {
      const int32_t at = (static_cast<int32_t>(code >> shift[l]) & mask[l]) + base[l];
      r.v[l] = at < 4 ? lo.v[at] : hi.v[at - 4];
    }
    return r;
  }
#endif

  explicit NmPicker(const NmView& v) {
    int32_t s[Vec::N], b[Vec::N], m[Vec::N];
    for (int64_t l = 0; l < Vec::N; ++l) {
      s[l] = static_cast<int32_t>(l * v.bits() % 32);
      b[l] = static_cast<int32_t>(l / v.n * v.m);
      m[l] = (1 << v.bits()) - 1;
    }
    __builtin_memcpy(&shift, s, sizeof(s));
    __builtin_memcpy(&base, b, sizeof(b));
    __builtin_memcpy(&mask, m, sizeof(m));
#if defined(SPARSEKERN_AVX512)
    wide = v.bits() == 4;
#endif
  }
  static bool fits(const NmView& v) { return Vec::N % v.n == 0 && v.m <= 2 * v.n; }
};

// Dot product of slots [slot, end) of a row with x, one by one.
SK_INLINE float nm_dot(const NmView& v, const float* values, const uint8_t* code, const float* x,
                       int64_t slot) {
  float even = 0, odd = 0;
  int64_t group = slot / v.n, i = slot % v.n;
  for (; slot < v.slots(); ++slot) {
    (slot & 1 ? odd : even) += values[slot] * x[group * v.m + v.position(code, slot)];
    if (++i == v.n) i = 0, ++group;
  }
  return even + odd;
}

template <class Bits>
SK_INLINE Vec nm_picked(const NmView& v, const NmPicker& picker, const float* values,
                        const uint8_t* code, const float* x) {
  const int64_t span = Vec::N / v.n * v.m, slots = v.slots() / Vec::N * Vec::N;
  const auto dot = [&](int64_t slot, Vec lo, Vec hi, Vec sum) {
    Bits bits;
    __builtin_memcpy(&bits, code, sizeof(bits));
    code += sizeof(bits);
    return fma(Vec::load(values + slot), picker.pick(lo, hi, bits), sum);
  };
  Vec even = Vec::set(0.f), odd = even;
  int64_t slot = 0;
  const float* end = x + v.channels - span - 2 * Vec::N;
  for (; slot + 2 * Vec::N <= slots && x <= end; slot += 2 * Vec::N, x += 2 * span) {
    for (int64_t j = 0; j < 2 * Vec::N; j += 16)  // one cache line at a time
      __builtin_prefetch(values + slot + j + kFetchAhead);
    even = dot(slot, Vec::load(x), Vec::load(x + Vec::N), even);
    odd = dot(slot + Vec::N, Vec::load(x + span), Vec::load(x + span + Vec::N), odd);
  }
  int64_t left = v.channels - slot / v.n * v.m;
  for (; slot < slots; slot += Vec::N, x += span, left -= span) {
    const int64_t lo = left < Vec::N ? left : Vec::N;
    const int64_t hi = left - lo < Vec::N ? left - lo : Vec::N;
    even = dot(slot, Vec::load(x, lo), Vec::load(x + lo, hi), even);
  }
  return even + odd;
}

void nm_spmv(const NmArgs& a, const float* x, float* y) {
  const NmView& v = a.view;
  const NmPicker picker(v);
  const bool fits = NmPicker::fits(v);
  const int64_t picked = fits ? v.slots() / Vec::N * Vec::N : 0;
  for (int64_t r = a.row_begin; r < a.row_end; r += Vec::N) {
    const int64_t rows = a.row_end - r < Vec::N ? a.row_end - r : Vec::N;
    Vec part[Vec::N];
    float rest[Vec::N] = {};
    for (int64_t u = 0; u < Vec::N; ++u) part[u] = Vec::set(0.f);
    for (int64_t u = 0; u < rows; ++u) {
      const uint8_t* code = v.index + (r + u) * v.row_bytes();
      const float* values = a.values + (r + u) * v.slots();
      if (fits)
        part[u] = v.bits() == 2 ? nm_picked<NmPicker::Bits2>(v, picker, values, code, x)
                                : nm_picked<NmPicker::Bits4>(v, picker, values, code, x);
      rest[u] = nm_dot(v, values, code, x, picked);
    }
    const Vec b = a.bias ? Vec::load(a.bias + r, rows) : Vec::set(0.f);
    activate(sum_each(part) + Vec::load(rest) + b, a.activation).store(y + r, rows);
  }
}

}  // namespace
}  // namespace sparsekern
