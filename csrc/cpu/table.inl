// All kernels over one small vector type, and the table that names them. A unit of an instruction
// set says what runs best there and gets its table.
#include "kernels.h"
#include "vec.h"
#include "panel.inl"
#include "planes.inl"
#include "activation.inl"
#include "csr.inl"
#include "lines.inl"
#include "depthwise.inl"
#include "int8.inl"
#include "sddmm.inl"
#include "spmv.inl"
#include "block.inl"
#include "nm.inl"
#include "norm.inl"
#include "vec_int8.h"
#include "dynamic.inl"

namespace sparsekern {
namespace {

constexpr Kernels table(const char* name, int64_t spmm_vectors, double bitmap_density) {
  return {name,    Vec::N,          spmm_vectors, kSddmmVectors, pack,        unpack,
          spmm,    sddmm,           fill_panel,   spmm_lines,    fill_plane,  depthwise,
          spmv,    bitmap_density,  block_spmm,   block_spmv,    block_sddmm, nm_spmm,
          nm_spmv, pack_int8,       spread_int8,  norm_moments,  norm_apply,  norm_grad,
          nullptr, &dynamic_kernels};
}

}  // namespace
}  // namespace sparsekern
