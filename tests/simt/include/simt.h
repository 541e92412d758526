// What device code asks of the emulated machine. Called on the fiber of the CUDA thread concerned.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(hidden)

namespace simt {

unsigned char* dynamic_smem();

void warp_sync();
// The bits of lane (own lane xor mask); `bytes` only serves to tell unequal calls apart.
std::uint64_t shuffle_xor(std::uint64_t bits, unsigned mask, std::size_t bytes);
void block_barrier();

unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive();
void cluster_wait();
unsigned char* peer_smem(unsigned char* mine, unsigned rank);

// Throws unless p is a multiple of `bytes`; `what` names the access.
void require_aligned(const void* p, std::size_t bytes, const char* what);

// A kernel with its arguments bound: call(context) runs one thread of it.
struct Kernel {
  void (*call)(const void* context);
  const void* context;
};

}  // namespace simt

#pragma GCC visibility pop
