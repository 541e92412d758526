#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// Saves the callee-saved registers on the old stack and takes them from the new one. The first switch to a fiber "returns"
// to normext_simt_start with the entry function and its argument in two of them. Fibers mostly switch at the same place in the
// code, so a plain return is what the processor's return-address predictor expects [13 ns per switch in a kernel; 18 with a jump].
#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl normext_simt_switch
  .hidden normext_simt_switch
  .type normext_simt_switch, @function
normext_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
  .size normext_simt_switch, .-normext_simt_switch

  .globl normext_simt_start
  .hidden normext_simt_start
  .type normext_simt_start, @function
normext_simt_start:
  .cfi_startproc
  .cfi_undefined rip
  movq %r13, %rdi
  callq *%r12
  ud2
  .cfi_endproc
  .size normext_simt_start, .-normext_simt_start
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .p2align 4
  .globl normext_simt_switch
  .hidden normext_simt_switch
  .type normext_simt_switch, %function
normext_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size normext_simt_switch, .-normext_simt_switch

  .globl normext_simt_start
  .hidden normext_simt_start
  .type normext_simt_start, %function
normext_simt_start:
  .cfi_startproc
  .cfi_undefined x30
  mov x0, x20
  blr x19
  brk #1
  .cfi_endproc
  .size normext_simt_start, .-normext_simt_start
)");
#else
#error "the emulator has a context switch for x86-64 and aarch64 only"
#endif

extern "C" __attribute__((visibility("hidden"))) void normext_simt_start();

namespace simt {

namespace {

constexpr std::size_t kGuardBytes = 64 * 1024;  // a page of any size in use
constexpr std::size_t kStackStride = kStackBytes + kGuardBytes;
constexpr std::size_t kSlabBytes = 32 * kStackStride;

}  // namespace

void make_fiber(Fiber& fiber, unsigned char* stack, unsigned colour, void (*entry)(void*), void* argument) {
  const auto address = [](auto p) { return reinterpret_cast<std::uintptr_t>(p); };
  auto* top = reinterpret_cast<std::uintptr_t*>(stack + kStackBytes - (colour * 7 % 61) * 64);
#if defined(__x86_64__)
  top -= 7;  // r15 r14 r13 r12 rbx rbp rip
  top[0] = top[1] = top[4] = top[5] = 0;
  top[2] = address(argument);
  top[3] = address(entry);
  top[6] = address(&normext_simt_start);
#else
  top -= 20;  // x19..x30, d8..d15
  for (int i = 0; i < 20; ++i) top[i] = 0;
  top[0] = address(entry);
  top[1] = address(argument);
  top[11] = address(&normext_simt_start);
#endif
  fiber.saved_stack_pointer = top;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(stack, kStackBytes);
  fiber.fake_stack = nullptr;
  fiber.bottom = stack;
  fiber.size = kStackBytes;
#endif
}

WarpStacks::WarpStacks() {
  void* slab = mmap(nullptr, kSlabBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (slab == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<unsigned char*>(slab);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mprotect(stack(lane), kStackBytes, PROT_READ | PROT_WRITE) != 0) {
      munmap(slab, kSlabBytes);
      throw std::bad_alloc();
    }
  }
}

WarpStacks::~WarpStacks() {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(base_, kSlabBytes);
#endif
  munmap(base_, kSlabBytes);
}

unsigned char* WarpStacks::stack(unsigned lane) const { return base_ + lane * kStackStride + kGuardBytes; }

}  // namespace simt
