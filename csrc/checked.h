// Arithmetic on sizes that come from the caller, and boxes that give every error the name of its
// op.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "check.h"

namespace sparsekern {

// What a helper throws that does not know its op; `named_errors` puts it into our message form.
struct Unnamed : std::runtime_error {
  std::string wanted, have;
  Unnamed(const std::string& w, const std::string& h)
      : std::runtime_error("sparsekern: expected " + w + ", got " + h), wanted(w), have(h) {}
};

[[noreturn]] inline void fail_size() {
  throw Unnamed("sizes whose products and sums stay below 2^63", "larger ones");
}

inline int64_t times(int64_t a, int64_t b) {
  int64_t out;
  if (__builtin_mul_overflow(a, b, &out)) fail_size();
  return out;
}

inline int64_t plus(int64_t a, int64_t b) {
  int64_t out;
  if (__builtin_add_overflow(a, b, &out)) fail_size();
  return out;
}

// A size, given by the caller, that is kept in an int32 somewhere.
inline void check_int32(const std::string& op, const char* name, int64_t size) {
  if (size < 0 || size > INT32_MAX)
    fail(op, std::string(name) + " in [0, 2^31)", std::to_string(size));
}

// Errors that a call of torch or the standard library makes, for want of memory, carry no op.
template <class F>
void named_errors(const char* op, F f) {
  try {
    f();
  } catch (const Unnamed& e) {
    fail(op, e.wanted, e.have);
  } catch (const std::exception& e) {
    const std::string what = e.what();
    if (what.rfind(std::string(op) + ":", 0) == 0) throw;
    fail(op, "memory to compute in", what.empty() ? "none" : what);
  }
}

}  // namespace sparsekern

// Registers a function for an op, by its name without namespace.
#define SPARSEKERN_IMPL(library, name, function)                                               \
  library.impl(name, [](StableIValue* stack, uint64_t arguments, uint64_t outputs) {           \
    sparsekern::named_errors(name, [&] { TORCH_BOX (&function)(stack, arguments, outputs); }); \
  })
