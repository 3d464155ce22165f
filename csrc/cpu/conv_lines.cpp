// Chooses between the two ways to run a CSR convolution, and runs the one without panels.
#include "conv.h"
#include "driver.h"
#include "lines.h"

namespace sparsekern {
namespace {

// A strip of an image in one group of channels.
struct Strip {
  int64_t image, group, row0, rows;
};

struct LineConv {
  const PlanView& plan;
  const Operands& o;
  const ConvImage& in;
  const LineLayout& layout;
  const float* packed;
  const uint16_t* lines;
  Axis y, x;
};

// Column offsets in columns become offsets in lines.
const uint16_t* line_offsets(const PlanView& plan, const std::vector<uint16_t>& of_column) {
  auto* out = reinterpret_cast<uint16_t*>(thread_scratch(kLineOffsets, plan.nnz / 2 + 1));
  const int64_t n = plan.n_row_blocks * plan.n_col_blocks;
  torch::stable::parallel_for(0, n, pack_grain(plan), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const uint16_t* table = of_column.data() + g % plan.n_col_blocks * plan.col_block;
      for (int32_t i = plan.value_start[g]; i < plan.value_start[g + 1]; ++i)
        out[i] = table[plan.offsets[i]];
    }
  });
  return out;
}

// A panel writes a few lines of each row of the matrix, far apart, so that lines that have left the
// L2 cache cost much to read before they are written. See bench/NOTES.md.
constexpr int64_t kStreamFloats = int64_t{4} << 18;  // 4 MiB

bool can_stream(const LineConv& c) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const Sink& s = c.o.sink;
  const bool whole = s.pixels % kLine == 0 && (c.layout.in_place || c.layout.out_w % kLine == 0);
  return whole && c.o.tokens * s.stride >= kStreamFloats &&
         reinterpret_cast<uintptr_t>(s.data) % 64 == 0;
}

void run_strip(const LineConv& c, const Strip& s) {
  const LineLayout& l = c.layout;
  const int64_t rows = largest_row_block(c.plan), taps = static_cast<int64_t>(l.tap_line.size());
  const int64_t sums = rows * s.rows * l.pitch * l.width;
  const int64_t channels = l.in_place ? 0 : (c.plan.col_block - 1) / taps + 2;
  float* scratch = thread_scratch(kTaskScratch, sums + channels * l.channel_lines * l.width);
  const int64_t blocks = c.plan.n_row_blocks / c.o.groups, pixels = c.o.sink.pixels;
  const int64_t channel = s.image * c.in.channels + s.group * c.o.channels_per_group;
  const float* src = c.in.data + channel * c.in.height * c.in.width;
  LineArgs a{c.plan, c.packed, c.lines, c.o.bias, c.o.activation, src + s.row0 * l.width, {}};
  if (!l.in_place) {
    PlaneAxis y = plane_axis(c.y);
    y.phase_size = l.phase_rows - l.strip_rows + s.rows;
    a.fill = {src,
              scratch + sums,
              y,
              plane_axis(c.x),
              l.shift.data(),
              0,
              static_cast<int64_t>(l.shift.size()),
              l.copy_lines,
              l.pitch,
              l.phase_rows,
              s.row0};
  }
  a.channel_lines = l.channel_lines, a.taps = taps;
  a.row_block_begin = s.group * blocks, a.row_block_end = (s.group + 1) * blocks;
  a.n_lines = s.rows * l.pitch, a.pitch = l.pitch, a.out_w = l.out_w;
  const int64_t at = s.image * c.o.sink.stride * pixels + s.row0 * l.out_w;
  a.out = c.o.sink.data + at;
  a.residual = c.o.residual ? c.o.residual + at : nullptr;
  a.pixels = pixels, a.stream = can_stream(c), a.vectors = panel_vectors(), a.sums = scratch;
  kernels().spmm_lines(a);
}

// False where panels run better, or 16 bits do not reach all lines.
bool run_lines(const PlanView& plan, const Operands& o, const ConvImage& in, const Axis& y,
               const Axis& x) {
  const int64_t width = kernels().width;
  const bool serial = plan.nnz * o.tokens < kSerialWork;
  const int64_t threads = serial ? 1 : torch::stable::get_num_threads();
  if (o.tokens == 0 || plan.nnz == 0) return false;
  const double values = static_cast<double>(plan.nnz) / static_cast<double>(plan.cols * o.groups);
  if (!suits_lines(y, x, width, values)) return false;
  const LineLayout layout =
      line_layout(y, x, largest_row_block(plan), in.images, width, panel_vectors(), threads);
  if (layout.in_place && reinterpret_cast<uintptr_t>(in.data) % 64 != 0) return false;
  const std::vector<uint16_t> of_column = column_lines(layout, plan.cols, plan.col_block);
  if (of_column.empty()) return false;
  const LineConv c{plan, o, in, layout, pack_values(plan, o), line_offsets(plan, of_column), y, x};
  const int64_t strips = (layout.out_h + layout.strip_rows - 1) / layout.strip_rows;
  const int64_t tasks = in.images * o.groups * strips;
  torch::stable::parallel_for(0, tasks, serial ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row0 = task % strips * layout.strip_rows, rest = task / strips;
      const int64_t rows = std::min(layout.strip_rows, layout.out_h - row0);
      run_strip(c, {rest / o.groups, rest % o.groups, row0, rows});
    }
  });
  return true;
}

}  // namespace

void run_conv(const PlanView& plan, Operands o, const ConvImage& in, const Axis& y, const Axis& x) {
  if (run_lines(plan, o, in, y, x)) return;
  Planes planes;
  make_planes(in.data, in.images, in.channels, y, x, kPlanes, &planes);
  o.source = {nullptr, &planes.source};
  run_spmm(plan, o);
}

}  // namespace sparsekern
