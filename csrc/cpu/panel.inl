// Panels: the dense operand of a block of columns, one column per row of the panel, tokens along
// the vector lanes. Built per block, so that it stays in the L1 cache while all rows of the sparse
// matrix run over it; neither the transpose of a matrix nor the im2col of an image is ever made
// whole.
namespace sparsekern {
namespace {

constexpr int64_t kMaxVectors = 8;  // widest panel, in vectors

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

// At most N tokens that lie side by side in the image.
struct Stretch {
  int64_t src, dst, n;
};

// Cuts the tokens of a panel at the ends of image rows; the same cuts serve every column.
SK_INLINE int64_t cut_stretches(const ImageSource& s, int64_t token_begin, int64_t token_end,
                                Stretch* out) {
  const int64_t pixels = s.out_h * s.out_w, image_size = s.channels * s.plane_size;
  int64_t image = token_begin / pixels;
  int64_t y = token_begin % pixels / s.out_w, x = token_begin % s.out_w;
  int64_t count = 0;
  for (int64_t t = token_begin; t < token_end;) {
    int64_t n = token_end - t < s.out_w - x ? token_end - t : s.out_w - x;
    n = n < Vec::N ? n : Vec::N;
    out[count++] = {image * image_size + y * s.pitch + x, t - token_begin, n};
    t += n;
    x += n;
    if (x == s.out_w) {
      x = 0;
      if (++y == s.out_h) y = 0, ++image;
    }
  }
  return count;
}

// Whole vectors for the first `full` stretches: their surplus lanes land inside the row of the
// panel and are written again by the next stretch. The others are cut to size.
template <bool kSlack>
SK_INLINE void copy_stretches(const float* plane, const Stretch* stretch, int64_t full,
                              int64_t count, float* dst) {
  for (int64_t i = 0; i < full; ++i) {
    const Stretch& s = stretch[i];
    (kSlack ? Vec::load(plane + s.src) : Vec::load(plane + s.src, s.n)).store(dst + s.dst);
  }
  for (int64_t i = full; i < count; ++i) {
    const Stretch& s = stretch[i];
    Vec::load(plane + s.src, s.n).store(dst + s.dst, s.n);
  }
}

void fill_from_image(const ImageSource& s, float* dst, int64_t panel, int64_t token_begin,
                     int64_t token_end, int64_t col_begin, int64_t col_end) {
  Stretch stretch[kMaxVectors * Vec::N];
  const int64_t n_tokens = token_end - token_begin;
  const int64_t count = cut_stretches(s, token_begin, token_end, stretch);
  int64_t full = count;
  while (full > 0 && stretch[full - 1].dst + Vec::N > n_tokens) --full;
  for (int64_t k = col_begin; k < col_end; ++k, dst += panel) {
    const float* plane =
        s.planes + (s.channel0 + k / s.taps) * s.plane_size + s.tap_offset[k % s.taps];
    if (s.slack) copy_stretches<true>(plane, stretch, full, count, dst);
    else copy_stretches<false>(plane, stretch, full, count, dst);
    for (int64_t i = n_tokens; i < panel; i += Vec::N)
      Vec::set(0.f).store(dst + i, panel - i < Vec::N ? panel - i : Vec::N);
  }
}

void fill_panel(const Source& source, float* dst, int64_t vectors, int64_t token_begin,
                int64_t token_end, int64_t col_begin, int64_t col_end) {
  const int64_t panel = vectors * Vec::N;
  if (source.matrix)
    fill_from_matrix(*source.matrix, dst, panel, token_begin, token_end, col_begin, col_end);
  else fill_from_image(*source.image, dst, panel, token_begin, token_end, col_begin, col_end);
}

}  // namespace
}  // namespace sparsekern
