// Convolution straight from shifted planes. Each channel is copied once per column of the kernel,
// shifted so that every row of the grid starts with a whole vector (a "line"). Then a tap of any
// output row is a constant number of lines away and aligned: the product reads the copies as they
// lie, and no panel is cut for every tap.
//
// The grid is cut into strips of rows. The channels of one block of columns are copied at a time,
// for one strip, so that they and the sums of the strip stay in the caches. Inside a strip, for a
// channel:
//   line = copy * copy_lines + (phase * phase_rows + row) * pitch + line of the row
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "planes.h"

namespace sparsekern {

struct LineLayout {
  bool in_place;                // one tap that reads the image as it lies: nothing is copied
  int64_t width;                // floats of a line
  int64_t out_h, out_w, pitch;  // rows of the grid, floats of a row that count, lines of a row
  int64_t strip_rows, phase_rows, copy_lines, channel_lines;
  std::vector<int64_t> shift;     // per copy: offset of its column of the kernel
  std::vector<int64_t> tap_line;  // per tap
};

constexpr int64_t kStripFloats = int64_t{32} << 10;  // sums of a strip: 128 KiB
constexpr int64_t kLeastRows = 4;  // of a strip: fewer would copy the rows between strips too often

// Values per column up to which lines win: a panel is cut once per column, and pays for it by all
// vectors being full and in order. See bench/NOTES.md.
constexpr double kLineValues = 20;

// More lanes idle than this, or a single tap that has to be copied all the same: panels are faster.
inline bool suits_lines(const Axis& y, const Axis& x, int64_t width, double values_per_column) {
  if (y.up != 1 || x.up != 1 || values_per_column > kLineValues) return false;
  const int64_t pitch = (x.out + width - 1) / width;
  if (is_plain(y, x)) return y.out * x.out % width == 0;
  if (y.offset.size() * x.offset.size() == 1 && y.stride == 1 && x.stride == 1) return false;
  return 4 * pitch * width <= 5 * x.out;
}

// Rows of a strip: whole panels of `vectors` lines, few enough for the cache and for the threads.
inline int64_t strip_rows(const LineLayout& l, int64_t matrix_rows, int64_t images, int64_t vectors,
                          int64_t threads) {
  const int64_t row = std::max<int64_t>(1, matrix_rows * l.pitch * l.width);
  int64_t rows = l.in_place ? vectors : std::max(kLeastRows, kStripFloats / row);
  const int64_t wanted = (threads + images - 1) / std::max<int64_t>(1, images);
  rows = std::min({rows, l.out_h, (l.out_h + wanted - 1) / wanted});
  const int64_t unit = std::max<int64_t>(1, vectors / l.pitch);
  return std::max<int64_t>(1, rows >= unit ? rows / unit * unit : rows);
}

inline LineLayout line_layout(const Axis& y, const Axis& x, int64_t matrix_rows, int64_t images,
                              int64_t width, int64_t vectors, int64_t threads) {
  LineLayout l;
  l.in_place = is_plain(y, x), l.width = width;
  l.out_h = y.out, l.out_w = x.out;
  if (l.in_place) l.out_h = y.out * x.out / width, l.out_w = width;
  l.pitch = (l.out_w + width - 1) / width;
  l.shift = x.offset;
  const int64_t halo = *std::max_element(y.offset.begin(), y.offset.end()) / y.stride;
  l.strip_rows = strip_rows(l, matrix_rows, images, vectors, threads);
  l.phase_rows = l.strip_rows + halo;
  // An odd number: copies and channels then spread over all sets of the L1 cache.
  l.copy_lines = times(times(y.stride, l.phase_rows), l.pitch) | 1;
  l.channel_lines = times(static_cast<int64_t>(l.shift.size()), l.copy_lines);
  if (l.in_place) l.channel_lines = l.out_h;
  for (int64_t oy : y.offset)
    for (size_t copy = 0; copy < l.shift.size(); ++copy)
      l.tap_line.push_back(static_cast<int64_t>(copy) * l.copy_lines +
                           (oy % y.stride * l.phase_rows + oy / y.stride) * l.pitch);
  if (l.in_place) l.tap_line = {0};
  return l;
}

// Lines from the first channel of a block of columns to each of its columns, for all columns; empty
// where 16 bits do not hold them.
inline std::vector<uint16_t> column_lines(const LineLayout& l, int64_t cols, int64_t col_block) {
  const int64_t taps = static_cast<int64_t>(l.tap_line.size());
  std::vector<uint16_t> lines(cols);
  for (int64_t begin = 0; begin < cols; begin += col_block) {
    const int64_t end = std::min(cols, begin + col_block);
    int64_t tap = begin % taps, base = 0;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t line = base + l.tap_line[tap];
      if (line > UINT16_MAX) return {};
      lines[c] = static_cast<uint16_t>(line);
      if (++tap == taps) tap = 0, base += l.channel_lines;
    }
  }
  return lines;
}

}  // namespace sparsekern
