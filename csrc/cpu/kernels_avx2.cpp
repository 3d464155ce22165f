#define SPARSEKERN_AVX2
#include "kernels.h"
#include "vec.h"
#include "panel.inl"
#include "planes.inl"
#include "activation.inl"
#include "csr.inl"
#include "lines.inl"
#include "int8.inl"
#include "sddmm.inl"
#include "spmv.inl"
#include "block.inl"
#include "nm.inl"
#include "vec_int8.h"
#include "dynamic.inl"

namespace sparsekern {
const Kernels kernels_avx2 = {
    "avx2",    Vec::N,      8,          kSddmmVectors,   pack,       unpack,
    spmm,      sddmm,       fill_panel, spmm_lines,      fill_plane, spmv,
    0.22,      block_spmm,  block_spmv, block_sddmm,     nm_spmm,    nm_spmv,
    pack_int8, spread_int8, nullptr,    &dynamic_kernels};
}  // namespace sparsekern
