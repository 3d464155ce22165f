// Plain loops for float64, over the same sources and sinks as the kernels. They define the result.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace sparsekern {

// How one kernel tap moves along one image axis: position `p` of the output grid reads
// (p * mul + add) / div, where that divides exactly and lies inside the image.
struct Tap {
  int64_t mul, add, div;
};

// The dense operand, float64: a matrix (tokens, cols) or, when `tap_y` is set, an image.
struct ReferenceSource {
  const double* data;
  int64_t cols;  // floats between two tokens of a matrix
  int64_t channels, height, width, channel0, kernel_h, kernel_w, out_h, out_w;
  const Tap *tap_y, *tap_x;
};

inline double source_at(const ReferenceSource& s, int64_t token, int64_t k) {
  if (!s.tap_y) return s.data[token * s.cols + k];
  const int64_t pixels = s.out_h * s.out_w, taps = s.kernel_h * s.kernel_w;
  const Tap ty = s.tap_y[k % taps / s.kernel_w], tx = s.tap_x[k % s.kernel_w];
  const int64_t y = token % pixels / s.out_w * ty.mul + ty.add,
                x = token % s.out_w * tx.mul + tx.add;
  if (y < 0 || x < 0 || y % ty.div || x % tx.div || y / ty.div >= s.height || x / tx.div >= s.width)
    return 0;
  const int64_t channel = token / pixels * s.channels + s.channel0 + k / taps;
  return s.data[(channel * s.height + y / ty.div) * s.width + x / tx.div];
}

inline int64_t sink_at(const Sink& s, int64_t token, int64_t row) {
  if (s.token_major) return token * s.stride + row;
  return (token / s.pixels * s.stride + row) * s.pixels + token % s.pixels;
}

inline double activate_reference(double x, Activation a) {
  switch (a) {
    case kRelu: return x > 0 || std::isnan(x) ? x : 0;
    case kRelu6: return x > 0 || std::isnan(x) ? (x > 6 ? 6 : x) : 0;
    case kGelu: return 0.5 * x * (1 + std::erf(x * M_SQRT1_2));
    case kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default: return x;
  }
}

// Value i is values[perm[i]].
inline std::vector<double> permuted(const double* values, const int32_t* perm, int64_t n) {
  std::vector<double> out(n);
  for (int64_t i = 0; i < n; ++i) out[i] = values[perm[i]];
  return out;
}

inline void spmm_reference(const int32_t* crow, const int32_t* col, const double* values,
                           const double* bias, Activation activation, const ReferenceSource& source,
                           const Sink& sink, double* out, int64_t row_begin, int64_t row_end,
                           int64_t tokens) {
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int64_t t = 0; t < tokens; ++t) {
      double sum = bias ? bias[r] : 0;
      for (int32_t i = crow[r]; i < crow[r + 1]; ++i)
        sum += values[i] * source_at(source, t, col[i]);
      out[sink_at(sink, t, r)] = activate_reference(sum, activation);
    }
}

inline void sddmm_reference(const int32_t* crow, const int32_t* col, const ReferenceSource& source,
                            const Sink& grad_layout, const double* grad, double* out,
                            int64_t row_begin, int64_t row_end, int64_t tokens) {
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int32_t i = crow[r]; i < crow[r + 1]; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t)
        sum += grad[sink_at(grad_layout, t, r)] * source_at(source, t, col[i]);
      out[i] = sum;
    }
}

}  // namespace sparsekern
