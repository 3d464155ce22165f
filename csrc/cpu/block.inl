// Blocks times dense panels. A tile of rows x vectors of tokens stays in registers over all blocks
// of a row of blocks: each vector of the panel is loaded once for all rows of the tile, each value
// is broadcast once for all its vectors, so the multiply-adds set the pace, not the loads.
namespace sparsekern {
namespace {

#if defined(SPARSEKERN_AVX512)
constexpr int kTileSums = 16;  // sums of a tile; with what feeds them they fill the registers
#else
constexpr int kTileSums = 8;
#endif

// The blocks of one row of blocks that one panel covers.
struct BlockRun {
  const float* values;  // of the first row of the tile in the first block
  const int32_t* col;
  int64_t count;
  const float* panel;  // row 0 is column 0 of the matrix
  float* sums;         // of the first row of the tile
  const float* bias;   // of the first row of the tile, or null
  bool first;          // start from the bias, not from the sums
  int64_t valid_rows;  // of the matrix, from the first row of the tile on; may be <= 0
};

// Columns of block `col`: the first one's place in the panel, and how many there are.
struct BlockColumns {
  int64_t first, count;
};
SK_INLINE BlockColumns columns_of(const BlockView& v, int32_t col) {
  const int64_t block = v.taps == 1 ? col : col / v.taps;
  const int64_t left = v.channels - block * v.block_cols;
  return {v.taps == 1 ? col * v.block_cols : block * v.block_cols * v.taps + col % v.taps,
          left < v.block_cols ? left : v.block_cols};
}

// U rows x H vectors, from vector h of a panel of R vectors on.
template <int U, int H, int R>
SK_INLINE void block_tile(const BlockView& view, const BlockRun& run, int h) {
  constexpr int64_t P = R * Vec::N;
  const int64_t block = view.block_rows * view.block_cols, step = view.taps * P;
  Vec acc[U][H];
  for (int u = 0; u < U; ++u)
    for (int j = 0; j < H; ++j)
      acc[u][j] = run.first ? Vec::set(run.bias && u < run.valid_rows ? run.bias[u] : 0.f)
                            : Vec::load(run.sums + u * P + (h + j) * Vec::N);
  for (int64_t i = 0; i < run.count; ++i) {
    const BlockColumns c = columns_of(view, run.col[i]);
    const float* x = run.panel + c.first * P + h * Vec::N;
    const float* v[U];
    for (int u = 0; u < U; ++u) {
      v[u] = run.values + i * block + u * view.block_cols;
      // The rows of a tile are stretches with gaps, which no hardware prefetcher follows.
      for (int64_t k = 0; k < view.block_cols; k += 16) __builtin_prefetch(v[u] + 2 * block + k);
    }
    for (int64_t k = 0; k < c.count; ++k, x += step) {
      Vec xs[H];
      for (int j = 0; j < H; ++j) xs[j] = Vec::load(x + j * Vec::N);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Vec w = Vec::set(v[u][k]);
        for (int j = 0; j < H; ++j) acc[u][j] = fma(w, xs[j], acc[u][j]);
      }
    }
  }
  for (int u = 0; u < U; ++u)
    for (int j = 0; j < H; ++j) acc[u][j].store(run.sums + u * P + (h + j) * Vec::N);
}

// All `rows` rows of a block, in tiles of U rows, what is left in tiles of half as many.
template <int U, int R>
SK_INLINE void block_rows_of(const BlockView& view, BlockRun run, int64_t rows) {
  constexpr int kMost = kTileSums / U < 1 ? 1 : kTileSums / U;
  constexpr int H = R < kMost ? R : kMost;
  for (; rows >= U; rows -= U) {
    for (int h = 0; h < R; h += H) block_tile<U, H, R>(view, run, h);
    run.values += U * view.block_cols;
    run.sums += U * R * Vec::N;
    run.bias += run.bias ? U : 0;
    run.valid_rows -= U;
  }
  if constexpr (U > 1) {
    if (rows > 0) block_rows_of<U / 2, R>(view, run, rows);
  }
}

// The values of blocks [begin, end), int8 ones spread to `wide`: once for all tokens of a panel.
SK_INLINE const float* block_values(const BlockArgs& a, int64_t begin, int64_t end, float* wide) {
  const int64_t block = a.view.block_rows * a.view.block_cols;
  if (!a.scales) return a.values + begin * block;
  spread(a.quantized + begin * block, 1.f, (end - begin) * block, wide);
  return wide;
}

// sums of int8 products -> scale * sum + bias
template <int R>
SK_INLINE void scale_rows(const BlockArgs& a, float* sums, int64_t row0, int64_t rows) {
  for (int64_t r = row0; r < row0 + rows; ++r) {
    const Vec scale = Vec::set(a.scales[r]), bias = Vec::set(a.bias ? a.bias[r] : 0.f);
    for (int j = 0; j < R; ++j, sums += Vec::N) fma(Vec::load(sums), scale, bias).store(sums);
  }
}

template <int R>
void block_panel(const BlockArgs& a, int64_t t0, int64_t t1) {
  constexpr int64_t P = R * Vec::N;
  constexpr int kRows = R >= 4 ? 4 : 8;  // enough sums to hide the latency when R is small
  const BlockView& v = a.view;
  const int64_t panel_cols = a.channel_blocks * v.block_cols * v.taps;
  const int64_t panels = a.panels();
  const float* bias = a.scales ? nullptr : a.bias;  // scale_rows adds it
  float* sums = a.scratch + panels * panel_cols * P;
  int32_t* next = reinterpret_cast<int32_t*>(sums + a.row_blocks * v.block_rows * P);
  float* wide = reinterpret_cast<float*>(next + a.row_blocks);
  SpmmArgs out{};
  out.activation = a.activation, out.sink = a.sink;
  for (int64_t b0 = a.begin; b0 < a.end; b0 += a.row_blocks) {
    const int64_t b1 = b0 + a.row_blocks < a.end ? b0 + a.row_blocks : a.end;
    const int64_t row0 = v.row_of(b0), rows = v.rows_in(b0, b1);
    for (int64_t b = b0; b < b1; ++b) next[b - b0] = v.crow[b];
    for (int64_t k = 0; k < panels; ++k) {
      float* panel = a.scratch + k * panel_cols * P;
      const int64_t c0 = k * panel_cols;
      const int64_t c1 = c0 + panel_cols < v.cols() ? c0 + panel_cols : v.cols();
      if (b0 == a.begin) fill_panel(a.source, panel, R, t0, t1, c0, c1);
      const int64_t end_col = (k + 1) * a.channel_blocks * v.taps;
      for (int64_t b = b0; b < b1; ++b) {
        const int32_t begin = next[b - b0];
        int32_t end = begin;
        while (end < v.crow[b + 1] && v.col[end] < end_col) ++end;
        next[b - b0] = end;
        if (end == begin && k) continue;
        const int64_t row = (b - b0) * v.block_rows;
        block_rows_of<kRows, R>(
            v,
            {block_values(a, begin, end, wide), v.col + begin, end - begin, panel - c0 * P,
             sums + row * P, bias ? bias + row0 + row : nullptr, k == 0, rows - row},
            v.block_rows);
      }
    }
    if (a.scales) scale_rows<R>(a, sums, row0, rows);
    store_rows<R>(out, sums, row0, rows, t0, t1 - t0);
  }
}

void block_spmm(const BlockArgs& a) {
  for (int64_t t = a.token_begin; t < a.token_end;) {
    const int64_t left = a.token_end - t, need = (left + Vec::N - 1) / Vec::N;
    int64_t r = a.vectors;
    while (r > 1 && need < r - r / 4) r /= 2;  // as for spmm: a narrow panel reads all values again
    const int64_t end = left < r * Vec::N ? a.token_end : t + r * Vec::N;
    switch (r) {
      case 8: block_panel<8>(a, t, end); break;
      case 4: block_panel<4>(a, t, end); break;
      case 2: block_panel<2>(a, t, end); break;
      default: block_panel<1>(a, t, end);
    }
    t = end;
  }
}

SK_INLINE Vec load_values(const float* p) {
  return Vec::load(p);
}
SK_INLINE Vec load_values(const float* p, int64_t n) {
  return Vec::load(p, n);
}
SK_INLINE Vec load_values(const int8_t* p) {
  return Vec::load_int8(p, Vec::N);
}
SK_INLINE Vec load_values(const int8_t* p, int64_t n) {
  return Vec::load_int8(p, n);
}

// One token: lanes along the columns of a block, U rows at a time. The values stream once.
template <int U, class T>
SK_INLINE void block_dot(const BlockView& view, const T* values, int64_t begin, int64_t end,
                         const float* x, Vec* sums) {
  Vec acc[U];
  for (int u = 0; u < U; ++u) acc[u] = Vec::set(0.f);
  const int64_t block = view.block_rows * view.block_cols;
  for (int64_t i = begin; i < end; ++i) {
    const BlockColumns c = columns_of(view, view.col[i]);
    const T* v = values + i * block;
    const float* xs = x + c.first;
    int64_t k = 0;
    for (; k + Vec::N <= c.count; k += Vec::N) {
      const Vec xv = Vec::load(xs + k);
#pragma GCC unroll 16
      for (int u = 0; u < U; ++u)
        acc[u] = fma(load_values(v + u * view.block_cols + k), xv, acc[u]);
    }
    if (k == c.count) continue;
    const Vec xv = Vec::load(xs + k, c.count - k);
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u)
      acc[u] = fma(load_values(v + u * view.block_cols + k, c.count - k), xv, acc[u]);
  }
  for (int u = 0; u < U; ++u) sums[u] = acc[u];
}

