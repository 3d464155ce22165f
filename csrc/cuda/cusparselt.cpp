// Products with a 2:4 sparse weight through cuSPARSELt; in float32, as TF32, with a 1:2 one.
//
// The weight W (out x in) is the left operand, so that the result, column-major (out x tokens), is
// y (tokens, out) as torch lays it out, and the bias runs along its rows. A plan (descriptors,
// algorithm, epilogue) is made once per shape, dtype, epilogue, bias address and algorithm, per
// thread and device; torch's own 2:4 product makes all of it on every call.
#include <torch/csrc/stable/library.h>

#include <array>
#include <list>
#include <tuple>

#include "libraries.h"

namespace sparsekern {
namespace {

const char* const kOp = "nm_linear";
constexpr size_t kMaxPlans = 512;  // per thread and device; a plan is some kilobytes of host memory
constexpr uint32_t kAlignment = 16;

// Algorithm number, split-K, its mode and its buffers. All as the library had them by default where
// `chosen` is false.
struct Algorithm {
  bool chosen = false;
  std::array<int, 4> attribute{};
};
constexpr std::array<cusparseLtMatmulAlgAttribute_t, 4> kAttributes{
    CUSPARSELT_MATMUL_ALG_CONFIG_ID, CUSPARSELT_MATMUL_SPLIT_K, CUSPARSELT_MATMUL_SPLIT_K_MODE,
    CUSPARSELT_MATMUL_SPLIT_K_BUFFERS};

struct Problem {
  int64_t rows, cols, tokens;  // W is rows x cols
  ScalarType in, out;
  int activation;    // 0 none, 1 relu, 2 the gelu of the library
  const void* bias;  // an address is part of a plan
  Algorithm algorithm;

  auto key() const {
    return std::make_tuple(rows, cols, tokens, in, out, activation, bias, algorithm.chosen,
                           algorithm.attribute);
  }
};

void check(const char* call, cusparseStatus_t status) {
  check_status(kOp, call, status);
}

// A descriptor of a matrix, destroyed with its scope.
class Matrix {
 public:
  Matrix(const cusparseLtHandle_t* handle, bool sparse, int64_t rows, int64_t cols, int64_t ld,
         ScalarType type, cusparseOrder_t order) {
    const CusparseLt& lt = cusparselt();
    const cudaDataType t = cuda_type(kOp, "a matrix", type);
    if (sparse)
      check("cusparseLtStructuredDescriptorInit",
            lt.cusparseLtStructuredDescriptorInit(handle, &matrix_, rows, cols, ld, kAlignment, t,
                                                  order, CUSPARSELT_SPARSITY_50_PERCENT));
    else
      check(
          "cusparseLtDenseDescriptorInit",
          lt.cusparseLtDenseDescriptorInit(handle, &matrix_, rows, cols, ld, kAlignment, t, order));
  }
  Matrix(const Matrix&) = delete;
  ~Matrix() { cusparselt().cusparseLtMatDescriptorDestroy(&matrix_); }
  const cusparseLtMatDescriptor_t* get() const { return &matrix_; }

 private:
  cusparseLtMatDescriptor_t matrix_;
};

// Stays where it was made: the library's structures point to each other.
class Plan {
 public:
  Plan(const cusparseLtHandle_t* handle, const Problem& p);
  Plan(const Plan&) = delete;
  ~Plan();

  void run(const Tensor& packed, const Tensor& x, const Tensor& y, float alpha);
  // Times the library's algorithms, stays with the fastest, and returns it.
  Algorithm search(const Tensor& packed, const Tensor& x, const Tensor& y);

 private:
  int read(cusparseLtMatmulAlgAttribute_t attribute) const;
  void set_epilogue(const Problem& p);
  void set_algorithm(const Algorithm& algorithm);
  Tensor scratch(const Tensor& like) const;

