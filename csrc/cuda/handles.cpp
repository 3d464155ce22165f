// Libraries, handles, streams and memory; see handles.h.
#include "handles.h"

#include <dlfcn.h>

#include <vector>

#include "libraries.h"

namespace sparsekern {

// The tests' stand-ins have names of their own: a CUDA torch has loaded the libraries already.
#ifdef SPARSEKERN_EMULATED
constexpr auto kCusparse = "libcusparse_stand_in.so", kCusparseLt = "libcusparseLt_stand_in.so";
#else
constexpr auto kCusparse = "libcusparse.so.12", kCusparseLt = "libcusparseLt.so.0";
#endif

SharedLibrary::SharedLibrary(const char* soname)
    : name_(soname), handle_(dlopen(soname, RTLD_NOW | RTLD_LOCAL)) {
  if (!handle_) error_ = dlerror();
}

void* SharedLibrary::symbol(const char* name) const {
  if (!handle_) fail("load", "the library " + name_, error_);
  void* found = dlsym(handle_, name);
  if (!found) fail("load", std::string(name) + " in " + name_, "a version without it");
  return found;
}

const Cusparse& cusparse() {
  static const Cusparse functions = [] {
    const SharedLibrary library(kCusparse);
    Cusparse table;
    SPARSEKERN_CUSPARSE(SPARSEKERN_LOOK_UP)
    return table;
  }();
  return functions;
}

const CusparseLt& cusparselt() {
  static const CusparseLt functions = [] {
    const SharedLibrary library(kCusparseLt);
    CusparseLt table;
    SPARSEKERN_CUSPARSELT(SPARSEKERN_LOOK_UP)
    return table;
  }();
  return functions;
}

cudaStream_t current_stream(const Tensor& like) {
  const int device = like.is_cuda() ? like.get_device_index() : 0;
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    fail("sparsekern", "a stream of CUDA device " + std::to_string(device), "none from torch");
  return static_cast<cudaStream_t>(stream);
}

namespace {

struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<std::unique_ptr<Context>>> free;
};
Pool& pool() {
  static Pool* p = new Pool;  // never destroyed: threads may end after the statics
  return *p;
}

// The contexts of one thread, given back when it ends.
struct ThreadContexts {
  std::map<int, std::unique_ptr<Context>> of;
  ~ThreadContexts() {
    std::lock_guard<std::mutex> lock(pool().mutex);
    for (auto& entry : of) pool().free[entry.first].push_back(std::move(entry.second));
  }
};

}  // namespace

Context& thread_context(const Tensor& like) {
  thread_local ThreadContexts mine;
  const int device = like.is_cuda() ? like.get_device_index() : 0;
  std::unique_ptr<Context>& slot = mine.of[device];
  if (slot) return *slot;
  std::lock_guard<std::mutex> lock(pool().mutex);
  auto& free = pool().free[device];
  if (free.empty()) {
    slot = std::make_unique<Context>();
    slot->device = device;
  } else {
    slot = std::move(free.back());
    free.pop_back();
  }
  return *slot;
}

cusparseHandle_t sparse_handle(const Tensor& like) {
  Context& context = thread_context(like);
  if (!context.sparse)
    check_status("cusparse", "cusparseCreate", cusparse().cusparseCreate(&context.sparse));
  check_status("cusparse", "cusparseSetStream",
               cusparse().cusparseSetStream(context.sparse, current_stream(like)));
  return context.sparse;
}

void check_status(const std::string& op, const char* call, cusparseStatus_t status) {
  if (status == CUSPARSE_STATUS_SUCCESS) return;
  fail(op, std::string(call) + " to succeed", cusparse().cusparseGetErrorName(status));
}

cudaDataType cuda_type(const std::string& op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return CUDA_R_32F;
    case ScalarType::Double: return CUDA_R_64F;
    case ScalarType::Half: return CUDA_R_16F;
    case ScalarType::BFloat16: return CUDA_R_16BF;
    case ScalarType::Char: return CUDA_R_8I;
    case ScalarType::Int: return CUDA_R_32I;
    case ScalarType::Float8_e4m3fn: return CUDA_R_8F_E4M3;
    case ScalarType::Float8_e5m2: return CUDA_R_8F_E5M2;
    default:
      fail(op, std::string(name) + " of a dtype of CUDA's sparse libraries", dtype_name(type));
  }
}

Tensor workspace(const std::string& op, const Tensor& like, size_t bytes) {
  const int64_t size = static_cast<int64_t>(bytes < 16 ? 16 : bytes);
  try {
    return torch::stable::new_empty(like, {size}, ScalarType::Byte);
  } catch (const std::exception&) {
    fail(op, std::to_string(size) + " bytes of GPU memory for the workspace", "no room for them");
  }
}

void check_library_operand(const std::string& op, const char* name, const Tensor& t,
                           const Tensor& like) {
  if (t.is_cuda() != like.is_cuda() ||
      (t.is_cuda() && t.get_device_index() != like.get_device_index()))
    fail(op, std::string(name) + " on the device of the other tensors", "another device");
  if (!t.is_contiguous()) fail(op, std::string(name) + " contiguous", "strides");
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16)
    fail(op, std::string(name) + " at an address divisible by 16", "another address");
}

}  // namespace sparsekern
