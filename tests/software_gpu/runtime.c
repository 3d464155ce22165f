// A CUDA runtime whose device is the host: memory is host memory, a stream is finished as soon as
// it is asked, events are the clock's. Functions that write something are here; build.py adds the
// others, which return success and do nothing. So do the launches: aten.cpp computes what torch
// would launch, Triton's interpreter and tests/stubbed/stubs compute our kernels.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if CUDART_VERSION < 13000
#error "expected the headers of CUDA 13"
#endif

#define API cudaError_t CUDARTAPI
// A function that writes something and succeeds.
#define GIVE(name, arguments, ...) \
  API name arguments {             \
    __VA_ARGS__;                   \
    return cudaSuccess;            \
  }

static const size_t kMemory = 79ull << 30;

GIVE(cudaGetDeviceCount, (int* count), *count = 1)
GIVE(cudaGetDevice, (int* device), *device = 0)
API cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
GIVE(cudaDriverGetVersion, (int* version), *version = CUDART_VERSION)
GIVE(cudaRuntimeGetVersion, (int* version), *version = CUDART_VERSION)
API cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device);  // both count alike
  return cudaSuccess;
}
static int fact(enum cudaDeviceAttr attribute) {
  int value;
  cudaDeviceGetAttribute(&value, attribute, 0);
  return value;
}
API cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  cuDeviceGetName(p->name, sizeof p->name, device);
  memset(p->uuid.bytes, 1, sizeof p->uuid.bytes);
  p->major = fact(cudaDevAttrComputeCapabilityMajor);
  p->minor = fact(cudaDevAttrComputeCapabilityMinor);
  p->totalGlobalMem = kMemory;
  p->totalConstMem = fact(cudaDevAttrTotalConstantMemory);
  p->sharedMemPerBlock = fact(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = fact(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = fact(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = fact(cudaDevAttrReservedSharedMemoryPerBlock);
  p->regsPerBlock = p->regsPerMultiprocessor = fact(cudaDevAttrMaxRegistersPerBlock);
  p->warpSize = fact(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = fact(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = fact(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->multiProcessorCount = fact(cudaDevAttrMultiProcessorCount);
  p->l2CacheSize = fact(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = fact(cudaDevAttrGlobalMemoryBusWidth);
  p->textureAlignment = p->surfaceAlignment = fact(cudaDevAttrTextureAlignment);
  p->asyncEngineCount = fact(cudaDevAttrAsyncEngineCount);
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = 1;
  for (int i = 0; i < 3; ++i) {
    p->maxThreadsDim[i] = fact(cudaDevAttrMaxBlockDimX + i);
    p->maxGridSize[i] = fact(cudaDevAttrMaxGridDimX + i);
  }
  return cudaSuccess;
}
GIVE(cudaDeviceCanAccessPeer, (int* can, int device, int peer), *can = 0)
GIVE(cudaDeviceGetPCIBusId, (char* id, int length, int device),
     snprintf(id, length, "0000:00:00.0"))
const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  return error ? "refused by the software GPU" : "no error";
}
const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
  return error ? "cudaErrorInvalidValue" : "cudaSuccess";
}

// Memory

static cudaError_t allocate(void** p, size_t alignment, size_t bytes) {
  *p = bytes ? aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment) : NULL;
  return *p || !bytes ? cudaSuccess : cudaErrorMemoryAllocation;
}
API cudaMalloc(void** p, size_t bytes) {
  return allocate(p, 2 << 20, bytes);  // a page of the device, which torch's allocator divides
}
GIVE(cudaFree, (void* p), free(p))
API cudaMallocHost(void** p, size_t bytes) {
  return allocate(p, 4096, bytes);
}
API cudaHostAlloc(void** p, size_t bytes, unsigned flags) {
  return allocate(p, 4096, bytes);
}
GIVE(cudaFreeHost, (void* p), free(p))
GIVE(cudaMemGetInfo, (size_t* unused, size_t* total), *unused = *total = kMemory)
GIVE(cudaMemcpy, (void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind),
     memmove(to, from, bytes))
API cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind,
                    cudaStream_t stream) {
  return cudaMemcpy(to, from, bytes, kind);
}
API cudaMemcpyPeerAsync(void* to, int device, const void* from, int peer, size_t bytes,
                        cudaStream_t stream) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
API cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                      size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t i = 0; i < height; ++i)
    memmove((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
  return cudaSuccess;
}
GIVE(cudaMemset, (void* p, int value, size_t bytes), memset(p, value, bytes))
API cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset(p, value, bytes);
}
API cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* p) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeDevice;
  found->devicePointer = found->hostPointer = (void*)p;
  return cudaSuccess;
}
API cudaGetSymbolAddress(void** p, const void* symbol) {
  static char variable[1 << 16];  // of kernels that never run
  *p = variable;
  return cudaSuccess;
}

// Streams and graphs. A capture runs what it captures; a replay does nothing.

static __thread int capturing;

API cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  static long made = 0x1000;
  *stream = (cudaStream_t)__atomic_add_fetch(&made, 16, __ATOMIC_RELAXED);
  return cudaSuccess;
}
API cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
API cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
GIVE(cudaDeviceGetStreamPriorityRange, (int* least, int* greatest), *least = 0; *greatest = -5)
GIVE(cudaStreamGetPriority, (cudaStream_t stream, int* priority), *priority = 0)
GIVE(cudaStreamIsCapturing, (cudaStream_t stream, enum cudaStreamCaptureStatus* status),
     *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone)
API cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status,
                             unsigned long long* id, cudaGraph_t* graph,
                             const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                             size_t* count) {
  if (id) *id = capturing;
  if (graph) *graph = NULL;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
GIVE(cudaStreamBeginCapture, (cudaStream_t stream, enum cudaStreamCaptureMode mode), capturing = 1)
API cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  capturing = 0;
  *graph = (cudaGraph_t)&kMemory;  // any address: nobody reads it
  return cudaSuccess;
}
API cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = 1;  // torch warns of an empty graph
  return cudaSuccess;
}
GIVE(cudaGraphInstantiate, (cudaGraphExec_t * made, cudaGraph_t graph, unsigned long long flags),
     *made = (cudaGraphExec_t)&kMemory)
API cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                  unsigned long long flags) {
  return cudaGraphInstantiate(made, graph, flags);
}

// Events: an event is the time of its record in milliseconds.

GIVE(cudaEventCreate, (cudaEvent_t * event), *event = (cudaEvent_t)calloc(1, sizeof(double)))
API cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return cudaEventCreate(event);
}
API cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(double*)event = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  return cudaSuccess;
}
API cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
API cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  const double passed = *(double*)end - *(double*)start;
  *ms = passed < 1e-3 ? 1e-3f : (float)passed;  // something is divided by it
  return cudaSuccess;
}
GIVE(cudaEventDestroy, (cudaEvent_t event), free(event))

// Kernels

API cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->binaryVersion = found->ptxVersion = 90;
  return cudaSuccess;
}
GIVE(cudaOccupancyMaxActiveBlocksPerMultiprocessor,
     (int* blocks, const void* function, int threads, size_t shared), *blocks = 2)
GIVE(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags,
     (int* blocks, const void* function, int threads, size_t shared, unsigned flags), *blocks = 2)
GIVE(cudaGetDriverEntryPointByVersion,
     (const char* name, void** function, unsigned version, unsigned long long flags,
      enum cudaDriverEntryPointQueryResult* result),
     cuGetProcAddress(name, function, version, flags, NULL);
     if (result) * result = *function ? cudaDriverEntryPointSuccess
                                      : cudaDriverEntryPointSymbolNotFound)
