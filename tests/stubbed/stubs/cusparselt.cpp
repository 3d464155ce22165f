// libcusparseLt of the tests; see stub.h. "Packed" is the dense weight as it is.
#include "stub.h"

#include <cusparseLt.h>

#include <cmath>
#include <map>
#include <string>

namespace {

constexpr int kAlgorithms = 3;  // 0, 1, 2; the search finds 2
constexpr uint32_t kMagic = 0x2424;

struct Matrix {
  uint32_t magic;
  bool sparse;
  int64_t rows, cols, ld;
  cudaDataType type;
  cusparseOrder_t order;
  int64_t at(int64_t r, int64_t c) const {
    return order == CUSPARSE_ORDER_ROW ? r * ld + c : c * ld + r;
  }
};
struct Matmul {
  uint32_t magic;
  const Matrix *a, *b, *c;
  cusparseOperation_t op_b;
  int relu, gelu;
  const void* bias;
};
struct Selection {
  uint32_t magic;
  int attribute[6];
};
struct Plan {
  uint32_t magic;
  const Matmul* matmul;
  Selection* selection;
};

std::map<std::string, int64_t> counts;
int gelu_kind = 2;  // 0 none, 1 erf, 2 tanh

template <class T, class S>
T* as(S* opaque) {
  static_assert(sizeof(T) <= 512, "the library's structures have 512 bytes");
  return reinterpret_cast<T*>(const_cast<std::remove_const_t<S>*>(opaque));
}

cusparseStatus_t count(const char* name, bool fine) {
  ++counts[name];
  return fine ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_INVALID_VALUE;
}

double activated(double v, const Matmul& m) {
  if (m.relu) return v > 0 ? v : 0;
  if (!m.gelu) return v;
  if (gelu_kind == 1) return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
  return 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
}

void multiply(const Matmul& m, double alpha, const void* a, const void* b, void* d) {
  const bool turned = m.op_b == CUSPARSE_OPERATION_TRANSPOSE;
  const int64_t tokens = turned ? m.b->rows : m.b->cols;
  const cudaDataType bias_type = m.a->type == CUDA_R_8I ? CUDA_R_32F : m.c->type;
  for (int64_t r = 0; r < m.a->rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) {
      double sum = 0;
      for (int64_t k = 0; k < m.a->cols; ++k)
        sum += load(a, m.a->type, m.a->at(r, k)) *
               load(b, m.b->type, turned ? m.b->at(t, k) : m.b->at(k, t));
      sum = alpha * sum + (m.bias ? load(m.bias, bias_type, r) : 0);
      store(d, m.c->type, m.c->at(r, t), activated(sum, m));
    }
}

size_t width(cudaDataType type) {
  if (type == CUDA_R_8I || type == CUDA_R_8F_E4M3) return 1;
  return type == CUDA_R_32F ? 4 : 2;
}

}  // namespace

