// Sparse rows times dense panels. One value is broadcast and multiplied with `R` vectors of tokens
// that lie in the L1 cache; the sums of a row stay in registers for a whole block of columns.
// Limit: one load and one FMA for every vector, see bench/NOTES.md.
namespace sparsekern {
namespace {

struct RowSums {
  float* sums;  // (rows of the block, panel)
  int64_t row0;
  const float* bias;
  bool first;  // first block of columns: start from the bias
  // Last block of columns, and the tokens lie side by side in the result: rows go there at once.
  float* out;  // null: to `sums`
  int64_t out_stride;
  Activation activation;  // of those that go to `out`: none, relu or relu6
  bool stream;
  const LineOut* lines;   // null: vectors follow each other in `out`
  const float* residual;  // laid out as `out`, or null
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

SK_INLINE Vec load_line(const float* row, const LineOut& lines, int64_t j) {
  if (lines.lanes[j] == Vec::N) return Vec::load(row + lines.at[j]);
  return Vec::load(row + lines.at[j], lines.lanes[j]);
}

SK_INLINE void store_line(Vec v, float* row, const LineOut& lines, int64_t j, bool stream = false) {
  if (lines.lanes[j] == Vec::N) stream ? v.stream(row + lines.at[j]) : v.store(row + lines.at[j]);
  else v.store(row + lines.at[j], lines.lanes[j]);
}

// Stores R vectors from vector `first` on of a row of `panel` floats.
template <int R>
SK_INLINE void finish_row(const RowSums& c, int64_t row, int64_t panel, int64_t first,
                          const Vec* acc) {
  if (!c.out) {
    float* p = c.sums + (row - c.row0) * panel + first * Vec::N;
    for (int j = 0; j < R; ++j) acc[j].store(p + j * Vec::N);
    return;
  }
  const int64_t at = (row - c.row0) * c.out_stride;
  float* p = c.out + at;
  for (int j = 0; j < R; ++j) {
    Vec v = acc[j];
    if (c.residual) {
      const float* from = c.residual + at;
      v = v +
          (c.lines ? load_line(from, *c.lines, first + j) : Vec::load(from + (first + j) * Vec::N));
    }
    if (c.activation != kNone) v = max(Vec::set(0.f), v);
    if (c.activation == kRelu6) v = min(Vec::set(6.f), v);
    float* to = p + (first + j) * Vec::N;
    if (c.lines) store_line(v, p, *c.lines, first + j, c.stream);
    else c.stream ? v.stream(to) : v.store(to);
  }
}

// S: floats that one step of an offset stands for.
template <int R, int S>
SK_INLINE void add_products(const float* panel, float value, int64_t offset, Vec* acc) {
  const Vec w = broadcast(value);
  const float* x = panel + offset * S;
  asm("" : "+r"(x));
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j) acc[j] = add_product(w, Vec::load(x + j * Vec::N), acc[j]);
}

// Where the next run finds its values and offsets. Packed values follow each other; those of a CSR
// matrix are found by the start of the run.
struct Stream {
  const float *values, *packed;
  const uint16_t* offsets;

  SK_INLINE const float* next(const Run& run, const uint16_t** offset) {
    const float* v = packed ? packed : values + run.start;
    *offset = offsets;
    offsets += run.count;
    if (packed) packed += run.count;
    return v;
  }
};

// U rows side by side, so that enough independent sums hide the latency of the FMA when R is small.
template <int R, int U, int S>
SK_INLINE void run_rows(const Run* runs, Stream& stream, const float* panel, const RowSums& c) {
  Vec acc[U][R];
  const float* v[U];
  const uint16_t* k[U];
  for (int u = 0; u < U; ++u) {
    start_row<R>(c, runs[u].row, acc[u]);
    v[u] = stream.next(runs[u], &k[u]);
  }
  const int32_t common = runs[U - 1].count;  // the smallest: runs are sorted
  for (int32_t i = 0; i < common; ++i) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) add_products<R, S>(panel, v[u][i], k[u][i], acc[u]);
  }
  for (int u = 0; u < U; ++u) {
    for (int32_t i = common; i < runs[u].count; ++i)
      add_products<R, S>(panel, v[u][i], k[u][i], acc[u]);
    finish_row<R>(c, runs[u].row, R * Vec::N, 0, acc[u]);
  }
}

// A tile of rows with equal columns: each vector of the panel is loaded once for all of them. At
// most four vectors at a time, so that the sums and what feeds them fit the registers.
template <int R, int S>
SK_INLINE void run_tile(const Run* runs, Stream& stream, const float* panel, const RowSums& c) {
  constexpr int U = kTileRows, H = R < 4 ? R : R % 4 ? 3 : 4;
  const float* v[U];
  const uint16_t* k;
  float* sums[U];
  for (int u = 0; u < U; ++u) {
    v[u] = stream.next(runs[u], &k);
    sums[u] = c.sums + (runs[u].row - c.row0) * R * Vec::N;
  }
  for (int h = 0; h < R; h += H) {
    Vec acc[U][H];
    for (int u = 0; u < U; ++u)
      for (int j = 0; j < H; ++j)
        acc[u][j] = c.first ? Vec::set(c.bias ? c.bias[runs[u].row] : 0.f)
                            : Vec::load(sums[u] + (h + j) * Vec::N);
    for (int32_t i = 0; i < runs[0].count; ++i) {
      const float* p = panel + k[i] * S + h * Vec::N;
      Vec x[H];
      for (int j = 0; j < H; ++j) x[j] = Vec::load(p + j * Vec::N);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vec w = Vec::set(v[u][i]);
        for (int j = 0; j < H; ++j) acc[u][j] = add_product(w, x[j], acc[u][j]);
      }
    }
    for (int u = 0; u < U; ++u) finish_row<H>(c, runs[u].row, R * Vec::N, h, acc[u]);
  }
}

