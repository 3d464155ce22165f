#define SPARSEKERN_AVX512
#define SPARSEKERN_BF16
#include "kernels.h"
#include "vec.h"
#include "panel.inl"
#include "activation.inl"
#include "csr.inl"
#include "pairs.inl"

namespace sparsekern {
const PairKernels pair_kernels_avx512bf16 = {kPairVectors, pack_pairs, spmm};
}  // namespace sparsekern