extern "C" {

int64_t stub_lt_count(const char* name) {
  return counts[name];
}
void stub_lt_gelu(int kind) {
  gelu_kind = kind;
}

cusparseStatus_t cusparseLtGetProperty(libraryPropertyType type, int* value) {
  const int version[] = {0, 8, 1};
  *value = version[type];
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtInit(cusparseLtHandle_t* handle) {
  *as<uint32_t>(handle) = kMagic;
  return count("init", true);
}
cusparseStatus_t cusparseLtStructuredDescriptorInit(const cusparseLtHandle_t* handle,
                                                    cusparseLtMatDescriptor_t* made, int64_t rows,
                                                    int64_t cols, int64_t ld, uint32_t alignment,
                                                    cudaDataType type, cusparseOrder_t order,
                                                    cusparseLtSparsity_t) {
  const bool fine =
      *as<uint32_t>(handle) == kMagic && alignment == 16 && rows % 16 == 0 && cols % 16 == 0;
  *as<Matrix>(made) = {kMagic, true, rows, cols, ld, type, order};
  return count("matrix", fine);
}
cusparseStatus_t cusparseLtDenseDescriptorInit(const cusparseLtHandle_t* handle,
                                               cusparseLtMatDescriptor_t* made, int64_t rows,
                                               int64_t cols, int64_t ld, uint32_t alignment,
                                               cudaDataType type, cusparseOrder_t order) {
  const bool fine = *as<uint32_t>(handle) == kMagic && alignment == 16 && rows % 8 == 0 &&
                    cols % 8 == 0 && ld >= (order == CUSPARSE_ORDER_ROW ? cols : rows);
  *as<Matrix>(made) = {kMagic, false, rows, cols, ld, type, order};
  return count("matrix", fine);
}
cusparseStatus_t cusparseLtMatDescriptorDestroy(const cusparseLtMatDescriptor_t* m) {
  as<Matrix>(m)->magic = 0;
  return count("matrix freed", true);
}
cusparseStatus_t cusparseLtMatmulDescriptorInit(
    const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* made, cusparseOperation_t op_a,
    cusparseOperation_t op_b, const cusparseLtMatDescriptor_t* a,
    const cusparseLtMatDescriptor_t* b, const cusparseLtMatDescriptor_t* c,
    const cusparseLtMatDescriptor_t* d, cusparseComputeType compute) {
  const Matrix *ma = as<Matrix>(a), *mb = as<Matrix>(b), *mc = as<Matrix>(c);
  const bool turned = op_b == CUSPARSE_OPERATION_TRANSPOSE;
  const bool fits = (turned ? mb->cols : mb->rows) == ma->cols && mc->rows == ma->rows &&
                    mc->cols == (turned ? mb->rows : mb->cols);
  const bool sums =
      compute == (ma->type == CUDA_R_8I ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F);
  *as<Matmul>(made) = {kMagic, ma, mb, mc, op_b, 0, 0, nullptr};
  return count("matmul descriptor",
               fits && sums && ma->sparse && c == d && op_a == CUSPARSE_OPERATION_NON_TRANSPOSE);
}
cusparseStatus_t cusparseLtMatmulDescSetAttribute(const cusparseLtHandle_t*,
                                                  cusparseLtMatmulDescriptor_t* matmul,
                                                  cusparseLtMatmulDescAttribute_t attribute,
                                                  const void* data, size_t size) {
  Matmul* m = as<Matmul>(matmul);
  if (attribute == CUSPARSELT_MATMUL_BIAS_POINTER) {
    std::memcpy(&m->bias, data, size);
    return count("bias", size == sizeof(void*) && aligned(m->bias));
  }
  if (attribute == CUSPARSELT_MATMUL_ACTIVATION_GELU && gelu_kind == 0)
    return CUSPARSE_STATUS_NOT_SUPPORTED;
  int* flag = attribute == CUSPARSELT_MATMUL_ACTIVATION_RELU ? &m->relu : &m->gelu;
  std::memcpy(flag, data, sizeof(int));
  return count("activation", size == sizeof(int));
}
cusparseStatus_t cusparseLtMatmulAlgSelectionInit(const cusparseLtHandle_t*,
                                                  cusparseLtMatmulAlgSelection_t* selection,
                                                  const cusparseLtMatmulDescriptor_t* matmul,
                                                  cusparseLtMatmulAlg_t) {
  *as<Selection>(selection) = {kMagic, {0, kAlgorithms, 5, 1, 1, 0}};
  return count("selection", as<Matmul>(matmul)->magic == kMagic);
}
cusparseStatus_t cusparseLtMatmulAlgSelectionDestroy(const cusparseLtMatmulAlgSelection_t* s) {
  as<Selection>(s)->magic = 0;
  return count("selection freed", true);
}
cusparseStatus_t cusparseLtMatmulAlgSetAttribute(const cusparseLtHandle_t*,
                                                 cusparseLtMatmulAlgSelection_t* selection,
                                                 cusparseLtMatmulAlgAttribute_t attribute,
                                                 const void* data, size_t size) {
  const int value = *static_cast<const int*>(data);
  if (attribute == CUSPARSELT_MATMUL_SPLIT_K && value == 8) return CUSPARSE_STATUS_NOT_SUPPORTED;
  as<Selection>(selection)->attribute[attribute] = value;
  return count("set algorithm", size == sizeof(int));
}
cusparseStatus_t cusparseLtMatmulAlgGetAttribute(const cusparseLtHandle_t*,
                                                 const cusparseLtMatmulAlgSelection_t* selection,
                                                 cusparseLtMatmulAlgAttribute_t attribute,
                                                 void* data, size_t size) {
  *static_cast<int*>(data) = as<Selection>(selection)->attribute[attribute];
  return size == sizeof(int) ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_INVALID_VALUE;
}
cusparseStatus_t cusparseLtMatmulPlanInit(const cusparseLtHandle_t*, cusparseLtMatmulPlan_t* plan,
                                          const cusparseLtMatmulDescriptor_t* matmul,
                                          const cusparseLtMatmulAlgSelection_t* selection) {
  const bool fine = as<Selection>(selection)->attribute[0] < kAlgorithms;
  *as<Plan>(plan) = {kMagic, as<Matmul>(matmul), as<Selection>(selection)};
  return fine ? count("plan", true) : CUSPARSE_STATUS_NOT_SUPPORTED;
}
cusparseStatus_t cusparseLtMatmulPlanDestroy(const cusparseLtMatmulPlan_t* plan) {
  as<Plan>(plan)->magic = 0;
  return count("plan freed", true);
}
cusparseStatus_t cusparseLtMatmulGetWorkspace(const cusparseLtHandle_t*,
                                              const cusparseLtMatmulPlan_t*, size_t* bytes) {
  *bytes = 0;
  return CUSPARSE_STATUS_SUCCESS;
}
cusparseStatus_t cusparseLtMatmul(const cusparseLtHandle_t* handle,
                                  const cusparseLtMatmulPlan_t* plan, const void* alpha,
                                  const void* a, const void* b, const void* beta, const void* c,
                                  void* d, void* space, cudaStream_t* streams, int32_t n) {
  const Plan* p = as<Plan>(plan);
  const Matmul* m = p->matmul;
  const bool alive = *as<uint32_t>(handle) == kMagic && p->magic == kMagic && m->magic == kMagic &&
                     m->a->magic == kMagic && m->b->magic == kMagic && m->c->magic == kMagic &&
                     p->selection->magic == kMagic;
  const bool fine = alive && n == 1 && is_stream(*streams) && space && aligned(a) && aligned(b) &&
                    aligned(d) && c == d && *static_cast<const float*>(beta) == 0;
  if (fine && !skips_products()) multiply(*m, *static_cast<const float*>(alpha), a, b, d);
  return count("matmul", fine);
}
cusparseStatus_t cusparseLtMatmulSearch(const cusparseLtHandle_t* handle,
                                        cusparseLtMatmulPlan_t* plan, const void* alpha,
                                        const void* a, const void* b, const void* beta,
                                        const void* c, void* d, void* space, cudaStream_t* streams,
                                        int32_t n) {
  as<Plan>(plan)->selection->attribute[0] = kAlgorithms - 1;
  ++counts["search"];
  return cusparseLtMatmul(handle, plan, alpha, a, b, beta, c, d, space, streams, n);
}
cusparseStatus_t cusparseLtSpMMACompressedSize2(const cusparseLtHandle_t*,
                                                const cusparseLtMatDescriptor_t* matrix,
                                                size_t* bytes, size_t* buffer) {
  const Matrix* m = as<Matrix>(matrix);
  *bytes = m->rows * m->cols * width(m->type);
  *buffer = 0;
  return m->magic == kMagic ? CUSPARSE_STATUS_SUCCESS : CUSPARSE_STATUS_INVALID_VALUE;
}
cusparseStatus_t cusparseLtSpMMACompress2(const cusparseLtHandle_t*,
                                          const cusparseLtMatDescriptor_t* matrix, int is_a,
                                          cusparseOperation_t, const void* dense, void* packed,
                                          void* buffer, cudaStream_t stream) {
  const Matrix* m = as<Matrix>(matrix);
  bool fine = is_a == 1 && buffer && is_stream(stream);
  for (int64_t i = 0; i < m->rows * m->cols && !skips_products(); ++i) {
    const double v = load(dense, m->type, i);
    fine &= !(v == 0 && std::signbit(v));  // taken for a weight that is kept
  }
  std::memcpy(packed, dense, m->rows * m->cols * width(m->type));
  return count("compress", fine);
}
cusparseStatus_t cusparseLtSpMMAPruneCheck2(const cusparseLtHandle_t*,
                                            const cusparseLtMatDescriptor_t* matrix, int,
                                            cusparseOperation_t, const void* dense, int* wrong,
                                            cudaStream_t) {
  const Matrix* m = as<Matrix>(matrix);
  *wrong = 0;
  if (skips_products()) return count("prune check", true);
  const int group = m->type == CUDA_R_32F ? 2 : 4;
  for (int64_t i = 0; i < m->rows * m->cols; i += group) {
    int kept = 0;
    for (int j = 0; j < group; ++j) kept += load(dense, m->type, i + j) != 0;
    *wrong |= kept > group / 2;
  }
  return count("prune check", true);
}

}  // extern "C"
