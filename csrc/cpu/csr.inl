// Sparse rows times dense panels. One value is broadcast and multiplied with `R` vectors of tokens
// that lie in the L1 cache; the sums of a row stay in registers for a whole block of columns.
// Limit: one load and one FMA for every vector, see bench/NOTES.md.
namespace sparsekern {
namespace {

SK_INLINE Vec gelu(Vec x) {
  // erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
  const Vec z = abs(x) * Vec::set(0.70710678f);
  const Vec t = Vec::set(1.f) / fma(z, Vec::set(0.3275911f), Vec::set(1.f));
  Vec p = Vec::set(1.061405429f);
  p = fma(p, t, Vec::set(-1.453152027f));
  p = fma(p, t, Vec::set(1.421413741f));
  p = fma(p, t, Vec::set(-0.284496736f));
  p = fma(p, t, Vec::set(0.254829592f));
  const Vec erf_z = Vec::set(1.f) - p * t * exp_negative(Vec::set(0.f) - z * z);
  return Vec::set(0.5f) * x * (Vec::set(1.f) + copy_sign(erf_z, x));
}

SK_INLINE Vec gelu_tanh(Vec x) {
  const Vec u = Vec::set(0.79788456f) * x * fma(Vec::set(0.044715f) * x, x, Vec::set(1.f));
  const Vec e = exp_negative(Vec::set(-2.f) * abs(u));
  const Vec tanh_u = (Vec::set(1.f) - e) / (Vec::set(1.f) + e);
  return Vec::set(0.5f) * x * (Vec::set(1.f) + copy_sign(tanh_u, u));
}

SK_INLINE Vec activate(Vec x, Activation a) {
  switch (a) {
    case kRelu: return max(Vec::set(0.f), x);
    case kGelu: return gelu(x);
    case kGeluTanh: return gelu_tanh(x);
    default: return x;
  }
}

struct RowSums {
  float* sums;  // (rows of the block, panel)
  int64_t row0;
  const float* bias;
  bool first;  // first block of columns: start from the bias
};

template <int R>
SK_INLINE void start_row(const RowSums& c, int64_t row, Vec* acc) {
  if (c.first) {
    const Vec b = Vec::set(c.bias ? c.bias[row] : 0.f);
    for (int j = 0; j < R; ++j) acc[j] = b;
  } else {
    const float* p = c.sums + (row - c.row0) * R * Vec::N;
    for (int j = 0; j < R; ++j) acc[j] = Vec::load(p + j * Vec::N);
  }
}

template <int R>
SK_INLINE void add_products(const float* panel, float value, int64_t column, Vec* acc) {
  const Vec w = Vec::set(value);
  const float* x = panel + column * (R * Vec::N);
  asm("" : "+r"(x));
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j) acc[j] = fma(w, Vec::load(x + j * Vec::N), acc[j]);
}

// U rows side by side, so that enough independent sums hide the latency of the FMA when R is small.
template <int R, int U>
SK_INLINE void run_rows(const Run* runs, const float* values, const int32_t* col,
                        const float* panel, const RowSums& c) {
  Vec acc[U][R];
  for (int u = 0; u < U; ++u) start_row<R>(c, runs[u].row, acc[u]);
  const int32_t common = runs[U - 1].count;  // the smallest: runs are sorted
  const float* v[U];
  const int32_t* k[U];
  for (int u = 0; u < U; ++u) v[u] = values + runs[u].start, k[u] = col + runs[u].start;
  for (int32_t i = 0; i < common; ++i) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) add_products<R>(panel, v[u][i], k[u][i], acc[u]);
  }
  for (int u = 0; u < U; ++u) {
    for (int32_t i = common; i < runs[u].count; ++i)
      add_products<R>(panel, v[u][i], k[u][i], acc[u]);
    float* p = c.sums + (runs[u].row - c.row0) * R * Vec::N;
    for (int j = 0; j < R; ++j) acc[u][j].store(p + j * Vec::N);
  }
}

// A tile of rows with equal columns: each vector of the panel is loaded once for all of them. At
// most four vectors at a time, so that the sums and what feeds them fit the registers.
template <int R>
SK_INLINE void run_tile(const Run* runs, const float* values, const int32_t* col,
                        const float* panel, const RowSums& c) {
  constexpr int U = kTileRows, H = R < 4 ? R : 4;
  const float* v[U];
  float* sums[U];
  for (int u = 0; u < U; ++u) {
    v[u] = values + runs[u].start;
    sums[u] = c.sums + (runs[u].row - c.row0) * R * Vec::N;
  }
  const int32_t* k = col + runs[0].start;
  for (int h = 0; h < R; h += H) {
    Vec acc[U][H];
    for (int u = 0; u < U; ++u)
      for (int j = 0; j < H; ++j)
        acc[u][j] = c.first ? Vec::set(c.bias ? c.bias[runs[u].row] : 0.f)
                            : Vec::load(sums[u] + (h + j) * Vec::N);
    for (int32_t i = 0; i < runs[0].count; ++i) {
      const float* p = panel + k[i] * (R * Vec::N) + h * Vec::N;
      Vec x[H];
      for (int j = 0; j < H; ++j) x[j] = Vec::load(p + j * Vec::N);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vec w = Vec::set(v[u][i]);
        for (int j = 0; j < H; ++j) acc[u][j] = fma(w, x[j], acc[u][j]);
      }
    }
    for (int u = 0; u < U; ++u)
      for (int j = 0; j < H; ++j) acc[u][j].store(sums[u] + (h + j) * Vec::N);
  }
}

