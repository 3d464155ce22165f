// A block of threads on the CPU, for kernels written over csrc/cuda/device.h: every thread is a
// fiber that runs until it meets others, at a barrier, a shuffle or a tensor-core product. What a
// GPU leaves open is made to hurt: fresh shared memory and what cp.async has not brought yet are
// NaN, every other block runs its threads backwards, unaligned accesses and lanes that disagree on
// what to do together end the launch with an error.
//
// The products follow the tables of the PTX ISA (warp-level matrix instructions, mma.sp and sparse
// matrix storage), not the code that packs weights.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define SPARSEKERN_DEVICE inline
#define SPARSEKERN_KERNEL(threads, blocks) void

namespace sparsekern {
namespace gpu {

struct Words {
  uint32_t w[4];
};
struct Grid {
  unsigned x, y, z;
};

struct Copy {
  void* to;
  uint8_t bytes[16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  bool done = false;
  const uint64_t* waits_for = nullptr;  // a counter that has to move on from `seen`
  uint64_t seen = 0;
  std::deque<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;
};

// Threads that do something together: a warp or the block.
struct Party {
  int arrived = 0;
  uint64_t round = 0;
  const char* doing = nullptr;
  Words a[32], b[32], out[32];
  float c[32][4];
  uint32_t metadata[32];
  const void* row[32];
  float value[32], given[32];
  int mask[32];
};

struct Block {
  Party party;
  std::vector<uint8_t> memory;
  int running = 0;
  uint8_t* shared() {
    return memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  }
};

// The blocks of a cluster run together, most often one block alone.
struct Emulator {
  static constexpr int kStack = 128 * 1024;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Party> warps;
  std::vector<Block> blocks;
  Party cluster;
  Grid first{};  // the first block of them; the others follow in y
  int threads = 0, current = 0;
  const char* fault = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;

  Block& mine() { return blocks[current / threads]; }
};

inline Emulator& emulator() {
  static Emulator e;
  return e;
}

[[noreturn]] inline void fail_launch(const char* why) {
  Emulator& e = emulator();
  e.fault = why;
  setcontext(&e.scheduler);
  __builtin_unreachable();
}

inline void expect(bool condition, const char* why) {
  if (!condition) fail_launch(why);
}

template <class F>
void together(Party& party, int size, const char* doing, F&& last) {
  Emulator& e = emulator();
  expect(party.arrived == 0 || party.doing == doing, "threads that do different things together");
  party.doing = doing;
  if (++party.arrived == size) {
    last();
    party.arrived = 0;
    ++party.round;
    return;
  }
  Fiber& me = e.fibers[e.current];
  me.waits_for = &party.round;
  me.seen = party.round;
  swapcontext(&me.context, &e.scheduler);
}

inline int thread() {
  return emulator().current % emulator().threads;
}
inline Grid block() {
  const Emulator& e = emulator();
  return {e.first.x, e.first.y + static_cast<unsigned>(e.current / e.threads), e.first.z};
}
inline unsigned char* shared() {
  return emulator().mine().shared();
}
inline Party& my_warp() {
  return emulator().warps[emulator().current / 32];
}
inline void barrier() {
  Emulator& e = emulator();
  together(e.mine().party, e.threads, "barrier", [] {});
}
inline void cluster_barrier() {
  Emulator& e = emulator();
  together(e.cluster, static_cast<int>(e.fibers.size()), "barrier of a cluster", [] {});
}
inline float load_remote(const float* mine, int rank) {
  Emulator& e = emulator();
  expect(rank < static_cast<int>(e.blocks.size()), "no such block in the cluster");
  Block& other = e.blocks[rank];
  expect(other.running > 0, "shared memory of a block that has ended");
  float value;
  std::memcpy(&value, other.shared() + (reinterpret_cast<const uint8_t*>(mine) - shared()), 4);
  return value;
}

inline float shuffle_xor(float value, int mask) {
  Party& w = my_warp();
  const int lane = thread() % 32;
  w.value[lane] = value;
  w.mask[lane] = mask;
  together(w, 32, "shuffle", [&w] {
    for (int i = 0; i < 32; ++i) w.given[i] = w.value[i ^ w.mask[i]];
  });
  return w.given[lane];
}

inline void check_aligned(const void* p) {
  expect(reinterpret_cast<uintptr_t>(p) % 16 == 0, "an access that is not aligned to 16 bytes");
}

inline Words load_stream(const void* p) {
  check_aligned(p);
  Words r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

inline void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to);
  check_aligned(from);
  Copy copy{to, {}};
  std::memcpy(copy.bytes, from, bytes);
  std::memset(to, 0xff, 16);  // whatever comes before the wait must not matter
  Emulator& e = emulator();
  e.fibers[e.current].open.push_back(copy);
}
inline void copy_commit() {
  Emulator& e = emulator();
  Fiber& me = e.fibers[e.current];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
template <int kLeft>
void copy_wait() {
  Emulator& e = emulator();
  Fiber& me = e.fibers[e.current];
  for (; me.groups.size() > kLeft; me.groups.pop_front())
    for (const Copy& c : me.groups.front()) std::memcpy(c.to, c.bytes, 16);
}

inline Words load_matrices(const void* row) {
  check_aligned(row);
  Party& w = my_warp();
  w.row[thread() % 32] = row;
  together(w, 32, "ldmatrix", [&w] {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&w.out[lane].w[matrix],
                    static_cast<const uint8_t*>(w.row[matrix * 8 + lane / 4]) + lane % 4 * 4, 4);
  });
  return w.out[thread() % 32];
}

// The number i of the eight in four registers.
template <class T>
float number(const Words& words, int i) {
  return i % 2 ? T::high(words.w[i / 2]) : T::low(words.w[i / 2]);
}

// mma.sp::ordered_metadata.m16n8k32 for 16-bit types. Of each four columns of A two are stored; the
// metadata of a row are 4 bits for each four columns, the place of the first in the low two. Of a
// group of four lanes the two that the selector names hold them, columns 0 to 15 and 16 to 31, the
// row of the group in the low half and the one eight further on in the high one.
template <class T>
void multiply_sparse(Party& w, int selector) {
  float a[16][32] = {}, b[32][8];
  bool stored[16][32] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int first = i < 4 ? in_group * 4 : in_group * 4 + 16;
      const uint32_t held = w.metadata[group * 4 + selector * 2 + first / 16];
      const uint32_t bits = held >> (row >= 8 ? 16 : 0) >> (first % 16);
      const int places[2] = {static_cast<int>(bits & 3), static_cast<int>(bits >> 2 & 3)};
      expect(places[0] < places[1], "metadata that are not ordered");
      a[row][first + places[i % 2]] = number<T>(w.a[lane], i);
      stored[row][first + places[i % 2]] = true;
      b[in_group * 2 + i % 2 + i / 2 * 8][group] = number<T>(w.b[lane], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k)
        if (stored[row][k]) w.c[lane][i] += a[row][k] * b[k][col];
    }
}

template <class T, int kSelector>
void mma_sp_in_warp(float (&c)[4], const Words& a, const Words& b, uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "m16n8k32 has two pairs of lanes in four");
  Party& w = my_warp();
  const int lane = thread() % 32;
  w.a[lane] = a;
  w.b[lane] = b;
  w.metadata[lane] = metadata;
  std::memcpy(w.c[lane], c, sizeof c);
  together(w, 32, kSelector ? "mma.sp 1" : "mma.sp 0", [&w] { multiply_sparse<T>(w, kSelector); });
  std::memcpy(c, w.c[lane], sizeof c);
}