template <int U, class T>
SK_INLINE void block_dots(const BlockView& view, const T* values, int64_t begin, int64_t end,
                          const float* x, int64_t rows, Vec* sums) {
  for (; rows >= U; rows -= U, sums += U, values += U * view.block_cols)
    block_dot<U>(view, values, begin, end, x, sums);
  if constexpr (U > 1) {
    if (rows > 0) block_dots<U / 2>(view, values, begin, end, x, rows, sums);
  }
}

// Up to N rows of a row of blocks of one column each: lanes along the rows.
template <class T>
SK_INLINE Vec column_dots(const BlockView& view, const T* values, int64_t begin, int64_t end,
                          const float* x, int64_t rows) {
  Vec even = Vec::set(0.f), odd = even;
  const int64_t block = view.block_rows;
  const auto at = [&](int64_t i) {
    const T* v = values + i * block;
    return rows == Vec::N ? load_values(v) : load_values(v, rows);
  };
  int64_t i = begin;
  for (; i + 2 <= end; i += 2) {
    even = fma(at(i), Vec::set(x[view.col[i]]), even);
    odd = fma(at(i + 1), Vec::set(x[view.col[i + 1]]), odd);
  }
  if (i < end) even = fma(at(i), Vec::set(x[view.col[i]]), even);
  return even + odd;
}

