// libcusparse of the tests; see stub.h.
#include "stub.h"

#include <map>
#include <string>

struct cusparseContext {
  cudaStream_t stream = nullptr;
};
struct cusparseDnMatDescr {
  int64_t rows, cols, ld;
  void* values;
  cudaDataType type;
  cusparseOrder_t order;
  int64_t at(int64_t r, int64_t c) const {
    return order == CUSPARSE_ORDER_ROW ? r * ld + c : c * ld + r;
  }
};
struct cusparseSpMatDescr {
  int64_t rows, cols, nnz;
  int32_t *crow, *col;
  void* values;
  cudaDataType type;
  const void* prepared = nullptr;  // the buffer of the last preprocess
  int algorithm = -1;
};

namespace {

std::map<std::string, int64_t> counts;
bool refuse_half = false, greedy = false;

cusparseStatus_t count(const char* name, bool fine) {
  ++counts[name];
  return fine ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_INVALID_VALUE;
}

double scalar(const void* p, cudaDataType compute) {
  return load(p, compute, 0);
}

bool is_half(cudaDataType t) {
  return t == CUDA_R_16F || t == CUDA_R_16BF;
}

// What cuSPARSE supports: 16 bits with sums in float32 by algorithm 3 alone, never transposed.
cusparseStatus_t spmm_terms(cusparseConstSpMatDescr_t a, cusparseConstDnMatDescr_t b,
                            cusparseConstDnMatDescr_t c, cudaDataType compute, int algorithm) {
  if (a->type != b->type || a->type != c->type || b->order != c->order)
    return CUSPARSE_STATUS_NOT_SUPPORTED;
  if (a->cols != b->rows || a->rows != c->rows || b->cols != c->cols)
    return CUSPARSE_STATUS_INVALID_VALUE;
  const int64_t least = b->order == CUSPARSE_ORDER_ROW ? b->cols : b->rows;
  if (b->ld < least) return CUSPARSE_STATUS_INVALID_VALUE;
  if (is_half(a->type))
    return compute == CUDA_R_32F && algorithm == CUSPARSE_SPMM_CSR_ALG3 && !refuse_half
               ? CUSPARSE_STATUS_SUCCESS
               : CUSPARSE_STATUS_NOT_SUPPORTED;
  return compute == a->type ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_NOT_SUPPORTED;
}

}  // namespace

extern "C" {

int64_t stub_count(const char* name) {
  return counts[name];
}
void stub_refuse_half(int on) {
  refuse_half = on != 0;
}
// Asks for a workspace that no device has.
void stub_greedy(int on) {
  greedy = on != 0;
}
#ifndef STUB_CUDA_TORCH
// Of the stable ABI of a CUDA torch.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(0x5eed);
  return 0;
}
#endif

