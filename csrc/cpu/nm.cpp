// N:M patterns: checks, plans and how the work is split over threads.
#include "nm.h"

namespace sparsekern {
namespace {

constexpr int32_t kNmMagic = 0x534b4e31;      // "SKN1"
constexpr int32_t kNmTwinMagic = 0x534b4f31;  // "SKO1"

// Measured in bench/NOTES.md: a panel of this many columns and 8 vectors stays in an L1 cache of
// 32 KB beside the values, and the sums of the rows in the L2 cache.
constexpr int64_t kNmPanelCols = 64, kNmVectors = 8;
constexpr int64_t kNmRowsKept = 512;

Header header_of(const NmView& v, int32_t magic) {
  return plan_header(magic, {v.rows, v.channels, v.n, v.m, v.groups, v.taps});
}

// f(row, column in its group, slot counted over all rows).
template <class F>
void for_each_value(const NmView& v, F f) {
  for (int64_t r = 0; r < v.rows; ++r) {
    const uint8_t* code = v.index + r * v.row_bytes();
    for (int64_t g = 0, slot = 0; g < v.channel_groups(); ++g)
      for (int64_t tap = 0; tap < v.taps; ++tap)
        for (int64_t i = 0; i < v.n; ++i, ++slot)
          f(r, (g * v.m + v.position(code, slot)) * v.taps + tap, r * v.slots() + slot);
  }
}

// Groups of channels in a panel.
int64_t panel_groups(const NmView& v) {
  return std::min(v.channel_groups(), std::max<int64_t>(1, kNmPanelCols / (v.m * v.taps)));
}

std::vector<int32_t> build_twin(const NmView& v) {
  const int64_t slots = v.slots(), nnz = v.rows * slots;
  const Header header = header_of(v, kNmTwinMagic);
  std::vector<int32_t> out(header.begin(), header.end());
  out.resize(kPlanHeader + nnz);
  std::vector<int32_t> crow(v.rows + 1, 0), col(nnz);
  int32_t* order = out.data() + kPlanHeader;
  std::vector<std::pair<int32_t, int32_t>> found;
  for_each_value(v, [&](int64_t, int64_t column, int64_t slot) {
    found.push_back({static_cast<int32_t>(column), static_cast<int32_t>(slot)});
  });
  for (int64_t r = 0; r < v.rows; ++r) {
    crow[r + 1] = static_cast<int32_t>((r + 1) * slots);
    std::sort(found.begin() + r * slots, found.begin() + (r + 1) * slots);
  }
  for (int64_t i = 0; i < nnz; ++i) col[i] = found[i].first, order[i] = found[i].second;
  auto transposed =
      build_transposed(crow.data(), col.data(), v.rows, v.cols(), v.groups, v.taps, panel_tokens());
  const TransposedShape t = transposed_shape(v.rows, v.cols(), v.groups, v.taps);
  int32_t* perm = transposed.data() + kPlanHeader + t.rows + 1 + nnz;
  for (int64_t i = 0; i < nnz; ++i) perm[i] = order[perm[i]];
  out.insert(out.end(), transposed.begin(), transposed.end());
  return out;
}

}  // namespace

NmPattern check_nm_pattern(const std::string& op, const Tensor& index, const NmShape& s) {
  check_cpu(op, "index", index);
  check_dtype(op, "index", index, {ScalarType::Byte});
  check_dim(op, "index", index, 2);
  if (s.n < 1 || s.n >= s.m || s.m > 16)
    fail(op, "1 <= n < m <= 16", std::to_string(s.n) + ":" + std::to_string(s.m));
  if (s.groups < 1 || s.taps < 1)
    fail(op, "groups and taps >= 1", std::to_string(std::min(s.groups, s.taps)));
  check_int32(op, "rows", s.rows);
  check_int32(op, "channels", s.channels);
  if (s.rows % s.groups || s.groups > std::max<int64_t>(1, s.rows))
    fail(op, "rows divisible by groups = " + std::to_string(s.groups), std::to_string(s.rows));
  const int64_t tail = s.channels % s.m;
  if (s.channels < 1 || (tail && tail < s.n))
    fail(op, "groups of " + std::to_string(s.m) + " that hold " + std::to_string(s.n) + " each",
         std::to_string(s.channels) + " columns");
  if (s.taps > UINT16_MAX / s.m)
    fail(op, "at most 65535 weights in a group with its kernel positions",
         std::to_string(s.m) + " at " + std::to_string(s.taps) + " positions");
  NmView v{nullptr, s.rows, s.channels, s.taps, s.groups, s.n, s.m};
  check_size(op, "index.size(0) = rows", index.size(0), s.rows);
  check_size(op, "index.size(1) = bytes of a row", index.size(1), v.row_bytes());
  check_int32(op, "number of values", times(v.rows, v.slots()));
  check_int32(op, "number of columns", v.cols());
  // Those of the transpose, which the gradients run on.
  check_int32(op, "out / groups * kernel positions", times(v.rows / v.groups, v.taps));
  check_int32(op, "in_channels", times(v.channels, v.groups));
  const Tensor held = packed(index);
  v.index = held.const_data_ptr<uint8_t>();
  return {held, v};
}

void check_nm_values(const std::string& op, const Tensor& values, const Tensor& like,
                     const NmView& v) {
  check_operand(op, "values", values, like);
  check_dim(op, "values", values, 2);
  check_size(op, "values.size(0) = rows", values.size(0), v.rows);
  check_size(op, "values.size(1) = values of a row", values.size(1), v.slots());
}

void check_positions(const std::string& op, const NmView& v) {
  int64_t before = -1;
  for_each_value(v, [&](int64_t r, int64_t column, int64_t slot) {
    const int64_t channel = column / v.taps, at = channel % v.m;
    const int64_t group = slot % v.slots() / (v.n * v.taps);
    const bool fits = channel < v.channels && channel / v.m == group;
    if (!fits || (slot % v.n && channel <= before))
      fail(op,
           "index with positions that rise strictly inside each group and stay in [0, " +
               std::to_string(std::min(v.m, v.channels - group * v.m)) + ")",
           "position " + std::to_string(at) + " in group " + std::to_string(group) + " of row " +
               std::to_string(r));
    before = channel;
  });
}

NmPlan get_nm_plan(const std::string& op, const NmPattern& p, const std::optional<Tensor>& plan) {
  const NmView& v = p.view;
  Header header = header_of(v, kNmMagic);
  const int64_t panel_cols = panel_groups(v) * v.m * v.taps;
  header[kPlanHeader - 1] = static_cast<int32_t>(panel_cols);
  const int64_t step = panel_groups(v) * v.taps * v.n;
  const int64_t panels = (v.slots() + step - 1) / step;
  const int64_t size = kPlanHeader + (panels * v.rows * step + 1) / 2;
  NmPlan h;
  const int32_t* data;
  if (plan && plan->numel() > 0) {
    h.given = check_sealed(op, "plan", "nm_plan", *plan, {p.index});
    data = h.given.const_data_ptr<int32_t>();
    if (h.given.numel() != size || !same_header(header, data))
      fail(op, "plan made by nm_plan for this pattern", "a plan of another pattern");
  } else {
    check_positions(op, v);
    h.own.assign(header.begin(), header.end());
    h.own.resize(size);
    uint16_t* offset = reinterpret_cast<uint16_t*>(h.own.data() + kPlanHeader);
    for_each_value(v, [&](int64_t row, int64_t column, int64_t slot) {
      const int64_t at = slot - row * v.slots();
      offset[(at / step * v.rows + row) * step + at % step] =
          static_cast<uint16_t>(column % panel_cols);
    });
    data = h.own.data();
  }
  h.offset = reinterpret_cast<const uint16_t*>(data + kPlanHeader);
  return h;
}

NmTwin get_nm_twin(const std::string& op, const NmPattern& p, const std::optional<Tensor>& plan_t) {
  NmTwin t;
  const int32_t* data;
  int64_t size;
  if (plan_t && plan_t->numel() > 0) {
    t.given = check_sealed(op, "plan_t", "nm_plan", *plan_t, {p.index});
    data = t.given.const_data_ptr<int32_t>(), size = t.given.numel();
  } else {
    check_positions(op, p.view);
    t.own = build_twin(p.view);
    data = t.own.data(), size = static_cast<int64_t>(t.own.size());
  }
  const NmView& v = p.view;
  const Header want = header_of(v, kNmTwinMagic);
  const int64_t nnz = v.rows * v.slots(), head = kPlanHeader + nnz;
  t.order = data + kPlanHeader;
  const auto refuse = [&] {
    fail(op, "plan_t made by nm_plan(transpose=True) for this pattern",
         "a plan of another pattern");
  };
  if (size < head || !same_header(want, data)) refuse();
  const TransposedShape shape = transposed_shape(v.rows, v.cols(), v.groups, v.taps);
  if (!view_transposed(data + head, size - head, shape, nnz, v.groups, &t.transposed) ||
      !view_values_plan(data + head, size - head, v.rows, v.cols(), nnz, v.groups, v.taps, &t.plan))
    refuse();
  return t;
}

void run_nm_spmm(const NmView& v, const uint16_t* offset, const Operands& o) {
  if (o.tokens == 0 || v.rows == 0) return;
  const int64_t panel = kNmVectors * kernels().width, per_group = v.rows / v.groups;
  const Split s = split_rows(v.rows * v.slots(), o.tokens, panel, v.groups, per_group);
  for_each_task(s, o, [&](const Task& t) {
    NmArgs a{v,
             offset,
             o.values,
             o.bias,
             o.activation,
             t.source,
             o.sink,
             t.row_begin,
             t.row_end,
             t.token_begin,
             t.token_end,
             kNmVectors,
             panel_groups(v),
             std::min(per_group, kNmRowsKept),
             nullptr};
    a.scratch = thread_scratch(kTaskScratch, nm_scratch(a, panel));
    kernels().nm_spmm(a);
  });
}

void nm_spmm_reference(const NmView& v, const double* values, const double* bias,
                       Activation activation, ReferenceSource source, const Sink& sink, double* out,
                       int64_t tokens) {
  for (int64_t r = 0; r < v.rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) out[sink_at(sink, t, r)] = bias ? bias[r] : 0;
  for_each_value(v, [&](int64_t row, int64_t column, int64_t slot) {
    source.channel0 = row / (v.rows / v.groups) * v.channels;
    for (int64_t t = 0; t < tokens; ++t)
      out[sink_at(sink, t, row)] += values[slot] * source_at(source, t, column);
  });
  for (int64_t i = 0; i < v.rows * tokens; ++i) out[i] = activate_reference(out[i], activation);
}

void nm_grad_input_reference(const NmView& v, const double* values, ReferenceSource source,
                             const Sink& sink, double* out, int64_t tokens) {
  std::fill_n(out, v.channels * v.groups * tokens, 0.0);
  const int64_t per_group = v.rows / v.groups;
  for_each_value(v, [&](int64_t row, int64_t column, int64_t slot) {
    const int64_t group = row / per_group;
    source.channel0 = group * per_group;
    const int64_t channel = group * v.channels + column / v.taps;
    const int64_t from = row % per_group * v.taps + column % v.taps;
    for (int64_t t = 0; t < tokens; ++t)
      out[sink_at(sink, t, channel)] += values[slot] * source_at(source, t, from);
  });
}

void nm_grad_values_reference(const NmView& v, ReferenceSource source, const Sink& grad_layout,
                              const double* grad, double* out, int64_t tokens) {
  for_each_value(v, [&](int64_t row, int64_t column, int64_t slot) {
    source.channel0 = row / (v.rows / v.groups) * v.channels;
    out[slot] = 0;
    for (int64_t t = 0; t < tokens; ++t)
      out[slot] += grad[sink_at(grad_layout, t, row)] * source_at(source, t, column);
  });
}

}  // namespace sparsekern
