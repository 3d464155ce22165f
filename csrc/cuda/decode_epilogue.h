// Where a sum goes: into y with bias and activation, or into the parts as it is.
#pragma once
#include "decode.h"
#include "device.h"

namespace sparsekern {
namespace gpu {

SPARSEKERN_DEVICE float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::kNone: return y;
    case Activation::kRelu: return y < 0.f ? 0.f : y;  // keeps NaN, as torch does
    case Activation::kRelu6: return y < 0.f ? 0.f : y > 6.f ? 6.f : y;
    case Activation::kGelu: return 0.5f * y * (1.f + erff(y * 0.70710678f));
    default:  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))
      return y / (1.f + expf(-1.59576912f * (y + 0.044715f * y * y * y)));
  }
}

template <class T>
SPARSEKERN_DEVICE uint16_t finished(float sum, const DecodeTask& task, int row) {
  if (task.bias) sum += T::low(static_cast<const uint16_t*>(task.bias)[row]);
  return T::round(activate(sum, task.activation));
}

template <class T>
SPARSEKERN_DEVICE void store_sum(float sum, const DecodeTask& task, int part, int token, int row) {
  const int64_t at = static_cast<int64_t>(token) * task.rows + row;
  if (task.parts) task.parts[static_cast<int64_t>(part) * task.tokens * task.rows + at] = sum;
  else static_cast<uint16_t*>(task.y)[at] = finished<T>(sum, task, row);
}

}  // namespace gpu
}  // namespace sparsekern