struct Bfloat16 {
  static float low(uint32_t word) { return high(word << 16); }
  static float high(uint32_t word) {
    word &= 0xffff0000u;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  static uint16_t round(float value) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
  }
  template <int kSelector>
  static void mma_sp(float (&c)[4], const Words& a, const Words& b, uint32_t metadata) {
    mma_sp_in_warp<Bfloat16, kSelector>(c, a, b, metadata);
  }
};

struct Float16 {
  static float low(uint32_t word) {
    __half_raw bits;
    bits.x = static_cast<unsigned short>(word);
    return __half2float(__half(bits));
  }
  static float high(uint32_t word) { return low(word >> 16); }
  static uint16_t round(float value) {
    const __half rounded = __float2half_rn(value);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
  }
  template <int kSelector>
  static void mma_sp(float (&c)[4], const Words& a, const Words& b, uint32_t metadata) {
    mma_sp_in_warp<Float16, kSelector>(c, a, b, metadata);
  }
};

inline void start_fiber() {
  Emulator& e = emulator();
  e.body(e.argument);
  e.fibers[e.current].done = true;
  --e.mine().running;
  setcontext(&e.scheduler);
}

inline void prepare_cluster(Emulator& e, int threads, int shared_bytes, int cluster) {
  e.threads = threads;
  e.fibers.resize(threads * cluster);
  e.warps.assign(threads * cluster / 32, Party());
  e.blocks.resize(cluster);
  e.cluster = Party();
  for (Block& b : e.blocks) {
    b.party = Party();
    b.memory.assign(shared_bytes + 128, 0xff);
    b.running = threads;
  }
  for (Fiber& f : e.fibers) {
    if (!f.stack) f.stack.reset(new uint8_t[Emulator::kStack]);
    f.done = false;
    f.waits_for = nullptr;
    f.groups.clear();
    f.open.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Emulator::kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start_fiber, 0);
  }
}

inline void run_cluster(Emulator& e) {
  const int threads = static_cast<int>(e.fibers.size());
  const bool backwards = (e.first.x + e.first.y + e.first.z) % 2;
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < threads; ++i) {
      const int n = backwards ? threads - 1 - i : i;
      Fiber& f = e.fibers[n];
      if (f.done || (f.waits_for && *f.waits_for == f.seen)) continue;
      f.waits_for = nullptr;
      e.current = n;
      moved = true;
      swapcontext(&e.scheduler, &f.context);
      if (e.fault) return;
    }
  }
  for (const Fiber& f : e.fibers)
    if (!f.done) e.fault = "threads that wait for others that have ended";
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), Grid grid, int threads, int shared_bytes, int, void*,
                   Arguments arguments, int cluster = 1) {
  struct Call {
    void (*kernel)(Arguments);
    Arguments arguments;
  } call{kernel, arguments};
  Emulator& e = emulator();
  if (shared_bytes > 232448) return "more shared memory than an H200 has";
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return "no such grid";
  if (cluster < 1 || cluster > 8 || grid.y % cluster) return "no such cluster";
#ifdef STUB_CUDA_TORCH
  if (std::getenv("SOFTWARE_GPU_SKIP")) return nullptr;
#endif
  e.fault = nullptr;
  e.argument = &call;
  e.body = [](void* p) { static_cast<Call*>(p)->kernel(static_cast<Call*>(p)->arguments); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; y += cluster)
      for (unsigned x = 0; x < grid.x; ++x) {
        e.first = {x, y, z};
        prepare_cluster(e, threads, shared_bytes, cluster);
        run_cluster(e);
        if (e.fault) return e.fault;
      }
  return nullptr;
}

}  // namespace gpu
}  // namespace sparsekern
