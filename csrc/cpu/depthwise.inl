// Depthwise convolution: every row of the matrix reads one channel, so nothing is shared between
// rows but the loads. Square kernels of 3 and 5 with all their taps are multiplied straight from
// the image, a few rows of the result at a time, so that a vector of the image serves up to K of
// them; the image is read once and nothing is padded in memory. All others read a padded plane.
// Limit of the first: 18 loads for the 36 FMAs of four rows of a 3x3 kernel, two of three loads
// across a line of the cache; of the second: one load per FMA.
namespace sparsekern {
namespace {

// ReLU, ReLU6 or nothing as two bounds, so that no store asks which; GELU is left to gelu_row.
struct Bounds {
  Vec low, high;
};

SK_INLINE Bounds bounds_of(Activation a) {
  const bool relu = a == kRelu || a == kRelu6;
  return {Vec::set(relu ? 0.f : -__builtin_inff()), Vec::set(a == kRelu6 ? 6.f : __builtin_inff())};
}

// A vector is stored whole where only `lanes` of it belong to the row: the others land where the
// next rows start, and are written again by those. So rows are walked from their ends, and `end` is
// that of the last one.
SK_INLINE void store_depthwise(const DepthwiseArgs& a, const Bounds& b, Vec v, int64_t to,
                               int64_t lanes, int64_t end) {
  const bool whole = lanes >= Vec::N || to + Vec::N <= end;
  if (a.residual) v = v + (whole ? Vec::load(a.residual + to) : Vec::load(a.residual + to, lanes));
  v = min(b.high, max(b.low, v));
  if (whole) v.store(a.out + to);
  else v.store(a.out + to, lanes);
}

SK_INLINE void gelu_row(const DepthwiseArgs& a, int64_t row) {
  const int64_t pixels = a.out_h * a.out_w;
  float* p = a.out + row * pixels;
  for (int64_t i = 0; i < pixels; i += Vec::N) {
    const int64_t lanes = pixels - i < Vec::N ? pixels - i : Vec::N;
    activate(Vec::load(p + i, lanes), a.activation).store(p + i, lanes);
  }
}

// Lanes [first, end) of a vector lie inside the image.
struct Span {
  int64_t first, end;
};

SK_INLINE Span span_of(int64_t from, int64_t size) {
  const int64_t first = from < 0 ? -from : 0, end = size - from;
  return {first < Vec::N ? first : Vec::N, end < first ? first : end < Vec::N ? end : Vec::N};
}

template <bool Inside>
SK_INLINE Vec load_part(const float* p, Span lanes) {
  if (Inside) return Vec::load(p);
  return Vec::load_lanes(p, lanes.first, lanes.end);
}

// U rows of the result from y on, one vector each from x on. Inside: no load leaves the image to
// the left or right; Rows: nor at the top or bottom.
template <int K, int S, int U, bool Inside, bool Rows>
SK_INLINE void depthwise_tile(const DepthwiseArgs& a, const Bounds& bounds, int64_t row, int64_t y,
                              int64_t x) {
  const PlaneAxis &py = a.plane.y, &px = a.plane.x;
  const float* weights = a.values + a.crow[row];
  const int64_t from = x * S - px.pad;
  Span lanes[K + 1], next[K + 1];
  for (int k = 0; !Inside && k < K; ++k) {
    lanes[k] = span_of(from + k, px.size);
    next[k] = span_of(from + k + Vec::N, px.size);
  }
  Vec w[K * K], acc[U];
  for (int k = 0; k < K * K; ++k) w[k] = Vec::set(weights[k]);
  const Vec bias = Vec::set(a.bias ? a.bias[row] : 0.f);
  for (int u = 0; u < U; ++u) acc[u] = bias;
  int64_t v = y * S - py.pad;
  const float* src = a.plane.src + v * px.size + from;
#pragma GCC unroll 16
  for (int i = 0; i < (U - 1) * S + K; ++i, ++v, src += px.size) {
    if (!Rows && (v < 0 || v >= py.size)) continue;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      Vec t = load_part<Inside>(src + k, lanes[k]);
      if (S == 2) t = even_lanes(t, load_part<Inside>(src + k + Vec::N, next[k]));
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u)
        if (i >= u * S && i < u * S + K) acc[u] = fma(w[(i - u * S) * K + k], t, acc[u]);
    }
  }
  const int64_t to = (row * a.out_h + y) * a.out_w + x, end = (row + 1) * a.out_h * a.out_w;
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
    store_depthwise(a, bounds, acc[u], to + u * a.out_w, a.out_w - x, end);
}

