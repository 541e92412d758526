// The only place that launches kernels and asks the CUDA runtime about the machine. Every call is checked.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "core/error.h"

namespace normext::cuda {

struct LaunchShape {
  std::int64_t blocks;
  int threads;             // a multiple of 32
  std::size_t smem = 0;    // bytes of dynamic shared memory
  int cluster = 1;         // blocks per cluster; divides `blocks`
  bool dependent = false;  // may start before the preceding kernel of the stream ends; the kernel calls dependency_wait()
};

struct DeviceLimits {
  int sm_count;
  int smem_per_block;  // bytes, after the opt-in that launch() makes
  int arch;            // 90 = sm_90
  int max_cluster;     // blocks; 1 where there are no clusters
};

[[noreturn]] inline void fail_cuda(cudaError_t error, const char* what) {
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    int runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    fail("normext was built for CUDA " + version(runtime) + ", but " +
         (driver == 0 ? std::string("no NVIDIA driver is installed; install one.")
                      : "the NVIDIA driver supports only CUDA " + version(driver) +
                            "; install a newer driver or build normext with an older toolkit."));
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string arch = std::to_string(major * 10 + minor);
    if (major < 8) fail("normext needs a GPU of sm_80 or newer, this is an sm_" + arch + ".");
    fail("normext was not built for this GPU, an sm_" + arch + "; build it again with NORMEXT_CUDA_ARCHS=\"" + arch + "\".");
  }
  fail(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error) + " (error " +
       std::to_string(static_cast<int>(error)) + ")");
}

// Throws, and clears the error so that the next checked call of anyone in the process does not report it again.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  fail_cuda(error, what);
}

constexpr std::size_t kDefaultSmem = 48 * 1024;  // without an opt-in
constexpr int kPortableCluster = 8;

template <int = 0>
__global__ void cluster_probe() {}

// The largest cluster of blocks that take a multiprocessor each: 16 on data-centre parts, less on others and on slices of one
// (MIG). Only the driver knows; where it does not say, the portable size holds.
inline int query_max_cluster(int device, int smem_per_block) {
  int current = device;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  const void* probe = reinterpret_cast<const void*>(&cluster_probe<>);
  cudaFuncAttributes code = {};
  const cudaError_t described = cudaFuncGetAttributes(&code, probe);
  // Code for an older architecture that the driver translated knows no clusters (intrinsics.cuh), whatever the device can do.
  const bool possible = described == cudaSuccess && code.ptxVersion >= 90;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(16);
  config.blockDim = dim3(512);
  config.dynamicSmemBytes = static_cast<std::size_t>(smem_per_block);
  int size = 0;
  const bool known = possible &&
                     cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_per_block) == cudaSuccess &&
                     cudaFuncSetAttribute(probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                     cudaOccupancyMaxPotentialClusterSize(&size, probe, &config) == cudaSuccess;
  if (!known) cudaGetLastError();
  if (current != device) check_cuda(cudaSetDevice(current), "cudaSetDevice");
  check_cuda(described, "cudaFuncGetAttributes");
  if (!possible) return 1;
  return known && size >= 1 ? size : kPortableCluster;
}

// Cached per device; makes CUDA calls only on first use.
inline const DeviceLimits& device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> cache;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find(device);
  if (found != cache.end()) return found->second;

  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  DeviceLimits limits;
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  limits.smem_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.arch = attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
  limits.max_cluster = attribute(cudaDevAttrClusterLaunch) != 0 ? query_max_cluster(device, limits.smem_per_block) : 1;
  return cache.emplace(device, limits).first->second;
}

// Whether the kernels that run on the current device contain the wait that a dependent launch needs: code for sm_90 and later.
inline bool knows_dependent_launch() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device_limits(device).max_cluster > 1;
}

// Shared memory above 48 KB and clusters above 8 blocks are opt-ins of the kernel, once per device.
inline void opt_in(const void* kernel, const LaunchShape& shape) {
  const bool more_smem = shape.smem > kDefaultSmem;
  const bool wide_cluster = shape.cluster > kPortableCluster;
  if (!more_smem && !wide_cluster) return;

  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const int smem_per_block = device_limits(device).smem_per_block;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> smem_done, cluster_done;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<const void*, int> key(kernel, device);
  if (more_smem && smem_done.count(key) == 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_per_block), "cudaFuncSetAttribute");
    smem_done.insert(key);
  }
  if (wide_cluster && cluster_done.count(key) == 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
    cluster_done.insert(key);
  }
}

// Launches on `stream` of the current device; no blocks, no launch. Arguments are converted to the kernel's parameter types.
template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchShape& shape, void* stream, const A&... args) {
  if (shape.blocks == 0) return;
  if (shape.blocks < 0 || shape.blocks > std::numeric_limits<std::int32_t>::max()) {
    fail("cannot launch " + std::to_string(shape.blocks) + " blocks: at most 2147483647 fit a grid");
  }
  opt_in(reinterpret_cast<const void*>(kernel), shape);

  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (shape.dependent && knows_dependent_launch()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.smem;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "a kernel launch");
}

}  // namespace normext::cuda
