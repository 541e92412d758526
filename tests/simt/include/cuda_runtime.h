// The part of CUDA that csrc/cuda uses, for g++: qualifiers, built-in variables and functions, and the runtime calls of
// launch.cuh. Nothing has C linkage, so that a real CUDA runtime in the same process is left alone. Whatever is missing here
// does not compile: kernels keep to the vocabulary of cuda/intrinsics.cuh.
#pragma once

#define NORMEXT_SIMT 1

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

#pragma GCC visibility push(hidden)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern __thread uint3 threadIdx __attribute__((tls_model("initial-exec")));
extern __thread uint3 blockIdx __attribute__((tls_model("initial-exec")));
extern __thread uint3 blockDim __attribute__((tls_model("initial-exec")));
extern __thread uint3 gridDim __attribute__((tls_model("initial-exec")));

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp() { simt::warp_sync(); }

// All 32 lanes only: the emulator has no partial masks.
template <class T>
inline T __shfl_xor_sync(unsigned members, T value, int mask) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(std::uint64_t), "shuffle of a number");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::shuffle_xor(bits, members == 0xffffffffu ? static_cast<unsigned>(mask) : ~0u, sizeof(T));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Numbers as in the real header.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
struct cudaFuncAttributes {
  int ptxVersion;  // 90 = compute_90: what the kernel was compiled from
};
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaGetLastError();
// What went wrong in this thread's last call that returned `error`, with the figures.
const char* cudaGetErrorString(cudaError_t error);

namespace simt {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, Kernel kernel);
int& launches();  // that this thread has made
}  // namespace simt

// Runs the whole grid before it returns. A bad launch is an error code, as on a GPU; a fault of the kernel (divergence, misaligned
// access, shared memory overrun) is a std::runtime_error.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  const auto thread = [kernel, parameters = std::tuple<P...>(std::forward<A>(args)...)] { std::apply(kernel, parameters); };
  using Thread = std::remove_const_t<decltype(thread)>;
  return simt::launch(*config, reinterpret_cast<const void*>(kernel),
                      {[](const void* context) { (*static_cast<const Thread*>(context))(); }, &thread});
}

#pragma GCC visibility pop
