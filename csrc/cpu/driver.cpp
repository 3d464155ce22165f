#include "driver.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>

namespace sparsekern {

Activation parse_activation(const std::string& op, const std::string& name) {
  if (name == "none") return kNone;
  if (name == "relu") return kRelu;
  if (name == "relu6") return kRelu6;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  fail(op, "activation to be none, relu, relu6, gelu or gelu_tanh", "'" + name + "'");
}

// What torch says of a copy that fails names neither the op nor the shape.
template <class F>
static Tensor copied(const Tensor& t, F copy) {
  try {
    return copy();
  } catch (const std::exception&) {
    throw Unnamed("memory for a copy of shape " + shape_of(t), "none");
  }
}

Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  return copied(t, [&] { return torch::stable::to(t, dtype); });
}

// A call through the dispatcher costs half a microsecond, asking costs nothing.
Tensor packed(const Tensor& t) {
  if (t.is_contiguous()) return t;
  return copied(t, [&] { return torch::stable::contiguous(t); });
}

Tensor as_contiguous(const Tensor& t, ScalarType dtype) {
  return packed(to_dtype(t, dtype));
}

// Past the dispatcher, which would cost as much as a small layer.
Tensor empty_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;)
    stride[i - 1] = times(stride[i], std::max<int64_t>(1, shape[i]));
  if (!shape.empty()) times(times(stride[0], shape[0]), sizeof(double));
  AtenTensorHandle handle;
  // Checked by hand: torch 2.11 and 2.13 have different macros for it.
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), stride.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle);
  if (error != AOTI_TORCH_SUCCESS)
    throw Unnamed("memory for a result of shape " + shape_text(shape), "none");
  return Tensor(handle);
}

void check_operand(const std::string& op, const char* name, const Tensor& t, const Tensor& like) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double});
  if (t.scalar_type() != like.scalar_type())
    fail(op, std::string(name) + " of the dtype of x (" + dtype_name(like.scalar_type()) + ")",
         dtype_name(t.scalar_type()));
}

int64_t csr_rows(const std::string& op, const Tensor& crow) {
  check_dim(op, "crow", crow, 1);
  if (crow.size(0) < 1) fail(op, "crow of shape (rows + 1,)", shape_of(crow));
  check_int32(op, "crow.size(0) - 1 = rows", crow.size(0) - 1);
  return crow.size(0) - 1;
}

void check_csr_values(const std::string& op, const Tensor& values, const Tensor& like) {
  check_operand(op, "values", values, like);
  check_dim(op, "values", values, 1);
}

Pattern check_pattern(const std::string& op, const Tensor& crow, const Tensor& col, int64_t nnz,
                      int64_t cols, int64_t groups, int64_t taps) {
  for (auto [name, t] : {std::pair{"crow", &crow}, std::pair{"col", &col}}) {
    check_cpu(op, name, *t);
    check_dtype(op, name, *t, {ScalarType::Int});
    check_dim(op, name, *t, 1);
  }
  const int64_t rows = csr_rows(op, crow);
  check_size(op, "col.size(0) = values.size(0)", col.size(0), nnz);
  check_int32(op, "number of columns", cols);
  check_int32(op, "number of nonzeros", nnz);
  // Those of the transpose, which the gradients run on.
  check_int32(op, "out / groups * kernel positions", times(rows / groups, taps));
  check_int32(op, "in_channels", times(cols / taps, groups));
  return {packed(crow), packed(col), rows, cols, nnz, groups, taps};
}

static void validate(const std::string& op, const Pattern& p) {
  check_csr(p.crow_data(), p.col_data(), p.rows, p.cols, p.nnz,
            [&](const std::string& wanted, const std::string& have) { fail(op, wanted, have); });
}

PanelTokens panel_tokens() {
  return {kernels().width * panel_vectors(), kernels().width * kernels().sddmm_vectors};
}

