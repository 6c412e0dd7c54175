// GPUs for a PyTorch built without CUDA: tensors of device type cuda whose memory is the host's, computed by the CPU's
// kernels. What may not meet on a GPU does not meet here either. See __init__.py, which builds and loads this.
//
// The storage of every GPU tensor holds a CPU storage over the same memory. So an operator is called like this: CPU
// tensors over the storages of its arguments, the CPU's kernel, GPU tensors over the storages of its results.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <ATen/SDPBackend.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <set>

namespace {

using at::IValue;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::Storage;
using c10::StorageImpl;
using c10::TensorImpl;

constexpr DeviceIndex GPUS = 2;
const Device CPU(at::kCPU);
thread_local DeviceIndex current_gpu = 0;

Device gpu_at(DeviceIndex index) {
  return Device(at::kCUDA, index < 0 ? current_gpu : index);
}

void use_gpu(DeviceIndex index) {
  TORCH_CHECK(index < GPUS, "CUDA error: invalid device ordinal");
  if (index >= 0) current_gpu = index;
}

// ------------------------------------------------------------------------------------------------- what is counted

std::mutex lock;
std::map<std::string, int64_t> counts;  // by "kernel NAME", "wait NAME", "copy to the GPU", "copy to the CPU"
std::array<int64_t, GPUS> allocated, peak;

void count(const std::string& what) {
  std::lock_guard<std::mutex> guard(lock);
  counts[what]++;
}

void count_bytes(DeviceIndex gpu, int64_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  allocated[gpu] += bytes;
  peak[gpu] = std::max(peak[gpu], allocated[gpu]);
}

// --------------------------------------------------------------------------------------------------------- memory

Storage new_storage(size_t bytes) {
  return Storage(c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), bytes, c10::GetCPUAllocator(), /*resizable=*/true));
}

struct Held {  // by the storage of a GPU tensor
  Storage host;
  DeviceIndex gpu;
  int64_t bytes;
};

void release(void* context) {
  auto* held = static_cast<Held*>(context);
  count_bytes(held->gpu, -held->bytes);
  delete held;
}

c10::DataPtr hold(const Storage& host, Device gpu) {
  const auto bytes = static_cast<int64_t>(host.nbytes());
  count_bytes(gpu.index(), bytes);
  return {const_cast<void*>(host.data()), new Held{host, gpu.index(), bytes}, &release, gpu};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Storage host = new_storage(bytes);
    if (bytes > 0) std::memset(host.mutable_data(), 0xFF, bytes);  // NaN: reading before writing shows
    return hold(host, gpu_at(-1));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} allocator;

struct PinnedAllocator final : c10::Allocator {  // remembers what it gave, which is all that pinning means here
  std::map<const void*, size_t> given;

  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool gave(const void* place) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = given.upper_bound(place);
    if (next == given.begin()) return false;
    const auto& [start, bytes] = *std::prev(next);
    return place < static_cast<const char*>(start) + bytes;
  }
} pinned;

void unpin(void* place) {
  {
    std::lock_guard<std::mutex> guard(lock);
    pinned.given.erase(place);
  }
  std::free(place);
}

c10::DataPtr PinnedAllocator::allocate(size_t bytes) {
  void* place = std::malloc(std::max<size_t>(bytes, 1));
  std::lock_guard<std::mutex> guard(lock);
  given[place] = bytes;
  return {place, place, &unpin, CPU};
}

const Storage& host_storage(const Storage& gpu) {
  const auto& pointer = gpu.data_ptr();
  TORCH_CHECK(pointer.get_deleter() == &release, "this memory is not an emulated GPU's");
  return static_cast<const Held*>(pointer.get_context())->host;
}

Storage gpu_storage(const Storage& host, Device gpu) {
  return Storage(c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), host.nbytes(), hold(host, gpu), &allocator, true));
}

Tensor tensor_over(Storage storage, DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  made._set_neg(like.is_neg());
  made._set_conj(like.is_conj());
  return made;
}

