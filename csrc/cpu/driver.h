// Between the ops and the kernels: checked patterns, plans, scratch memory and threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../checked.h"
#include "isa.h"
#include "kernels.h"
#include "pairs.h"
#include "seal.h"

namespace sparsekern {

Activation parse_activation(const std::string& op, const std::string& name);

// A CSR pattern whose arguments were checked. `rows` x `cols`, cols counted within a group.
struct Pattern {
  Tensor crow, col;  // contiguous int32
  int64_t rows, cols, nnz, groups, taps;
  const int32_t* crow_data() const { return crow.const_data_ptr<int32_t>(); }
  const int32_t* col_data() const { return col.const_data_ptr<int32_t>(); }
};

Pattern check_pattern(const std::string& op, const Tensor& crow, const Tensor& col, int64_t nnz,
                      int64_t cols, int64_t groups = 1, int64_t taps = 1);

// Rows of a CSR pattern.
int64_t csr_rows(const std::string& op, const Tensor& crow);

// (nnz,) values of the dtype of `like`.
void check_csr_values(const std::string& op, const Tensor& values, const Tensor& like);

// Of the table that runs.
PanelTokens panel_tokens();

// A plan that came as an argument, or one made here (which validates every index).
struct PlanHolder {
  Tensor given;
  std::vector<int32_t> own;
  PlanView view;
  std::optional<PairView> pairs;
};
PlanHolder get_plan(const std::string& op, const Pattern& p, const std::optional<Tensor>& plan);

// A new plan with that of the pairs of columns, where this CPU can use it; a plain one elsewhere.
std::vector<int32_t> make_pairs_plan(const std::string& op, const Pattern& p);

// The plan of the weight gradient: `plan_t`, what csr_plan(transpose=True) made, holds one; any
// other plan of the pattern does as well, with narrower blocks than the kernel likes.
PlanHolder get_values_plan(const std::string& op, const Pattern& p,
                           const std::optional<Tensor>& plan_t);

struct TransposedHolder {
  Tensor given;
  std::vector<int32_t> own;
  Transposed view;
};
TransposedHolder get_transposed(const std::string& op, const Pattern& p,
                                const std::optional<Tensor>& plan_t);

// Memory of the calling thread that outlives the call: fresh pages for every call would cost as
// much as small layers do. 64-byte aligned, valid until the thread asks for the same slot again.
enum ScratchSlot {
  kTaskScratch,
  kPlanes,
  kGradPlanes,
  kGradPanels,
  kPacked,
  kLineOffsets,
  kScratchSlots
};
float* thread_scratch(ScratchSlot slot, int64_t floats);

struct Operands {
  const float* values;  // in the order of the CSR matrix, or of another that `perm` leads to
  const int32_t* perm;  // null, or where each value of the plan's matrix sits in `values`
  const float* bias;
  Activation activation;
  Source source;  // for a grouped image: channel0 of group 0
  Sink sink;
  int64_t tokens;
  int64_t groups;
  int64_t channels_per_group;  // of the source, when it is an image
  const int8_t* quantized;     // takes the place of `values` where `scales` is set,
  const float* scales;         // one per row
  const float* residual;       // laid out as sink.data, which is an image; or null
};

// The values in the order in which the kernel reads them, in scratch of the calling thread.
const float* pack_values(const PlanView& plan, const Operands& operands);

// Groups of runs that are worth a thread when values are only moved.
int64_t pack_grain(const PlanView& plan);

// out = act(values * source + bias), split over threads.
void run_spmm(const PlanView& plan, const Operands& operands);

// Up to this many tokens, run_few is the faster one where the plan holds an index for it.
bool few_tokens(const PlanView& plan, int64_t tokens);

// As run_spmm for a matrix (tokens, cols) and few tokens.
void run_few(const PlanView& plan, const int32_t* crow, const Operands& operands);

// As run_spmm for bfloat16: the source holds words of two, sink.data points to bfloat16, `values`
// of the operands is not read.
void run_spmm_pairs(const PairView& pairs, const uint16_t* values, const Operands& operands);

// As run_spmm for int8 values.
void run_spmm_int8(const PlanView& plan, const Operands& operands);

// A gradient (tokens, rows) in panels of sddmm's width, one after the other, in scratch memory.
struct GradPanels {
  const float* data;
  int64_t stride, width;  // floats between two panels, tokens in one
};
GradPanels grad_panels(const Source& grad, int64_t rows, int64_t tokens);

// out[i] = <grad of row(i), source of col(i)>, split over threads.
void run_sddmm(const PlanView& plan, const Operands& operands, const Source& grad, float* out);

// What the kernels compute in: float64 runs plain loops, everything else float32.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks device, dtype (one the kernels take, the same as that of `like`).
void check_operand(const std::string& op, const char* name, const Tensor& t, const Tensor& like);

Tensor empty_tensor(const std::vector<int64_t>& shape, ScalarType dtype);
Tensor to_dtype(const Tensor& t, ScalarType dtype);

// A contiguous version of t; t itself when it is one already.
Tensor packed(const Tensor& t);

// The same in float32 (or another dtype).
Tensor as_contiguous(const Tensor& t, ScalarType dtype);

// The shape of t with another last size; the product of all sizes but the last.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape.push_back(t.size(i));
  shape.push_back(last);
  return shape;
}

