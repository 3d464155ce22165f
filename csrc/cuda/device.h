// The few instructions and intrinsics that the kernels are written over. Compiled by nvcc they are
// PTX; the tests compile the same kernels as plain C++ over a header that emulates a block of
// threads, so that the kernels run where there is no GPU.
#pragma once
#ifdef SPARSEKERN_EMULATED
#include "emulated.h"
#else
#include <cuda_runtime.h>

#include <cstdint>

#define SPARSEKERN_DEVICE __device__ __forceinline__
#define SPARSEKERN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace sparsekern {
namespace gpu {

struct Words {  // 16 bytes, in registers
  uint32_t w[4];
};

struct Grid {
  unsigned x, y, z;
};

SPARSEKERN_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}
SPARSEKERN_DEVICE Grid block() {
  return {blockIdx.x, blockIdx.y, blockIdx.z};
}
SPARSEKERN_DEVICE unsigned char* shared() {
  extern __shared__ uint4 buffer[];
  return reinterpret_cast<unsigned char*>(buffer);
}
SPARSEKERN_DEVICE void barrier() {
  __syncthreads();
}
SPARSEKERN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Blocks of a cluster, of Hopper and later: all meet, and one reads the shared memory of another.
SPARSEKERN_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}
// Read once: kept out of L1, where it would only push out what is read again.
SPARSEKERN_DEVICE Words load_stream(const void* p) {
  Words r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p));
  return r;
}

SPARSEKERN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The float of another block at the place of one of our own.
SPARSEKERN_DEVICE float load_remote(const float* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t at;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
#else
  return *mine;
#endif
}

// Sixteen bytes of shared memory, of which the first `bytes` come from memory and the others are 0.
SPARSEKERN_DEVICE void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes)
               : "memory");
}
SPARSEKERN_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `kLeft` of the groups that this thread has committed are under way.
template <int kLeft>
SPARSEKERN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16 bits; lane l names row l % 8 of matrix l / 8 in shared memory.
SPARSEKERN_DEVICE Words load_matrices(const void* row) {
  Words r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "r"(shared_address(row))
               : "memory");
  return r;
}

#define SPARSEKERN_MMA_SP(type)                                                                \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type     \
               ".f32"                                                                          \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3},"    \
               " %12, %13;"                                                                    \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
               : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b.w[0]), "r"(b.w[1]), \
                 "r"(b.w[2]), "r"(b.w[3]), "r"(metadata), "n"(kSelector))

struct Bfloat16 {
  // Of a word that holds two numbers, the one in its low or high half.
  static SPARSEKERN_DEVICE float low(uint32_t word) { return __uint_as_float(word << 16); }
  static SPARSEKERN_DEVICE float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  static SPARSEKERN_DEVICE uint16_t round(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
  // c (16 x 8) += a (16 x 32, 2:4) b (32 x 8).
  template <int kSelector>
  static SPARSEKERN_DEVICE void mma_sp(float (&c)[4], const Words& a, const Words& b,
                                       uint32_t metadata) {
    SPARSEKERN_MMA_SP("bf16");
  }
};

struct Float16 {
  static SPARSEKERN_DEVICE float low(uint32_t word) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(word));
    return value;
  }
  static SPARSEKERN_DEVICE float high(uint32_t word) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(word));
    return value;
  }
  static SPARSEKERN_DEVICE uint16_t round(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
  template <int kSelector>
  static SPARSEKERN_DEVICE void mma_sp(float (&c)[4], const Words& a, const Words& b,
                                       uint32_t metadata) {
    SPARSEKERN_MMA_SP("f16");
  }
};

// Launches a kernel on a device and stream of torch; what went wrong, or null. The `cluster` blocks
// that differ in y alone form a cluster.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), Grid grid, int threads, int shared_bytes, int device,
                   void* stream, Arguments arguments, int cluster = 1) {
  // This runtime is linked into the module and is another one than torch's; they share the driver.
  cudaError_t status = cudaSetDevice(device);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (status == cudaSuccess && shared_bytes > 48 * 1024)
    status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = attribute.val.clusterDim.z = 1;
  attribute.val.clusterDim.y = static_cast<unsigned>(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  void* list[] = {&arguments};
  if (status == cudaSuccess) status = cudaLaunchKernelExC(&config, function, list);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace gpu
}  // namespace sparsekern
#endif
