// The runtime calls of the emulator's <cuda_runtime.h>: what a device reports, what a launch may ask for.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"
#include "machine.h"

namespace simt {

namespace {

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; SM counts of one product each.
struct DeviceModel {
  int arch;
  int sm_count;
  int smem_per_block;  // opt-in, bytes
  int max_cluster;
};
constexpr DeviceModel kModels[] = {
    {80, 108, 163 * 1024, 1},  {86, 84, 99 * 1024, 1},     {89, 142, 99 * 1024, 1},
    {90, 132, 227 * 1024, 16}, {100, 148, 227 * 1024, 16}, {120, 188, 99 * 1024, 8},
};
constexpr std::uint64_t kMaxBlocks = 2147483647;
constexpr unsigned kMaxThreads = kMaxWarps * kWarpLanes;
constexpr std::size_t kDefaultSmem = 48 * 1024;
constexpr unsigned kPortableCluster = 8;
constexpr int kCudaVersion = 13000;

thread_local std::string last_detail;

cudaError_t refuse(cudaError_t error, const std::string& detail) {
  last_detail = detail;
  return error;
}

const DeviceModel& model() {
  static const DeviceModel& chosen = []() -> const DeviceModel& {
    const char* text = std::getenv("NORMEXT_SIMT_ARCH");
    const std::string wanted = text == nullptr ? "90" : text;
    std::string known;
    for (const DeviceModel& candidate : kModels) {
      if (std::to_string(candidate.arch) == wanted) return candidate;
      known += (known.empty() ? "" : ", ") + std::to_string(candidate.arch);
    }
    throw std::runtime_error("NORMEXT_SIMT_ARCH: expected one of " + known + ", got " + wanted);
  }();
  return chosen;
}

struct KernelAttributes {
  std::size_t max_smem = kDefaultSmem;
  bool wide_cluster = false;
};
std::mutex attributes_mutex;
std::map<const void*, KernelAttributes> attributes;

KernelAttributes attributes_of(const void* function) {
  const std::lock_guard<std::mutex> lock(attributes_mutex);
  const auto found = attributes.find(function);
  return found == attributes.end() ? KernelAttributes() : found->second;
}

unsigned largest_cluster(const KernelAttributes& kernel) {
  return std::min(static_cast<unsigned>(model().max_cluster), kernel.wide_cluster ? 16u : kPortableCluster);
}

// Empty if the kernel may be launched like this.
std::string objection(const cudaLaunchConfig_t& config, unsigned cluster, const void* function) {
  const auto number = [](std::uint64_t n) { return std::to_string(n); };
  const auto flat = [](const dim3& d) { return d.y == 1 && d.z == 1; };
  const KernelAttributes kernel = attributes_of(function);
  if (!flat(config.gridDim) || !flat(config.blockDim)) return "grids and blocks have one dimension here";
  if (config.gridDim.x == 0 || config.gridDim.x > kMaxBlocks) {
    return number(config.gridDim.x) + " blocks, 1 to 2147483647 are allowed";
  }
  if (config.blockDim.x == 0 || config.blockDim.x > kMaxThreads) {
    return number(config.blockDim.x) + " threads in a block, 1 to 1024 are allowed";
  }
  if (config.dynamicSmemBytes > kernel.max_smem) {
    return number(config.dynamicSmemBytes) + " bytes of shared memory, the kernel may have " + number(kernel.max_smem);
  }
  const unsigned most = largest_cluster(kernel);
  if (cluster == 0 || cluster > most) {
    return "clusters of " + number(cluster) + " blocks, 1 to " + number(most) + " are allowed for this kernel";
  }
  if (config.gridDim.x % cluster != 0) {
    return number(config.gridDim.x) + " blocks are not a multiple of the cluster size " + number(cluster);
  }
  return "";
}

}  // namespace

int& launches() {
  thread_local int count = 0;
  return count;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, Kernel kernel) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    cluster = attribute.val.clusterDim.x;
    if (model().max_cluster == 1) return refuse(cudaErrorInvalidValue, "this device has no clusters");
    if (attribute.val.clusterDim.y != 1 || attribute.val.clusterDim.z != 1) {
      return refuse(cudaErrorInvalidClusterSize, "clusters have one dimension here");
    }
  }
  const std::string bad = objection(config, cluster, function);
  if (!bad.empty()) return refuse(cudaErrorInvalidConfiguration, bad);

  Schedule schedule;
  const char* order = std::getenv("NORMEXT_SIMT_ORDER");
  if (order != nullptr && *order != '\0' && !parse_schedule(order, &schedule)) {
    return refuse(cudaErrorInvalidValue,
                  std::string("NORMEXT_SIMT_ORDER: expected forward, reverse or random:<seed>, got ") + order);
  }
  ++launches();
  Machine::mine().run({config.gridDim.x, config.blockDim.x, config.dynamicSmemBytes, cluster}, schedule, kernel);
  return cudaSuccess;
}

}  // namespace simt

using simt::refuse;

cudaError_t cudaDriverGetVersion(int* version) {
  *version = simt::kCudaVersion;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = simt::kCudaVersion;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device == 0) return cudaSuccess;
  return refuse(cudaErrorInvalidDevice, "device " + std::to_string(device) + ", the emulator has only device 0");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return error;
  const simt::DeviceModel& model = simt::model();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = model.sm_count;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = model.arch / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = model.arch % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = model.smem_per_block;
      break;
    case cudaDevAttrClusterLaunch:
      *value = model.max_cluster > 1;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = simt::model().arch;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const simt::DeviceModel& model = simt::model();
  const std::lock_guard<std::mutex> lock(simt::attributes_mutex);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > model.smem_per_block) {
        return refuse(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory, the device has " +
                                                 std::to_string(model.smem_per_block) + " per block");
      }
      simt::attributes[kernel].max_smem = static_cast<std::size_t>(value);
      break;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      simt::attributes[kernel].wide_cluster = value != 0;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* kernel, const cudaLaunchConfig_t* config) {
  const std::string bad = simt::objection(*config, 1, kernel);
  if (!bad.empty()) return refuse(cudaErrorInvalidConfiguration, bad);
  *blocks = static_cast<int>(simt::largest_cluster(simt::attributes_of(kernel)));
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return simt::last_detail.c_str(); }
