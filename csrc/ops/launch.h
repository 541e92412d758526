// What every op needs to call a kernel: threads, workspace, and which back end serves a device.
#pragma once

#include <cstddef>

#include "cpu/isa.h"
#include "ops/tensor.h"

namespace normext::ops {

// torch's thread pool, as the CPU kernels see it.
cpu::Parallel thread_pool();

// Memory from torch's allocator, or from the stack for a small need of the CPU [0.4 us less].
class Workspace {
 public:
  Workspace(std::size_t bytes, Device device);
  void* address() { return address_; }

 private:
  alignas(64) unsigned char small_[8192];
  Tensor large_;
  void* address_ = nullptr;
};

inline void* address_or_null(const Tensor& tensor) { return tensor ? tensor.mutable_data() : nullptr; }

// In the emulated build CPU tensors run the CUDA kernels.
inline bool runs_cpu_kernels(Device device) { return device.is_cpu() && !NORMEXT_EMULATED; }

#if NORMEXT_WITH_CUDA || NORMEXT_EMULATED
inline int cuda_index(Device device) { return device.is_cuda() ? device.index : 0; }
#else
[[noreturn]] void refuse_cuda();
#endif

}  // namespace normext::ops
