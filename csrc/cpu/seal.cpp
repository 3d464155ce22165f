#include "seal.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace sparsekern {
namespace {

constexpr int64_t kUncounted = -1;  // tensors of inference mode have no version
constexpr int64_t kSealEnd = kSealWord + 4;
static_assert(kSealEnd <= kPlanSpmv && kPlanSpmv < kPlanHeader, "the header holds both");

int64_t version(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  if (torch_call_dispatcher("aten::_version", "", stack.data(), TORCH_ABI_VERSION))
    return kUncounted;
  return torch::stable::detail::to<int64_t>(stack[0]);
}

// Four independent chains of multiplications, so that reading memory is what it waits for. No
// protection against somebody who wants to deceive: such a person has the process already.
uint64_t fingerprint(const void* data, size_t bytes, uint64_t seed) {
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15ull;
  const auto mix = [](uint64_t h, uint64_t word) {
    h = (h ^ word) * kFactor;
    return h ^ (h >> 32);
  };
  const char* p = static_cast<const char*>(data);
  uint64_t lane[4] = {seed, seed + 1, seed + 2, seed + 3}, word[4];
  size_t left = bytes;
  for (; left >= sizeof word; left -= sizeof word, p += sizeof word) {
    std::memcpy(word, p, sizeof word);
    for (int k = 0; k < 4; ++k) lane[k] = mix(lane[k], word[k]);
  }
  std::memset(word, 0, sizeof word);
  std::memcpy(word, p, left);
  for (int k = 0; k < 4; ++k) lane[0] = mix(mix(lane[0], word[k]), lane[k]);
  return mix(lane[0], bytes);
}

size_t bytes_of(const Tensor& t) {
  return t.numel() * (t.scalar_type() == ScalarType::Byte ? 1 : sizeof(int32_t));
}

uint64_t fingerprint(Indices indices) {
  uint64_t h = 0;
  for (const Tensor& t : indices) h = fingerprint(t.const_data_ptr(), bytes_of(t), h + 1);
  return h;
}

uint64_t stored(const int32_t* plan, int64_t word) {
  uint64_t h;
  std::memcpy(&h, plan + word, sizeof h);
  return h;
}

// Of all words but its own.
uint64_t own_fingerprint(const int32_t* plan, int64_t size) {
  const uint64_t head = fingerprint(plan, (kSealEnd - 2) * sizeof(int32_t), 0);
  return fingerprint(plan + kSealEnd, (size - kSealEnd) * sizeof(int32_t), head);
}

// The memory of a tensor, kept alive; whoever gives the tensor other memory (`t.data = other`,
// which torch does not count) leaves this one alone.
Tensor same_memory(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Index {
  Tensor memory;
  const void* data;  // where it began: a storage can be resized under its tensors
  int64_t version;
};

// What is known of a plan that lives where it was made.
struct Known {
  int64_t size, version;
  std::vector<Index> indices;
};

Known known_of(const Tensor& plan, Indices indices) {
  Known known{plan.numel(), version(plan), {}};
  for (const Tensor& t : indices)
    known.indices.push_back({same_memory(t), t.const_data_ptr(), version(t)});
  return known;
}

class Registry {
 public:
  void add(const void* plan, Known known) {
    std::unique_lock lock(mutex_);
    plans_.insert_or_assign(plan, std::move(known));
  }

  // After a look at every word: an average of a model copies all buffers onto themselves, say.
  void renew(const Tensor& plan, Indices indices) {
    if (!counted(plan)) return;
    Known now = known_of(plan, indices);  // of the old ones it lets go without the lock
    std::unique_lock lock(mutex_);
    const auto found = plans_.find(plan.const_data_ptr());
    if (found != plans_.end()) std::swap(found->second, now);
    lock.unlock();
  }

  void forget(const void* plan) {
    Known last{};
    std::unique_lock lock(mutex_);
    const auto found = plans_.find(plan);
    if (found == plans_.end()) return;
    std::swap(found->second, last);
    plans_.erase(found);
    lock.unlock();
  }

  // Whether nothing has changed since the plan was made of these indices.
  bool vouches(const Tensor& plan, Indices indices) {
    std::shared_lock lock(mutex_);
    const auto found = plans_.find(plan.const_data_ptr());
    if (found == plans_.end()) return false;
    const Known& known = found->second;
    if (known.size != plan.numel() || known.indices.size() != indices.size()) return false;
    size_t i = 0;
    for (const Tensor& t : indices) {
      const Index& was = known.indices[i++];
      if (t.const_data_ptr() != was.data || t.numel() != was.memory.numel() ||
          was.version == kUncounted || version(t) != was.version)
        return false;
    }
    return known.version != kUncounted && version(plan) == known.version;
  }

 private:
  // Whether the plan lives where it was made, and torch counts the versions of all (asking for one
  // that is not counted takes milliseconds).
  bool counted(const Tensor& plan) {
    std::shared_lock lock(mutex_);
    const auto found = plans_.find(plan.const_data_ptr());
    if (found == plans_.end() || found->second.version == kUncounted) return false;
    for (const Index& index : found->second.indices)
      if (index.version == kUncounted) return false;
    return true;
  }

  std::shared_mutex mutex_;
  std::unordered_map<const void*, Known> plans_;
};

Registry& registry() {
  static Registry* const all = new Registry;  // outlives tensors that Python keeps to the end
  return *all;
}

struct Release {
  void operator()(void* data) const {
    registry().forget(data);
    std::free(data);
  }
};

}  // namespace

Tensor sealed_plan(std::vector<int32_t> words, Indices indices) {
  const uint64_t of_indices = fingerprint(indices);
  std::memcpy(words.data() + kSealWord, &of_indices, sizeof of_indices);
  const int64_t size = static_cast<int64_t>(words.size());
  const uint64_t of_plan = own_fingerprint(words.data(), size);
  std::memcpy(words.data() + kSealWord + 2, &of_plan, sizeof of_plan);
  const size_t bytes = (words.size() * sizeof(int32_t) + 63) / 64 * 64;
  void* data = std::aligned_alloc(64, bytes);
  if (!data) fail("sparsekern", "memory for a plan", "none");
  std::memcpy(data, words.data(), words.size() * sizeof(int32_t));
  const int64_t stride = 1;
  const Tensor plan = torch::stable::from_blob(
      data, {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Int, static_cast<torch::stable::DeleterFnPtr>([](void* p) { Release()(p); }));
  registry().add(data, known_of(plan, indices));
  return plan;
}

Tensor check_sealed(const std::string& op, const char* name, const char* maker, const Tensor& plan,
                    Indices indices) {
  check_cpu(op, name, plan);
  check_dtype(op, name, plan, {ScalarType::Int});
  check_dim(op, name, plan, 1);
  for (const Tensor& t : indices)
    if (t.numel() > 0 && !t.const_data_ptr()) fail(op, "indices with data", "emptied storage");
  const Tensor packed = plan.is_contiguous() ? plan : torch::stable::contiguous(plan);
  if (registry().vouches(packed, indices)) return packed;
  const int32_t* data = packed.const_data_ptr<int32_t>();
  const std::string wanted = std::string(name) + " made by " + maker + " for this pattern";
  if (packed.numel() < kPlanHeader) fail(op, wanted, "shape " + shape_of(plan));
  if (stored(data, kSealWord + 2) != own_fingerprint(data, packed.numel()))
    fail(op, wanted, "a plan whose words were changed, or none");
  if (stored(data, kSealWord) != fingerprint(indices))
    fail(op, wanted, "a plan of another pattern, or indices that were changed since");
  registry().renew(packed, indices);
  return packed;
}

bool same_header(const Header& want, const int32_t* have) {
  return std::equal(want.begin(), want.begin() + kSealWord, have) &&
         std::equal(want.begin() + kSealEnd, want.begin() + kPlanHeader, have + kSealEnd);
}

}  // namespace sparsekern
