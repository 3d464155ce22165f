// Stand-ins for NVIDIA's sparse libraries that compute on the CPU, plainly and in double, and
// refuse what the real ones do not allow: wrong order of calls, unaligned operands, layouts that do
// not fit. The tests run the CUDA half against them on tensors of the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cusparse.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef STUB_CUDA_TORCH
// For tests/software_gpu: the default stream is null there; a sweep wants no numbers, only to end.
inline bool is_stream(cudaStream_t) {
  return true;
}
inline bool skips_products() {
  return std::getenv("SOFTWARE_GPU_SKIP") != nullptr;
}
#else
inline bool is_stream(cudaStream_t stream) {
  return stream != nullptr;
}
inline bool skips_products() {
  return false;
}
#endif

inline double load(const void* data, cudaDataType type, int64_t i) {
  switch (type) {
    case CUDA_R_64F: return static_cast<const double*>(data)[i];
    case CUDA_R_32F: return static_cast<const float*>(data)[i];
    case CUDA_R_16F: return __half2float(static_cast<const __half*>(data)[i]);
    case CUDA_R_16BF: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case CUDA_R_8I: return static_cast<const int8_t*>(data)[i];
    case CUDA_R_8F_E4M3: return float(static_cast<const __nv_fp8_e4m3*>(data)[i]);
    default: return 0;
  }
}

inline void store(void* data, cudaDataType type, int64_t i, double v) {
  switch (type) {
    case CUDA_R_64F: static_cast<double*>(data)[i] = v; break;
    case CUDA_R_32F: static_cast<float*>(data)[i] = static_cast<float>(v); break;
    case CUDA_R_16F: static_cast<__half*>(data)[i] = __float2half(static_cast<float>(v)); break;
    case CUDA_R_16BF:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(static_cast<float>(v));
      break;
    case CUDA_R_32I: static_cast<int32_t*>(data)[i] = static_cast<int32_t>(v); break;
    default: break;
  }
}

inline bool aligned(const void* p) {
  return p && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
