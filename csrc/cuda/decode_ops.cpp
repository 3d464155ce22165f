// The ops of our own kernels for few tokens: check, allocate, launch. Called by the CUDA
// implementations in sparsekern/ops alone.
#include <torch/csrc/stable/library.h>

#include "decode.h"
#include "handles.h"

namespace sparsekern {
namespace {

void check_launch(const std::string& op, const char* error) {
  if (error) fail(op, "a kernel that runs", error);
}

// Checks what all take, and fills a task whose y and parts are still missing.
DecodeTask decode_task(const std::string& op, const Tensor& x, const std::optional<Tensor>& bias,
                       int64_t rows, int64_t activation) {
  check_dim(op, "x", x, 2);
  check_library_operand(op, "x", x, x);
  check_dtype(op, "x", x, {ScalarType::BFloat16, ScalarType::Half});
  const int64_t tokens = x.size(0), cols = x.size(1);
  if (tokens < 1 || tokens > kNmTokens)
    fail(op, "1 to " + std::to_string(kNmTokens) + " rows of x", std::to_string(tokens));
  // Places in x and its gathers are 32-bit numbers.
  if (rows < 1 || cols < 1 || rows >= 1 << 24 || cols >= 1 << 24)
    fail(op, "a weight of 1 to 16777215 rows and columns",
         std::to_string(rows) + " x " + std::to_string(cols));
  if (cols % 8) fail(op, "x padded to a multiple of 8 columns", std::to_string(cols));
  if (activation < 0 || activation > static_cast<int>(Activation::kGeluTanh))
    fail(op, "activation 0 to 4", std::to_string(activation));
  if (bias) {
    check_library_operand(op, "bias", *bias, x);
    check_dtype(op, "bias", *bias, {x.scalar_type()});
    check_size(op, "bias.numel()", bias->numel(), rows);
  }
  DecodeTask task{};
  task.x = x.const_data_ptr();
  task.bias = bias ? bias->const_data_ptr() : nullptr;
  task.tokens = static_cast<int>(tokens);
  task.rows = static_cast<int>(rows);
  task.cols = static_cast<int>(cols);
  task.activation = static_cast<Activation>(activation);
  task.half = x.scalar_type() == ScalarType::Half;
  task.device = x.is_cuda() ? x.get_device_index() : 0;
  task.stream = current_stream(x);
  return task;
}

// Memory for several parts of y, none for a single one, which goes into y as it is.
std::optional<Tensor> parts_of(const Tensor& x, DecodeTask& task, int64_t parts) {
  if (parts == 1) return std::nullopt;
  const Tensor made =
      torch::stable::new_empty(x, {parts, task.tokens, task.rows}, ScalarType::Float);
  task.parts = made.mutable_data_ptr<float>();
  return made;
}

void check_packed(const std::string& op, const Tensor& packed, const Tensor& x, int64_t rows) {
  const int64_t units = (rows + 31) / 32 * ((x.size(1) + 127) / 128);
  check_library_operand(op, "packed", packed, x);
  check_dtype(op, "packed", packed, {ScalarType::Byte});
  check_size(op, "bytes of packed", packed.numel(), units * 4608);
}

void check_split(const std::string& op, int64_t split) {
  if (split < 1 || split > 64) fail(op, "split in 1 to 64", std::to_string(split));
}

// act(x W^T + b) for a 2:4 weight packed by nm_packed.py, K cut into `split` parts, which the
// blocks of a cluster or a second kernel add up.
Tensor own_nm_decode(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                     int64_t rows, int64_t activation, int64_t split, bool cluster) {
  const std::string op = "_own_nm_decode";
  const DeviceScope scope(x);
  DecodeTask task = decode_task(op, x, bias, rows, activation);
  check_packed(op, packed, x, rows);
  check_split(op, split);
  if (cluster && split > kMaxCluster)
    fail(op, "at most 8 parts in a cluster", std::to_string(split));
  const Tensor y = torch::stable::new_empty(x, {x.size(0), rows});
  task.y = y.mutable_data_ptr();
  const auto parts = parts_of(x, task, cluster ? 1 : split);
  check_launch(op, nm_decode(task, packed.const_data_ptr(), static_cast<int>(split), cluster));
  if (parts) check_launch(op, finish(task, static_cast<int>(split)));
  return y;
}

// act(x W^T + b) for the lists of csr_packed.py and, if given, a 2:4 weight that holds the others.
Tensor own_csr_decode(const Tensor& x, const Tensor& words, const Tensor& starts,
                      const std::optional<Tensor>& packed, const std::optional<Tensor>& bias,
                      int64_t rows, int64_t width, int64_t activation, int64_t split) {
  const std::string op = "_own_csr_decode";
  const DeviceScope scope(x);
  DecodeTask task = decode_task(op, x, bias, rows, activation);
  if (width < 1 || width > 2048) fail(op, "width in 1 to 2048", std::to_string(width));
  const int64_t slices = (x.size(1) + width - 1) / width;
  check_library_operand(op, "words", words, x);
  check_dtype(op, "words", words, {ScalarType::Int});
  check_library_operand(op, "starts", starts, x);
  check_dtype(op, "starts", starts, {ScalarType::Int});
  check_size(op, "starts.numel()", starts.numel(), slices * rows + 1);
  if (packed) check_packed(op, *packed, x, rows);
  check_split(op, split);
  const Tensor y = torch::stable::new_empty(x, {x.size(0), rows});
  task.y = y.mutable_data_ptr();
  const int64_t first = packed ? split : 0;
  const auto parts = parts_of(x, task, first + slices);
  if (packed)
    check_launch(op, nm_decode(task, packed->const_data_ptr(), static_cast<int>(split), false));
  task.first_part = static_cast<int>(first);
  check_launch(op, csr_decode(task, words.const_data_ptr(), starts.const_data_ptr<int32_t>(),
                              static_cast<int>(width), static_cast<int>(slices)));
  if (parts) check_launch(op, finish(task, static_cast<int>(first + slices)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern, m) {
  m.def(
      "_own_nm_decode(Tensor x, Tensor packed, Tensor? bias, int rows, int activation, int split, "
      "bool cluster=False) -> Tensor");
  m.def(
      "_own_csr_decode(Tensor x, Tensor words, Tensor starts, Tensor? packed, Tensor? bias, "
      "int rows, int width, int activation, int split) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CompositeExplicitAutograd, m) {
  m.impl("_own_nm_decode", TORCH_BOX(&own_nm_decode));
  m.impl("_own_csr_decode", TORCH_BOX(&own_csr_decode));
}

}  // namespace sparsekern
