#define SPARSEKERN_AVX512
#include "table.inl"

namespace sparsekern {
const Kernels kernels_avx512 = table("avx512", 8, 0.18);
}  // namespace sparsekern
