// Products of a CSR matrix with a dense one, and sampled products, through cuSPARSE.
//
// A plan holds the descriptors of one pattern for one number of tokens, and the buffer that
// cusparseSpMM_preprocess filled from the pattern; a call only exchanges the addresses of the
// values. A plan may be used by one thread and one stream at a time; Python keeps one for each.
// The weight is the left operand W (out x in). In a column-major plan the dense operand is
// x (tokens, in) as it lies in memory, which is the column-major (in x tokens); in a row-major one
// it is x transposed, (in, tokens).
#include <torch/csrc/stable/library.h>

#include "libraries.h"

namespace sparsekern {
namespace {

struct CsrPlan {
  cusparseSpMatDescr_t sparse = nullptr;
  cusparseDnMatDescr_t left = nullptr, right = nullptr;  // SpMM: input, output; SDDMM: factors
  cusparseOperation_t left_op = CUSPARSE_OPERATION_NON_TRANSPOSE;
  cudaDataType compute = CUDA_R_32F;
  cusparseSpMMAlg_t algorithm = CUSPARSE_SPMM_ALG_DEFAULT;
  ScalarType dtype = ScalarType::Float;
  int64_t nnz = 0, left_size = 0, right_size = 0;
  Tensor buffer;

  CsrPlan() = default;
  CsrPlan(const CsrPlan&) = delete;
  ~CsrPlan() {
    if (sparse) cusparse().cusparseDestroySpMat(sparse);
    if (left) cusparse().cusparseDestroyDnMat(left);
    if (right) cusparse().cusparseDestroyDnMat(right);
  }
};

Registry<CsrPlan>& plans() {
  static Registry<CsrPlan>* all = new Registry<CsrPlan>;
  return *all;
}

// alpha or beta in the type that is computed in.
struct Scalar {
  float single;
  double twice;
  explicit Scalar(double v) : single(static_cast<float>(v)), twice(v) {}
  const void* in(cudaDataType compute) const {
    return compute == CUDA_R_64F ? static_cast<const void*>(&twice) : &single;
  }
};

cusparseSpMMAlg_t spmm_algorithm(const std::string& op, int64_t number) {
  switch (number) {
    case 1: return CUSPARSE_SPMM_CSR_ALG1;
    case 2: return CUSPARSE_SPMM_CSR_ALG2;
    case 3: return CUSPARSE_SPMM_CSR_ALG3;
    default: fail(op, "algorithm 1, 2 or 3", std::to_string(number));
  }
}

void check_values(const std::string& op, const char* name, const Tensor& t, ScalarType dtype,
                  int64_t size, const Tensor& like) {
  check_library_operand(op, name, t, like);
  check_dtype(op, name, t, {dtype});
  check_size(op, std::string(name) + ".numel()", t.numel(), size);
}

// The descriptors of a pattern; dense operands are (rows, cols) row by row in memory.
void describe(const std::string& op, CsrPlan& p, const Tensor& crow, const Tensor& col,
              const Tensor& values, int64_t cols) {
  check_dtype(op, "crow", crow, {ScalarType::Int});
  check_dtype(op, "col", col, {ScalarType::Int});
  check_library_operand(op, "crow", crow, values);
  check_library_operand(op, "col", col, values);
  p.dtype = values.scalar_type();
  p.compute = p.dtype == ScalarType::Double ? CUDA_R_64F : CUDA_R_32F;
  p.nnz = col.numel();
  check_values(op, "values", values, p.dtype, p.nnz, values);
  check_status(op, "cusparseCreateCsr",
               cusparse().cusparseCreateCsr(
                   &p.sparse, crow.numel() - 1, cols, p.nnz, crow.mutable_data_ptr(),
                   col.mutable_data_ptr(), values.mutable_data_ptr(), CUSPARSE_INDEX_32I,
                   CUSPARSE_INDEX_32I, CUSPARSE_INDEX_BASE_ZERO, cuda_type(op, "values", p.dtype)));
}

// A contiguous tensor (a, b) as a row-major (a x b) or a column-major (b x a) matrix.
cusparseDnMatDescr_t dense(const std::string& op, const CsrPlan& p, const Tensor& t,
                           bool row_major) {
  check_dim(op, "a dense operand", t, 2);
  check_values(op, "a dense operand", t, p.dtype, t.numel(), t);
  cusparseDnMatDescr_t made = nullptr;
  const int64_t rows = row_major ? t.size(0) : t.size(1), cols = row_major ? t.size(1) : t.size(0);
  check_status(op, "cusparseCreateDnMat",
               cusparse().cusparseCreateDnMat(&made, rows, cols, t.size(1), t.mutable_data_ptr(),
                                              cuda_type(op, "a dense operand", p.dtype),
                                              row_major ? CUSPARSE_ORDER_ROW : CUSPARSE_ORDER_COL));
  return made;
}

int64_t spmm_plan(const Tensor& crow, const Tensor& col, const Tensor& values, const Tensor& b,
                  const Tensor& c, bool row_major, int64_t algorithm) {
  const std::string op = "csr_linear";
  const DeviceScope scope(values);
  auto p = std::make_shared<CsrPlan>();
  check_dim(op, "x", b, 2);
  describe(op, *p, crow, col, values, row_major ? b.size(0) : b.size(1));
  p->algorithm = spmm_algorithm(op, algorithm);
  p->left = dense(op, *p, b, row_major);
  p->right = dense(op, *p, c, row_major);
  p->left_size = b.numel(), p->right_size = c.numel();
  const Scalar one(1), zero(0);
  const auto N = CUSPARSE_OPERATION_NON_TRANSPOSE;
  const cusparseHandle_t handle = sparse_handle(values);
  size_t bytes = 0;
  check_status(op, "cusparseSpMM_bufferSize",
               cusparse().cusparseSpMM_bufferSize(handle, N, N, one.in(p->compute), p->sparse,
                                                  p->left, zero.in(p->compute), p->right,
                                                  p->compute, p->algorithm, &bytes));
  p->buffer = workspace(op, values, bytes);
  // It helps ALG1 and ALG3; the documentation says that ALG2 ignores it.
  if (p->algorithm != CUSPARSE_SPMM_CSR_ALG2)
    check_status(op, "cusparseSpMM_preprocess",
                 cusparse().cusparseSpMM_preprocess(
                     handle, N, N, one.in(p->compute), p->sparse, p->left, zero.in(p->compute),
                     p->right, p->compute, p->algorithm, p->buffer.mutable_data_ptr()));
  return plans().add(p);
}

void spmm(int64_t plan, const Tensor& values, const Tensor& b, const Tensor& c) {
  const std::string op = "csr_linear";
  const DeviceScope scope(values);
  const auto p = plans().at(op, plan);
  check_values(op, "values", values, p->dtype, p->nnz, values);
  check_values(op, "x", b, p->dtype, p->left_size, values);
  check_values(op, "y", c, p->dtype, p->right_size, values);
  const Cusparse& lib = cusparse();
  check_status(op, "cusparseSpMatSetValues",
               lib.cusparseSpMatSetValues(p->sparse, values.mutable_data_ptr()));
  check_status(op, "cusparseDnMatSetValues",
               lib.cusparseDnMatSetValues(p->left, b.mutable_data_ptr()));
  check_status(op, "cusparseDnMatSetValues",
               lib.cusparseDnMatSetValues(p->right, c.mutable_data_ptr()));
  const Scalar one(1), zero(0);
  const auto N = CUSPARSE_OPERATION_NON_TRANSPOSE;
  check_status(op, "cusparseSpMM",
               lib.cusparseSpMM(sparse_handle(values), N, N, one.in(p->compute), p->sparse, p->left,
                                zero.in(p->compute), p->right, p->compute, p->algorithm,
                                p->buffer.mutable_data_ptr()));
}

// values[i] = <grad of its row, x of its column>: grad (tokens, out) and x (tokens, in), or both
// transposed, in which case the tokens are neighbours in memory.
int64_t sddmm_plan(const Tensor& crow, const Tensor& col, const Tensor& values, const Tensor& grad,
                   const Tensor& x, bool transposed) {
  const std::string op = "csr_linear_grad_values";
  const DeviceScope scope(values);
  auto p = std::make_shared<CsrPlan>();
  check_dim(op, "x", x, 2);
  describe(op, *p, crow, col, values, transposed ? x.size(0) : x.size(1));
  p->left = dense(op, *p, grad, true);
  p->right = dense(op, *p, x, !transposed);
  p->left_op = transposed ? CUSPARSE_OPERATION_NON_TRANSPOSE : CUSPARSE_OPERATION_TRANSPOSE;
  p->left_size = grad.numel(), p->right_size = x.numel();
  const Scalar one(1), zero(0);
  const auto N = CUSPARSE_OPERATION_NON_TRANSPOSE;
  const auto alg = CUSPARSE_SDDMM_ALG_DEFAULT;
  const cusparseHandle_t handle = sparse_handle(values);
  size_t bytes = 0;
  check_status(op, "cusparseSDDMM_bufferSize",
               cusparse().cusparseSDDMM_bufferSize(handle, p->left_op, N, one.in(p->compute),
                                                   p->left, p->right, zero.in(p->compute),
                                                   p->sparse, p->compute, alg, &bytes));
  p->buffer = workspace(op, values, bytes);
  check_status(op, "cusparseSDDMM_preprocess",
               cusparse().cusparseSDDMM_preprocess(
                   handle, p->left_op, N, one.in(p->compute), p->left, p->right,
                   zero.in(p->compute), p->sparse, p->compute, alg, p->buffer.mutable_data_ptr()));
  return plans().add(p);
}

void sddmm(int64_t plan, const Tensor& values, const Tensor& grad, const Tensor& x) {
  const std::string op = "csr_linear_grad_values";
  const DeviceScope scope(values);
  const auto p = plans().at(op, plan);
  check_values(op, "values", values, p->dtype, p->nnz, values);
  check_values(op, "grad", grad, p->dtype, p->left_size, values);
  check_values(op, "x", x, p->dtype, p->right_size, values);
  const Cusparse& lib = cusparse();
  check_status(op, "cusparseSpMatSetValues",
               lib.cusparseSpMatSetValues(p->sparse, values.mutable_data_ptr()));
  check_status(op, "cusparseDnMatSetValues",
               lib.cusparseDnMatSetValues(p->left, grad.mutable_data_ptr()));
  check_status(op, "cusparseDnMatSetValues",
               lib.cusparseDnMatSetValues(p->right, x.mutable_data_ptr()));
  const Scalar one(1), zero(0);
  check_status(
      op, "cusparseSDDMM",
      lib.cusparseSDDMM(sparse_handle(values), p->left_op, CUSPARSE_OPERATION_NON_TRANSPOSE,
                        one.in(p->compute), p->left, p->right, zero.in(p->compute), p->sparse,
                        p->compute, CUSPARSE_SDDMM_ALG_DEFAULT, p->buffer.mutable_data_ptr()));
}

}  // namespace

bool free_plan(int64_t number) {
  return plans().erase(number);
}

// Called by the CUDA implementations in sparsekern/ops/csr_cuda.py alone, below every other
// dispatch key.
STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern, m) {
  m.def(
      "_cusparse_spmm_plan(Tensor crow, Tensor col, Tensor values, Tensor b, Tensor c, "
      "bool row_major, int algorithm) -> int");
  m.def("_cusparse_spmm(int plan, Tensor values, Tensor b, Tensor(a!) c) -> ()");
  m.def(
      "_cusparse_sddmm_plan(Tensor crow, Tensor col, Tensor values, Tensor grad, Tensor x, "
      "bool transposed) -> int");
  m.def("_cusparse_sddmm(int plan, Tensor(a!) values, Tensor grad, Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CompositeExplicitAutograd, m) {
  m.impl("_cusparse_spmm_plan", TORCH_BOX(&spmm_plan));
  m.impl("_cusparse_spmm", TORCH_BOX(&spmm));
  m.impl("_cusparse_sddmm_plan", TORCH_BOX(&sddmm_plan));
  m.impl("_cusparse_sddmm", TORCH_BOX(&sddmm));
}

}  // namespace sparsekern