PlanHolder get_plan(const std::string& op, const Pattern& p, const std::optional<Tensor>& plan) {
  PlanHolder h;
  const int32_t* data;
  int64_t size;
  if (plan && plan->numel() > 0) {
    h.given = check_sealed(op, "plan", "csr_plan", *plan, {p.crow, p.col});
    data = h.given.const_data_ptr<int32_t>(), size = h.given.numel();
  } else {
    validate(op, p);
    h.own = build_plan(p.crow_data(), p.col_data(), p.rows, p.cols, p.groups,
                       plan_shape(p.crow_data(), p.rows, p.cols, panel_tokens().spmm));
    if (p.groups == 1 && p.taps == 1)  // the input is a matrix
      append_spmv(&h.own, p.crow_data(), p.col_data(), p.rows, p.cols, kernels().bitmap_density);
    data = h.own.data(), size = static_cast<int64_t>(h.own.size());
  }
  PairView pairs;
  const bool given_pairs = size >= kPlanHeader && data[0] == kPairsMagic;
  const bool fits = !given_pairs || view_pairs(&data, &size, p.rows, p.cols, &pairs);
  if (given_pairs && fits) h.pairs = pairs;
  if (size > 2 && data[0] == kPlanMagic && data[2] != p.cols && p.taps == 1)
    fail(op, "x.size(-1) = in_features = " + std::to_string(data[2]), std::to_string(p.cols));
  if (!fits || !view_plan(data, size, p.rows, p.cols, p.nnz, p.groups, &h.view))
    fail(op, "plan made by csr_plan for this pattern", "a plan of another pattern");
  return h;
}

std::vector<int32_t> make_pairs_plan(const std::string& op, const Pattern& p) {
  std::vector<int32_t> plan = get_plan(op, p, std::nullopt).own;
  if (!kernels().pairs) return plan;
  return append_pairs(plan, p.crow_data(), p.col_data(), p.rows, p.cols,
                      kernels().width * kernels().pairs->vectors);
}

PlanHolder get_values_plan(const std::string& op, const Pattern& p,
                           const std::optional<Tensor>& plan_t) {
  PlanHolder h;
  if (!plan_t || plan_t->numel() == 0) {
    validate(op, p);
    h.own = build_plan(p.crow_data(), p.col_data(), p.rows, p.cols, p.groups,
                       plan_shape(p.crow_data(), p.rows, p.cols, panel_tokens().sddmm));
    view_plan(h.own.data(), static_cast<int64_t>(h.own.size()), p.rows, p.cols, p.nnz, p.groups,
              &h.view);
    return h;
  }
  h.given = check_sealed(op, "plan_t", "csr_plan", *plan_t, {p.crow, p.col});
  const int32_t* data = h.given.const_data_ptr<int32_t>();
  if (data[0] != kTransposedMagic) return get_plan(op, p, plan_t);
  if (!view_values_plan(data, h.given.numel(), p.rows, p.cols, p.nnz, p.groups, p.taps, &h.view))
    fail(op, "plan_t made by csr_plan(transpose=True) for this pattern",
         "a plan of another pattern");
  return h;
}

TransposedHolder get_transposed(const std::string& op, const Pattern& p,
                                const std::optional<Tensor>& plan_t) {
  TransposedHolder h;
  const int32_t* data;
  int64_t size;
  if (plan_t && plan_t->numel() > 0) {
    h.given = check_sealed(op, "plan_t", "csr_plan", *plan_t, {p.crow, p.col});
    data = h.given.const_data_ptr<int32_t>(), size = h.given.numel();
  } else {
    validate(op, p);
    h.own = build_transposed(p.crow_data(), p.col_data(), p.rows, p.cols, p.groups, p.taps,
                             panel_tokens());
    data = h.own.data(), size = static_cast<int64_t>(h.own.size());
  }
  const TransposedShape shape = transposed_shape(p.rows, p.cols, p.groups, p.taps);
  if (!view_transposed(data, size, shape, p.nnz, p.groups, &h.view))
    fail(op, "plan_t made by csr_plan(transpose=True) for this pattern",
         "a plan of another pattern");
  return h;
}

namespace {

// Kept from call to call: a layer is called again and again with the same shapes. A large buffer is
// given back when a call needs far less of it.
constexpr int64_t kLargeScratch = int64_t{16} << 20;  // floats

struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
};

