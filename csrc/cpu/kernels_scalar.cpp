#include "kernels.h"
#include "vec.h"
#include "panel.inl"
#include "csr.inl"
#include "sddmm.inl"
#include "spmv.inl"

namespace sparsekern {
const Kernels kernels_scalar = {"scalar",   Vec::N, 4, kSddmmVectors, spmm, sddmm,
                                fill_panel, spmv,   2};
}  // namespace sparsekern
