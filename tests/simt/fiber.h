// A stack to switch to and back: six or twenty saved registers, no system call. Fibers never leave the thread that made them.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(SIMT_ASAN)
constexpr std::size_t kStackBytes = 256 * 1024;  // red zones, and reports are printed on the fiber
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

struct Fiber {
  void* saved_stack_pointer = nullptr;
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
#endif
};

// Prepares a fiber that calls entry(argument) on its first switch; entry calls fiber_entered() first and never returns.
// `colour` staggers the stacks, which would otherwise all compete for the same cache sets.
void make_fiber(Fiber& fiber, unsigned char* stack, unsigned colour, void (*entry)(void*), void* argument);

extern "C" __attribute__((visibility("hidden"))) void normext_simt_switch(void** save, void* load);

inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  normext_simt_switch(&from.saved_stack_pointer, to.saved_stack_pointer);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  normext_simt_switch(&from.saved_stack_pointer, to.saved_stack_pointer);
#endif
}

// `caller`: the fiber of the thread's own stack, whose bounds become known when the first fiber is entered from it.
inline void fiber_entered([[maybe_unused]] Fiber& caller) {
#if defined(SIMT_ASAN)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (caller.bottom == nullptr) {
    caller.bottom = bottom;
    caller.size = size;
  }
#endif
}

// Memory for 32 stacks, each with a guard page below it; pages are committed on first use.
class WarpStacks {
 public:
  WarpStacks();
  ~WarpStacks();
  WarpStacks(const WarpStacks&) = delete;
  WarpStacks& operator=(const WarpStacks&) = delete;
  unsigned char* stack(unsigned lane) const;  // lowest usable byte

 private:
  unsigned char* base_;
};

}  // namespace simt