Tensor on_host(const Tensor& gpu) {
  TORCH_CHECK(gpu.layout() == c10::kStrided, "the emulated GPU knows dense tensors alone");
  return tensor_over(host_storage(gpu.storage()), DispatchKey::CPU, gpu);
}

// -------------------------------------------------------------------------------------------------- random numbers

struct Generator final : c10::GeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();

  explicit Generator(DeviceIndex gpu) : GeneratorImpl(gpu_at(gpu), DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* twin = new Generator(device_.index());
    twin->host = host.clone();
    return twin;
  }
};

at::Generator& default_generator(DeviceIndex gpu) {
  static std::array<at::Generator, GPUS> all{at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return all[gpu_at(gpu).index()];
}

at::Generator& host_generator(const at::Generator& gpu) {
  TORCH_CHECK(gpu.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
  return static_cast<Generator*>(gpu.unsafeGetGeneratorImpl())->host;
}

struct DrawsFromGPU {  // within its life, what kernels draw without a generator; the CPU's own stays as it was
  at::Generator cpu = at::detail::getDefaultCPUGenerator();
  at::Generator& gpu;
  Tensor before;
  explicit DrawsFromGPU(Device device) : gpu(host_generator(default_generator(device.index()))) {
    std::lock_guard<std::mutex> guard(cpu.mutex());
    before = cpu.get_state();
    cpu.set_state(gpu.get_state());
  }
  ~DrawsFromGPU() {
    std::lock_guard<std::mutex> guard(cpu.mutex());
    gpu.set_state(cpu.get_state());
    cpu.set_state(before);
  }
};

// ------------------------------------------------------------------------------------------------ guard and hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return at::kCUDA; }
  Device getDevice() const override { return gpu_at(-1); }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    use_gpu(device.index());
    return before;
  }
  void setDevice(Device device) const override { use_gpu(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current_gpu = gpu_at(device.index()).index(); }
  DeviceIndex deviceCount() const noexcept override { return GPUS; }
  c10::Stream getStream(Device gpu) const override {
    return c10::Stream(c10::Stream::DEFAULT, gpu_at(gpu.index()));
  }
  c10::Stream getDefaultStream(Device gpu) const override { return getStream(gpu); }
  c10::Stream getStreamFromGlobalPool(Device gpu, bool) const override { return getStream(gpu); }
  c10::Stream getNewStream(Device gpu, int) const override { return getStream(gpu); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count("wait synchronize"); }
  void synchronizeEvent(void*) const override { count("wait synchronize"); }
  void synchronizeDevice(const DeviceIndex) const override { count("wait synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return GPUS; }
  DeviceIndex deviceCount() const override { return GPUS; }
  DeviceIndex current_device() const override { return current_gpu; }
  DeviceIndex getCurrentDevice() const override { return current_gpu; }
  DeviceIndex exchangeDevice(DeviceIndex gpu) const override {
    const auto before = current_gpu;
    use_gpu(gpu);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex gpu) const override { return exchangeDevice(gpu); }
  void setCurrentDevice(DeviceIndex gpu) const override { use_gpu(gpu); }
  Device getDeviceFromPtr(void*) const override { return gpu_at(-1); }
  bool isPinnedPtr(const void* place) const override { return pinned.gave(place); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  const at::Generator& getDefaultGenerator(DeviceIndex gpu) const override { return default_generator(gpu); }
  at::Generator getNewGenerator(DeviceIndex gpu) const override {
    return at::make_generator<Generator>(gpu_at(gpu).index());
  }
  void deviceSynchronize(DeviceIndex) const override { count("wait synchronize"); }
  std::string showConfig() const override { return "emulated on the CPU"; }
};

struct NoTimer final : c10d::Timer {  // which DistributedDataParallel asks for
  explicit NoTimer(Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};

// --------------------------------------------------------------------------------------------- one call of a kernel

// Operators that take indices on the CPU, and those that read the number in a CPU tensor without dimensions.
const std::set<std::string> TAKE_CPU_INDICES = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor", "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_", "aten::_unsafe_index_put"};
const std::set<std::string> TAKE_CPU_NUMBERS = {
    "aten::fill.Tensor", "aten::fill_.Tensor", "aten::masked_fill.Tensor", "aten::masked_fill_.Tensor",
    "aten::index_fill.int_Tensor", "aten::index_fill_.int_Tensor"};
// Operators that ask the GPU for the size of their result, or for whether it is right.
const std::set<std::string> WAIT = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal", "aten::bincount", "aten::histc",
    "aten::repeat_interleave.Tensor", "aten::_linalg_eigh.eigenvalues", "aten::_linalg_check_errors",
    "aten::linalg_lstsq", "aten::is_nonzero"};

struct Done final : c10d::Work {  // the work of an exchange that is over
  explicit Done(std::vector<Tensor> tensors)
      : future(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))),
        tensors(std::move(tensors)) {
    future->markCompleted(IValue(this->tensors));
    finish();
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
  std::vector<Tensor> result() override { return tensors; }
  c10::intrusive_ptr<c10::ivalue::Future> future;
  std::vector<Tensor> tensors;
};

const std::set<std::string> LAUNCH_NOTHING = {"aten::empty.memory_format", "aten::empty_strided", "aten::resize_"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op(op), name(c10::toString(op.operator_name())), arguments(op.schema().arguments()), stack(stack) {
    first = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); i++) look_at((*stack)[first + i], is_written(i));
    check_devices();
  }

  void run(DispatchKey key) {
    for (size_t i = 0; i < arguments.size(); i++) {
      auto& value = (*stack)[first + i];
      value = converted(value, [this](const Tensor& tensor) { return to_host(tensor); });
    }
    {
      std::optional<DrawsFromGPU> draws;
      if (op.hasTag(at::Tag::nondeterministic_seeded)) draws.emplace(target());
      op.redispatchBoxed(DispatchKeySet(key), stack);
    }
    for (const auto& [host, gpu] : gpu_of) follow(gpu, host);
    bool is_new = !written.empty();
    for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
      auto& value = (*stack)[i];
      if (value.isCustomClass()) {
        value.toCustomClass<c10d::Work>()->wait();
        value = IValue(c10::static_intrusive_pointer_cast<c10d::Work>(c10::make_intrusive<Done>(read)));
      } else {
        value = converted(value, [this, &is_new](const Tensor& tensor) { return to_gpu(tensor, is_new); });
      }
    }
    if (is_new && !LAUNCH_NOTHING.count(name)) count("kernel " + name);  // a view launches none
  }

 private:
  const c10::OperatorHandle& op;
  const std::string name;
  const std::vector<c10::Argument>& arguments;
  torch::jit::Stack* stack;
  size_t first;
  std::vector<Tensor> read, written;
  std::optional<Device> asked, of_tensors;
  std::vector<std::pair<Tensor, Tensor>> gpu_of;  // by the host's tensor, which is kept alive
  std::map<StorageImpl*, Storage> storages;       // the GPU's by the host's

  bool is_written(size_t i) const { return arguments[i].alias_info() && arguments[i].alias_info()->isWrite(); }

  Device target() const { return of_tensors ? *of_tensors : asked ? *asked : gpu_at(-1); }

  template <class Function>
  static IValue converted(const IValue& value, Function tensor_to_tensor) {
    if (value.isTensor()) return tensor_to_tensor(value.toTensor());
    if (value.isDevice()) return value.toDevice().is_cuda() ? IValue(CPU) : value;
    if (value.isGenerator()) return host_generator(value.toGenerator());
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& tensor : value.toTensorList()) made.push_back(tensor_to_tensor(tensor));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList()) {
        made.push_back(tensor ? std::optional<Tensor>(tensor_to_tensor(*tensor)) : tensor);
      }
      return made;
    }
    if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::ListType) {  // as of all_gather
      auto made = c10::impl::GenericList(value.toList().elementType());
      for (const IValue& inner : value.toListRef()) made.push_back(converted(inner, tensor_to_tensor));
      return made;
    }
    return value;
  }

  void look_at(const IValue& value, bool is_written) {
    if (value.isDevice() && value.toDevice().is_cuda()) asked = gpu_at(value.toDevice().index());
    converted(value.isGenerator() ? IValue() : value, [this, is_written](const Tensor& tensor) {
      if (tensor.defined()) {
        (is_written ? written : read).push_back(tensor);
        if (tensor.is_cuda() && !of_tensors) of_tensors = tensor.device();
      }
      return tensor;
    });
  }

  void check_devices() const {
    for (const auto* tensors : {&written, &read}) {
      for (const Tensor& tensor : *tensors) {
        const bool is_fine = !of_tensors || tensor.device() == *of_tensors ||
            (tensors == &read && tensor.is_cpu() && may_be_on_cpu(tensor));
        TORCH_CHECK(is_fine, "Expected all tensors to be on the same device, but found at least two devices, ",
                    *of_tensors, " and ", tensor.device(), "! (", name, ")");
      }
    }
  }

  bool may_be_on_cpu(const Tensor& tensor) const {
    if (TAKE_CPU_INDICES.count(name)) return true;
    const bool is_number = tensor.unsafeGetTensorImpl()->is_wrapped_number() || op.hasTag(at::Tag::pointwise);
    return tensor.dim() == 0 && (is_number || TAKE_CPU_NUMBERS.count(name));
  }

  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (const auto& [host, gpu] : gpu_of) {
      if (gpu.is_same(tensor)) return host;
    }
    const auto host = on_host(tensor);
    gpu_of.emplace_back(host, tensor);
    storages.emplace(host.storage().unsafeGetStorageImpl(), tensor.storage());
    return host;
  }

  Tensor to_gpu(const Tensor& tensor, bool& is_new) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (const auto& [host, gpu] : gpu_of) {
      if (host.is_same(tensor)) return gpu;
    }
    TORCH_CHECK(tensor.layout() == c10::kStrided, "the emulated GPU knows dense tensors alone");
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto known = storages.find(storage);
    if (known == storages.end()) {
      is_new = true;
      known = storages.emplace(storage, gpu_storage(tensor.storage(), target())).first;
    }
    return tensor_over(known->second, DispatchKey::CUDA, tensor);
  }

  // What a kernel did to the shape or the memory of a tensor on the host.
  static void follow(const Tensor& gpu, const Tensor& host) {
    auto* own = gpu.storage().unsafeGetStorageImpl();
    const Storage& storage = host.storage();
    if (own->data() != storage.data() || own->nbytes() != storage.nbytes()) {
      own->set_data_ptr_noswap(hold(storage, gpu.device()));
      own->set_nbytes(storage.nbytes());
    }
    if (gpu.sizes() != host.sizes() || gpu.strides() != host.strides()) {
      gpu.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

 public:
  void count_waits() const {
    bool by_mask = false;
    if (TAKE_CPU_INDICES.count(name)) {
      for (size_t i = 0; i < read.size(); i++) by_mask |= read[i].scalar_type() == at::kBool && i + written.size() > 0;
    }
    if (by_mask || WAIT.count(name)) count("wait " + name);
  }
};

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call(op, stack);
  call.count_waits();
  call.run(DispatchKey::CPU);
}