template <int R, int S>
void run_block(const Run* run, const Run* end, int32_t tiles, Stream stream, const float* panel,
               const RowSums& c) {
  for (int32_t i = 0; i < tiles; ++i, run += kTileRows) run_tile<R, S>(run, stream, panel, c);
  constexpr int U = 4 * R >= 3 * kSums ? 1 : kSums / R;
  for (; run + U <= end; run += U) {
    // Rows come in order of their counts, so unpacked values do not stream: fetch ahead.
    if (!stream.packed)
      for (int u = 0; u < U; ++u) __builtin_prefetch(stream.values + run[u + 8].start);
    run_rows<R, U, S>(run, stream, panel, c);
  }
  for (; run < end; ++run) run_rows<R, 1, S>(run, stream, panel, c);
}

// Tiles transposed back to (tokens, rows).
template <int R>
SK_INLINE void store_matrix(const Sink& s, const float* sums, int64_t row0, int64_t rows,
                            int64_t t0, int64_t n) {
  constexpr int64_t P = R * Vec::N;
  for (int64_t t = 0; t < n; t += Vec::N)
    for (int64_t r = 0; r < rows; r += Vec::N)
      store_tile(sums + r * P + t, P, rows - r < Vec::N ? rows - r : Vec::N, s.data,
                 (t0 + t) * s.stride + s.row_offset + row0 + r, s.stride,
                 n - t < Vec::N ? n - t : Vec::N);
}

// Whether rows of n floats from p on can be written around the caches: whole lines only.
SK_INLINE bool can_stream(const Sink& s, const float* p) {
  constexpr int64_t kLine = 64 / sizeof(float);
  return s.stream && reinterpret_cast<uintptr_t>(p) % 64 == 0 && s.pixels % kLine == 0;
}

// Contiguous stretches of an image. A stretch is short and the next one a whole plane away: written
// around the caches it need not be read first. That takes whole lines.
template <int R>
SK_INLINE void store_image(const Sink& s, const float* sums, int64_t row0, int64_t rows, int64_t t0,
                           int64_t n) {
  constexpr int64_t P = R * Vec::N;
  for (int64_t t = 0; t < n;) {
    const int64_t image = (t0 + t) / s.pixels, pixel = (t0 + t) % s.pixels;
    const int64_t stretch = n - t < s.pixels - pixel ? n - t : s.pixels - pixel;
    float* out = s.data + (image * s.stride + s.row_offset + row0) * s.pixels + pixel;
    const bool stream = can_stream(s, out);
    for (int64_t r = 0; r < rows; ++r, out += s.pixels) {
      const float* src = sums + r * P + t;
      int64_t i = 0;
      for (; i + Vec::N <= stretch; i += Vec::N)
        stream ? Vec::load(src + i).stream(out + i) : Vec::load(src + i).store(out + i);
      if (i < stretch) Vec::load(src + i, stretch - i).store(out + i, stretch - i);
    }
    t += stretch;
  }
}

// Adds the residual to sums that store_image will store.
template <int R>
SK_INLINE void add_residual(const Sink& s, const float* residual, float* sums, int64_t row0,
                            int64_t rows, int64_t t0, int64_t n) {
  constexpr int64_t P = R * Vec::N;
  for (int64_t t = 0; t < n;) {
    const int64_t image = (t0 + t) / s.pixels, pixel = (t0 + t) % s.pixels;
    const int64_t stretch = n - t < s.pixels - pixel ? n - t : s.pixels - pixel;
    const float* from = residual + (image * s.stride + s.row_offset + row0) * s.pixels + pixel;
    for (int64_t r = 0; r < rows; ++r, from += s.pixels) {
      float* sum = sums + r * P + t;
      for (int64_t i = 0; i < stretch; i += Vec::N) {
        const int64_t lanes = stretch - i < Vec::N ? stretch - i : Vec::N;
        (Vec::load(sum + i, lanes) + Vec::load(from + i, lanes)).store(sum + i, lanes);
      }
    }
    t += stretch;
  }
}

template <int R>
void store_rows(const SpmmArgs& a, float* sums, int64_t row0, int64_t rows, int64_t t0, int64_t n) {
  if (a.residual) add_residual<R>(a.sink, a.residual, sums, row0, rows, t0, n);
  if (a.activation != kNone)
    for (int64_t i = 0; i < rows * R * Vec::N; i += Vec::N)
      activate(Vec::load(sums + i), a.activation).store(sums + i);
  if (a.sink.token_major) store_matrix<R>(a.sink, sums, row0, rows, t0, n);
  else store_image<R>(a.sink, sums, row0, rows, t0, n);
}

