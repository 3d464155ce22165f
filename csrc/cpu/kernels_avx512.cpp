#define SPARSEKERN_AVX512
#include "kernels.h"
#include "vec.h"
#include "panel.inl"
#include "csr.inl"
#include "sddmm.inl"
#include "block.inl"
#include "nm.inl"

namespace sparsekern {
const Kernels kernels_avx512 = {"avx512",    Vec::N,     8,      kSddmmVectors, spmm,
                                sddmm,       fill_panel, spmv,   block_spmm,    block_spmv,
                                block_sddmm, nm_spmm,    nm_spmv};
}  // namespace sparsekern
