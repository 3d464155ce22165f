// The functions of cuSPARSE and cuSPARSELt that we call, as members of a table that is filled when
// the first of them is needed.
#pragma once
#include <cusparseLt.h>

#include "handles.h"

#define SPARSEKERN_CUSPARSE(X) \
  X(cusparseCreate)            \
  X(cusparseGetErrorName)      \
  X(cusparseSetStream)         \
  X(cusparseCreateCsr)         \
  X(cusparseCreateDnMat)       \
  X(cusparseDestroySpMat)      \
  X(cusparseDestroyDnMat)      \
  X(cusparseSpMatSetValues)    \
  X(cusparseDnMatSetValues)    \
  X(cusparseSpMM_bufferSize)   \
  X(cusparseSpMM_preprocess)   \
  X(cusparseSpMM)              \
  X(cusparseSDDMM_bufferSize)  \
  X(cusparseSDDMM_preprocess)  \
  X(cusparseSDDMM)

#define SPARSEKERN_CUSPARSELT(X)         \
  X(cusparseLtInit)                      \
  X(cusparseLtDenseDescriptorInit)       \
  X(cusparseLtStructuredDescriptorInit)  \
  X(cusparseLtMatDescriptorDestroy)      \
  X(cusparseLtMatmulDescriptorInit)      \
  X(cusparseLtMatmulDescSetAttribute)    \
  X(cusparseLtMatmulAlgSelectionInit)    \
  X(cusparseLtMatmulAlgSelectionDestroy) \
  X(cusparseLtMatmulAlgSetAttribute)     \
  X(cusparseLtMatmulAlgGetAttribute)     \
  X(cusparseLtMatmulGetWorkspace)        \
  X(cusparseLtMatmulPlanInit)            \
  X(cusparseLtMatmulPlanDestroy)         \
  X(cusparseLtMatmul)                    \
  X(cusparseLtMatmulSearch)              \
  X(cusparseLtSpMMAPruneCheck2)          \
  X(cusparseLtSpMMACompressedSize2)      \
  X(cusparseLtSpMMACompress2)

namespace sparsekern {

#define SPARSEKERN_MEMBER(name) decltype(&::name) name;
#define SPARSEKERN_LOOK_UP(name) \
  table.name = reinterpret_cast<decltype(&::name)>(library.symbol(#name));

struct Cusparse {
  SPARSEKERN_CUSPARSE(SPARSEKERN_MEMBER)
};
struct CusparseLt {
  SPARSEKERN_CUSPARSELT(SPARSEKERN_MEMBER)
};

const Cusparse& cusparse();
const CusparseLt& cusparselt();

}  // namespace sparsekern
