// Padded planes: an image laid out so that every tap of a convolution is one constant offset.
//
// Tap k reads position p of the output grid at v = p * stride + offset[k] of the padded axis, which
// holds source element (v - pad) / up where that divides and lies inside, and zero elsewhere. A
// strided axis is stored phase by phase (all v = 0 mod stride, then all v = 1, ...), so that
// neighbouring positions are neighbours in memory and stride 2 runs like stride 1.
//   forward:        offset[k] = k * dilation, pad = padding, up = 1
//   input gradient: offset[k] = (kernel - 1 - k) * dilation, pad = (kernel - 1) * dilation -
//   padding,
//                   stride 1, up = the stride of the convolution
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace sparsekern {

struct Axis {
  int64_t size;  // of the source
  int64_t out;   // positions of the grid
  int64_t stride, pad, up;
  std::vector<int64_t> offset;  // per tap

  int64_t phase_size() const {
    return out + *std::max_element(offset.begin(), offset.end()) / stride;
  }
  bool phase_used(int64_t phase) const {
    return std::any_of(offset.begin(), offset.end(),
                       [&](int64_t o) { return o % stride == phase; });
  }
};

inline Axis forward_axis(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                         int64_t dilation) {
  Axis a{size, out, stride, padding, 1, {}};
  for (int64_t k = 0; k < kernel; ++k) a.offset.push_back(k * dilation);
  return a;
}

inline Axis backward_axis(int64_t size, int64_t out, int64_t kernel, int64_t stride,
                          int64_t padding, int64_t dilation) {
  Axis a{size, out, 1, (kernel - 1) * dilation - padding, stride, {}};
  for (int64_t k = 0; k < kernel; ++k) a.offset.push_back((kernel - 1 - k) * dilation);
  return a;
}

// Whether the source can be read as it is: one tap, no padding, stride 1.
inline bool is_plain(const Axis& y, const Axis& x) {
  const auto plain = [](const Axis& a) {
    return a.offset.size() == 1 && a.offset[0] == 0 && a.pad == 0 && a.stride == 1 && a.up == 1 &&
           a.out == a.size;
  };
  return plain(y) && plain(x);
}

struct PlaneLayout {
  int64_t pitch, phase_plane, plane_size;
  std::vector<int64_t> tap_offset;  // (kernel_h * kernel_w,)
};

inline PlaneLayout plane_layout(const Axis& y, const Axis& x) {
  PlaneLayout l;
  l.pitch = x.phase_size();
  l.phase_plane = y.phase_size() * l.pitch;
  l.plane_size = y.stride * x.stride * l.phase_plane;
  for (int64_t oy : y.offset)
    for (int64_t ox : x.offset)
      l.tap_offset.push_back((oy % y.stride * x.stride + ox % x.stride) * l.phase_plane +
                             oy / y.stride * l.pitch + ox / x.stride);
  return l;
}

// One row of the source into one phase row of n floats: dst[q] = source at v = q * stride + phase.
inline void fill_phase_row(const float* src, const Axis& x, int64_t phase, float* dst, int64_t n) {
  // Smallest q with (v - pad) divisible by up and not negative; then every `up`-th q hits.
  int64_t q = 0;
  while (q < n && (q * x.stride + phase < x.pad || (q * x.stride + phase - x.pad) % x.up)) ++q;
  int64_t s = (q * x.stride + phase - x.pad) / x.up;
  if (x.up == 1 && x.stride == 1) {  // the common case touches every float once
    const int64_t copied = std::max<int64_t>(0, std::min(n - q, x.size - s));
    std::memset(dst, 0, q * sizeof(float));
    std::memcpy(dst + q, src + s, copied * sizeof(float));
    std::memset(dst + q + copied, 0, (n - q - copied) * sizeof(float));
    return;
  }
  std::memset(dst, 0, n * sizeof(float));
  if (x.up == 1 && x.stride == 2) {  // a constant stride, so that the compiler vectorises it
    const int64_t copied = std::max<int64_t>(0, std::min(n - q, (x.size - s + 1) / 2));
    for (int64_t i = 0; i < copied; ++i) dst[q + i] = src[s + 2 * i];
    return;
  }
  const int64_t step = x.up == 1 ? x.stride : 1;
  for (; q < n && s < x.size; q += x.up, s += step) dst[q] = src[s];
}

// The plane of one channel of one image. A stride together with up > 1 does not occur.
inline void fill_plane(const float* src, const Axis& y, const Axis& x, const PlaneLayout& l,
                       float* dst) {
  const int64_t rows = y.phase_size();
  for (int64_t py = 0; py < y.stride; ++py)
    for (int64_t px = 0; px < x.stride; ++px) {
      if (!y.phase_used(py) || !x.phase_used(px)) continue;
      float* plane = dst + (py * x.stride + px) * l.phase_plane;
      for (int64_t q = 0; q < rows; ++q) {
        const int64_t v = q * y.stride + py - y.pad;
        if (v < 0 || v % y.up || v / y.up >= y.size)
          std::memset(plane + q * l.pitch, 0, l.pitch * sizeof(float));
        else fill_phase_row(src + v / y.up * x.size, x, px, plane + q * l.pitch, l.pitch);
      }
    }
}

}  // namespace sparsekern
