// Convolution straight from shifted planes, see lines.h.
namespace sparsekern {
namespace {

// One row of the source into the lines of a row of a copy: position q reads element q * stride +
// from.
SK_INLINE void fill_line_row(const float* src, int64_t size, int64_t stride, int64_t from,
                             int64_t lines, float* dst) {
  for (int64_t i = 0; i < lines; ++i, dst += Vec::N, from += stride * Vec::N) {
    if (stride == 1) {
      padded(src, size, from).store(dst);
    } else if (stride == 2) {
      even_lanes(padded(src, size, from), padded(src, size, from + Vec::N)).store(dst);
    } else {
      for (int64_t q = 0; q < Vec::N; ++q) {
        const int64_t v = from + q * stride;
        dst[q] = v >= 0 && v < size ? src[v] : 0;
      }
    }
  }
}

void fill_lines(const LineFill& a) {
  const int64_t row_floats = a.pitch * Vec::N;
  for (int64_t c = 0; c < a.channels; ++c) {
    const float* src = a.src + c * a.y.size * a.x.size;
    for (int64_t copy = 0; copy < a.copies; ++copy) {
      float* base = a.dst + (c * a.copies + copy) * a.copy_lines * Vec::N;
      for (int64_t phase = 0; phase < a.y.stride; ++phase) {
        float* dst = base + phase * a.phase_rows * row_floats;
        for (int64_t q = 0; q < a.y.phase_size; ++q, dst += row_floats) {
          const int64_t v = (a.row0 + q) * a.y.stride + phase - a.y.pad;
          if (v < 0 || v >= a.y.size) zero(dst, row_floats);
          else
            fill_line_row(src + v * a.x.size, a.x.size, a.x.stride, a.shift[copy] - a.x.pad,
                          a.pitch, dst);
        }
      }
    }
  }
}

// The surplus lanes at the end of a row land where the next row starts and are written again by it,
// whole vectors being cheaper to store; so only the last row of the strip is cut to size.
template <int R>
SK_INLINE LineOut line_out(const LineArgs& a, int64_t line0) {
  LineOut lines;
  for (int64_t j = 0; j < R; ++j) {
    const int64_t line = line0 + j, x = line % a.pitch * Vec::N, left = a.out_w - x;
    lines.at[j] = line / a.pitch * a.out_w + x;
    lines.lanes[j] = left < Vec::N && line + 1 == a.n_lines ? left : Vec::N;
  }
  return lines;
}

// One block of columns times one panel of lines. `source` is the first line of the strip in the
// first channel of the block; the sums of a panel follow those of the panel before.
template <int R>
void line_panel(const LineArgs& a, int64_t b, int64_t k, int64_t line0, const float* source) {
  const PlanView& plan = a.plan;
  const int64_t row0 = plan.row_start[b], rows = plan.row_start[b + 1] - row0;
  const int64_t g = b * plan.n_col_blocks + k, first = plan.value_start[g];
  const bool last = k + 1 == plan.n_col_blocks;
  const bool direct = a.activation != kGelu && a.activation != kGeluTanh;
  const LineOut lines = last ? line_out<R>(a, line0) : LineOut{};
  float *sums = a.sums + line0 * rows * Vec::N, *out = a.out + row0 * a.pixels;
  const float* residual = a.residual ? a.residual + row0 * a.pixels : nullptr;
  run_block<R, Vec::N>(plan.runs + plan.run_start[g], plan.runs + plan.run_start[g + 1],
                       plan.n_tiles[g], {nullptr, a.packed + first, a.lines + first},
                       source + line0 * Vec::N,
                       {sums, row0, a.bias, k == 0, last && direct ? out : nullptr, a.pixels,
                        a.activation, a.stream, &lines, residual});
  if (!last || direct) return;
  for (int64_t r = 0; r < rows; ++r, sums += R * Vec::N)
    for (int j = 0; j < R; ++j) {
      Vec v = Vec::load(sums + j * Vec::N);
      if (residual) v = v + load_line(residual + r * a.pixels, lines, j);
      store_line(activate(v, a.activation), out + r * a.pixels, lines, j);
    }
}

// The channels of a block of columns, copied where the image does not serve as it lies.
SK_INLINE const float* block_lines(const LineArgs& a, int64_t k) {
  const int64_t begin = k * a.plan.col_block, end = begin + a.plan.col_block;
  const int64_t channel = begin / a.taps;
  if (!a.fill.dst) return a.source + channel * a.channel_lines * Vec::N;
  LineFill fill = a.fill;
  fill.src += channel * fill.y.size * fill.x.size;
  fill.channels = ((end < a.plan.cols ? end : a.plan.cols) + a.taps - 1) / a.taps - channel;
  fill_lines(fill);
  return fill.dst;
}

void spmm_lines(const LineArgs& a) {
  for (int64_t b = a.row_block_begin; b < a.row_block_end; ++b)
    for (int64_t k = 0; k < a.plan.n_col_blocks; ++k) {
      const float* source = block_lines(a, k);
      for (int64_t line = 0; line < a.n_lines;) {
        const int64_t left = a.n_lines - line;
        int64_t r = left < a.vectors ? left : a.vectors;
        if (r == 5 || r == 7) --r;
        switch (r) {
          case 8: line_panel<8>(a, b, k, line, source); break;
          case 6: line_panel<6>(a, b, k, line, source); break;
          case 4: line_panel<4>(a, b, k, line, source); break;
          case 3: line_panel<3>(a, b, k, line, source); break;
          case 2: line_panel<2>(a, b, k, line, source); break;
          default: line_panel<1>(a, b, k, line, source);
        }
        line += r;
      }
    }
  if (a.stream) Vec::stream_end();
}

}  // namespace
}  // namespace sparsekern