// NCCL: gloo, over the same memory. The group has no backend for CPU tensors, and gloo as that of a third device.
void by_gloo(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call(op, stack).run(DispatchKey::PrivateUse1);
}

// ------------------------------------------------------------------- what is no kernel of the CPU on the same memory

void fresh(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  by_cpu(op, stack);
  const Tensor& made = stack->back().toTensor();
  auto* storage = made.storage().unsafeGetStorageImpl();
  if (storage->nbytes() > 0) std::memset(storage->mutable_data(), 0xFF, storage->nbytes());
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.numel() > 0 && to.device().type() == from.device().type()) count("kernel aten::copy_");
  if (to.numel() > 0 && from.is_cpu()) {
    count("copy to the GPU");
    if (!non_blocking) count("wait copy to the GPU");
    if (!from.is_pinned()) count("copy of pageable memory");
  }
  if (to.numel() > 0 && to.is_cpu()) {
    count("copy to the CPU");
    count("wait copy to the CPU");
  }
  Tensor target = to.is_cuda() ? on_host(to) : to;
  target.copy_(from.is_cuda() ? on_host(from) : from);
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy(target, from, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  Tensor target = to.resize_(from.sizes());
  return copy(target, from, false);
}

at::Scalar number(const Tensor& tensor) {
  count("wait item");
  return at::_local_scalar_dense(on_host(tensor));
}