// `all` are the values of a, whatever their type.
template <class T>
SK_INLINE void block_spmv_of(const BlockArgs& a, const T* all, const float* x, float* y) {
  const BlockView& v = a.view;
  for (int64_t b = a.begin; b < a.end; ++b) {
    const int64_t row0 = v.row_of(b), rows = v.rows_in(b, b + 1);
    for (int64_t r = 0; r < rows; r += Vec::N) {
      const int64_t n = rows - r < Vec::N ? rows - r : Vec::N;
      const T* values = all + r * v.block_cols;
      Vec sum;
      if (v.block_cols == 1) {
        sum = column_dots(v, values, v.crow[b], v.crow[b + 1], x, n);
      } else {
        Vec part[Vec::N];
        for (int64_t u = n; u < Vec::N; ++u) part[u] = Vec::set(0.f);
        block_dots<Vec::N>(v, values, v.crow[b], v.crow[b + 1], x, n, part);
        sum = sum_each(part);
      }
      const Vec bias = a.bias ? Vec::load(a.bias + row0 + r, n) : Vec::set(0.f);
      const Vec scale = a.scales ? Vec::load(a.scales + row0 + r, n) : Vec::set(1.f);
      activate(fma(sum, scale, bias), a.activation).store(y + row0 + r, n);
    }
  }
}

void block_spmv(const BlockArgs& a, const float* x, float* y) {
  if (a.scales) block_spmv_of(a, a.quantized, x, y);
  else block_spmv_of(a, a.values, x, y);
}

