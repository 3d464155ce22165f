// Padded planes, see planes.h: rows of the source, shifted by the padding and split into phases.
namespace sparsekern {
namespace {

SK_INLINE void zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::N)
    Vec::set(0.f).store(p + i, n - i < Vec::N ? n - i : Vec::N);
}

// N floats of the row from position `from` on, zeros outside of it.
SK_INLINE Vec padded(const float* src, int64_t size, int64_t from) {
  if (from >= 0 && from + Vec::N <= size) return Vec::load(src + from);
  const int64_t first = from < 0 ? -from : 0, end = size - from < Vec::N ? size - from : Vec::N;
  return first < end ? Vec::load_lanes(src + from, first, end) : Vec::set(0.f);
}

// One row of the source into one phase row: dst[q] = source at v = q * stride + phase, which is
// element (v - pad) / up where that divides and lies inside.
SK_INLINE void fill_phase_row(const float* src, const PlaneAxis& x, int64_t phase, float* dst) {
  const int64_t n = x.phase_size;
  if (x.up == 1 && x.stride <= 2) {
    for (int64_t q = 0; q < n; q += Vec::N) {
      const int64_t from = q * x.stride + phase - x.pad;
      const Vec a = padded(src, x.size, from);
      const Vec v = x.stride == 1 ? a : even_lanes(a, padded(src, x.size, from + Vec::N));
      if (q + Vec::N <= n) v.store(dst + q);
      else v.store(dst + q, n - q);
    }
    return;
  }
  zero(dst, n);
  for (int64_t q = 0; q < n; ++q) {
    const int64_t v = q * x.stride + phase - x.pad;
    if (v >= 0 && v % x.up == 0 && v / x.up < x.size) dst[q] = src[v / x.up];
  }
}

void fill_plane(const PlaneArgs& a) {
  const PlaneAxis &y = a.y, &x = a.x;
  for (int64_t py = 0; py < y.stride; ++py)
    for (int64_t px = 0; px < x.stride; ++px) {
      if (!(y.phases >> py % 64 & 1) || !(x.phases >> px % 64 & 1)) continue;
      float* dst = a.dst + (py * x.stride + px) * y.phase_size * x.phase_size;
      for (int64_t q = 0; q < y.phase_size; ++q, dst += x.phase_size) {
        const int64_t v = q * y.stride + py - y.pad;
        if (v < 0 || v % y.up || v / y.up >= y.size) zero(dst, x.phase_size);
        else fill_phase_row(a.src + v / y.up * x.size, x, px, dst);
      }
    }
}

}  // namespace
}  // namespace sparsekern
