// y = act(x W^T + b) for up to 64 tokens and a 2:4 weight of 16 bits, by the sparse tensor-core
// product mma.sp.m16n8k32, which takes a 2:4 weight as it is stored: nothing is spread.
//
// A decode step is bound by the bytes of the weight. They are packed once in the order in which
// lanes need them (sparsekern/ops/nm_packed.py): a unit is 32 rows x 128 columns, 512 bytes of
// metadata and eight fragments of 512 bytes, and a lane reads its 16 bytes of each. Weights go from
// memory to registers, several units ahead; x goes through shared memory, where a block's warps
// share it. Warps of a block cut K among them where there are few tokens, and share rows where x
// would be read too often otherwise.
#include "decode_epilogue.h"

namespace sparsekern {
namespace gpu {
namespace {

constexpr int kUnitRows = 32, kUnitCols = 128, kFragment = 512, kUnitBytes = 9 * kFragment;
constexpr int kWarps = 8, kThreads = 32 * kWarps, kStages = 3;

template <int kTiles>  // of eight tokens
struct Shape {
  static constexpr int kSlices = kTiles == 1 ? 8 : kTiles == 2 ? 4 : 2;  // of K, by warps
  static constexpr int kStrips = kWarps / kSlices;                       // of rows
  static constexpr int kTokens = 8 * kTiles;
  static constexpr int kRows = kUnitRows * kStrips;
  static constexpr int kCols = kUnitCols * kSlices;  // of x in a stage
  static constexpr int kPitch = 2 * kCols + 16;      // bytes; a row moves on by one 16-byte bank
  static constexpr int kStage = kTokens * kPitch;
  static constexpr int kSumPitch = kRows + 4;  // floats; lanes of a fragment meet no bank twice
  static constexpr int kDepth = kTiles <= 2 ? 2 : 1;  // units a warp is ahead
  static constexpr int kShared = kStages * kStage;
  static_assert(kSlices * kTokens * kSumPitch * 4 <= kShared, "the sums take the place of x");
  static_assert(kShared <= 163 * 1024, "one block on an A100");
  static_assert(2 * (kShared + 1024) <= 228 * 1024, "two blocks on an H200");
};

struct Nm {
  DecodeTask task;
  const unsigned char* packed;
  int units;    // of a strip of 32 rows
  int chunks;   // of kCols columns
  int share;    // chunks of a part
  int cluster;  // blocks that add up their parts, or 1
};

struct Unit {
  Words metadata, fragment[2][4];  // 16 rows, 32 columns
};

// The columns of a chunk for all tokens; zeros past the end of x, whose rows are aligned.
template <int kTiles>
SPARSEKERN_DEVICE void stage_x(const DecodeTask& t, unsigned char* stage, int chunk) {
  using S = Shape<kTiles>;
  constexpr int kPieces = S::kCols / 8;  // of 16 bytes
  const uint16_t* x = static_cast<const uint16_t*>(t.x);
#pragma unroll 2  // more at a time cost registers that the weights need
  for (int i = 0; i < S::kTokens * kPieces / kThreads; ++i) {
    const int n = i * kThreads + thread(), token = n / kPieces, piece = n % kPieces;
    const int col = chunk * S::kCols + piece * 8;
    const bool there = token < t.tokens && col < t.cols;
    copy_async(stage + token * S::kPitch + piece * 16, there ? x + token * t.cols + col : x,
               there ? 16 : 0);
  }
}

SPARSEKERN_DEVICE void load_step(Unit& unit, const unsigned char* from, int step) {
  for (int m = 0; m < 2; ++m)
    unit.fragment[m][step] = load_stream(from + (1 + m * 4 + step) * kFragment);
}

// A unit times all tokens. Each fragment makes room for the one of the unit after next, at `next`.
template <class T, int kTiles>
SPARSEKERN_DEVICE void multiply(Unit& unit, float (&sum)[2][kTiles][4], const unsigned char* x,
                                const unsigned char* next) {
  const Words metadata = unit.metadata;
  if (next) unit.metadata = load_stream(next);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Words b = load_matrices(x + tile * 8 * Shape<kTiles>::kPitch + step * 64);
      T::template mma_sp<0>(sum[0][tile], unit.fragment[0][step], b, metadata.w[step]);
      T::template mma_sp<1>(sum[1][tile], unit.fragment[1][step], b, metadata.w[step]);
    }
    if (next) load_step(unit, next, step);
  }
}

// Of each warp, its sums in shared memory.
template <int kTiles>
SPARSEKERN_DEVICE void share_sums(const float (&sum)[2][kTiles][4], int strip, int slice) {
  using S = Shape<kTiles>;
  const int lane = thread() % 32;
  float* all = reinterpret_cast<float*>(shared());
  for (int m = 0; m < 2; ++m)
    for (int tile = 0; tile < kTiles; ++tile)
      for (int i = 0; i < 4; ++i) {
        const int row = strip * kUnitRows + m * 16 + lane / 4 + i / 2 * 8;
        const int token = tile * 8 + lane % 4 * 2 + i % 2;
        all[(slice * S::kTokens + token) * S::kSumPitch + row] = sum[m][tile][i];
      }
}

// Adds up, always in the same order, what the warps of a block and the blocks of a cluster have of
// the same rows. The blocks of a cluster divide the outputs.
template <class T, int kTiles>
SPARSEKERN_DEVICE void reduce(const Nm& a) {
  using S = Shape<kTiles>;
  const bool alone = a.cluster == 1;
  const int part = static_cast<int>(block().y), rank = alone ? 0 : part;
  const int first = static_cast<int>(block().x) * S::kRows;
  for (int i = rank * kThreads + thread(); i < S::kTokens * S::kRows; i += a.cluster * kThreads) {
    const int token = i / S::kRows, row = i % S::kRows;
    if (token >= a.task.tokens || first + row >= a.task.rows) continue;
    const float* at = reinterpret_cast<float*>(shared()) + token * S::kSumPitch + row;
    float total = 0;
    for (int from = 0; from < a.cluster; ++from)
      for (int k = 0; k < S::kSlices; ++k) {
        const float* mine = at + k * S::kTokens * S::kSumPitch;
        total += alone ? *mine : load_remote(mine, from);
      }
    store_sum<T>(total, a.task, a.task.first_part + part, token, first + row);
  }
}

template <class T, int kTiles>
SPARSEKERN_KERNEL(kThreads, 2)
nm_decode_kernel(Nm a) {
  using S = Shape<kTiles>;
  const int warp = thread() / 32, lane = thread() % 32;
  const int strip = warp / S::kSlices, slice = warp % S::kSlices;
  const int first = static_cast<int>(block().y) * a.share;
  const int end = first + a.share < a.chunks ? first + a.share : a.chunks;
  const int64_t strip_row = static_cast<int64_t>(block().x) * S::kStrips + strip;
  const bool inside = strip_row * kUnitRows < a.task.rows;
  // Of chunk c this warp takes the unit c * kSlices + slice, if there is one.
  const unsigned char* mine =
      a.packed + (strip_row * a.units + slice) * kUnitBytes + lane * sizeof(Words);
  const auto unit_at = [&](int chunk) -> const unsigned char* {
    const bool there = inside && chunk < end && chunk * S::kSlices + slice < a.units;
    return there ? mine + static_cast<int64_t>(chunk) * S::kSlices * kUnitBytes : nullptr;
  };

  Unit units[S::kDepth];
#pragma unroll
  for (int d = 0; d < S::kDepth; ++d) {
    const unsigned char* from = unit_at(first + d);
    if (!from) continue;
    units[d].metadata = load_stream(from);
    for (int step = 0; step < 4; ++step) load_step(units[d], from, step);
  }
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s < end) stage_x<kTiles>(a.task, shared() + s * S::kStage, first + s);
    copy_commit();
  }
  const int x_offset = lane % 8 * S::kPitch + slice * kUnitCols * 2 + lane / 8 * 16;
  float sum[2][kTiles][4] = {};
  int stage = 0;
  for (int base = first; base < end; base += S::kDepth)
