#include "ops/tensor.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "core/dtypes.h"
#include "cpu/isa.h"
#include "ops/launch.h"

// Present in a torch built with CUDA only: weak, so that this library also loads into one without.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);
// Declared in torch's generated headers, which differ between builds with and without CUDA.
extern "C" AOTITorchError aoti_torch_aten_fill__Scalar(AtenTensorHandle self, double value);

namespace normext::ops {
namespace {

struct DtypeNumbers {
  std::int32_t of[4];
  DtypeNumbers() {
    of[static_cast<int>(DType::kFloat32)] = aoti_torch_dtype_float32();
    of[static_cast<int>(DType::kFloat16)] = aoti_torch_dtype_float16();
    of[static_cast<int>(DType::kBFloat16)] = aoti_torch_dtype_bfloat16();
    of[static_cast<int>(DType::kFloat64)] = aoti_torch_dtype_float64();
  }
};

const DtypeNumbers& dtype_numbers() {
  static const DtypeNumbers numbers;
  return numbers;
}

// For torch functions that fail only when torch itself is broken or out of memory.
void check(AOTITorchError code, const char* what) {
  if (code != AOTI_TORCH_SUCCESS) refuse(std::string("normext: torch could not ") + what);
}

}  // namespace

bool poisoned() {
  static const bool on = [] {
    const char* value = std::getenv("NORMEXT_POISON");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return on;
}

std::int32_t torch_dtype(DType dtype) { return dtype_numbers().of[static_cast<int>(dtype)]; }

bool from_torch_dtype(std::int32_t number, DType* dtype) {
  for (int i = 0; i < 4; ++i) {
    if (dtype_numbers().of[i] != number) continue;
    *dtype = static_cast<DType>(i);
    return true;
  }
  return false;
}

std::string dtype_text(DType dtype) {
  static const char* const kNames[] = {"torch.float32", "torch.float16", "torch.bfloat16", "torch.float64"};
  return kNames[static_cast<int>(dtype)];
}

Tensor::Tensor(AtenTensorHandle owned) noexcept : handle_(owned) {
  bool defined = false;
  if (owned == nullptr || aoti_torch_is_defined(owned, &defined) != AOTI_TORCH_SUCCESS || !defined) return;
  present_ = aoti_torch_get_dim(owned, &ndim_) == AOTI_TORCH_SUCCESS &&
             aoti_torch_get_sizes(owned, &sizes_) == AOTI_TORCH_SUCCESS &&
             aoti_torch_get_strides(owned, &strides_) == AOTI_TORCH_SUCCESS &&
             aoti_torch_get_dtype(owned, &dtype_) == AOTI_TORCH_SUCCESS &&
             aoti_torch_get_device_type(owned, &device_.type) == AOTI_TORCH_SUCCESS &&
             aoti_torch_get_device_index(owned, &device_.index) == AOTI_TORCH_SUCCESS;
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(present_, other.present_);
  std::swap(fresh_, other.fresh_);
  std::swap(dtype_, other.dtype_);
  std::swap(device_, other.device_);
  std::swap(ndim_, other.ndim_);
  std::swap(sizes_, other.sizes_);
  std::swap(strides_, other.strides_);
  return *this;
}

bool Tensor::same_shape(const Tensor& other) const {
  return ndim_ == other.ndim_ && std::memcmp(sizes_, other.sizes_, sizeof(std::int64_t) * ndim_) == 0;
}

bool Tensor::has_shape(std::initializer_list<std::int64_t> shape) const {
  return ndim_ == static_cast<std::int64_t>(shape.size()) && std::memcmp(sizes_, shape.begin(), sizeof(std::int64_t) * ndim_) == 0;
}

bool Tensor::is_empty() const {
  for (int d = 0; d < ndim(); ++d) {
    if (sizes_[d] == 0) return true;
  }
  return false;
}

bool Tensor::is_contiguous() const {
  std::int64_t expected = 1;
  for (int d = ndim() - 1; d >= 0; --d) {
    if (sizes_[d] == 0) return true;
    if (sizes_[d] == 1) continue;
    if (strides_[d] != expected) return false;
    expected *= sizes_[d];
  }
  return true;
}

std::string Tensor::shape_text() const {
  std::string text = "[";
  for (int d = 0; d < ndim(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(sizes_[d]);
  return text + "]";
}

std::string Tensor::dtype_text() const {
  DType dtype;
  if (from_torch_dtype(dtype_, &dtype)) return ops::dtype_text(dtype);
  // Torch's numbers of the dtypes that someone may pass by mistake.
  static const char* const kNames[] = {"uint8", "int8", "int16",     "int32",     "int64",      "",
                                       "",      "",     "complex32", "complex64", "complex128", "bool"};
  const bool named = dtype_ >= 0 && dtype_ < 12;
  return named ? std::string("torch.") + kNames[dtype_] : "dtype number " + std::to_string(dtype_);
}

std::string Tensor::device_text() const {
  if (device_.is_cpu()) return "cpu";
  if (device_.is_cuda()) return "cuda:" + std::to_string(device_.index);
  if (device_.type == aoti_torch_device_type_meta()) return "meta";
  return "device type " + std::to_string(device_.type);
}

const void* Tensor::data() const {
  const void* pointer = nullptr;
  check(torch_get_const_data_ptr(handle_, &pointer), "give the address of a tensor");
  check_memory(pointer);
  return pointer;
}

void* Tensor::mutable_data() const {
  void* pointer = nullptr;
  check(torch_get_mutable_data_ptr(handle_, &pointer), "give the address of a tensor");
  check_memory(pointer);
  return pointer;
}

void Tensor::check_memory(const void* pointer) const {
  if (fresh_) return;
  std::int64_t held = 0, offset = 0;
  check(aoti_torch_get_storage_size(handle_, &held), "give the size of a storage");
  check(aoti_torch_get_storage_offset(handle_, &offset), "give the place of a tensor in its storage");
  std::uint64_t last = static_cast<std::uint64_t>(offset);
  for (int d = 0; d < ndim(); ++d) {
    if (sizes_[d] == 0) return;
    last += static_cast<std::uint64_t>(sizes_[d] - 1) * static_cast<std::uint64_t>(strides_[d]);
  }
  DType dtype;
  const std::uint64_t item = from_torch_dtype(dtype_, &dtype) ? size_of(dtype) : 1;
  const bool at_null = reinterpret_cast<std::uintptr_t>(pointer) == static_cast<std::uint64_t>(offset) * item;
  if (!at_null && (last + 1) * item <= static_cast<std::uint64_t>(held)) return;
  refuse("normext: a tensor of shape " + shape_text() + " has no memory, or too little");
}

Tensor allocate(int ndim, const std::int64_t* sizes, const std::int64_t* strides, DType dtype, Device device) {
#if !NORMEXT_WITH_CUDA && !NORMEXT_EMULATED
  if (device.is_cuda()) refuse_cuda();
#endif
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(ndim, sizes, strides, torch_dtype(dtype), device.type, device.index, &handle) !=
      AOTI_TORCH_SUCCESS) {
    throw std::bad_alloc();
  }
  Tensor tensor(handle);
  tensor.set_fresh();
  if (device.is_cpu()) {
    std::size_t bytes = size_of(dtype);
    for (int d = 0; d < ndim; ++d) bytes *= static_cast<std::size_t>(sizes[d]);
    cpu::advise_huge_pages(tensor.mutable_data(), bytes);
  }
  if (poisoned()) check(aoti_torch_aten_fill__Scalar(handle, __builtin_nan("")), "fill a tensor");
  return tensor;
}

Tensor allocate_contiguous(int ndim, const std::int64_t* sizes, DType dtype, Device device) {
  constexpr int kInline = 8;
  std::int64_t inlined[kInline];
  std::vector<std::int64_t> spilled;
  std::int64_t* strides = inlined;
  if (ndim > kInline) {
    spilled.resize(ndim);
    strides = spilled.data();
  }
  std::int64_t next = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    strides[d] = next;
    next *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return allocate(ndim, sizes, strides, dtype, device);
}

Tensor allocate(std::initializer_list<std::int64_t> sizes, DType dtype, Device device) {
  return allocate_contiguous(static_cast<int>(sizes.size()), sizes.begin(), dtype, device);
}

Tensor allocate_like(const Tensor& other, DType dtype) {
  return allocate_contiguous(other.ndim(), other.sizes(), dtype, other.device());
}

Tensor allocate_none(const Tensor& like) {
  DType dtype = DType::kFloat32;
  from_torch_dtype(like.dtype_number(), &dtype);
  return allocate({0}, dtype, like.device());
}

void copy(const Tensor& from, const Tensor& to) {
  from.data();  // refuses a tensor without memory; torch reads it
  check(aoti_torch_copy_(to.get(), from.get(), 0), "copy a tensor");
}

void fill_zero(const Tensor& tensor) { check(aoti_torch_zero_(tensor.get()), "fill a tensor"); }

Tensor contiguous_copy(const Tensor& tensor, DType dtype) {
  Tensor result = allocate_like(tensor, dtype);
  copy(tensor, result);
  return result;
}

DeviceGuard::DeviceGuard(Device device) {
  if (!device.is_cuda()) return;
  check(aoti_torch_create_device_guard(device.index, &guard_), "change the current device");
}

void* current_stream(Device device) {
  if (!device.is_cuda()) return nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    refuse("normext: this torch was built without CUDA, so it has no CUDA stream; install a CUDA build of torch");
  }
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device.index, &stream), "give the current CUDA stream");
  return stream;
}

}  // namespace normext::ops