template <int R>
void run_block(const Run* run, const Run* end, int32_t tiles, const float* values,
               const int32_t* col, const float* panel, const RowSums& c) {
  for (int32_t i = 0; i < tiles; ++i, run += kTileRows) run_tile<R>(run, values, col, panel, c);
  constexpr int U = R >= 8 ? 1 : 8 / R;
  for (; run + U <= end; run += U) {
    // Rows come in order of their counts, so neither the values nor the columns stream: fetch
    // ahead.
    for (int u = 0; u < U; ++u) {
      __builtin_prefetch(values + run[u + 2 * U].start);
      __builtin_prefetch(col + run[u + 2 * U].start);
    }
    run_rows<R, U>(run, values, col, panel, c);
  }
  for (; run < end; ++run) run_rows<R, 1>(run, values, col, panel, c);
}

// Writes finished sums out: transposed tiles for a matrix, contiguous stretches for an image.
template <int R>
void store_rows(const SpmmArgs& a, float* sums, int64_t row0, int64_t rows, int64_t t0, int64_t n) {
  constexpr int64_t P = R * Vec::N;
  if (a.activation != kNone)
    for (int64_t i = 0; i < rows * P; i += Vec::N)
      activate(Vec::load(sums + i), a.activation).store(sums + i);
  const Sink& s = a.sink;
  if (s.token_major) {
    for (int64_t t = 0; t < n; t += Vec::N)
      for (int64_t r = 0; r < rows; r += Vec::N)
        transpose_tile(sums + r * P + t, P, rows - r < Vec::N ? rows - r : Vec::N,
                       s.data + (t0 + t) * s.stride + s.row_offset + row0 + r, s.stride,
                       n - t < Vec::N ? n - t : Vec::N, false);
    return;
  }
  for (int64_t t = 0; t < n;) {
    const int64_t image = (t0 + t) / s.pixels, pixel = (t0 + t) % s.pixels;
    const int64_t stretch = n - t < s.pixels - pixel ? n - t : s.pixels - pixel;
    float* out = s.data + (image * s.stride + s.row_offset + row0) * s.pixels + pixel;
    for (int64_t r = 0; r < rows; ++r) {
      const float* src = sums + r * P + t;
      int64_t i = 0;
      for (; i + Vec::N <= stretch; i += Vec::N) Vec::load(src + i).store(out + r * s.pixels + i);
      if (i < stretch) Vec::load(src + i, stretch - i).store(out + r * s.pixels + i, stretch - i);
    }
    t += stretch;
  }
}

template <int R>
void spmm_panel(const SpmmArgs& a, int64_t t0, int64_t t1) {
  constexpr int64_t P = R * Vec::N;
  const PlanView& plan = a.plan;
  const int64_t blocks = a.row_block_end - a.row_block_begin;
  const bool keep = blocks > 1;  // several row blocks read the same panel: keep all of it
  float* sums = a.scratch + (keep ? plan.n_col_blocks : 1) * plan.col_block * P;
  for (int64_t b = a.row_block_begin; b < a.row_block_end; ++b) {
    const int64_t row0 = plan.row_start[b], rows = plan.row_start[b + 1] - row0;
    for (int64_t k = 0; k < plan.n_col_blocks; ++k) {
      float* panel = a.scratch + (keep ? k * plan.col_block * P : 0);
      const int64_t c0 = k * plan.col_block;
      const int64_t c1 = c0 + plan.col_block < plan.cols ? c0 + plan.col_block : plan.cols;
      if (b == a.row_block_begin) fill_panel(a.source, panel, R, t0, t1, c0, c1);
      const int32_t* g = plan.run_start + b * plan.n_col_blocks + k;
      // Columns count from the start of the matrix: shift the panel instead of every column.
      run_block<R>(plan.runs + g[0], plan.runs + g[1], plan.n_tiles[b * plan.n_col_blocks + k],
                   a.values, a.col, panel - c0 * P, RowSums{sums, row0, a.bias, k == 0});
    }
    store_rows<R>(a, sums, row0, rows, t0, t1 - t0);
  }
}

void spmm(const SpmmArgs& a) {
  for (int64_t t = a.token_begin; t < a.token_end;) {
    const int64_t left = a.token_end - t;
    // A panel only a quarter empty costs less than two narrow ones that read the weights twice.
    const int64_t need = (left + Vec::N - 1) / Vec::N;
    int64_t r = a.vectors;
    while (r > 1 && need < r - r / 4) r /= 2;
    const int64_t end = left < r * Vec::N ? a.token_end : t + r * Vec::N;
    switch (r) {
      case 8: spmm_panel<8>(a, t, end); break;
      case 4: spmm_panel<4>(a, t, end); break;
      case 2: spmm_panel<2>(a, t, end); break;
      default: spmm_panel<1>(a, t, end);
    }
    t = end;
  }
}

}  // namespace
}  // namespace sparsekern
