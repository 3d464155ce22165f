// What the ops with int8 values share: checks, and operands that outlive the call of the kernel.
#pragma once
#include <optional>
#include <string>

#include "driver.h"

namespace sparsekern {

// Checks x and values; returns in_features.
int64_t check_int8(const std::string& op, const Tensor& x, const Tensor& values);

// Contiguous operands, kept until the product is done.
struct Int8Linear {
  Tensor x, values, scales, y;
  std::optional<Tensor> bias;
  MatrixSource matrix;
  Operands operands;
};

// Checks what is left and fills in `l`. The bias is float32 or bfloat16, whatever x is.
void prepare_int8(const std::string& op, const Tensor& x, const Tensor& values,
                  const Tensor& scales, const std::optional<Tensor>& bias, int64_t rows,
                  Activation activation, Int8Linear* l);

}  // namespace sparsekern
