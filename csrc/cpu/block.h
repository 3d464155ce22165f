// Between the block ops and the kernels: checked patterns, plans, threads.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "driver.h"
#include "reference.h"

namespace sparsekern {

struct BlockPattern {
  Tensor crow, col;  // contiguous int32
  BlockView view;
};

// What an op knows of the shape of a block weight.
struct BlockShape {
  int64_t rows, channels, block_rows, block_cols, groups, taps;
};

// Checks everything but the indices themselves.
BlockPattern check_block_pattern(const std::string& op, const Tensor& crow, const Tensor& col,
                                 const BlockShape& shape);
// (n_blocks, block_rows, block_cols) as many as `col` has.
void check_block_values(const std::string& op, const Tensor& values, const Tensor& like,
                        const Tensor& col);
void check_block_sizes(const std::string& op, const Tensor& values, const Tensor& col);

// Accepts the plan of this pattern, which vouches for the indices; without one checks every index.
void check_block_plan(const std::string& op, const BlockPattern& p,
                      const std::optional<Tensor>& plan);

// The plan of this pattern; checks every index.
std::vector<int32_t> make_block_plan(const std::string& op, const BlockPattern& p);

// The pattern of the input gradient: rows are the channels of all groups, blocks are turned. Block
// i of it is block perm[i] of the original.
struct BlockTransposed {
  Tensor given;
  std::vector<int32_t> own;
  BlockView view;
  const int32_t* perm;
};
BlockTransposed get_block_transposed(const std::string& op, const BlockPattern& p,
                                     const std::optional<Tensor>& plan_t);

// out = act(values * source + bias), split over threads.
void run_block_spmm(const BlockView& view, const Operands& operands);

// The same for a matrix; few tokens take a kernel of their own.
void run_block_linear(const BlockView& view, const Operands& operands);

// out[block] = sums over tokens of grad (rows of the block) times source (its columns).
void run_block_sddmm(const BlockView& view, const Operands& operands, const Source& grad,
                     float* out);

// The same in float64 by plain loops. `source.channel0` is set for each group.
void block_spmm_reference(const BlockView& view, const double* values, const double* bias,
                          Activation activation, ReferenceSource source, const Sink& sink,
                          double* out, int64_t tokens);
void block_sddmm_reference(const BlockView& view, ReferenceSource source, const Sink& grad_layout,
                           const double* grad, double* out, int64_t tokens);

}  // namespace sparsekern
