// The dynamic shared memory of one block.
#pragma once

#include <cstddef>

namespace simt {

// Exactly as long as asked for, so that AddressSanitizer sees every overrun; elsewhere a canary on both sides sees writes.
class SharedMemory {
 public:
  ~SharedMemory() { release(); }
  void resize(std::size_t bytes);
  void poison();
  bool intact() const;
  unsigned char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void release();
  unsigned char* allocation_ = nullptr;
  unsigned char* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace simt
