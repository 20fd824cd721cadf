// A device that PyTorch takes for CUDA. Its memory is main memory and its kernels are those of the CPU, so that a build
// for CPUs shows which tensor lies where, what is launched, and how much memory tensors take, as on a GPU.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

const c10::Device gpu(c10::DeviceType::CUDA, 0);
const c10::Device host(c10::DeviceType::CPU);

bool on_gpu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().is_cuda(); }

// What was launched and what is held. Autograd works in a thread of its own, hence the lock.
struct Books {
  std::mutex lock;
  std::map<std::string, int64_t> launched;
  int64_t blocks = 0, held = 0, peak = 0, limit = 0;

  void launch(const std::string& name) {
    std::lock_guard<std::mutex> guard(lock);
    launched[name]++;
  }

  void take(int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    if (limit && held + bytes > limit)
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory (pretended): ", bytes, " bytes beside ", held);
    blocks++;
    held += bytes;
    peak = std::max(peak, held);
  }

  void give_back(int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    held -= bytes;
  }
};

Books& books() {
  static auto* kept = new Books;  // outlives every tensor
  return *kept;
}

// A block of main memory that counts as memory of the device while it lives.
struct Block {
  Block(c10::Storage storage, int64_t bytes) : storage(std::move(storage)), bytes(bytes) { books().take(bytes); }
  ~Block() { books().give_back(bytes); }
  c10::Storage storage;
  int64_t bytes;
};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto inner = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), size, c10::GetCPUAllocator(), /*resizable=*/false);
    auto* block = new Block(c10::Storage(inner), size);
    return {block->storage.mutable_data(), block, [](void* old) { delete static_cast<Block*>(old); }, gpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t size) const override {
    default_copy_data(target, source, size);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator);

// One stream on one device, where everything has happened as soon as it is asked for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream only() const { return c10::Stream(c10::Stream::DEFAULT, gpu); }
  c10::DeviceType type() const override { return gpu.type(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return gpu; }
  c10::Device exchangeDevice(c10::Device) const override { return gpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return only(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// The same numbers at the same place in memory, for the kernels of the CPU or as a tensor of the device.
at::Tensor over(c10::Storage storage, const at::Tensor& like, c10::Device device) {
  const auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) out._set_conj(true);
  if (like.is_neg()) out._set_neg(true);
  return out;
}

c10::Storage storage_of(c10::DataPtr data, int64_t bytes, c10::Allocator* owner) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), owner, /*resizable=*/true);
}

at::Tensor seen_by_host(const at::Tensor& tensor) {
  auto* kept = new c10::Storage(tensor.storage());
  c10::DataPtr data(kept->mutable_data(), kept, [](void* old) { delete static_cast<c10::Storage*>(old); }, host);
  return over(storage_of(std::move(data), tensor.storage().nbytes(), c10::GetCPUAllocator()), tensor, host);
}

at::Tensor moved_to_gpu(const at::Tensor& tensor) {
  const int64_t bytes = tensor.storage().nbytes();
  auto* block = new Block(tensor.storage(), bytes);
  c10::DataPtr data(block->storage.mutable_data(), block, [](void* old) { delete static_cast<Block*>(old); }, gpu);
  return over(storage_of(std::move(data), bytes, &allocator), tensor, gpu);
}