// U x V dot products over a panel of tokens, U * V = N, added to `out`. Rows and columns beyond
// `rows` and `cols` repeat the last one and are not written.
template <int U, int V>
SK_INLINE void dot_tile(const float* grad, int64_t rows, const float* x, int64_t x_step,
                        int64_t cols, float* out, int64_t out_step) {
  constexpr int64_t P = kSddmmVectors * Vec::N;
  const float *g[U], *xs[V];
  for (int u = 0; u < U; ++u) g[u] = grad + (u < rows ? u : rows - 1) * P;
  for (int v = 0; v < V; ++v) xs[v] = x + (v < cols ? v : cols - 1) * x_step;
  Vec acc[U * V];
  for (int i = 0; i < U * V; ++i) acc[i] = Vec::set(0.f);
  for (int64_t t = 0; t < P; t += Vec::N) {
    Vec xv[V];
    for (int v = 0; v < V; ++v) xv[v] = Vec::load(xs[v] + t);
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      const Vec gv = Vec::load(g[u] + t);
      for (int v = 0; v < V; ++v) acc[u * V + v] = fma(gv, xv[v], acc[u * V + v]);
    }
  }
  float sum[Vec::N];
  sum_each(acc).store(sum);
  for (int64_t u = 0; u < U && u < rows; ++u)
    for (int64_t v = 0; v < V && v < cols; ++v) out[u * out_step + v] += sum[u * V + v];
}

template <int U, int V>
SK_INLINE void dot_tiles(const BlockView& view, const float* grad, int64_t rows, const float* x,
                         int64_t cols, float* out) {
  constexpr int64_t P = kSddmmVectors * Vec::N;
  for (int64_t r = 0; r < rows; r += U)
    for (int64_t c = 0; c < cols; c += V)
      dot_tile<U, V>(grad + r * P, rows - r, x + c * view.taps * P, view.taps * P, cols - c,
                     out + r * view.block_cols + c, view.block_cols);
}

// First block of each row of blocks inside the range of channels, and the one after the last.
void find_runs(const BlockSddmmArgs& a, int32_t* first, int32_t* last) {
  const BlockView& v = a.view;
  for (int64_t b = a.begin; b < a.end; ++b) {
    int32_t i = v.crow[b];
    while (i < v.crow[b + 1] && v.col[i] < a.channel_block_begin * v.taps) ++i;
    first[b - a.begin] = i;
    while (i < v.crow[b + 1] && v.col[i] < a.channel_block_end * v.taps) ++i;
    last[b - a.begin] = i;
  }
}

void block_sddmm(const BlockSddmmArgs& a) {
  constexpr int64_t P = kSddmmVectors * Vec::N;
  const BlockView& v = a.view;
  const int64_t c0 = a.channel_block_begin * v.block_cols * v.taps;
  const int64_t wide = a.channel_block_end * v.block_cols * v.taps;
  const int64_t c1 = wide < v.cols() ? wide : v.cols();
  int32_t* first = reinterpret_cast<int32_t*>(a.scratch + (wide - c0) * P);
  int32_t* last = first + (a.end - a.begin);
  find_runs(a, first, last);
  for (int64_t t = 0, p = 0; t < a.tokens; t += P, ++p) {
    fill_panel(a.source, a.scratch, kSddmmVectors, t, t + P < a.tokens ? t + P : a.tokens, c0, c1);
    const float* panel = a.scratch - c0 * P;
    for (int64_t b = a.begin; b < a.end; ++b) {
      const float* grad = a.grad_panels + p * a.grad_panel_stride + v.row_of(b) * P;
      const int64_t rows = v.rows_in(b, b + 1);
      for (int32_t i = first[b - a.begin]; i < last[b - a.begin]; ++i) {
        const BlockColumns c = columns_of(v, v.col[i]);
        const float* x = panel + c.first * P;
        float* out = a.out + i * v.block_rows * v.block_cols;
        if (rows == 1) dot_tiles<1, Vec::N>(v, grad, rows, x, c.count, out);
        else if (c.count == 1) dot_tiles<Vec::N, 1>(v, grad, rows, x, c.count, out);
        else dot_tiles<4, Vec::N / 4>(v, grad, rows, x, c.count, out);
      }
    }
  }
}

}  // namespace
}  // namespace sparsekern