#pragma unroll
    for (int d = 0; d < S::kDepth; ++d) {
      const int chunk = base + d;
      if (chunk >= end) break;
      copy_wait<kStages - 2>();
      barrier();  // this stage has arrived, and nobody reads the one before any more
      const int ahead = chunk + kStages - 1, free = stage == 0 ? kStages - 1 : stage - 1;
      if (ahead < end) stage_x<kTiles>(a.task, shared() + free * S::kStage, ahead);
      copy_commit();
      if (unit_at(chunk))
        multiply<T, kTiles>(units[d], sum, shared() + stage * S::kStage + x_offset,
                            unit_at(chunk + S::kDepth));
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
  copy_wait<0>();
  barrier();
  share_sums<kTiles>(sum, strip, slice);
  if (a.cluster > 1) cluster_barrier();
  else barrier();
  reduce<T, kTiles>(a);
  if (a.cluster > 1) cluster_barrier();  // nobody leaves while others read its sums
}

template <class T, int kTiles>
const char* launch_tiles(const DecodeTask& task, const void* packed, int split, int cluster) {
  using S = Shape<kTiles>;
  const int units = (task.cols + kUnitCols - 1) / kUnitCols;
  const int chunks = (units + S::kSlices - 1) / S::kSlices;
  const Nm a{task,
             static_cast<const unsigned char*>(packed),
             units,
             chunks,
             (chunks + split - 1) / split,
             cluster};
  const Grid grid{static_cast<unsigned>((task.rows + S::kRows - 1) / S::kRows),
                  static_cast<unsigned>(split), 1};
  return launch(nm_decode_kernel<T, kTiles>, grid, kThreads, S::kShared, task.device, task.stream,
                a, cluster);
}

template <class T>
const char* launch_nm(const DecodeTask& task, const void* packed, int split, int cluster) {
  if (task.tokens <= 8) return launch_tiles<T, 1>(task, packed, split, cluster);
  if (task.tokens <= 16) return launch_tiles<T, 2>(task, packed, split, cluster);
  if (task.tokens <= 32) return launch_tiles<T, 4>(task, packed, split, cluster);
  return launch_tiles<T, 8>(task, packed, split, cluster);
}

}  // namespace
}  // namespace gpu

const char* nm_decode(const DecodeTask& task, const void* packed, int split, bool cluster) {
  const int blocks = cluster ? split : 1;
  return task.half ? gpu::launch_nm<gpu::Float16>(task, packed, split, blocks)
                   : gpu::launch_nm<gpu::Bfloat16>(task, packed, split, blocks);
}

}  // namespace sparsekern
