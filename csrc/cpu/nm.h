// Between the N:M ops and the kernels: checked patterns, plans, threads.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "driver.h"
#include "reference.h"

namespace sparsekern {

struct NmPattern {
  Tensor index;  // contiguous uint8
  NmView view;
};

// What an op knows of the shape of an N:M weight; `channels` of one group.
struct NmShape {
  int64_t rows, channels, n, m, groups, taps;
};

// Checks everything but the positions themselves.
NmPattern check_nm_pattern(const std::string& op, const Tensor& index, const NmShape& shape);
void check_nm_values(const std::string& op, const Tensor& values, const Tensor& like,
                     const NmView& view);

// Where the column of each slot lies in its panel; made from the index, every position checked.
// The kernels trust what went through here.
struct NmPlan {
  Tensor given;
  std::vector<int32_t> own;
  const uint16_t* offset;
};
NmPlan get_nm_plan(const std::string& op, const NmPattern& p, const std::optional<Tensor>& plan);
void check_positions(const std::string& op, const NmView& view);

// The plans of the same weights as CSR, which the gradients run on. Value i of it is value order[i]
// of the N:M weight; `transposed.perm` already leads to the latter.
struct NmTwin {
  Tensor given;
  std::vector<int32_t> own;
  const int32_t* order;
  PlanView plan;
  Transposed transposed;
};
NmTwin get_nm_twin(const std::string& op, const NmPattern& p, const std::optional<Tensor>& plan_t);

// out = act(values * source + bias), split over threads.
void run_nm_spmm(const NmView& view, const uint16_t* offset, const Operands& operands);

// float64 by plain loops. `source.channel0` is set for each group. The input gradient walks from
// the output (`source`) to the input (`sink`).
void nm_spmm_reference(const NmView& view, const double* values, const double* bias,
                       Activation activation, ReferenceSource source, const Sink& sink, double* out,
                       int64_t tokens);
void nm_grad_input_reference(const NmView& view, const double* values, ReferenceSource source,
                             const Sink& sink, double* out, int64_t tokens);
void nm_grad_values_reference(const NmView& view, ReferenceSource source, const Sink& grad_layout,
                              const double* grad, double* out, int64_t tokens);

}  // namespace sparsekern
