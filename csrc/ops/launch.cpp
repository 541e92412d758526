#include "ops/launch.h"

#include <pthread.h>

#include <cstdlib>
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

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kGuarded = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr bool kGuarded = true;
#else
constexpr bool kGuarded = false;
#endif
#else
constexpr bool kGuarded = false;
#endif

// Calls that a thread makes while it ends, from destructors of its own, come after that of its scratch memory.
thread_local bool scratch_ended = false;

// A stack of workspaces. Pages that no call has needed yet are only reserved.
class Scratch {
 public:
  ~Scratch() {
    scratch_ended = true;
    std::free(base_);
  }

  // Null where it does not fit.
  void* take(std::size_t bytes, std::size_t* taken) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > kBytes - used_) return nullptr;
    if (base_ == nullptr) base_ = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, kBytes));
    if (base_ == nullptr) return nullptr;
    used_ += bytes;
    *taken = bytes;
    return base_ + used_ - bytes;
  }

  void give_back(std::size_t bytes) { used_ -= bytes; }

 private:
  static constexpr std::size_t kAlignment = 64;
  static constexpr std::size_t kBytes = kGuarded ? 0 : 1 << 20;  // an address sanitizer watches the allocator's memory only
  unsigned char* base_ = nullptr;
  std::size_t used_ = 0;
};
thread_local Scratch scratch;

}  // namespace

cpu::Parallel thread_pool() {
  if (!watched || forked) return {};
  std::uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != AOTI_TORCH_SUCCESS || threads <= 1) return {};
  return {static_cast<int>(threads), &run_parallel};
}

Workspace::Workspace(std::size_t bytes, Device device) {
  if (bytes == 0) return;
  if (device.is_cpu() && !scratch_ended) address_ = scratch.take(bytes, &scratch_bytes_);
  if (address_ != nullptr) {
    if (poisoned()) std::memset(address_, 0xff, scratch_bytes_);  // NaN in every float type
    return;
  }
  large_ = allocate({static_cast<std::int64_t>((bytes + 3) / 4)}, DType::kFloat32, device);
  address_ = large_.mutable_data();
}

Workspace::~Workspace() {
  if (scratch_bytes_ != 0) scratch.give_back(scratch_bytes_);
}

#if !NORMEXT_WITH_CUDA && !NORMEXT_EMULATED
void refuse_cuda() {
  refuse("normext was built without CUDA and got a CUDA tensor: install the CUDA toolkit (nvcc) and build normext again");
}
#endif

}  // namespace normext::ops
