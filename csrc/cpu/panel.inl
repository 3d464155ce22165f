// Panels: the dense operand of a block of columns, one column per row of the panel, tokens along the
// vector lanes. Built per block, so that it stays in the L1 cache while all rows of the sparse matrix
// run over it; neither the transpose of a matrix nor the im2col of an image is ever made whole.
namespace sparsekern {
namespace {

void fill_from_matrix(const MatrixSource& source, float* dst, int64_t panel, int64_t token_begin,
                      int64_t token_end, int64_t col_begin, int64_t col_end) {
  const int64_t n_tokens = token_end - token_begin;
  for (int64_t t = 0; t < panel; t += Vec::N) {
    const int64_t left = n_tokens - t;
    const int64_t rows = left < 0 ? 0 : left < Vec::N ? left : Vec::N;
    const float* src = source.data + (token_begin + t) * source.stride;
    for (int64_t k = col_begin; k < col_end; k += Vec::N) {
      const int64_t cols = col_end - k < Vec::N ? col_end - k : Vec::N;
      transpose_tile(src + k, source.stride, rows, dst + (k - col_begin) * panel + t, panel, cols,
                     true);
    }
  }
}

SK_INLINE void fill_zeros(float* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::N) Vec::set(0.f).store(dst + i, n - i < Vec::N ? n - i : Vec::N);
}

// Every `mul`-th float of src, n of them; src + limit is the end of the image row.
SK_INLINE void copy_strided(const float* src, int64_t limit, int64_t mul, int64_t n, float* dst) {
  int64_t i = 0;
  if (mul == 1) {
    for (; i < n; i += Vec::N) {
      const int64_t lanes = n - i < Vec::N ? n - i : Vec::N;
      Vec::load(src + i, lanes).store(dst + i, lanes);
    }
    return;
  }
  if (mul == 2)
    for (; i + Vec::N <= n && 2 * (i + Vec::N) <= limit; i += Vec::N)
      Vec::load_even(src + 2 * i).store(dst + i);
  for (; i < n; ++i) dst[i] = src[i * mul];
}

// One stretch of positions x0 .. x0 + n of an image row under one tap; `src` is the row.
SK_INLINE void copy_stretch(const float* src, int64_t width, const Tap& tap, int64_t x0, int64_t n,
                            float* dst) {
  const int64_t first = x0 * tap.mul + tap.add;
  if (tap.div == 1) {  // positions [lo, hi) lie inside the row, the others are padding
    const int64_t lo = first >= 0 ? 0 : (-first + tap.mul - 1) / tap.mul;
    const int64_t fit = first < width ? (width - 1 - first) / tap.mul + 1 : 0;
    const int64_t hi = fit < n ? fit : n;
    if (lo >= hi) return fill_zeros(dst, n);
    fill_zeros(dst, lo);
    const int64_t at = first + lo * tap.mul;
    copy_strided(src + at, width - at, tap.mul, hi - lo, dst + lo);
    fill_zeros(dst + hi, n - hi);
    return;
  }
  fill_zeros(dst, n);  // input gradient of a strided convolution: one position in `div` is hit
  int64_t i = first >= 0 ? (tap.div - first % tap.div) % tap.div : -first;
  for (; i < n && (first + i) / tap.div < width; i += tap.div) dst[i] = src[(first + i) / tap.div];
}

void fill_image_row(const ImageSource& s, float* dst, int64_t panel, int64_t token_begin,
                    int64_t token_end, int64_t channel, const Tap& tap_y, const Tap& tap_x) {
  const int64_t pixels = s.out_h * s.out_w;
  int64_t image = token_begin / pixels;
  int64_t y = token_begin % pixels / s.out_w, x = token_begin % s.out_w;
  int64_t t = token_begin;
  while (t < token_end) {
    const int64_t n = token_end - t < s.out_w - x ? token_end - t : s.out_w - x;
    const int64_t at = y * tap_y.mul + tap_y.add;
    const int64_t row = at / tap_y.div;
    float* out = dst + (t - token_begin);
    if (at >= 0 && row * tap_y.div == at && row < s.height)
      copy_stretch(s.data + ((image * s.channels + channel) * s.height + row) * s.width, s.width,
                   tap_x, x, n, out);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = 0.f;
    t += n;
    x = 0;
    if (++y == s.out_h) y = 0, ++image;
  }
  fill_zeros(dst + (token_end - token_begin), panel - (token_end - token_begin));
}

void fill_from_image(const ImageSource& s, float* dst, int64_t panel, int64_t token_begin,
                     int64_t token_end, int64_t col_begin, int64_t col_end) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  for (int64_t k = col_begin; k < col_end; ++k) {
    const int64_t tap = k % taps;
    fill_image_row(s, dst + (k - col_begin) * panel, panel, token_begin, token_end,
                   s.channel0 + k / taps, s.tap_y[tap / s.kernel_w], s.tap_x[tap % s.kernel_w]);
  }
}

void fill_panel(const Source& source, float* dst, int64_t vectors, int64_t token_begin,
                int64_t token_end, int64_t col_begin, int64_t col_end) {
  const int64_t panel = vectors * Vec::N;
  if (source.matrix)
    fill_from_matrix(*source.matrix, dst, panel, token_begin, token_end, col_begin, col_end);
  else
    fill_from_image(*source.image, dst, panel, token_begin, token_end, col_begin, col_end);
}

}  // namespace
}  // namespace sparsekern
