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
#include <vector>

#include "../checked.h"
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
  l.phase_plane = times(y.phase_size(), l.pitch);
  l.plane_size = times(times(y.stride, x.stride), l.phase_plane);
  for (int64_t oy : y.offset)
    for (int64_t ox : x.offset)
      l.tap_offset.push_back((oy % y.stride * x.stride + ox % x.stride) * l.phase_plane +
                             oy / y.stride * l.pitch + ox / x.stride);
  return l;
}

inline PlaneAxis plane_axis(const Axis& a) {
  PlaneAxis p{a.size, a.phase_size(), a.stride, a.pad, a.up, 0};
  for (int64_t o : a.offset) p.phases |= uint64_t{1} << (o % a.stride % 64);
  return p;
}

}  // namespace sparsekern