// Along the rows, in which the image lies in memory, from their ends.
template <int K, int S, int U, bool Rows>
void depthwise_rows(const DepthwiseArgs& a, int64_t row, int64_t y) {
  const PlaneAxis& px = a.plane.x;
  const Bounds bounds = bounds_of(a.activation);
  for (int64_t x = (a.out_w - 1) / Vec::N * Vec::N; x >= 0; x -= Vec::N) {
    const int64_t from = x * S - px.pad;
    const bool inside = from >= 0 && from + K - 1 + S * Vec::N <= px.size;
    inside ? depthwise_tile<K, S, U, true, Rows>(a, bounds, row, y, x)
           : depthwise_tile<K, S, U, false, Rows>(a, bounds, row, y, x);
  }
}

template <int K, int S>
void depthwise_image(const DepthwiseArgs& a, int64_t row) {
  constexpr int U = S == 1 ? 4 : 2;
  const PlaneAxis& py = a.plane.y;
  int64_t y = 0;
  for (; y + U <= a.out_h; y += U) {
    const bool rows = y * S >= py.pad && (y + U - 1) * S + K - py.pad <= py.size;
    rows ? depthwise_rows<K, S, U, true>(a, row, y) : depthwise_rows<K, S, U, false>(a, row, y);
  }
  if (U == 4 && y + 2 < a.out_h) depthwise_rows<K, S, U - 1, false>(a, row, y), y += U - 1;
  if (U == 4 && y + 1 < a.out_h) depthwise_rows<K, S, 2, false>(a, row, y), y += 2;
  if (y < a.out_h) depthwise_rows<K, S, 1, false>(a, row, y);
}

// R vectors of the result from (y, x) on, row by row; a row starts with a whole vector.
template <int R>
SK_INLINE void depthwise_vectors(const DepthwiseArgs& a, int64_t row, int64_t* y, int64_t* x) {
  const int32_t first = a.crow[row], count = a.crow[row + 1] - first;
  int64_t from[R], to[R], lanes[R];
  for (int j = 0; j < R; ++j) {
    from[j] = *y * a.pitch + *x;
    to[j] = (row * a.out_h + *y) * a.out_w + *x;
    lanes[j] = a.out_w - *x;
    *x += Vec::N;
    if (*x >= a.out_w) *x = 0, ++*y;
  }
  Vec acc[R];
  for (int j = 0; j < R; ++j) acc[j] = Vec::set(a.bias ? a.bias[row] : 0.f);
  for (int32_t i = first; i < first + count; ++i) {
    const Vec w = broadcast(a.values[i]);
    const float* plane = a.plane.dst + a.tap_offset[a.col[i]];
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) acc[j] = fma(w, Vec::load(plane + from[j]), acc[j]);
  }
  const Bounds bounds = bounds_of(a.activation);
  for (int j = 0; j < R; ++j) store_depthwise(a, bounds, acc[j], to[j], lanes[j], 0);
}

void depthwise_plane(const DepthwiseArgs& a, int64_t row) {
  constexpr int kAtOnce = 8;
  const int64_t vectors = a.out_h * ((a.out_w + Vec::N - 1) / Vec::N);
  int64_t v = 0, y = 0, x = 0;
  for (; v + kAtOnce <= vectors; v += kAtOnce) depthwise_vectors<kAtOnce>(a, row, &y, &x);
  for (; v + 2 <= vectors; v += 2) depthwise_vectors<2>(a, row, &y, &x);
  if (v < vectors) depthwise_vectors<1>(a, row, &y, &x);
}

void depthwise(const DepthwiseArgs& a) {
  const int64_t taps = a.square * a.square;
  const bool once = a.plane.x.stride == 1;
  bool filled = false;
  for (int64_t row = 0; row < a.rows; ++row) {
    const bool all = taps > 0 && a.crow[row + 1] - a.crow[row] == taps;
    if (!all && !filled) fill_plane(a.plane), filled = true;
    if (!all) depthwise_plane(a, row);
    else if (a.square == 3) once ? depthwise_image<3, 1>(a, row) : depthwise_image<3, 2>(a, row);
    else once ? depthwise_image<5, 1>(a, row) : depthwise_image<5, 2>(a, row);
    if (a.activation == kGelu || a.activation == kGeluTanh) gelu_row(a, row);
  }
}

}  // namespace
}  // namespace sparsekern
