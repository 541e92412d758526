// Torch as the ops see it: the C functions of LibTorch's stable ABI, behind one move-only tensor. Only csrc/ops may include this.
//
// A Tensor owns one reference and reads shape, strides, dtype and device once, when an op is entered; nothing is shared-counted
// on our side [torch::stable::Tensor allocates a control block per argument]. Nothing here throws but refuse() and allocate().
#pragma once

// The oldest torch whose ABI is used; built against any newer one, the binary still loads in this one.
#if !defined(TORCH_TARGET_VERSION)
#define TORCH_TARGET_VERSION 0x020a000000000000ULL
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/types.h"

namespace normext::ops {

// The one place where ops throw. std::runtime_error becomes RuntimeError in Python, std::invalid_argument ValueError,
// std::out_of_range IndexError; the text arrives as it is.
template <class E = std::runtime_error>
[[noreturn]] void refuse(const std::string& sentence) {
  throw E(sentence);
}

struct Device {
  std::int32_t type = 0;
  std::int32_t index = -1;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
};

// torch's number for a dtype of ours, and back. Returns false for a dtype no kernel takes.
std::int32_t torch_dtype(DType dtype);
bool from_torch_dtype(std::int32_t number, DType* dtype);
std::string dtype_text(DType dtype);  // torch.float32

class Tensor {
 public:
  Tensor() = default;  // absent: what None becomes
  explicit Tensor(AtenTensorHandle owned) noexcept;
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return present_; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int ndim() const { return static_cast<int>(ndim_); }
  const std::int64_t* sizes() const { return sizes_; }
  const std::int64_t* strides() const { return strides_; }
  bool has_dtype(DType dtype) const { return dtype_ == torch_dtype(dtype); }
  std::int32_t dtype_number() const { return dtype_; }
  Device device() const { return device_; }
  bool same_shape(const Tensor& other) const;
  bool has_shape(std::initializer_list<std::int64_t> shape) const;
  bool is_contiguous() const;
  bool is_empty() const;
  std::string shape_text() const;   // [2, 3]
  std::string dtype_text() const;   // torch.float32; a number for a dtype we do not know
  std::string device_text() const;  // cpu, cuda:0

  const void* data() const;  // leaves a lazily copied tensor shared
  void* mutable_data() const;
  void set_fresh() { fresh_ = true; }

 private:
  // Storages can be freed or shrunk under a tensor, as sharded training does. Kernels would read there, or take null for absent.
  void check_memory(const void* pointer) const;

  AtenTensorHandle handle_ = nullptr;
  bool present_ = false;
  bool fresh_ = false;  // from allocate(): nobody has freed its memory
  std::int32_t dtype_ = 0;
  Device device_;
  std::int64_t ndim_ = 0;
  std::int64_t* sizes_ = nullptr;    // borrowed from the tensor
  std::int64_t* strides_ = nullptr;  // borrowed from the tensor
};

// `Tensor?` in a schema: the same, and may be absent.
struct OptionalTensor : Tensor {
  using Tensor::Tensor;
  const Tensor* or_null() const { return *this ? this : nullptr; }
};

bool poisoned();  // NORMEXT_POISON=1

// Fresh memory from torch's allocator; std::bad_alloc when there is none. With NORMEXT_POISON=1 every element is NaN, so that
// an element no kernel wrote cannot pass for a result.
Tensor allocate(int ndim, const std::int64_t* sizes, const std::int64_t* strides, DType dtype, Device device);
Tensor allocate_contiguous(int ndim, const std::int64_t* sizes, DType dtype, Device device);
Tensor allocate(std::initializer_list<std::int64_t> sizes, DType dtype, Device device);  // contiguous
Tensor allocate_like(const Tensor& other, DType dtype);                                  // contiguous, shape of `other`
Tensor allocate_none(const Tensor& like);                                                // shape [0]: a result not asked for

void copy(const Tensor& from, const Tensor& to);
void fill_zero(const Tensor& tensor);
Tensor contiguous_copy(const Tensor& tensor, DType dtype);

// Makes a CUDA device current while it lives. Torch is asked to even where it says that the device is current already: it may have
// put off telling CUDA.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device);
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// The cudaStream_t on which torch enqueues work now.
void* current_stream(Device device);

}  // namespace normext::ops