  const cusparseLtHandle_t* handle_;
  Matrix weight_, input_, output_;
  cusparseLtMatmulDescriptor_t matmul_;
  cusparseLtMatmulAlgSelection_t selection_;
  cusparseLtMatmulPlan_t plan_;
};

cusparseComputeType compute_type(ScalarType in) {
  return in == ScalarType::Char ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F;
}

Plan::Plan(const cusparseLtHandle_t* handle, const Problem& p)
    : handle_(handle),
      weight_(handle, true, p.rows, p.cols, p.cols, p.in, CUSPARSE_ORDER_ROW),
      input_(handle, false, p.tokens, p.cols, p.cols, p.in, CUSPARSE_ORDER_ROW),
      output_(handle, false, p.rows, p.tokens, p.rows, p.out, CUSPARSE_ORDER_COL) {
  const CusparseLt& lt = cusparselt();
  check("cusparseLtMatmulDescriptorInit",
        lt.cusparseLtMatmulDescriptorInit(handle_, &matmul_, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                          CUSPARSE_OPERATION_TRANSPOSE, weight_.get(), input_.get(),
                                          output_.get(), output_.get(), compute_type(p.in)));
  set_epilogue(p);
  check("cusparseLtMatmulAlgSelectionInit",
        lt.cusparseLtMatmulAlgSelectionInit(handle_, &selection_, &matmul_,
                                            CUSPARSELT_MATMUL_ALG_DEFAULT));
  try {
    set_algorithm(p.algorithm);
    check("cusparseLtMatmulPlanInit",
          lt.cusparseLtMatmulPlanInit(handle_, &plan_, &matmul_, &selection_));
  } catch (...) {
    lt.cusparseLtMatmulAlgSelectionDestroy(&selection_);
    throw;
  }
}

Plan::~Plan() {
  cusparselt().cusparseLtMatmulPlanDestroy(&plan_);
  cusparselt().cusparseLtMatmulAlgSelectionDestroy(&selection_);
}

void Plan::set_epilogue(const Problem& p) {
  const auto set = [&](const char* what, cusparseLtMatmulDescAttribute_t attribute,
                       const void* data, size_t size) {
    check(what,
          cusparselt().cusparseLtMatmulDescSetAttribute(handle_, &matmul_, attribute, data, size));
  };
  const int on = 1;
  if (p.bias) set("bias of cuSPARSELt", CUSPARSELT_MATMUL_BIAS_POINTER, &p.bias, sizeof p.bias);
  if (p.activation == 1)
    set("relu of cuSPARSELt", CUSPARSELT_MATMUL_ACTIVATION_RELU, &on, sizeof on);
  if (p.activation == 2)
    set("gelu of cuSPARSELt", CUSPARSELT_MATMUL_ACTIVATION_GELU, &on, sizeof on);
}

// Only what differs from the defaults is set: not every algorithm takes every attribute.
void Plan::set_algorithm(const Algorithm& algorithm) {
  if (!algorithm.chosen) return;
  for (size_t i = 0; i < kAttributes.size(); ++i) {
    const int wanted = algorithm.attribute[i];
    if (read(kAttributes[i]) == wanted) continue;
    check("cusparseLtMatmulAlgSetAttribute",
          cusparselt().cusparseLtMatmulAlgSetAttribute(handle_, &selection_, kAttributes[i],
                                                       &wanted, sizeof wanted));
  }
}

int Plan::read(cusparseLtMatmulAlgAttribute_t attribute) const {
  int value = 0;
  check("cusparseLtMatmulAlgGetAttribute",
        cusparselt().cusparseLtMatmulAlgGetAttribute(handle_, &selection_, attribute, &value,
                                                     sizeof value));
  return value;
}

Tensor Plan::scratch(const Tensor& like) const {
  size_t bytes = 0;
  check("cusparseLtMatmulGetWorkspace",
        cusparselt().cusparseLtMatmulGetWorkspace(handle_, &plan_, &bytes));
  return workspace(kOp, like, bytes);
}

void Plan::run(const Tensor& packed, const Tensor& x, const Tensor& y, float alpha) {
  const float zero = 0;
  const Tensor space = scratch(x);
  cudaStream_t stream = current_stream(x);
  check("cusparseLtMatmul",
        cusparselt().cusparseLtMatmul(handle_, &plan_, &alpha, packed.const_data_ptr(),
                                      x.const_data_ptr(), &zero, y.const_data_ptr(),
                                      y.mutable_data_ptr(), space.mutable_data_ptr(), &stream, 1));
}

Algorithm Plan::search(const Tensor& packed, const Tensor& x, const Tensor& y) {
  const float one = 1, zero = 0;
  const Tensor space = scratch(x);
  cudaStream_t stream = current_stream(x);
  check("cusparseLtMatmulSearch",
        cusparselt().cusparseLtMatmulSearch(
            handle_, &plan_, &one, packed.const_data_ptr(), x.const_data_ptr(), &zero,
            y.const_data_ptr(), y.mutable_data_ptr(), space.mutable_data_ptr(), &stream, 1));
  Algorithm best{true, {}};
  for (size_t i = 0; i < kAttributes.size(); ++i) best.attribute[i] = read(kAttributes[i]);
  return best;
}

// What a thread keeps for a device: the handle and the plans, the latest used in front.
struct LtState {
  cusparseLtHandle_t handle;
  using Entry = std::pair<Problem, std::unique_ptr<Plan>>;
  std::list<Entry> plans;
  std::map<decltype(std::declval<Problem>().key()), std::list<Entry>::iterator> by_key;

