// ATen of a device whose memory is host memory: every operator with a kernel for CUDA gets a boxed
// one that looks at the same bytes as tensors of the CPU, and runs the kernel for the CPU on them.
// Allocation, views and streams stay those of CUDA. torch loads this as a backend at its import.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <set>

namespace {

using c10::IValue;
using torch::jit::Stack;

struct Twin {
  at::Tensor device, host;
};
using Twins = std::vector<Twin>;

// The same memory as a tensor of the CPU that does not own it.
at::Tensor host_view(const at::Tensor& t) {
  c10::DataPtr memory(t.storage().mutable_data(), at::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(memory),
                       c10::GetCPUAllocator(), true);
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* impl = view.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides());
  impl->set_storage_offset(t.storage_offset());
  if (t.is_conj()) view._set_conj(true);
  if (t.is_neg()) view._set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return view;
}

bool on_device(const at::Tensor& t) {
  return t.defined() && t.is_cuda() && t.layout() == at::kStrided;
}

at::Tensor to_host(const at::Tensor& t, Twins& twins) {
  if (!on_device(t)) return t;
  twins.push_back({t, host_view(t)});
  return twins.back().host;
}

// A result: one of the arguments, a view into one, or new.
at::Tensor to_device(const at::Tensor& t, const Twins& twins) {
  if (!t.defined() || !t.is_cpu() || t.layout() != at::kStrided) return t;
  for (const Twin& twin : twins)
    if (twin.host.is_same(t)) return twin.device;
  for (const Twin& twin : twins)
    if (t.storage().nbytes() && twin.host.storage().is_alias_of(t.storage()))
      return twin.device.as_strided(t.sizes(), t.strides(), t.storage_offset());
  if (!t.is_non_overlapping_and_dense()) return to_device(t.contiguous(), twins);
  auto made = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCUDA));
  if (t.numel()) std::memcpy(made.mutable_data_ptr(), t.const_data_ptr(), t.nbytes());
  return made;
}

template <class Move>
IValue moved(const IValue& v, Move&& move) {
  if (v.isTensor()) return move(v.toTensor());
  if (v.isTensorList()) {
    std::vector<at::Tensor> tensors = v.toTensorVector();
    for (auto& t : tensors) t = move(t);
    return tensors;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const auto& t : v.toOptionalTensorVector())
      tensors.push_back(t && t->defined() ? std::optional(move(*t)) : std::nullopt);
    return tensors;
  }
  if (v.isDevice() && v.toDevice().is_cuda()) return at::Device(at::kCPU);
  if (v.isGenerator()) return IValue();  // the CPU's own; torch.manual_seed seeds both
  return v;
}

// For sweeps, which want no numbers: zeros in the place of the products that would take long.
at::Tensor skipped_product(const c10::FunctionSchema& schema, const Stack& stack) {
  static const bool skip = std::getenv("SOFTWARE_GPU_SKIP") != nullptr;
  const auto& name = schema.name();
  if (!skip || !schema.overload_name().empty()) return {};
  const IValue* arguments = &stack[stack.size() - schema.arguments().size()];
  auto tensor = [&](int i) { return arguments[i].toTensor(); };
  if (name == "aten::mm") return tensor(0).new_zeros({tensor(0).size(0), tensor(1).size(1)});
  if (name == "aten::addmm") return tensor(1).new_zeros({tensor(1).size(0), tensor(2).size(1)});
  if (name != "aten::convolution" || arguments[6].toBool()) return {};
  auto shape = at::convolution(tensor(0).to(at::kMeta), tensor(1).to(at::kMeta), {},
                               arguments[3].toIntVector(), arguments[4].toIntVector(),
                               arguments[5].toIntVector(), false, arguments[7].toIntVector(),
                               arguments[8].toInt())
                   .sizes()
                   .vec();
  return tensor(0).new_zeros(shape);
}

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  if (auto zeros = skipped_product(schema, *stack); zeros.defined()) {
    torch::jit::drop(*stack, schema.arguments().size());
    stack->emplace_back(zeros);
    return;
  }
  Twins twins;
  for (size_t i = stack->size() - schema.arguments().size(); i < stack->size(); ++i)
    (*stack)[i] = moved((*stack)[i], [&](const at::Tensor& t) { return to_host(t, twins); });
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const Twin& t : twins) {  // an `out` that the kernel has resized
    if (t.host.storage().data() == t.device.storage().data() && t.host.sizes() == t.device.sizes())
      continue;
    t.device.resize_(t.host.sizes());
    host_view(t.device).copy_(t.host);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = moved((*stack)[i], [&](const at::Tensor& t) { return to_device(t, twins); });
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& from, bool) {
  at::Tensor to = on_device(self) ? host_view(self) : self;
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  to.copy_(on_device(from) ? host_view(from) : from);
  return self;
}

// What allocates, views, or belongs to a stand-in of a library.
const std::set<std::string> kKept = {"as_strided",
                                     "view",
                                     "_reshape_alias",
                                     "unfold",
                                     "set_",
                                     "resize_",
                                     "empty",
                                     "empty_strided",
                                     "record_stream",
                                     "_pin_memory",
                                     "is_pinned",
                                     "view_as_real",
                                     "view_as_complex",
                                     "copy_",
                                     "alias",
                                     "_efficientzerotensor",
                                     "is_set_to",
                                     "_cslt_compress",
                                     "_cslt_sparse_mm",
                                     "_cslt_sparse_mm_search"};
// Composites that ask for the device inside.
const std::set<std::string> kAlso = {"convolution", "convolution_backward", "_convolution"};

struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void install() {
  static Silent silent;  // torch says that it had kernels already
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__,
                                __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0 || kKept.count(name.name.substr(6))) continue;
    const auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema()) continue;
    const std::string bare = name.name.substr(6);
    const bool also = kAlso.count(bare) && name.overload_name.empty();
    if (!also && !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    if (!op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    const std::string full = name.overload_name.empty() ? bare : bare + "." + name.overload_name;
    library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
  library.impl("copy_", copy);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install);
}
