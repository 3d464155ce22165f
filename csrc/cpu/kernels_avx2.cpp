#define SPARSEKERN_AVX2
#include "table.inl"

namespace sparsekern {
const Kernels kernels_avx2 = table("avx2", 8, 0.22);
}  // namespace sparsekern
