#include "ops/launch.h"

#include <pthread.h>

#include <cstring>

namespace normext::ops {
namespace {

// Bodies do not throw.
struct Range {
  void (*body)(void*, std::int64_t, std::int64_t);
  void* context;
};

void run_range(std::int64_t begin, std::int64_t end, void* context) {
  const auto* range = static_cast<const Range*>(context);
  range->body(range->context, begin, end);
}

void run_parallel(std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* context) {
  Range range{body, context};
  if (torch_parallel_for(0, tasks, 1, &run_range, &range) != AOTI_TORCH_SUCCESS) {
    refuse("normext: torch's thread pool failed");
  }
}

// Set in a forked child: the threads of torch's OpenMP pool do not exist there, and waking them would wait for ever.
bool forked = false;
const bool watched = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;

}  // namespace

cpu::Parallel thread_pool() {
  if (!watched || forked) return {};
  std::uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != AOTI_TORCH_SUCCESS || threads <= 1) return {};
  return {static_cast<int>(threads), &run_parallel};
}

Workspace::Workspace(std::size_t bytes, Device device) {
  if (bytes == 0) return;
  if (device.is_cpu() && bytes <= sizeof(small_)) {
    if (poisoned()) std::memset(small_, 0xff, sizeof(small_));  // NaN in every float type
    address_ = small_;
    return;
  }
  large_ = allocate({static_cast<std::int64_t>((bytes + 3) / 4)}, DType::kFloat32, device);
  address_ = large_.mutable_data();
}

#if !NORMEXT_WITH_CUDA && !NORMEXT_EMULATED
void refuse_cuda() {
  refuse("normext was built without CUDA and got a CUDA tensor: install the CUDA toolkit (nvcc) and build normext again");
}
#endif

}  // namespace normext::ops