Tensor& set_storage(Tensor& tensor, Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (strides.data() == nullptr) {
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, strides);
  }
  return tensor;
}

Tensor& set_whole_storage(Tensor& tensor, Storage storage) {
  const auto numbers = static_cast<int64_t>(storage.nbytes() / tensor.dtype().itemsize());
  return set_storage(tensor, std::move(storage), 0, {numbers}, {});
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return set_storage(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& tensor) {
  return set_whole_storage(tensor, gpu_storage(new_storage(0), tensor.device()));
}

// Attention without a matrix of weights: the CPU's kernel of that kind behind the operators of CUDA, whose
// log-sum-exps are padded to 32 queries.
int64_t attention_kernel(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                         double dropout, bool, std::optional<double>, bool grouped) {
  const bool suits = q.dim() == 4 && q.size(3) == v.size(3) && q.size(2) > 0 && k.size(2) > 0 && dropout == 0 &&
      !grouped && q.is_floating_point() && q.scalar_type() != at::kDouble && !(mask && mask->requires_grad());
  return static_cast<int64_t>(suits ? at::SDPBackend::efficient_attention : at::SDPBackend::math);
}

Tensor new_on_gpu(const Tensor& host, Device gpu) {
  return tensor_over(gpu_storage(host.storage(), gpu), DispatchKey::CUDA, host);
}

std::optional<Tensor> mask_on_host(const std::optional<Tensor>& mask, const Tensor& q) {
  if (!mask || !mask->defined()) return std::nullopt;
  TORCH_CHECK(mask->device() == q.device() && mask->dtype() == q.dtype(), "attention: the mask is not as the queries");
  return on_host(*mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, bool keep_sums, double dropout,
    bool is_causal, std::optional<double> scale) {
  TORCH_CHECK(q.device() == k.device() && q.device() == v.device(), "attention: tensors on several devices");
  count("kernel aten::_scaled_dot_product_efficient_attention");
  auto [output, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      on_host(q), on_host(k), on_host(v), dropout, is_causal, mask_on_host(mask, q), scale);
  const auto queries = q.size(2);
  const auto padded = keep_sums ? (queries + 31) / 32 * 32 : 0;
  auto kept = at::full({q.size(0), q.size(1), padded}, NAN, at::kFloat);
  if (keep_sums) kept.narrow(2, 0, queries).copy_(sums);
  const auto seed = at::zeros({}, at::kLong);
  const auto gpu = q.device();
  return {new_on_gpu(output, gpu), new_on_gpu(kept, gpu), new_on_gpu(seed, gpu), new_on_gpu(seed.clone(), gpu)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gy, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, const Tensor& output,
    const Tensor& sums, const Tensor&, const Tensor&, double dropout, std::array<bool, 4>, bool is_causal,
    std::optional<double> scale) {
  if (!gy.defined()) return {};
  TORCH_CHECK(sums.size(2) >= q.size(2), "attention: no log-sum-exps were kept");
  count("kernel aten::_scaled_dot_product_efficient_attention_backward");
  auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_host(gy), on_host(q), on_host(k), on_host(v), on_host(output),
      on_host(sums).narrow(2, 0, q.size(2)).contiguous(), dropout, is_causal, mask_on_host(mask, q), scale);
  const auto gpu = q.device();
  return {new_on_gpu(gq, gpu), new_on_gpu(gk, gpu), new_on_gpu(gv, gpu), Tensor()};
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", torch::CppFunction::makeFromBoxedFunction<&fresh>());
  library.impl("empty_strided", torch::CppFunction::makeFromBoxedFunction<&fresh>());
  library.impl("copy_", &copy);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &number);
  library.impl("set_", &set_nothing);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("record_stream", &record_stream);
  library.impl("_scaled_dot_product_efficient_attention", &attention);
  library.impl("_scaled_dot_product_efficient_attention_backward", &attention_backward);
  library.impl("_fused_sdp_choice", &attention_kernel);
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
  library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {  // operators of other libraries
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

struct Quiet final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

std::vector<std::unique_ptr<torch::Library>> libraries;

// Give every operator of a library that has a kernel of the CPU, and none here yet, one here.
void adopt(const std::string& space) {
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, space, DispatchKey::CUDA, __FILE__, __LINE__));
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findOp(name);
    const auto full_name = c10::toString(name);
    if (op && op->hasSchema() && full_name.rfind(space + "::", 0) == 0 &&
        op->hasKernelForDispatchKey(DispatchKey::CPU) && !op->hasKernelForDispatchKey(DispatchKey::CUDA)) {
      libraries.back()->impl(
          full_name.substr(space.size() + 2).c_str(), torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
    }
  }
}

void adopt_exchanges() {
  Quiet quiet;  // that they have another kernel already is known
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "c10d", DispatchKey::CUDA, __FILE__, __LINE__));
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findOp(name);
    const auto full_name = c10::toString(name);
    if (op && full_name.rfind("c10d::", 0) == 0 && op->hasKernelForDispatchKey(DispatchKey::PrivateUse1)) {
      libraries.back()->impl(full_name.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&by_gloo>());
    }
  }
}

