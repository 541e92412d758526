// Everything a kernel may ask of the machine besides threadIdx.x, blockIdx.x, blockDim.x and gridDim.x: lanes, barriers,
// clusters, vector accesses, 16-bit conversions, programmatic dependent launch. The only file with PTX, but for one line of
// core/portable.h. The emulator (tests/simt) puts its own <cuda_runtime.h> first on the include path; it defines NORMEXT_SIMT, and
// what only a GPU can do has a twin below. Blocks are one-dimensional, their size a multiple of 32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/math.h"
#include "core/types.h"

namespace normext::cuda {

constexpr int kWarpSize = 32;

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x % kWarpSize; }

// The value of lane (own lane xor mask). float, double or int; all 32 lanes take part, always.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// Every thread of the block must come, exited ones included.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// N consecutive elements in at most 16 bytes. 16-bit elements are held two to a word, so that a register holds two.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(N > 0 && (N & (N - 1)) == 0 && sizeof(T) * N <= 16, "a pack is 1, 2, 4, 8 or 16 bytes");
  static constexpr bool kPaired = sizeof(T) == 2 && N >= 2;
  using Unit = std::conditional_t<kPaired, std::uint32_t, T>;
  static constexpr int kUnits = kPaired ? N / 2 : N;
  Unit unit[kUnits];

  __device__ __forceinline__ T get(int i) const {
    if constexpr (kPaired) {
      return T{static_cast<std::uint16_t>(unit[i / 2] >> (i % 2 * 16))};
    } else {
      return unit[i];
    }
  }
};

template <class T>
__device__ __forceinline__ std::uint32_t pair_of(T low, T high) {
  return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
}

// N accesses of one element each, for pointers aligned to T only.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_elements(const T* p) {
  using P = Pack<T, N>;
  P pack;
#pragma unroll
  for (int i = 0; i < P::kUnits; ++i) {
    if constexpr (P::kPaired) {
      pack.unit[i] = pair_of(p[2 * i], p[2 * i + 1]);
    } else {
      pack.unit[i] = p[i];
    }
  }
  return pack;
}
template <class T, int N>
__device__ __forceinline__ void store_elements(T* p, Pack<T, N> pack) {
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = pack.get(i);
}

__device__ __forceinline__ float to_accumulate(float x) { return x; }
__device__ __forceinline__ double to_accumulate(double x) { return x; }

#if defined(NORMEXT_SIMT)

// A shuffle as on a GPU, so that missing lanes are reported.
__device__ __forceinline__ int warp_id() { return shuffle_xor(static_cast<int>(threadIdx.x) / kWarpSize, 0); }

__device__ __forceinline__ unsigned cluster_rank() { return ::simt::cluster_rank(); }
__device__ __forceinline__ unsigned cluster_size() { return ::simt::cluster_size(); }
__device__ __forceinline__ void cluster_arrive() { ::simt::cluster_arrive(); }
__device__ __forceinline__ void cluster_wait() { ::simt::cluster_wait(); }
__device__ __forceinline__ void cluster_barrier() {
  ::simt::cluster_arrive();
  ::simt::cluster_wait();
}
template <class T>
__device__ __forceinline__ T* peer_smem(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(::simt::peer_smem(reinterpret_cast<unsigned char*>(mine), rank));
}
__device__ __forceinline__ unsigned char* dynamic_smem() { return ::simt::dynamic_smem(); }

__device__ __forceinline__ void dependency_wait() {}
__device__ __forceinline__ void launch_dependents() {}

// Copies are made as late as they may be: at the wait for them.
template <int kMost>
class AsyncCopies {
 public:
  template <int kBytes>
  __device__ __forceinline__ void copy(void* to, const void* from) {
    ::simt::require_aligned(to, kBytes, "AsyncCopies");
    ::simt::require_aligned(from, kBytes, "AsyncCopies");
    pending_[count_++] = {to, from, kBytes, group_};
  }
  __device__ __forceinline__ void commit() { ++group_; }
  template <int kGroups>
  __device__ __forceinline__ void wait() {
    int left = 0;
    for (int i = 0; i < count_; ++i) {
      const Copy copy = pending_[i];
      if (copy.group < group_ - kGroups) {
        memcpy(copy.to, copy.from, copy.bytes);
      } else {
        pending_[left++] = copy;
      }
    }
    count_ = left;
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    int bytes, group;
  };
  Copy pending_[kMost];
  int count_ = 0, group_ = 0;
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  ::simt::require_aligned(p, sizeof(Pack<T, N>), "load_pack");
  return load_elements<T, N>(p);
}
template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, Pack<T, N> pack) {
  ::simt::require_aligned(p, sizeof(Pack<T, N>), "store_pack");
  store_elements<T, N>(p, pack);
}

