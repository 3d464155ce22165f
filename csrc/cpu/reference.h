// Plain loops for float64, over the same sources and sinks as the kernels. They define the result.
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels.h"

namespace sparsekern {

// The dense operand at (token, column); `data` replaces the float pointer of the source.
inline double source_at(const Source& s, const double* data, int64_t token, int64_t k) {
  if (s.matrix) return data[token * s.matrix->stride + k];
  const ImageSource& i = *s.image;
  const int64_t pixels = i.out_h * i.out_w, taps = i.kernel_h * i.kernel_w;
  const Tap ty = i.tap_y[k % taps / i.kernel_w], tx = i.tap_x[k % i.kernel_w];
  const int64_t y = token % pixels / i.out_w * ty.mul + ty.add, x = token % i.out_w * tx.mul + tx.add;
  if (y < 0 || x < 0 || y % ty.div || x % tx.div || y / ty.div >= i.height || x / tx.div >= i.width)
    return 0;
  const int64_t channel = token / pixels * i.channels + i.channel0 + k / taps;
  return data[(channel * i.height + y / ty.div) * i.width + x / tx.div];
}

inline int64_t sink_at(const Sink& s, int64_t token, int64_t row) {
  if (s.token_major) return token * s.stride + row;
  return (token / s.pixels * s.stride + row) * s.pixels + token % s.pixels;
}

inline double activate_reference(double x, Activation a) {
  switch (a) {
    case kRelu: return x > 0 || std::isnan(x) ? x : 0;
    case kGelu: return 0.5 * x * (1 + std::erf(x * M_SQRT1_2));
    case kGeluTanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default: return x;
  }
}

inline void spmm_reference(const int32_t* crow, const int32_t* col, const double* values,
                           const double* bias, Activation activation, const Source& source,
                           const double* data, const Sink& sink, double* out, int64_t row_begin,
                           int64_t row_end, int64_t tokens) {
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int64_t t = 0; t < tokens; ++t) {
      double sum = bias ? bias[r] : 0;
      for (int32_t i = crow[r]; i < crow[r + 1]; ++i)
        sum += values[i] * source_at(source, data, t, col[i]);
      out[sink_at(sink, t, r)] = activate_reference(sum, activation);
    }
}

inline void sddmm_reference(const int32_t* crow, const int32_t* col, const Source& source,
                            const double* data, const Sink& grad_layout, const double* grad,
                            double* out, int64_t row_begin, int64_t row_end, int64_t tokens) {
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int32_t i = crow[r]; i < crow[r + 1]; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t)
        sum += grad[sink_at(grad_layout, t, r)] * source_at(source, data, t, col[i]);
      out[i] = sum;
    }
}

}  // namespace sparsekern