inline int64_t tokens_of(const Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) n = times(n, x.size(i));
  return n;
}

// The last size of a dense operand (..., what), which must have one.
inline int64_t check_features(const std::string& op, const char* name, const char* what,
                              const Tensor& t, const Tensor& like) {
  check_operand(op, name, t, like);
  if (t.dim() < 1) fail(op, std::string(name) + " of shape (..., " + what + ")", "a scalar");
  return t.size(t.dim() - 1);
}

inline Sink matrix_sink(float* data, int64_t rows) {
  return {data, true, rows, 0, 0, false};
}

// Of a product with a matrix; the values, and what comes after the product, are left to the caller.
inline Operands matrix_operands(const MatrixSource* matrix, const Sink& sink, int64_t tokens) {
  Operands o{};
  o.source = {matrix, nullptr};
  o.sink = sink, o.tokens = tokens, o.groups = 1;
  return o;
}

// How a product is cut into tasks for the threads: parts of the tokens x parts of the rows x
// groups. Rows are counted in what the kernel takes them by: blocks of rows, or rows.
struct Split {
  int64_t token_parts, token_chunk, row_parts, rows_per_group;
};

// Whole panels first, then rows. `work`: multiply-adds per token.
Split split_rows(int64_t work, int64_t tokens, int64_t panel, int64_t groups,
                 int64_t rows_per_group);

struct Task {
  int64_t row_begin, row_end;  // of one group
  int64_t token_begin, token_end;
  Source source;  // of that group
};

// A source whose group of channels starts `channels` further; `image` holds it, if it is an image.
Source shifted(const Source& s, ImageSource* image, int64_t channels);

// Calls f(task) for all tasks, on all threads.
template <class F>
void for_each_task(const Split& s, const Operands& o, F f) {
  const int64_t tasks = s.token_parts * s.row_parts * o.groups;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % s.token_parts, rest = task / s.token_parts;
      const int64_t row_part = rest % s.row_parts, group = rest / s.row_parts;
      const int64_t row0 = group * s.rows_per_group;
      const int64_t t0 = std::min(o.tokens, part * s.token_chunk);
      ImageSource image;
      f(Task{row0 + row_part * s.rows_per_group / s.row_parts,
             row0 + (row_part + 1) * s.rows_per_group / s.row_parts, t0,
             std::min(o.tokens, t0 + s.token_chunk),
             shifted(o.source, &image, group * o.channels_per_group)});
    }
  });
}

// Bias of the right size and dtype, contiguous in the type that is computed in.
inline std::optional<Tensor> check_bias(const std::string& op, const std::optional<Tensor>& bias,
                                        const Tensor& x, int64_t rows, const char* what) {
  if (!bias) return std::nullopt;
  check_operand(op, "bias", *bias, x);
  check_dim(op, "bias", *bias, 1);
  check_size(op, std::string("bias.size(0) = ") + what, bias->size(0), rows);
  return as_contiguous(*bias, compute_type(x));
}

inline const float* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}
inline const double* double_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<double>() : nullptr;
}

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kSerialWork = 200000;

}  // namespace sparsekern