// An image of this size is out of the caches before anybody reads it; written the usual way it is
// read from memory first. See bench/NOTES.md.
constexpr int64_t kStreamFloats = int64_t{8} << 18;  // 8 MiB

// As split_rows; panels narrower than the kernel likes where there are no more blocks of rows.
Split split_work(const PlanView& plan, int64_t tokens, int64_t groups, int64_t vectors) {
  const int64_t panel = kernels().width * vectors;
  const int64_t per_group = groups ? plan.n_row_blocks / groups : 0;
  int64_t threads = torch::stable::get_num_threads();
  if (plan.nnz * tokens < kSerialWork) threads = 1;
  // Whole panels first, then blocks of rows, then narrower panels.
  int64_t token_parts = std::min(threads, std::max<int64_t>(1, tokens / panel));
  const int64_t row_parts =
      std::max<int64_t>(1, std::min(per_group, threads / (token_parts * groups)));
  const int64_t width = kernels().width;
  if (token_parts * row_parts * groups < threads)
    token_parts = std::max<int64_t>(1, std::min(threads, (tokens + width - 1) / width));
  const int64_t chunk = (tokens + token_parts - 1) / token_parts;
  return {token_parts, (chunk + width - 1) / width * width, row_parts, per_group};
}

}  // namespace

Split split_rows(int64_t work, int64_t tokens, int64_t panel, int64_t groups,
                 int64_t rows_per_group) {
  const int64_t threads = work * tokens < kSerialWork ? 1 : torch::stable::get_num_threads();
  const int64_t token_parts = std::min(threads, std::max<int64_t>(1, tokens / panel));
  const int64_t wanted = (threads + token_parts * groups - 1) / (token_parts * groups);
  const int64_t chunk = (tokens + token_parts - 1) / token_parts, width = kernels().width;
  return {token_parts, (chunk + width - 1) / width * width,
          std::max<int64_t>(1, std::min(rows_per_group, wanted)), rows_per_group};
}

Source shifted(const Source& s, ImageSource* image, int64_t channels) {
  if (s.matrix) return s;
  *image = *s.image;
  image->channel0 += channels;
  return {nullptr, image};
}

float* thread_scratch(ScratchSlot slot, int64_t floats) {
  static thread_local Scratch slots[kScratchSlots];
  Scratch& scratch = slots[slot];
  const bool wasteful = scratch.size > kLargeScratch && floats < scratch.size / 4;
  if (floats > scratch.size || wasteful) {
    times(plus(floats, 1024), sizeof(float));
    std::free(scratch.data);
    scratch.size = (floats / 1024 + 1) * 1024;
    scratch.data = static_cast<float*>(std::aligned_alloc(64, scratch.size * sizeof(float)));
    if (!scratch.data) {
      scratch.size = 0;
      throw Unnamed("memory for " + std::to_string(floats * 4) + " bytes of scratch", "none");
    }
  }
  return scratch.data;
}

int64_t pack_grain(const PlanView& plan) {
  const int64_t n = plan.n_row_blocks * plan.n_col_blocks;
  return std::max<int64_t>(1, 65536 * n / std::max<int64_t>(1, plan.nnz));
}

const float* pack_values(const PlanView& plan, const Operands& o) {
  float* packed = thread_scratch(kPacked, plan.nnz);
  const int64_t n = plan.n_row_blocks * plan.n_col_blocks;
  torch::stable::parallel_for(0, n, pack_grain(plan), [&](int64_t begin, int64_t end) {
    kernels().pack(plan, o.values, o.perm, packed, begin, end);
  });
  return packed;
}

