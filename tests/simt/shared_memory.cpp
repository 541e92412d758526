#include "shared_memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "fiber.h"

namespace simt {

namespace {

constexpr std::size_t kCanaryBytes = 128;
constexpr unsigned char kCanary = 0xc5;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point format, -1 as an integer

}  // namespace

void SharedMemory::resize(std::size_t bytes) {
  if (allocation_ != nullptr && bytes == size_) return;
  release();
#if defined(SIMT_ASAN)
  constexpr std::size_t kMargin = 0;
#else
  constexpr std::size_t kMargin = kCanaryBytes;
#endif
  // 16-byte aligned and no more, so that nobody comes to rely on more.
  void* memory = nullptr;
  if (posix_memalign(&memory, 32, 16 + bytes + 2 * kMargin) != 0) throw std::bad_alloc();
  allocation_ = static_cast<unsigned char*>(memory);
  data_ = allocation_ + 16 + kMargin;
  size_ = bytes;
  std::memset(data_ - kMargin, kCanary, kMargin);
  std::memset(data_ + size_, kCanary, kMargin);
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(allocation_, 16);
#endif
}

void SharedMemory::release() {
#if defined(SIMT_ASAN)
  if (allocation_ != nullptr) __asan_unpoison_memory_region(allocation_, 16);
#endif
  std::free(allocation_);
  allocation_ = nullptr;
}

void SharedMemory::poison() { std::memset(data_, kPoison, size_); }

bool SharedMemory::intact() const {
#if !defined(SIMT_ASAN)
  for (std::size_t i = 0; i < kCanaryBytes; ++i) {
    if (data_[size_ + i] != kCanary || data_[-1 - static_cast<std::ptrdiff_t>(i)] != kCanary) return false;
  }
#endif
  return true;
}

}  // namespace simt