struct Start {
  Start() {
    adopt("aten");
    adopt_exchanges();
    c10::SetAllocator(at::kCUDA, &allocator, 100);
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_kernel);
  }
} start;

// ------------------------------------------------------------------------------------------ what Python is told

TORCH_LIBRARY(cuda_on_cpu, library) {
  library.def("counts() -> Dict(str, int)", [] {
    std::lock_guard<std::mutex> guard(lock);
    c10::Dict<std::string, int64_t> counted;
    for (const auto& [what, times] : counts) counted.insert(what, times);
    return counted;
  });
  library.def("forget() -> ()", [] {
    std::lock_guard<std::mutex> guard(lock);
    counts.clear();
  });
  library.def("forget_peak() -> ()", [] {
    std::lock_guard<std::mutex> guard(lock);
    peak = allocated;
  });
  library.def("memory(int gpu) -> int[]", [](int64_t gpu) {
    std::lock_guard<std::mutex> guard(lock);
    return std::vector<int64_t>{allocated[gpu], peak[gpu]};
  });
  library.def("wait() -> ()", [] { count("wait synchronize"); });
  library.def("adopt(str library) -> ()", [](const std::string& space) { adopt(space); });
  library.def("gpus() -> int", [] { return static_cast<int64_t>(GPUS); });
  library.def("current() -> int", [] { return static_cast<int64_t>(current_gpu); });
  library.def("use(int gpu) -> ()", [](int64_t gpu) { use_gpu(static_cast<DeviceIndex>(gpu)); });
  library.def("generator(int gpu) -> Generator?", [](int64_t gpu) { return default_generator(gpu); });
}

}  // namespace

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, ::NoTimer)
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, ::Guard)
}
namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", ::Hooks)
}