// Where the last block of columns may store: straight into the image when the panel is full, lies
// in one image and needs no transpose. Saves the sums another trip through the L2 cache.
template <int R>
SK_INLINE void set_direct_out(const SpmmArgs& a, int64_t row0, int64_t t0, int64_t t1, RowSums* c) {
  constexpr int64_t P = R * Vec::N;
  const Sink& s = a.sink;
  if (s.token_major || t1 - t0 != P || t0 % s.pixels + P > s.pixels) return;
  if (a.activation == kGelu || a.activation == kGeluTanh) return;
  const int64_t at = (t0 / s.pixels * s.stride + s.row_offset + row0) * s.pixels + t0 % s.pixels;
  c->out = s.data + at;
  c->residual = a.residual ? a.residual + at : nullptr;
  c->out_stride = s.pixels;
  c->activation = a.activation;
  c->stream = can_stream(s, c->out);
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
    RowSums c{sums, row0, a.bias, true, nullptr, 0, kNone, false, nullptr, nullptr};
    for (int64_t k = 0; k < plan.n_col_blocks; ++k) {
      float* panel = a.scratch + (keep ? k * plan.col_block * P : 0);
      const int64_t c0 = k * plan.col_block;
      const int64_t c1 = c0 + plan.col_block < plan.cols ? c0 + plan.col_block : plan.cols;
      if (b == a.row_block_begin) fill_panel(a.source, panel, R, t0, t1, c0, c1);
      const int64_t g = b * plan.n_col_blocks + k;
      const int32_t first = plan.value_start[g];
      c.first = k == 0;
      if (k + 1 == plan.n_col_blocks) set_direct_out<R>(a, row0, t0, t1, &c);
      run_block<R, R * Vec::N>(
          plan.runs + plan.run_start[g], plan.runs + plan.run_start[g + 1], plan.n_tiles[g],
          {a.values, a.packed ? a.packed + first : nullptr, plan.offsets + first}, panel, c);
    }
    if (!c.out) store_rows<R>(a, sums, row0, rows, t0, t1 - t0);
  }
}

void spmm(const SpmmArgs& a) {
  for (int64_t t = a.token_begin; t < a.token_end;) {
    const int64_t left = a.token_end - t;
    // The last panel is as wide as what is left; 5 and 7 vectors run as 6 and 8.
    const int64_t need = (left + Vec::N - 1) / Vec::N;
    int64_t r = need < a.vectors ? need : a.vectors;
    if (r > 4) r += r % 2;
    const int64_t end = left < r * Vec::N ? a.token_end : t + r * Vec::N;
    switch (r) {
      case 8: spmm_panel<8>(a, t, end); break;
      case 6: spmm_panel<6>(a, t, end); break;
      case 4: spmm_panel<4>(a, t, end); break;
      case 3: spmm_panel<3>(a, t, end); break;
      case 2: spmm_panel<2>(a, t, end); break;
      default: spmm_panel<1>(a, t, end);
    }
    t = end;
  }
  if (a.sink.stream) Vec::stream_end();
}

// Runs are short and lie all over the CSR matrix: fetch them this many ahead.
constexpr int64_t kPackAhead = 24;

#if !defined(SPARSEKERN_BF16)

void pack(const PlanView& plan, const float* values, const int32_t* perm, float* out,
          int64_t group_begin, int64_t group_end) {
  float* p = out + plan.value_start[group_begin];
  const Run* end = plan.runs + plan.run_start[group_end];
  for (const Run* run = plan.runs + plan.run_start[group_begin]; run < end; ++run) {
    if (perm) {
      __builtin_prefetch(perm + run[kPackAhead].start);
      for (int32_t i = 0; i < run->count; ++i) p[i] = values[perm[run->start + i]];
    } else {
      __builtin_prefetch(values + run[kPackAhead].start);
      const float* v = values + run->start;
      int32_t i = 0;
      for (; i + Vec::N <= run->count; i += Vec::N) Vec::load(v + i).store(p + i);
      if (i < run->count) Vec::load(v + i, run->count - i).store(p + i, run->count - i);
    }
    p += run->count;
  }
}

void unpack(const PlanView& plan, const float* packed, float* values, int64_t group_begin,
            int64_t group_end) {
  const float* p = packed + plan.value_start[group_begin];
  const Run* end = plan.runs + plan.run_start[group_end];
  for (const Run* run = plan.runs + plan.run_start[group_begin]; run < end; ++run) {
    float* v = values + run->start;
    int32_t i = 0;
    for (; i + Vec::N <= run->count; i += Vec::N) Vec::load(p + i).store(v + i);
    if (i < run->count) Vec::load(p + i, run->count - i).store(v + i, run->count - i);
    p += run->count;
  }
}

#endif  // SPARSEKERN_BF16

}  // namespace
}  // namespace sparsekern
