// What every call into the NVIDIA libraries needs: the library itself, opened at run time; a handle
// per device and thread; the stream that torch works on; memory from torch's allocator.
#pragma once
#ifndef USE_CUDA
#define USE_CUDA  // declares the stream of torch's stable ABI
#endif
#include <cuda_runtime_api.h>
#include <cusparse.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "../check.h"

namespace sparsekern {

// A library opened by its file name: what torch has loaded already is found again. The package
// thereby imports on machines without it, and no second copy comes into the process.
class SharedLibrary {
 public:
  explicit SharedLibrary(const char* soname);
  // Throws, naming the library, when it is missing or too old to have the function.
  void* symbol(const char* name) const;

 private:
  std::string name_, error_;
  void* handle_;
};

// Makes the device of a tensor current for a scope. A tensor of the CPU needs nothing; the tests
// run this code on such ones, with stand-ins for the libraries.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) {
    if (t.is_cuda()) guard_.emplace(t.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The stream torch uses now on the device of a tensor, in this thread.
cudaStream_t current_stream(const Tensor& like);

// What a thread keeps per device. Threads must not share a handle (the stream is a state of it, and
// cuSPARSELt fails with internal errors); handles of threads that ended are used again.
struct Context {
  int device = 0;
  cusparseHandle_t sparse = nullptr;
  std::shared_ptr<void> lt;  // cusparselt.cpp keeps its handle and plans here
};
Context& thread_context(const Tensor& like);

// The cuSPARSE handle of this thread, set to torch's stream.
cusparseHandle_t sparse_handle(const Tensor& like);

// Throws "op: <call> failed with <name of the status>" unless it succeeded.
void check_status(const std::string& op, const char* call, cusparseStatus_t status);

cudaDataType cuda_type(const std::string& op, const char* name, ScalarType type);

// Bytes on the device of `like` from torch's caching allocator, at least 16 so that there is an
// address. Throws an error that names the op and the size when there is no room.
Tensor workspace(const std::string& op, const Tensor& like, size_t bytes);

// Refuses an operand that is not contiguous, not on the device of `like`, or not 16-byte aligned:
// the libraries load 16 bytes at a time and fault on others.
void check_library_operand(const std::string& op, const char* name, const Tensor& t,
                           const Tensor& like);

// Objects that Python refers to by number. Never destroyed as a whole: at exit the driver may be
// gone before us.
template <class T>
class Registry {
 public:
  int64_t add(std::shared_ptr<T> item) {
    std::lock_guard<std::mutex> lock(mutex_);
    items_[++last_] = std::move(item);
    return last_;
  }
  std::shared_ptr<T> at(const std::string& op, int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = items_.find(number);
    if (found == items_.end()) fail(op, "the number of a live plan", std::to_string(number));
    return found->second;
  }
  bool erase(int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_.erase(number) > 0;
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<T>> items_;
  int64_t last_ = 0;
};

// Frees a plan of cusparse.cpp; false when the number is unknown.
bool free_plan(int64_t number);

}  // namespace sparsekern
