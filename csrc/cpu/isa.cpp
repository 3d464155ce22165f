// Which instruction set runs: the best one this CPU and its operating system offer, chosen once.
#include "isa.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>

namespace sparsekern {
namespace {

#if defined(__x86_64__)
// Every sub-feature that the flags of a unit let the compiler use, see setup.py. The builtins also
// check that the operating system saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}
// By its bit: not every compiler knows the feature by name. Registers are those of AVX2.
bool has_avxvnni() {
  unsigned int a = 0, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512bf16() {
  return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi2");
}

// A table with other products of int8 with int8.
Kernels with_vnni(Kernels k, const char* name, const DynamicKernels* dynamic) {
  k.name = name, k.dynamic = dynamic;
  return k;
}
const Kernels& avxvnni() {
  static const Kernels table = with_vnni(kernels_avx2, "avxvnni", &dynamic_kernels_avxvnni);
  return table;
}
const Kernels& avx512vnni() {
  static const Kernels table = with_vnni(kernels_avx512, "avx512vnni", &dynamic_kernels_avx512vnni);
  return table;
}

// The avx512vnni table with products of bfloat16 pairs.
const Kernels& avx512bf16() {
  static const Kernels table = [] {
    Kernels k = avx512vnni();
    k.name = "avx512bf16";
    k.pairs = &pair_kernels_avx512bf16;
    return k;
  }();
  return table;
}
#endif

const Kernels* best() {
#if defined(__x86_64__)
  if (has_avx512bf16()) return &avx512bf16();
  if (has_avx512vnni()) return &avx512vnni();
  if (has_avx512()) return &kernels_avx512;
  if (has_avxvnni()) return &avxvnni();
  if (has_avx2()) return &kernels_avx2;
#endif
  return &kernels_scalar;
}

// Zen 4 runs 512-bit operations in two halves: a load costs as much as an FMA and a store twice
// that, and its L1 cache is small (Zen 5 and AVX-512 of Intel: full width). See bench/NOTES.md.
bool halves_avx512() {
#if defined(__x86_64__) && defined(_SC_LEVEL1_DCACHE_SIZE)
  return __builtin_cpu_is("amd") && sysconf(_SC_LEVEL1_DCACHE_SIZE) <= 32 * 1024;
#else
  return false;
#endif
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) {
    k = best();
    chosen.store(k, std::memory_order_relaxed);
  }
  return *k;
}

int64_t panel_vectors() {
  static const bool narrow = halves_avx512();
  const Kernels& k = kernels();
  return narrow && k.width == 16 ? 4 : k.spmm_vectors;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names{"scalar"};
#if defined(__x86_64__)
  if (has_avx2()) names.push_back("avx2");
  if (has_avxvnni()) names.push_back("avxvnni");
  if (has_avx512()) names.push_back("avx512");
  if (has_avx512vnni()) names.push_back("avx512vnni");
  if (has_avx512bf16()) names.push_back("avx512bf16");
#endif
  return names;
}

bool set_cpu_isa(const std::string& name) {
  for (const std::string& have : available_isas()) {
    if (have != name) continue;
    const Kernels* k = &kernels_scalar;
#if defined(__x86_64__)
    if (name == "avx2") k = &kernels_avx2;
    if (name == "avxvnni") k = &avxvnni();
    if (name == "avx512") k = &kernels_avx512;
    if (name == "avx512vnni") k = &avx512vnni();
    if (name == "avx512bf16") k = &avx512bf16();
#endif
    chosen.store(k, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace sparsekern