// Operations that may be given tensors of both devices.
const std::set<std::string> crossing = {
    "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_to_copy",
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

// Operations that launch nothing.
const std::set<std::string> silent = {
    "aten::empty", "aten::empty_strided", "aten::set_", "aten::resize_", "aten::is_pinned", "aten::_efficientzerotensor",
    "aten::_local_scalar_dense", "aten::equal", "aten::is_set_to"};

// The tensors of one call: those of the device, each with what the CPU is shown of it, and those of main memory.
struct Call {
  explicit Call(const std::string& name)
      : all_there(name.rfind("aten::_fused_adam", 0) == 0 || name.rfind("aten::_amp_", 0) == 0) {}

  bool all_there;  // not even a single number may lie in main memory
  std::vector<std::pair<at::Tensor, at::Tensor>> shown;
  std::vector<at::Tensor> elsewhere;

  at::Tensor show(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!on_gpu(tensor)) {
      if (tensor.device().is_cpu() && (tensor.dim() || all_there)) elsewhere.push_back(tensor);
      return tensor;
    }
    shown.emplace_back(tensor, seen_by_host(tensor));
    return shown.back().second;
  }

  at::Tensor back(const at::Tensor& tensor, bool made_here) {
    if (!tensor.defined()) return tensor;
    for (auto& [own, alias] : shown) {
      if (alias.is_same(tensor)) return own;
      if (alias.storage().is_alias_of(tensor.storage())) return over(own.storage(), tensor, gpu);
    }
    for (auto& other : elsewhere)
      if (other.is_same(tensor)) return tensor;
    return made_here ? moved_to_gpu(tensor) : tensor;
  }

  // A kernel may have given a tensor other memory or another shape.
  void settle() {
    for (auto& [own, alias] : shown) {
      const bool moved = alias.storage().data() != own.storage().data();
      if (!moved && own.sizes() == alias.sizes() && own.strides() == alias.strides()) continue;
      auto* inside = own.unsafeGetTensorImpl();
      if (moved) inside->set_storage_keep_dtype(moved_to_gpu(alias).storage());
      inside->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }
};

// Every tensor in a value, a list or an optional list, passed through `change`.
template <typename Change>
c10::IValue changed(const c10::IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (!value.isOptionalTensorList()) return value;

  c10::List<std::optional<at::Tensor>> list;
  for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList())
    list.push_back(tensor ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
  return list;
}

// Runs the kernel of the CPU on the memory of the device.
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  Call call(name);
  bool asked = false;  // whether the device is named by an argument
  bool draws = false;  // whether a generator of main memory is given

  const auto first = stack->size() - schema.arguments().size();
  for (auto at = first; at < stack->size(); at++) {
    auto& value = (*stack)[at];
    draws = draws || (value.isGenerator() && value.toGenerator().device().is_cpu());
    if (value.isDevice() && value.toDevice().is_cuda()) {
      asked = true;
      value = c10::IValue(host);
    } else {
      value = changed(value, [&](const at::Tensor& tensor) { return call.show(tensor); });
    }
  }
  if (!call.shown.empty() && !call.elsewhere.empty() && !crossing.count(name))
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ",
                "(pretended, in ", name, ", with a tensor of shape ", call.elsewhere[0].sizes(), " in main memory)");

  if (draws && (asked || !call.shown.empty()))
    TORCH_CHECK(false, "Expected a 'cuda' device type for generator but found 'cpu' (pretended, in ", name, ")");

  if (!silent.count(name)) books().launch(name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  for (auto at = stack->size() - schema.returns().size(); at < stack->size(); at++)
    (*stack)[at] = changed((*stack)[at], [&](const at::Tensor& t) { return call.back(t, asked || !call.shown.empty()); });
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

c10::Dict<std::string, int64_t> launched() {
  std::lock_guard<std::mutex> guard(books().lock);
  c10::Dict<std::string, int64_t> copy;
  for (const auto& [name, count] : books().launched) copy.insert(name, count);
  return copy;
}

std::vector<int64_t> memory() {
  std::lock_guard<std::mutex> guard(books().lock);
  return {books().blocks, books().held, books().peak};
}

void forget_peak() {
  std::lock_guard<std::mutex> guard(books().lock);
  books().peak = books().held;
}

void set_limit(int64_t bytes) {
  std::lock_guard<std::mutex> guard(books().lock);
  books().limit = bytes;
}

}  // namespace

namespace at {
struct PretendedHooks final : CUDAHooksInterface {
  PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  void deviceSynchronize(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendedHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  for (auto name : {"copy_", "_copy_from", "set_.source_Tensor", "set_.source_Storage", "resize_", "is_pinned",
                    "_efficientzerotensor"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY(pretend, m) {
  m.def("launched", &launched);
  m.def("memory", &memory);
  m.def("forget_peak", &forget_peak);
  m.def("set_limit", &set_limit);
}
