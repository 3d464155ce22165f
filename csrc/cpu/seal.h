// Binds a plan to the indices it was made of. The kernels trust a plan blindly: one of another
// pattern, or one whose words were changed, would lead them out of their buffers or to another
// product. So the header of a plan carries a fingerprint of its indices and one of itself, and no
// kernel sees a plan before both were found right.
//
// That reads every word, so it is done once: a plan that lives where it was made is remembered with
// the memory it was made of (which it keeps alive, so that no other tensor can take its place) and
// with the version that torch counts for each tensor. As long as none of these changed, a call
// compares pointers and counters. Copies of a plan are read at every call. Writes that torch does
// not count (`tensor.data`, numpy) are not seen.
#pragma once
#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "../check.h"
#include "plan.h"

namespace sparsekern {

constexpr int64_t kSealWord = 9;  // of a plan's header: two fingerprints of two int32 each

using Indices = std::initializer_list<Tensor>;  // contiguous, on the CPU

// The plan as a tensor, sealed: bound to `indices`, which were checked.
Tensor sealed_plan(std::vector<int32_t> words, Indices indices);

// Refuses a plan that was not made of these indices or was changed since; `maker` is the op that
// makes such plans. Returns it contiguous, with a whole header.
Tensor check_sealed(const std::string& op, const char* name, const char* maker, const Tensor& plan,
                    Indices indices);

// What a plan begins with; made at every call, so that no memory is asked for.
using Header = std::array<int32_t, kPlanHeader>;
inline Header plan_header(int32_t magic, std::initializer_list<int64_t> sizes) {
  Header h{magic};
  int32_t* next = h.data() + 1;
  for (int64_t size : sizes) *next++ = static_cast<int32_t>(size);
  return h;
}

// Whether two headers say the same, whatever their seals.
bool same_header(const Header& want, const int32_t* have);

}  // namespace sparsekern
