// A CUDA driver without a device: what Triton's launcher and the runtime beside this file ask of
// libcuda.so.1. Functions that write something are here; build.py adds the others, which return
// success and do nothing. So do the launches.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

// A function that writes something and succeeds.
#define GIVE(name, arguments, ...) \
  CUresult name arguments {        \
    __VA_ARGS__;                   \
    return CUDA_SUCCESS;           \
  }

// An H100, by the numbers that torch, Triton and the kernels' choices read.
static const int kFacts[][2] = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
    {CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},         // kHz
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},  // kHz
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
    {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 52428800},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
};

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = 1;  // most of the others say that something is supported
  for (size_t i = 0; i < sizeof kFacts / sizeof *kFacts; ++i)
    if (kFacts[i][0] == (int)attribute) *value = kFacts[i][1];
  return CUDA_SUCCESS;
}
GIVE(cuDriverGetVersion, (int* version), *version = 13000)
GIVE(cuDeviceGetCount, (int* count), *count = 1)
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
GIVE(cuDeviceGetName, (char* name, int length, CUdevice device),
     snprintf(name, length, "Software GPU"))
GIVE(cuGetErrorString, (CUresult error, const char** text),
     *text = error ? "refused by the software GPU" : "no error")
GIVE(cuGetErrorName, (CUresult error, const char** text),
     *text = error ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_SUCCESS")

// There is one context, always current; its address alone matters.
static char context;

GIVE(cuCtxGetCurrent, (CUcontext * current), *current = (CUcontext)&context)
GIVE(cuCtxGetDevice, (CUdevice * device), *device = 0)
GIVE(cuCtxGetLimit, (size_t* value, CUlimit limit), *value = 1 << 20)
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) {
  return cuCtxGetCurrent(made);
}
GIVE(cuDevicePrimaryCtxGetState, (CUdevice device, unsigned* flags, int* active), *flags = 0;
     *active = 1)

// A module is its image, a function its module: nothing is ever run.
GIVE(cuModuleLoadData, (CUmodule * module, const void* image), *module = (CUmodule)image)
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count,
                            CUjit_option* options, void** values) {
  return cuModuleLoadData(module, image);
}
GIVE(cuModuleGetFunction, (CUfunction * function, CUmodule module, const char* name),
     *function = (CUfunction)module)
GIVE(cuFuncGetModule, (CUmodule * module, CUfunction function), *module = (CUmodule)function)
GIVE(cuFuncGetAttribute, (int* value, CUfunction_attribute attribute, CUfunction function),
     *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
     if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) * value = 64)
GIVE(cuOccupancyMaxActiveClusters, (int* count, CUfunction function, const CUlaunchConfig* config),
     *count = 66)
// Triton asks for the device's address of a pointer: memory is the host's.
GIVE(cuPointerGetAttribute, (void* value, CUpointer_attribute attribute, CUdeviceptr pointer),
     *(CUdeviceptr*)value = pointer)

// The rules of the driver's manual for cuTensorMapEncodeTiled without interleaving: what breaks one
// would fail on every card.
static const char* map_fault(unsigned width, unsigned rank, const void* address,
                             const cuuint64_t* sizes, const cuuint64_t* strides,
                             const cuuint32_t* box, const cuuint32_t* steps,
                             CUtensorMapSwizzle swizzle) {
  static const unsigned kSwizzled[] = {1u << 30, 32, 64, 128};  // bytes of a row of the box
  if ((uintptr_t)address % 16) return "an address that is not aligned to 16 bytes";
  if (rank < 1 || rank > 5) return "a rank outside of 1 to 5";
  for (unsigned i = 0; i < rank; ++i) {
    if (!sizes[i] || sizes[i] > 1ull << 32) return "a size outside of 1 to 2^32";
    if (!box[i] || box[i] > 256) return "a box outside of 1 to 256";
    if (!steps[i] || steps[i] > 8) return "an element stride outside of 1 to 8";
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return "a stride that is no multiple of 16 bytes";
  }
  if (box[0] * width % 16) return "a row of the box that is no multiple of 16 bytes";
  if (swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && box[0] * width > kSwizzled[swizzle])
    return "a row of the box that is longer than its swizzle";
  return NULL;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned kWidth[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if ((unsigned)type >= sizeof kWidth / sizeof *kWidth) return CUDA_ERROR_INVALID_VALUE;
  const char* fault = map_fault(kWidth[type], rank, address, sizes, strides, box, steps, swizzle);
  if (fault) {
    fprintf(stderr, "software GPU: cuTensorMapEncodeTiled refuses %s\n", fault);
    return CUDA_ERROR_INVALID_VALUE;
  }
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char* name, void** function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* result) {
  char newer[128];
  snprintf(newer, sizeof newer, "%s_v2", name);
  void* self = dlopen("libcuda.so.1", RTLD_NOW);
  *function = self ? dlsym(self, newer) : NULL;
  if (self && !*function) *function = dlsym(self, name);
  if (result)
    *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetExportTable(const void** table, const CUuuid* id) {
  *table = NULL;  // private tables of NVIDIA's own libraries
  return CUDA_ERROR_NOT_FOUND;
}
