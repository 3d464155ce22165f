#include "table.inl"

namespace sparsekern {
const Kernels kernels_scalar = table("scalar", 4, 2);
}  // namespace sparsekern