  Plan& plan(const Problem& p) {
    const auto found = by_key.find(p.key());
    if (found == by_key.end()) return keep(p, std::make_unique<Plan>(&handle, p));
    plans.splice(plans.begin(), plans, found->second);
    return *plans.front().second;
  }

  Plan& keep(const Problem& p, std::unique_ptr<Plan> made) {
    plans.emplace_front(p, std::move(made));
    by_key[p.key()] = plans.begin();
    if (plans.size() > kMaxPlans) {
      by_key.erase(plans.back().first.key());
      plans.pop_back();
    }
    return *plans.front().second;
  }
};

LtState& lt_state(const Tensor& like) {
  Context& context = thread_context(like);
  if (!context.lt) {
    auto made = std::make_shared<LtState>();
    check("cusparseLtInit", cusparselt().cusparseLtInit(&made->handle));
    context.lt = made;
  }
  return *static_cast<LtState*>(context.lt.get());
}

// The library's terms: sizes of a weight of 16 bits (and of 32) in multiples of 16, of 8 bits
// of 32.
void check_weight(int64_t rows, int64_t cols, ScalarType type) {
  const bool bytes = type == ScalarType::Char || type == ScalarType::Float8_e4m3fn ||
                     type == ScalarType::Float8_e5m2;
  const int64_t unit = bytes ? 32 : 16;
  if (!bytes && type != ScalarType::Half && type != ScalarType::BFloat16 &&
      type != ScalarType::Float)
    fail(kOp, "a weight of float32, float16, bfloat16, int8 or float8", dtype_name(type));
  if (rows % unit || cols % unit || !rows || !cols)
    fail(kOp, "a weight of sizes that are multiples of " + std::to_string(unit),
         std::to_string(rows) + " x " + std::to_string(cols));
}

struct Sizes {
  size_t packed = 0, buffer = 0;
};

Sizes packed_sizes(const cusparseLtHandle_t* handle, const Matrix& weight) {
  Sizes s;
  check("cusparseLtSpMMACompressedSize2",
        cusparselt().cusparseLtSpMMACompressedSize2(handle, weight.get(), &s.packed, &s.buffer));
  return s;
}

Matrix weight_matrix(const cusparseLtHandle_t* handle, const Tensor& dense) {
  check_dim(kOp, "the weight", dense, 2);
  check_library_operand(kOp, "the weight", dense, dense);
  check_weight(dense.size(0), dense.size(1), dense.scalar_type());
  return Matrix(handle, true, dense.size(0), dense.size(1), dense.size(1), dense.scalar_type(),
                CUSPARSE_ORDER_ROW);
}

int64_t packed_bytes(const Tensor& dense) {
  const DeviceScope scope(dense);
  const cusparseLtHandle_t* handle = &lt_state(dense).handle;
  return static_cast<int64_t>(packed_sizes(handle, weight_matrix(handle, dense)).packed);
}

// Compresses into memory that stays in its place, so that a captured graph sees new weights.
void compress(const Tensor& dense, const Tensor& packed) {
  const DeviceScope scope(dense);
  const cusparseLtHandle_t* handle = &lt_state(dense).handle;
  const Matrix weight = weight_matrix(handle, dense);
  const Sizes sizes = packed_sizes(handle, weight);
  check_library_operand(kOp, "packed", packed, dense);
  check_size(kOp, "bytes of packed", packed.numel(), static_cast<int64_t>(sizes.packed));
  const Tensor buffer = workspace(kOp, dense, sizes.buffer);
  check("cusparseLtSpMMACompress2",
        cusparselt().cusparseLtSpMMACompress2(
            handle, weight.get(), 1, CUSPARSE_OPERATION_NON_TRANSPOSE, dense.const_data_ptr(),
            packed.mutable_data_ptr(), buffer.mutable_data_ptr(), current_stream(dense)));
}

// int32 (1,) on the device: 0 where the weight is 2:4 (1:2 in float32).
Tensor prune_check(const Tensor& dense) {
  const DeviceScope scope(dense);
  const cusparseLtHandle_t* handle = &lt_state(dense).handle;
  const Matrix weight = weight_matrix(handle, dense);
  const Tensor wrong = torch::stable::new_empty(dense, {1}, ScalarType::Int);
  check("cusparseLtSpMMAPruneCheck2",
        cusparselt().cusparseLtSpMMAPruneCheck2(
            handle, weight.get(), 1, CUSPARSE_OPERATION_NON_TRANSPOSE, dense.const_data_ptr(),
            wrong.mutable_data_ptr<int32_t>(), current_stream(dense)));
  return wrong;
}

Problem problem(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                int64_t rows, int64_t activation, ScalarType out) {
  check_dim(kOp, "x", x, 2);
  check_library_operand(kOp, "x", x, x);
  check_library_operand(kOp, "packed", packed, x);
  check_weight(rows, x.size(1), x.scalar_type());
  const int64_t unit = x.element_size() == 1 ? 16 : 8;
  if (x.size(0) % unit || !x.size(0))
    fail(kOp, "padded tokens, a multiple of " + std::to_string(unit), std::to_string(x.size(0)));
  if (activation < 0 || activation > 2)
    fail(kOp, "activation 0, 1 or 2", std::to_string(activation));
  if (bias) {
    check_library_operand(kOp, "bias", *bias, x);
    check_size(kOp, "bias.numel()", bias->numel(), rows);
    check_dtype(kOp, "bias", *bias,
                {x.scalar_type() == ScalarType::Char ? ScalarType::Float : out});
  }
  return {rows,
          x.size(1),
          x.size(0),
          x.scalar_type(),
          out,
          static_cast<int>(activation),
          bias ? bias->const_data_ptr() : nullptr,
          {}};
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              int64_t rows, int64_t activation, double alpha, ScalarType out,
              std::vector<int64_t> algorithm) {
  const DeviceScope scope(x);
  Problem p = problem(x, packed, bias, rows, activation, out);
  if (!algorithm.empty()) {
    check_size(kOp, "attributes of the algorithm", static_cast<int64_t>(algorithm.size()), 4);
    p.algorithm.chosen = true;
    for (size_t i = 0; i < 4; ++i) p.algorithm.attribute[i] = static_cast<int>(algorithm[i]);
  }
  const Tensor y = torch::stable::new_empty(x, {x.size(0), rows}, out);
  lt_state(x).plan(p).run(packed, x, y, static_cast<float>(alpha));
  return y;
}

// The four attributes of the fastest algorithm; its plan is kept.
std::vector<int64_t> search(const Tensor& x, const Tensor& packed,
                            const std::optional<Tensor>& bias, int64_t rows, int64_t activation,
                            ScalarType out) {
  const DeviceScope scope(x);
  Problem p = problem(x, packed, bias, rows, activation, out);
  LtState& state = lt_state(x);
  auto plan = std::make_unique<Plan>(&state.handle, p);
  const Tensor y = torch::stable::new_empty(x, {x.size(0), rows}, out);
  p.algorithm = plan->search(packed, x, y);
  std::vector<int64_t> found(p.algorithm.attribute.begin(), p.algorithm.attribute.end());
  if (!state.by_key.count(p.key())) state.keep(p, std::move(plan));
  return found;
}

}  // namespace

// Called by the CUDA implementations in sparsekern/ops/nm_cuda.py alone, below every other
// dispatch key.
STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern, m) {
  m.def("_cslt_packed_bytes(Tensor dense) -> int");
  m.def("_cslt_compress(Tensor dense, Tensor(a!) packed) -> ()");
  m.def("_cslt_prune_check(Tensor dense) -> Tensor");
  m.def(
      "_cslt_linear(Tensor x, Tensor packed, Tensor? bias, int rows, int activation, float alpha, "
      "ScalarType out, int[] algorithm) -> Tensor");
  m.def(
      "_cslt_search(Tensor x, Tensor packed, Tensor? bias, int rows, int activation, "
      "ScalarType out) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CompositeExplicitAutograd, m) {
  m.impl("_cslt_packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("_cslt_compress", TORCH_BOX(&compress));
  m.impl("_cslt_prune_check", TORCH_BOX(&prune_check));
  m.impl("_cslt_linear", TORCH_BOX(&linear));
  m.impl("_cslt_search", TORCH_BOX(&search));
}

}  // namespace sparsekern
