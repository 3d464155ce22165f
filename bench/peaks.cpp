// What one core can do at most: fused multiply-adds from registers, with one operand from the L1
// and the L2 cache, and loads. Vectors are the compiler's own, as wide as the flags allow, so one
// source serves every instruction set. Prints one JSON object; arguments: threads, seconds per
// measurement.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
typedef float Vec __attribute__((vector_size(kBytes)));
typedef int32_t IntVec __attribute__((vector_size(kBytes)));

using Clock = std::chrono::steady_clock;

static Vec broadcast(float x) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
}

// Keeps a result alive without storing it.
template <class V>
static void use(V v) {
  asm volatile("" : : "m"(v) : "memory");
}

// A buffer whose every page is real: pages never written all map to one page of zeros, which would
// stay in the cache whatever the size of the buffer.
struct Buffer {
  size_t bytes;
  char* data;
  explicit Buffer(size_t n)
      : bytes(n / 4096 * 4096), data(static_cast<char*>(std::aligned_alloc(4096, bytes))) {
    if (!data) std::abort();
    float* f = reinterpret_cast<float*>(data);
    for (size_t i = 0; i < bytes / 4; ++i) f[i] = static_cast<float>(i % 97) / 97.f - 0.5f;
  }
  ~Buffer() { std::free(data); }
};

// Stops the compiler from skipping a pass because nothing in memory changed.
static void new_pass() {
  asm volatile("" : : : "memory");
}

// Enough passes over a buffer that reading the clock costs nothing beside them.
static size_t passes(const Buffer& buffer) {
  return 1 + (size_t{4} << 20) / buffer.bytes;
}

// 12 independent sums hide a latency of 4 or 5 cycles on two units, and leave room in 16 registers.
// Returns floating-point operations.
static double fma_registers(const Buffer&) {
  constexpr int kSums = 12, kTimes = 20000;
  Vec sum[kSums];
  const Vec a = broadcast(0.5f), b = broadcast(0.25f);
  for (int j = 0; j < kSums; ++j) sum[j] = broadcast(static_cast<float>(j));
  for (int i = 0; i < kTimes; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) sum[j] = sum[j] * a + b;
  }
  for (int j = 0; j < kSums; ++j) use(sum[j]);
  return 2.0 * kLanes * kSums * kTimes;
}

// Every FMA reads one operand from the buffer: eight sums, as a sparse row over a panel has them.
static double fma_memory(const Buffer& buffer) {
  constexpr int kSums = 8;
  Vec sum[kSums];
  const Vec w = broadcast(0.25f);
  for (int j = 0; j < kSums; ++j) sum[j] = broadcast(0.f);
  const Vec* p = reinterpret_cast<const Vec*>(buffer.data);
  const size_t n = buffer.bytes / kBytes / kSums * kSums, times = passes(buffer);
  for (size_t pass = 0; pass < times; ++pass) {
    new_pass();
    for (size_t i = 0; i < n; i += kSums) {
#pragma GCC unroll 8
      for (int j = 0; j < kSums; ++j) sum[j] = w * p[i + j] + sum[j];
    }
  }
  for (int j = 0; j < kSums; ++j) use(sum[j]);
  return 2.0 * kLanes * static_cast<double>(n * times);
}

// Bytes loaded. Bitwise or, which has more execution units than any floating-point operation.
static double load(const Buffer& buffer) {
  constexpr int kSums = 8;
  IntVec any[kSums] = {};
  const IntVec* p = reinterpret_cast<const IntVec*>(buffer.data);
  const size_t n = buffer.bytes / kBytes / kSums * kSums, times = passes(buffer);
  for (size_t pass = 0; pass < times; ++pass) {
    new_pass();
    for (size_t i = 0; i < n; i += kSums) {
#pragma GCC unroll 8
      for (int j = 0; j < kSums; ++j) any[j] |= p[i + j];
    }
  }
  for (int j = 0; j < kSums; ++j) use(any[j]);
  return static_cast<double>(kBytes) * static_cast<double>(n * times);
}

// Units per second: the best of five windows, because a limit is what the machine does undisturbed.
template <class F>
static double best_rate(F work, const Buffer& buffer, double seconds) {
  double best = 0;
  work(buffer);
  for (int window = 0; window < 5; ++window) {
    double done = 0, elapsed = 0;
    const auto start = Clock::now();
    do {
      done += work(buffer);
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    } while (elapsed < seconds / 5);
    if (done / elapsed > best) best = done / elapsed;
  }
  return best;
}

// Sum over threads that start together, each with a buffer of its own.
template <class F>
static double together(F work, size_t bytes, int threads, double seconds) {
  std::vector<std::thread> pool;
  std::vector<double> rate(threads);
  std::atomic<int> ready{0};
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      const Buffer buffer(bytes);
      for (++ready; ready < threads;) std::this_thread::yield();
      rate[t] = best_rate(work, buffer, seconds);
    });
  double sum = 0;
  for (int t = 0; t < threads; ++t) {
    pool[t].join();
    sum += rate[t];
  }
  return sum;
}

static size_t cache_size(int name, size_t otherwise) {
  const long bytes = name < 0 ? 0 : sysconf(name);
  return bytes > 0 ? static_cast<size_t>(bytes) : otherwise;
}

int main(int argc, char** argv) {
  if (argc != 3 || std::atoi(argv[1]) < 1 || !(std::atof(argv[2]) > 0)) {
    std::fprintf(stderr, "peaks: expected arguments THREADS SECONDS, both above 0\n");
    return 2;
  }
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[2]);
#ifdef _SC_LEVEL1_DCACHE_SIZE
  const size_t l1 = cache_size(_SC_LEVEL1_DCACHE_SIZE, 32768),
               l2 = cache_size(_SC_LEVEL2_CACHE_SIZE, 524288);
#else
  const size_t l1 = cache_size(-1, 32768), l2 = cache_size(-1, 524288);
#endif
  const size_t half_l1 = l1 / 2, half_l2 = l2 / 2, memory = size_t{256} << 20;
  std::printf(
      "{\"threads\": %d, \"vector_bits\": %d, \"l1_buffer_bytes\": %zu, \"l2_buffer_bytes\": %zu, "
      "\"memory_buffer_bytes\": %zu, ",
      threads, kBytes * 8, half_l1, half_l2, memory);
  std::printf("\"fma_gflops\": %.1f, ", together(fma_registers, 4096, threads, seconds) / 1e9);
  std::printf("\"fma_l1_gflops\": %.1f, ", together(fma_memory, half_l1, threads, seconds) / 1e9);
  std::printf("\"fma_l2_gflops\": %.1f, ", together(fma_memory, half_l2, threads, seconds) / 1e9);
  std::printf("\"load_l1_gb_s\": %.1f, ", together(load, half_l1, threads, seconds) / 1e9);
  std::printf("\"load_l2_gb_s\": %.1f, ", together(load, half_l2, threads, seconds) / 1e9);
  std::printf("\"load_memory_gb_s\": %.1f}\n", together(load, memory, threads, seconds) / 1e9);
  return 0;
}