// Splits a product over threads; `packed` may be null.
static void run_panels(const PlanView& plan, const Operands& o, const float* packed,
                       int64_t vectors, void (*spmm)(const SpmmArgs&)) {
  const Split s = split_work(plan, o.tokens, o.groups, vectors);
  Sink sink = o.sink;
  sink.stream = !sink.token_major && o.tokens * sink.stride >= kStreamFloats;
  for_each_task(s, o, [&](const Task& t) {
    SpmmArgs a{plan, o.values,    packed,    o.bias,        o.activation, o.residual, t.source,
               sink, t.row_begin, t.row_end, t.token_begin, t.token_end,  vectors,    nullptr};
    a.scratch = thread_scratch(kTaskScratch, spmm_scratch(plan, a.vectors * kernels().width));
    spmm(a);
  });
}

void run_spmm(const PlanView& plan, const Operands& o) {
  if (o.tokens == 0 || plan.rows == 0) return;
  // Packing is worth its time from the second panel on, or where values are permuted anyhow.
  const bool pack = o.perm || o.tokens > kernels().width * panel_vectors();
  run_panels(plan, o, pack ? pack_values(plan, o) : nullptr, panel_vectors(), kernels().spmm);
}

void run_spmm_int8(const PlanView& plan, const Operands& o) {
  if (o.tokens == 0 || plan.rows == 0) return;
  float* packed = thread_scratch(kPacked, plan.nnz);
  const int64_t n = plan.n_row_blocks * plan.n_col_blocks;
  torch::stable::parallel_for(0, n, pack_grain(plan), [&](int64_t begin, int64_t end) {
    kernels().pack_int8(plan, o.quantized, o.scales, packed, begin, end);
  });
  run_panels(plan, o, packed, panel_vectors(), kernels().spmm);
}

void run_spmm_pairs(const PairView& pairs, const uint16_t* values, const Operands& o) {
  const PlanView& plan = pairs.plan;
  if (o.tokens == 0 || plan.rows == 0) return;
  const PairKernels& k = *kernels().pairs;
  float* packed = thread_scratch(kPacked, plan.nnz);
  const int64_t n = plan.n_row_blocks * plan.n_col_blocks;
  torch::stable::parallel_for(0, n, pack_grain(plan), [&](int64_t begin, int64_t end) {
    k.pack(pairs, values, packed, begin, end);
  });
  run_panels(plan, o, packed, k.vectors, k.spmm);
}

GradPanels grad_panels(const Source& grad, int64_t rows, int64_t tokens) {
  const int64_t vectors = kernels().sddmm_vectors, panel = kernels().width * vectors;
  const int64_t n = (tokens + panel - 1) / panel, stride = rows * panel;
  float* data = thread_scratch(kGradPanels, times(n, stride));
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      kernels().fill_panel(grad, data + p * stride, vectors, p * panel,
                           std::min(tokens, (p + 1) * panel), 0, rows);
  });
  return {data, stride, panel};
}

void run_sddmm(const PlanView& plan, const Operands& o, const Source& grad, float* out) {
  if (o.tokens == 0 || plan.nnz == 0) {
    std::fill_n(out, plan.nnz, 0.f);
    return;
  }
  const GradPanels panels = grad_panels(grad, plan.rows, o.tokens);
  // A task is a row block with some of its blocks of columns: enough of them for all threads.
  float* packed = thread_scratch(kPacked, plan.nnz);
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts =
      std::min(plan.n_col_blocks, std::max<int64_t>(1, wanted / plan.n_row_blocks));
  const int64_t per_group = plan.n_row_blocks / o.groups;
  torch::stable::parallel_for(0, plan.n_row_blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / parts, part = task % parts;
      ImageSource image;
      SddmmArgs a{plan,
                  panels.data,
                  panels.stride,
                  shifted(o.source, &image, block / per_group * o.channels_per_group),
                  packed,
                  block,
                  part * plan.n_col_blocks / parts,
                  (part + 1) * plan.n_col_blocks / parts,
                  o.tokens,
                  thread_scratch(kTaskScratch, plan.col_block * panels.width)};
      kernels().sddmm(a);
    }
  });
  const int64_t n = plan.n_row_blocks * plan.n_col_blocks;
  torch::stable::parallel_for(0, n, pack_grain(plan), [&](int64_t begin, int64_t end) {
    kernels().unpack(plan, packed, out, begin, end);
  });
}

}  // namespace sparsekern
