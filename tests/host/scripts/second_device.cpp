// A device of its own that the CPU plays: its tensors lie in memory of the CPU, and whatever meets a tensor of the CPU
// on the way is refused, as a graphics card refuses it. So what is made on the wrong device shows without a card.
// Built and registered by second_device.py, under torch's key for devices of others.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
long to_cpu = 0;

void check(bool fine, const std::string& name) {
  TORCH_CHECK(fine, "Expected all tensors to be on the same device, and ", name, " got some of the CPU as well");
}

struct Memory final : at::Allocator {
  static void release(void* at) { std::free(at); }
  at::DataPtr allocate(size_t bytes) override {
    void* at = bytes ? std::malloc(bytes) : nullptr;
    return {at, at, &release, at::Device(DEVICE, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return c10::Device(DEVICE, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
} hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// The same memory as a tensor of the CPU.
Tensor seen(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  auto bytes = static_cast<int64_t>(tensor.storage().nbytes());
  auto keep = [tensor](void*) {};
  auto base = at::from_blob(const_cast<void*>(tensor.storage().data()), {bytes}, keep, at::dtype(at::kByte));
  auto found = at::empty({0}, at::dtype(tensor.scalar_type()));
  return found.set_(base.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor brought(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto made = empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, {}, {});
  seen(made).copy_(tensor);
  return made;
}

const Tensor& resized(const Tensor& tensor, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto made = at::detail::empty_generic(sizes, &memory, KEYS, tensor.scalar_type(), {});
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

Tensor& placed(Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto* its = tensor.unsafeGetTensorImpl();
  its->set_storage_keep_dtype(std::move(storage));
  its->set_storage_offset(offset);
  its->set_sizes_and_strides(sizes, strides);
  return tensor;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  to_cpu += to.is_cpu();
  c10::InferenceMode inference(from.is_inference() || to.is_inference());
  seen(to).copy_(seen(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  ++to_cpu;
  return seen(tensor).item();
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output,
                   int64_t groups) {
  bool biased = bias && bias->defined();
  check(!x.is_cpu() && !weight.is_cpu() && !(biased && bias->is_cpu()), "convolution");
  auto b = biased ? std::optional<Tensor>(seen(*bias)) : std::nullopt;
  return brought(at::convolution(seen(x), seen(weight), b, stride, padding, dilation, transposed, output, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  check(!gradient.is_cpu() && !x.is_cpu() && !weight.is_cpu(), "convolution_backward");
  std::vector<int64_t> bias = {weight.size(transposed ? 1 : 0)};
  auto [a, b, c] = at::convolution_backward(seen(gradient), seen(x), seen(weight), bias, stride, padding, dilation,
                                            transposed, output, groups, wanted);
  return {brought(a), brought(b), brought(c)};
}

// All other operations: done by the CPU's, on the same memory.
void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto first = stack->size() - arguments.size();
  const std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  std::vector<std::pair<Tensor, Tensor>> in_place, results;
  bool ours = false, theirs = false;
  const auto& name = op.schema().name();

  auto lowered = [&](const Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cpu()) {
      theirs |= tensor.dim() > 0;  // a number on the CPU may be anywhere
      return tensor;
    }
    ours = true;
    auto low = seen(tensor);
    if (written) in_place.emplace_back(tensor, low);
    return low;
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    const auto* alias = arguments[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (value.isTensor() && written && arguments[i].kwarg_only() && !value.toTensor().is_cpu()) {
      ours = true;
      results.emplace_back(value.toTensor(), at::empty({0}, at::dtype(value.toTensor().scalar_type())));
      value = results.back().second;
    } else if (value.isTensor()) {
      value = lowered(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorList().vec()) list.push_back(lowered(tensor, written));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional<Tensor>(lowered(*tensor, written)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  const bool indices = name.find("index") != std::string::npos;  // may lie on the CPU, on a card as well
  check(!ours || !theirs || indices, name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [tensor, low] : results) {
    if (low.sizes() != tensor.sizes()) resized(tensor, low.sizes(), {});
    seen(tensor).copy_(low);
  }
  for (auto& [tensor, low] : in_place)
    if (low.sizes() != tensor.sizes()) {
      resized(tensor, low.sizes(), {});
      seen(tensor).copy_(low);
    }
  const auto& returns = op.schema().returns();
  const auto start = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); ++i) {
    auto& value = (*stack)[start + i];
    const auto* alias = returns[i].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t a = 0; a < arguments.size(); ++a)
        if (arguments[a].alias_info() && *arguments[a].alias_info() == *alias) value = given[a];
    } else if (value.isTensor()) {
      value = brought(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorList().vec()) list.push_back(brought(tensor));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(resized));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(placed));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("convolution_overrideable", TORCH_FN(convolution));
  m.impl("convolution_backward_overrideable", TORCH_FN(convolution_backward));
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

}  // namespace

// How often something was fetched to the CPU, for which a card would have to be waited for.
extern "C" long fetched() { return to_cpu; }
