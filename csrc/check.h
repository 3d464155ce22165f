// Argument checks with one message form: "op: expected <argument> <wanted>, got <have>".
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace sparsekern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const std::string& op, const std::string& wanted,
                              const std::string& have) {
  throw std::runtime_error(op + ": expected " + wanted + ", got " + have);
}

inline std::string dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "dtype number " + std::to_string(static_cast<int>(t));
  }
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << "(";
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << (shape.size() == 1 ? ",)" : ")");
  return out.str();
}

inline std::string shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape_text(shape);
}

inline void check_dtype(const std::string& op, const char* name, const Tensor& t,
                        std::initializer_list<ScalarType> allowed) {
  std::string wanted;
  for (ScalarType a : allowed) {
    if (t.scalar_type() == a) return;
    wanted += (wanted.empty() ? "" : " or ") + dtype_name(a);
  }
  fail(op, std::string(name) + " of dtype " + wanted, dtype_name(t.scalar_type()));
}

inline void check_dim(const std::string& op, const char* name, const Tensor& t, int64_t dim) {
  if (t.dim() != dim)
    fail(op, std::string(name) + " with " + std::to_string(dim) + " dimensions",
         "shape " + shape_of(t));
}

inline void check_size(const std::string& op, const std::string& what, int64_t have, int64_t want) {
  if (have != want) fail(op, what + " = " + std::to_string(want), std::to_string(have));
}

inline void check_cpu(const std::string& op, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(op, std::string(name) + " on the device of x (cpu)", "another device");
}

}  // namespace sparsekern