__device__ __forceinline__ float to_accumulate(Half x) { return to_float(x); }
__device__ __forceinline__ float to_accumulate(BFloat16 x) { return to_float(x); }
template <class T>
__device__ __forceinline__ std::uint32_t pair_from_accumulate(float low, float high) {
  return pair_of(FromFloat<T>::convert(low), FromFloat<T>::convert(high));
}
template <class Unit>
__device__ __forceinline__ void forget_derived(Unit&) {}
__device__ __forceinline__ std::int64_t opaque_offset(std::int64_t offset) { return offset; }
template <class T, class A>
__device__ __forceinline__ T from_accumulate(A x) {
  if constexpr (sizeof(T) == 2) {
    return FromFloat<T>::convert(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

#else

// Of the block. All 32 lanes must ask. By shuffle, so that the compiler knows that a warp agrees on it: without, every shuffle in a
// loop over segments gets a second version of itself for divided warps [row_wide_kernel: 3064 -> 2528 instructions].
__device__ __forceinline__ int warp_id() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpSize, 0); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The two halves of a barrier over every thread of every block of the cluster that orders no memory accesses of peers: after
// it, all blocks have started. Whatever stands between the halves overlaps with the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Every thread of every block of the cluster must come. What was written before it, peers see after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same offset in the shared memory of block `rank` of the cluster. Legal between a cluster_barrier() that shows that the
// peer has started and one after which it may exit.
template <class T>
__device__ __forceinline__ T* peer_smem(T* mine, unsigned rank) {
  T* theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
}

// Waits for what the preceding kernel of the stream wrote; returns at once unless launched with LaunchShape::dependent.
__device__ __forceinline__ void dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel start; it may overwrite anything that this thread has not read yet.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#else

__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_barrier() {}
template <class T>
__device__ __forceinline__ T* peer_smem(T* mine, unsigned) {
  return mine;
}
__device__ __forceinline__ void dependency_wait() {}
__device__ __forceinline__ void launch_dependents() {}

#endif

// The block's dynamic shared memory, 16-byte aligned. There is no other shared memory.
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ uint4 normext_smem[];
  return reinterpret_cast<unsigned char*>(normext_smem);
}

template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<1> {
  using type = unsigned char;
};
template <>
struct AccessOf<2> {
  using type = unsigned short;
};
template <>
struct AccessOf<4> {
  using type = unsigned;
};
template <>
struct AccessOf<8> {
  using type = uint2;
};
template <>
struct AccessOf<16> {
  using type = uint4;
};

// Copies by a thread from global to shared memory in the background, in groups that end with commit(). Both ends are aligned to
// kBytes, which are 4, 8 or 16. wait() returns when at most kGroups groups are under way; the thread itself then sees the others.
// At most kMost copies are under way at a time: the emulator counts on it.
template <int kMost>
class AsyncCopies {
 public:
  template <int kBytes>
  __device__ __forceinline__ void copy(void* to, const void* from) {
    const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(place), "l"(from), "n"(kBytes) : "memory");
    }
  }
  __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kGroups>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
  }
};

// One access; p is aligned to the pack. Plain ld/st: p may be in any memory and may alias what the kernel writes.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  using Access = typename AccessOf<sizeof(Pack<T, N>)>::type;
  const Access bits = *reinterpret_cast<const Access*>(p);
  Pack<T, N> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}
template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, Pack<T, N> pack) {
  using Access = typename AccessOf<sizeof(Pack<T, N>)>::type;
  Access bits;
  memcpy(&bits, &pack, sizeof(pack));
  *reinterpret_cast<Access*>(p) = bits;
}

// Nothing computed from the unit is kept in registers across this point: it is computed again instead, which is cheaper than
// the registers that copies of a whole row would hold.
__device__ __forceinline__ void forget_derived(std::uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void forget_derived(float& value) { asm volatile("" : "+f"(value)); }
__device__ __forceinline__ void forget_derived(double& value) { asm volatile("" : "+d"(value)); }
template <class T>
__device__ __forceinline__ void forget_derived(T& half) {
  asm volatile("" : "+h"(half.bits));
}

// The same offset, of which the compiler knows no parts: where it sees a sum with a multiple of the pack, nvcc 13.0 shuffles the
// terms and no longer recognises the words of store_pack as neighbours [4 stores instead of one].
__device__ __forceinline__ std::int64_t opaque_offset(std::int64_t offset) {
  asm("" : "+l"(offset));
  return offset;
}

__device__ __forceinline__ float to_accumulate(Half x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
__device__ __forceinline__ float to_accumulate(BFloat16 x) {
  float value;
  asm("mov.b32 %0, {%1, %2};" : "=f"(value) : "h"(std::uint16_t{0}), "h"(x.bits));
  return value;
}

// Two neighbours of a pack in one instruction.
template <class T>
__device__ __forceinline__ std::uint32_t pair_from_accumulate(float low, float high) {
  std::uint32_t word;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// Rounds to nearest even and keeps subnormals.
template <class T, class A>
__device__ __forceinline__ T from_accumulate(A x) {
  if constexpr (sizeof(T) == 2) {
    const float value = static_cast<float>(x);
    T out;
    if constexpr (std::is_same_v<T, Half>) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    } else {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    }
    return out;
  } else {
    return static_cast<T>(x);
  }
}

#endif

// Element i as Accumulate<T>.
template <class T, int N>
__device__ __forceinline__ Accumulate<T> accumulate_at(const Pack<T, N>& pack, int i) {
  if constexpr (Pack<T, N>::kPaired && std::is_same_v<T, BFloat16>) {
    const std::uint32_t word = pack.unit[i / 2];
    return bits_to_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return to_accumulate(pack.get(i));
  }
}

// values[0..N) rounded to T.
template <class T, int N, class A>
__device__ __forceinline__ Pack<T, N> pack_from_accumulate(const A* values) {
  using P = Pack<T, N>;
  P pack;
#pragma unroll
  for (int i = 0; i < P::kUnits; ++i) {
    if constexpr (P::kPaired) {
      pack.unit[i] = pair_from_accumulate<T>(values[2 * i], values[2 * i + 1]);
    } else {
      pack.unit[i] = from_accumulate<T>(values[i]);
    }
  }
  return pack;
}

}  // namespace normext::cuda
