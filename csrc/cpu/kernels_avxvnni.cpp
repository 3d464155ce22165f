#define SPARSEKERN_AVX2
#define SPARSEKERN_VNNI
#include "kernels.h"
#include "vec.h"
#include "activation.inl"
#include "vec_int8.h"
#include "dynamic.inl"

namespace sparsekern {
const DynamicKernels dynamic_kernels_avxvnni = dynamic_kernels;
}  // namespace sparsekern