cusparseStatus_t cusparseGetProperty(libraryPropertyType type, int* value) {
  const int version[] = {12, 6, 3};
  *value = version[type];
  return CUSPARSE_STATUS_SUCCESS;
}
const char* cusparseGetErrorName(cusparseStatus_t status) {
  if (status == CUSPARSE_STATUS_NOT_SUPPORTED) return "CUSPARSE_STATUS_NOT_SUPPORTED";
  return "CUSPARSE_STATUS_INVALID_VALUE";
}
cusparseStatus_t cusparseCreate(cusparseHandle_t* handle) {
  *handle = new cusparseContext;
  return count("create", true);
}
cusparseStatus_t cusparseSetStream(cusparseHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseCreateCsr(cusparseSpMatDescr_t* made, int64_t rows, int64_t cols,
                                   int64_t nnz, void* crow, void* col, void* values,
                                   cusparseIndexType_t rt, cusparseIndexType_t ct,
                                   cusparseIndexBase_t, cudaDataType type) {
  const bool fine = aligned(crow) && aligned(col) && aligned(values);
  if (!fine || rt != CUSPARSE_INDEX_32I || ct != CUSPARSE_INDEX_32I) return count("csr", false);
  *made = new cusparseSpMatDescr{
      rows, cols, nnz, static_cast<int32_t*>(crow), static_cast<int32_t*>(col), values, type};
  return count("csr", true);
}
cusparseStatus_t cusparseCreateDnMat(cusparseDnMatDescr_t* made, int64_t rows, int64_t cols,
                                     int64_t ld, void* values, cudaDataType type,
                                     cusparseOrder_t order) {
  if (!aligned(values)) return count("dense", false);
  *made = new cusparseDnMatDescr{rows, cols, ld, values, type, order};
  return count("dense", true);
}
cusparseStatus_t cusparseDestroySpMat(cusparseConstSpMatDescr_t m) {
  delete m;
  return count("csr freed", true);
}
cusparseStatus_t cusparseDestroyDnMat(cusparseConstDnMatDescr_t m) {
  delete m;
  return count("dense freed", true);
}
cusparseStatus_t cusparseSpMatSetValues(cusparseSpMatDescr_t m, void* values) {
  m->values = values;
  return aligned(values) ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_INVALID_VALUE;
}
cusparseStatus_t cusparseDnMatSetValues(cusparseDnMatDescr_t m, void* values) {
  m->values = values;
  return aligned(values) ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_INVALID_VALUE;
}

cusparseStatus_t cusparseSpMM_bufferSize(cusparseHandle_t, cusparseOperation_t, cusparseOperation_t,
                                         const void*, cusparseConstSpMatDescr_t a,
                                         cusparseConstDnMatDescr_t b, const void*,
                                         cusparseDnMatDescr_t c, cudaDataType compute,
                                         cusparseSpMMAlg_t algorithm, size_t* bytes) {
  *bytes = greedy ? size_t{1} << 60 : 40;
  return spmm_terms(a, b, c, compute, algorithm);
}
cusparseStatus_t cusparseSpMM_preprocess(cusparseHandle_t handle, cusparseOperation_t,
                                         cusparseOperation_t, const void*,
                                         cusparseConstSpMatDescr_t a, cusparseConstDnMatDescr_t b,
                                         const void*, cusparseDnMatDescr_t c, cudaDataType compute,
                                         cusparseSpMMAlg_t algorithm, void* buffer) {
  if (!is_stream(handle->stream) || !buffer) return count("spmm preprocess", false);
  auto* m = const_cast<cusparseSpMatDescr*>(a);
  m->prepared = buffer, m->algorithm = algorithm;
  count("spmm preprocess", true);
  return spmm_terms(a, b, c, compute, algorithm);
}
cusparseStatus_t cusparseSpMM(cusparseHandle_t handle, cusparseOperation_t op_a,
                              cusparseOperation_t op_b, const void* alpha,
                              cusparseConstSpMatDescr_t a, cusparseConstDnMatDescr_t b,
                              const void* beta, cusparseDnMatDescr_t c, cudaDataType compute,
                              cusparseSpMMAlg_t algorithm, void* buffer) {
  const bool prepared =
      algorithm == CUSPARSE_SPMM_CSR_ALG2 || (a->prepared == buffer && a->algorithm == algorithm);
  const bool plain = op_a == CUSPARSE_OPERATION_NON_TRANSPOSE && op_a == op_b;
  if (!is_stream(handle->stream) || !prepared || !plain) return count("spmm", false);
  const cusparseStatus_t status = spmm_terms(a, b, c, compute, algorithm);
  if (status != CUSPARSE_STATUS_SUCCESS) return status;
  const double scale = scalar(alpha, compute);
  if (scalar(beta, compute) != 0) return count("spmm", false);
  if (skips_products()) return count("spmm", true);
  for (int64_t r = 0; r < a->rows; ++r)
    for (int64_t t = 0; t < c->cols; ++t) {
      double sum = 0;
      for (int32_t i = a->crow[r]; i < a->crow[r + 1]; ++i)
        sum += load(a->values, a->type, i) * load(b->values, b->type, b->at(a->col[i], t));
      store(c->values, c->type, c->at(r, t), scale * sum);
    }
  return count("spmm", true);
}

cusparseStatus_t cusparseSDDMM_bufferSize(cusparseHandle_t, cusparseOperation_t,
                                          cusparseOperation_t, const void*,
                                          cusparseConstDnMatDescr_t a, cusparseConstDnMatDescr_t,
                                          const void*, cusparseSpMatDescr_t, cudaDataType,
                                          cusparseSDDMMAlg_t, size_t* bytes) {
  *bytes = 0;
  return a->type == CUDA_R_16BF ? CUSPARSE_STATUS_NOT_SUPPORTED : CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseSDDMM_preprocess(cusparseHandle_t, cusparseOperation_t,
                                          cusparseOperation_t, const void*,
                                          cusparseConstDnMatDescr_t, cusparseConstDnMatDescr_t,
                                          const void*, cusparseSpMatDescr_t c, cudaDataType,
                                          cusparseSDDMMAlg_t, void* buffer) {
  c->prepared = buffer;
  return count("sddmm preprocess", buffer != nullptr);
}
cusparseStatus_t cusparseSDDMM(cusparseHandle_t handle, cusparseOperation_t op_a,
                               cusparseOperation_t op_b, const void*, cusparseConstDnMatDescr_t a,
                               cusparseConstDnMatDescr_t b, const void* beta,
                               cusparseSpMatDescr_t c, cudaDataType compute, cusparseSDDMMAlg_t,
                               void* buffer) {
  const bool turned = op_a == CUSPARSE_OPERATION_TRANSPOSE;
  const int64_t rows = turned ? a->cols : a->rows, tokens = turned ? a->rows : a->cols;
  const bool fits = rows == c->rows && b->rows == tokens && b->cols == c->cols;
  if (!is_stream(handle->stream) || c->prepared != buffer || !fits || scalar(beta, compute) != 0 ||
      op_b != CUSPARSE_OPERATION_NON_TRANSPOSE)
    return count("sddmm", false);
  if (skips_products()) return count("sddmm", true);
  for (int64_t r = 0; r < c->rows; ++r)
    for (int32_t i = c->crow[r]; i < c->crow[r + 1]; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t)
        sum += load(a->values, a->type, turned ? a->at(t, r) : a->at(r, t)) *
               load(b->values, b->type, b->at(t, c->col[i]));
      store(c->values, c->type, i, sum);
    }
  return count("sddmm", true);
}

}  // extern "C"
