// What every op needs to call a kernel: threads, workspace, and which back end serves a device.
#pragma once

#include <cstddef>

#include "cpu/isa.h"
#include "ops/tensor.h"

namespace normext::ops {

// torch's thread pool, as the CPU kernels see it.
cpu::Parallel thread_pool();

// Memory for the duration of a call. On the CPU a stretch of the thread's scratch memory, where that suffices: it is mapped and in
// the cache. Otherwise from torch's allocator. Scratch memory, at most 1 MB, stays until its thread ends. Workspaces of a thread
// end in the reverse order of their beginnings.
class Workspace {
 public:
  Workspace(std::size_t bytes, Device device);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* address() { return address_; }

 private:
  std::size_t scratch_bytes_ = 0;
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
