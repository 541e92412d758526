// Proves the emulator of tests/simt: right kernels give right results in every order, wrong ones are caught in every order.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"

namespace {

using namespace normext;
using namespace normext::cuda;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// The launch must throw, and its text must contain every part.
void expect_fault(const std::string& name, const std::vector<std::string>& parts, const std::function<void()>& launches) {
  try {
    launches();
  } catch (const std::exception& error) {
    for (const std::string& part : parts) {
      expect(std::string(error.what()).find(part) != std::string::npos,
             name + ": expected \"" + part + "\" in \"" + error.what() + "\"");
    }
    return;
  }
  expect(false, name + ": not reported");
}

const std::vector<std::string> kOrders = {"forward", "reverse", "random:0", "random:1", "random:12345"};

void in_every_order(const std::function<void(const std::string&)>& body) {
  for (const std::string& order : kOrders) {
    setenv("NORMEXT_SIMT_ORDER", order.c_str(), 1);
    body(order);
  }
  unsetenv("NORMEXT_SIMT_ORDER");
}

// a block reduction, with barriers that can be left out

enum Omit { kNothing, kBarrierBeforeRead, kBarrierBeforeOverwrite, kPeerBarrierAtEnd, kPeerBarrierBeforeRead };

template <Omit kOmit>
__device__ float block_sum(float value, float* partial) {
  for (int mask = 16; mask >= 1; mask /= 2) value += shuffle_xor(value, mask);
  if (lane_id() == 0) partial[threadIdx.x / kWarpSize] = value;
  if (kOmit != kBarrierBeforeRead) block_barrier();
  float sum = 0.0f;
  for (unsigned w = 0; w < blockDim.x / kWarpSize; ++w) sum += partial[w];
  return sum;
}

// Two reductions over one piece of shared memory, as in LayerNorm.
template <Omit kOmit>
__global__ void two_sums(const float* input, float* output) {
  float* partial = reinterpret_cast<float*>(dynamic_smem());
  const float x = input[blockIdx.x * blockDim.x + threadIdx.x];
  const float sum = block_sum<kOmit>(x, partial);
  if (kOmit != kBarrierBeforeOverwrite) block_barrier();
  const float squares = block_sum<kNothing>(x * x + sum, partial);
  output[blockIdx.x * blockDim.x + threadIdx.x] = squares;
}

template <Omit kOmit>
bool two_sums_right(int blocks, int threads) {
  const std::size_t n = static_cast<std::size_t>(blocks) * static_cast<std::size_t>(threads);
  std::vector<float> input(n), output(n, -1.0f);
  for (std::size_t i = 0; i < n; ++i) input[i] = static_cast<float>(i * 7 % 13);
  launch(two_sums<kOmit>, {blocks, threads, threads / 32 * sizeof(float)}, nullptr, input.data(), output.data());
  for (int b = 0; b < blocks; ++b) {
    const float* x = &input[static_cast<std::size_t>(b) * threads];
    float sum = 0.0f;
    float squares = 0.0f;
    for (int t = 0; t < threads; ++t) sum += x[t];
    for (int t = 0; t < threads; ++t) squares += x[t] * x[t] + sum;
    for (int t = 0; t < threads; ++t) {
      if (output[static_cast<std::size_t>(b) * threads + t] != squares) return false;
    }
  }
  return true;
}

void test_barriers() {
  in_every_order([](const std::string& order) {
    for (const int threads : {32, 64, 256, 1024}) {
      expect(two_sums_right<kNothing>(5, threads), "two sums, " + std::to_string(threads) + " threads, " + order);
    }
    expect(!two_sums_right<kBarrierBeforeRead>(3, 256), "missing barrier before a read not caught, " + order);
    expect(!two_sums_right<kBarrierBeforeOverwrite>(3, 256), "missing barrier before an overwrite not caught, " + order);
  });
}

// exchange within a warp through shared memory

template <bool kSync>
__global__ void rotate_lanes(int* output) {
  int* slot = reinterpret_cast<int*>(dynamic_smem());
  for (int round = 0; round < 3; ++round) {
    slot[threadIdx.x] = static_cast<int>(threadIdx.x) + round;
    if (kSync) warp_sync();
    output[threadIdx.x] = slot[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
    if (kSync) warp_sync();
  }
}

template <bool kSync>
bool rotate_right() {
  std::vector<int> output(64, -1);
  launch(rotate_lanes<kSync>, {1, 64, 256}, nullptr, output.data());
  for (int t = 0; t < 64; ++t) {
    if (output[static_cast<std::size_t>(t)] != t / 32 * 32 + (t + 1) % 32 + 2) return false;
  }
  return true;
}

template <class T>
__global__ void shuffle_all(T* output) {
  T value = static_cast<T>(threadIdx.x) / static_cast<T>(2);
  for (int mask = 1; mask < 32; ++mask) output[mask * 64 + static_cast<int>(threadIdx.x)] = shuffle_xor(value, mask);
}

template <class T>
bool shuffles_right() {
  std::vector<T> output(32 * 64);
  launch(shuffle_all<T>, {1, 64}, nullptr, output.data());
  for (int mask = 1; mask < 32; ++mask) {
    for (int t = 0; t < 64; ++t) {
      if (output[static_cast<std::size_t>(mask * 64 + t)] != static_cast<T>(t ^ mask) / static_cast<T>(2)) return false;
    }
  }
  return true;
}

void test_warps() {
  in_every_order([](const std::string& order) {
    expect(rotate_right<true>(), "exchange within a warp, " + order);
    expect(!rotate_right<false>(), "missing warp_sync not caught, " + order);
    expect(shuffles_right<float>() && shuffles_right<double>() && shuffles_right<int>(), "shuffle_xor, " + order);
  });
}

// faults of the kernel

__global__ void divergent_barrier() {
  if (threadIdx.x != 70) block_barrier();
  warp_sync();
}
__global__ void barrier_for_some_warps() {
  if (threadIdx.x < 96) block_barrier();
}
__global__ void exit_before_barrier() {
  if (threadIdx.x == 5) return;
  block_barrier();
}
__global__ void missing_lane(float* output) {
  if (threadIdx.x != 40) output[threadIdx.x] = shuffle_xor(1.0f, 16);
}
__global__ void lane_at_barrier(float* output) {
  if (threadIdx.x % 32 < 16) output[threadIdx.x] = shuffle_xor(1.0f, 16);
  block_barrier();
}
__global__ void different_shuffles(float* output) { output[threadIdx.x] = shuffle_xor(1.0f, threadIdx.x < 8 ? 1 : 2); }
__global__ void write_smem(int index) {
  if (threadIdx.x == 0) reinterpret_cast<float*>(dynamic_smem())[index] = 1.0f;
}
template <int N>
__global__ void copy_packs(const float* input, float* output) {
  store_pack<float, N>(output + threadIdx.x * N, load_pack<float, N>(input + threadIdx.x * N));
}

void test_faults() {
  std::vector<float> buffer(256);
  in_every_order([&](const std::string& order) {
    expect_fault("divergent barrier, " + order, {"warp_sync", "1 of 32 lanes of warp 2 of block", "31 wait at block_barrier"},
                 [] { launch(divergent_barrier, {2, 128}, nullptr); });
    expect_fault("barrier for some warps, " + order, {"divergent block_barrier: 96 of 128 threads", "32 have exited"},
                 [] { launch(barrier_for_some_warps, {2, 128}, nullptr); });
    expect_fault("exit before a barrier, " + order, {"divergent block_barrier: 63 of 64 threads of block", "1 have exited"},
                 [] { launch(exit_before_barrier, {2, 64}, nullptr); });
    expect_fault("missing lane, " + order, {"shuffle_xor of 4 bytes with mask 16: 31 of 32 lanes of warp 1", "1 have exited"},
                 [&] { launch(missing_lane, {1, 64}, nullptr, buffer.data()); });
    expect_fault("lane at a barrier, " + order, {"16 of 32 lanes", "16 wait at block_barrier"},
                 [&] { launch(lane_at_barrier, {1, 64}, nullptr, buffer.data()); });
    expect_fault("different shuffles, " + order, {"divergent warp", "mask 1", "mask 2"},
                 [&] { launch(different_shuffles, {1, 64}, nullptr, buffer.data()); });
    expect_fault("half a warp, " + order, {"16 of 32 lanes", "the block ends after lane 15"},
                 [&] { launch(missing_lane, {1, 16}, nullptr, buffer.data()); });
    expect(two_sums_right<kNothing>(3, 128), "a right kernel after faults, " + order);
  });
  alignas(16) float memory[264] = {};
  float* const aligned = memory;
  for (int i = 0; i < 132; ++i) aligned[i] = static_cast<float>(i);
  launch(copy_packs<4>, {1, 32}, nullptr, aligned, aligned + 132);
  launch(copy_packs<2>, {1, 32}, nullptr, aligned + 66, aligned + 200);
  bool copied = true;
  for (int i = 0; i < 64; ++i) copied &= aligned[132 + i] == aligned[i] && aligned[200 + i] == aligned[66 + i];
  expect(copied, "copies by packs of 16 and 8 bytes");
  expect_fault("misaligned load_pack", {"load_pack of 16 bytes", "4 bytes past alignment", "thread 0"},
               [&] { launch(copy_packs<4>, {1, 32}, nullptr, aligned + 1, aligned); });
  expect_fault("misaligned store_pack", {"store_pack of 8 bytes", "4 bytes past alignment"},
               [&] { launch(copy_packs<2>, {1, 32}, nullptr, aligned, aligned + 1); });
}

// Runs `body` in a child process and says how it ended: the first line of the fault, or "ended well".
std::string in_child(const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    try {
      body();
      std::fprintf(stderr, "ended well");
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s", error.what());
    }
    std::fflush(stderr);
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char chunk[512];
  for (ssize_t n; (n = read(ends[0], chunk, sizeof(chunk))) > 0;) text.append(chunk, static_cast<std::size_t>(n));
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return text;
}

void test_smem_bounds() {
  launch(write_smem, {2, 32, 100}, nullptr, 24);
  for (const int index : {25, -1}) {
    const std::string text = in_child([index] { launch(write_smem, {2, 32, 100}, nullptr, index); });
    expect(text.find("outside its 100 bytes of shared memory") != std::string::npos ||
               text.find("AddressSanitizer") != std::string::npos,
           "shared memory overrun at " + std::to_string(index) + ": " + text);
  }
}

// poisoned shared memory

__global__ void read_smem(float* output) {
  float* smem = reinterpret_cast<float*>(dynamic_smem());
  output[blockIdx.x * blockDim.x + threadIdx.x] = smem[threadIdx.x];
  smem[threadIdx.x] = 1.0f;
}

void test_poison() {
  std::vector<float> output(4 * 32, 0.0f);
  launch(read_smem, {4, 32, 128}, nullptr, output.data());
  bool all_nan = true;
  for (const float x : output) all_nan &= std::isnan(x);
  expect(all_nan, "shared memory starts as NaN in every block");
}

// launch limits

__global__ void nothing() {}
__global__ void unprepared() {}

void test_limits() {
  launch(nothing, {0, 32}, nullptr);
  launch(nothing, {1, 1024, 227 * 1024}, nullptr);
  expect_fault("smem", {"232449 bytes of shared memory", "232448"}, [] { launch(nothing, {1, 32, 227 * 1024 + 1}, nullptr); });
  expect_fault("oversized block", {"1025 threads"}, [] { launch(nothing, {1, 1025}, nullptr); });
  expect_fault("empty block", {"0 threads"}, [] { launch(nothing, {1, 0}, nullptr); });
  expect_fault("oversized grid", {"2147483648 blocks"}, [] { launch(nothing, {std::int64_t{1} << 31, 32}, nullptr); });
  expect_fault("cluster of 32", {"clusters of 32 blocks", "1 to 16"}, [] { launch(nothing, {32, 32, 0, 32}, nullptr); });
  expect_fault("cluster and grid", {"6 blocks are not a multiple of the cluster size 4"},
               [] { launch(nothing, {6, 32, 0, 4}, nullptr); });
  setenv("NORMEXT_SIMT_ORDER", "sideways", 1);
  expect_fault("unknown order", {"NORMEXT_SIMT_ORDER", "got sideways"}, [] { launch(nothing, {1, 32}, nullptr); });
  unsetenv("NORMEXT_SIMT_ORDER");

  expect_fault("old driver", {"built for CUDA 13.0, but the NVIDIA driver supports only CUDA 13.0"},
               [] { check_cuda(cudaErrorInsufficientDriver, "anything"); });
  expect_fault("other GPU", {"not built for this GPU", "NORMEXT_CUDA_ARCHS=\"90\""},
               [] { check_cuda(cudaErrorNoKernelImageForDevice, "anything"); });
  expect_fault("no such device", {"cudaDeviceGetAttribute", "device 3", "error 101"}, [] { device_limits(3); });

  // Without the opt-ins that launch() makes.
  cudaLaunchConfig_t config = {dim3(16), dim3(32), 48 * 1024 + 1, nullptr, nullptr, 0};
  expect(cudaLaunchKernelEx(&config, unprepared) == cudaErrorInvalidConfiguration, "more than 48 KB without an opt-in");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {16, 1, 1};
  config.dynamicSmemBytes = 0;
  config.attrs = &cluster;
  config.numAttrs = 1;
  expect(cudaLaunchKernelEx(&config, unprepared) == cudaErrorInvalidConfiguration, "a cluster of 16 without an opt-in");
}

void test_arch(const char* arch, int smem, int max_cluster) {
  const std::string text = in_child([=] {
    setenv("NORMEXT_SIMT_ARCH", arch, 1);
    const DeviceLimits& limits = device_limits(0);
    if (std::to_string(limits.arch) != arch || limits.smem_per_block != smem || limits.max_cluster != max_cluster) {
      throw std::runtime_error("wrong limits");
    }
    launch(nothing, {2, 32, 0, 2}, nullptr);
  });
  expect(text.find(max_cluster > 1 ? "ended well" : "no clusters") != std::string::npos, std::string("sm_") + arch + ": " + text);
}

// clusters

template <Omit kOmit>
__global__ void cluster_sum(const float* input, float* output) {
  float* shared = reinterpret_cast<float*>(dynamic_smem());
  float* table = shared + 32;  // one entry per block
  const float mine = block_sum<kNothing>(input[blockIdx.x * blockDim.x + threadIdx.x], shared);
  cluster_barrier();
  if (threadIdx.x < cluster_size()) *peer_smem(table + cluster_rank(), threadIdx.x) = mine;
  if (kOmit != kPeerBarrierBeforeRead) cluster_barrier();
  float sum = 0.0f;
  for (unsigned r = 0; r < cluster_size(); ++r) sum += table[r];
  block_barrier();
  if (threadIdx.x == 0) table[0] = sum * static_cast<float>(cluster_rank() + 1);
  cluster_barrier();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  const float theirs = *peer_smem(table, next);
  if (kOmit != kPeerBarrierAtEnd) cluster_barrier();
  output[blockIdx.x * blockDim.x + threadIdx.x] = theirs;
}

template <Omit kOmit>
bool cluster_right(int cluster, int clusters) {
  constexpr int kThreads = 64;
  const int blocks = cluster * clusters;
  std::vector<float> input(static_cast<std::size_t>(blocks) * kThreads), output(input.size(), -1.0f);
  for (std::size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i * 5 % 17);
  launch(cluster_sum<kOmit>, {blocks, kThreads, 256, cluster}, nullptr, input.data(), output.data());
  for (int c = 0; c < clusters; ++c) {
    const std::size_t first = static_cast<std::size_t>(c) * cluster * kThreads;
    float sum = 0.0f;
    for (int i = 0; i < cluster * kThreads; ++i) sum += input[first + i];
    for (int i = 0; i < cluster * kThreads; ++i) {
      const int next = (i / kThreads + 1) % cluster;
      if (output[first + i] != sum * static_cast<float>(next + 1)) return false;
    }
  }
  return true;
}

__global__ void early_peer() { *peer_smem(dynamic_smem(), (cluster_rank() + 1) % cluster_size()) = 1; }
__global__ void bad_rank() { *peer_smem(dynamic_smem(), cluster_size()) = 1; }
__global__ void lone_cluster_barrier() {
  if (cluster_rank() != 1) cluster_barrier();
}
__global__ void cluster_barrier_in_one_warp() {
  if (threadIdx.x < 32) cluster_barrier();
  block_barrier();
}
__global__ void overlapped_barriers(int* output) {
  cluster_arrive();
  block_barrier();
  cluster_wait();
  output[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

void test_clusters() {
  in_every_order([](const std::string& order) {
    for (const int cluster : {2, 4, 8, 16}) {
      const std::string name = "cluster of " + std::to_string(cluster) + ", " + order;
      expect(cluster_right<kNothing>(cluster, 3), name);
      bool caught = true;
      try {
        caught = !cluster_right<kPeerBarrierBeforeRead>(cluster, 3);
      } catch (const std::exception&) {
      }
      expect(caught, name + ": missing barrier before a read not caught");
      expect_fault(name + ": missing barrier at the end", {"peer_smem: block", "has exited"},
                   [&] { cluster_right<kPeerBarrierAtEnd>(cluster, 3); });
    }
    expect_fault("peer not started, " + order, {"has not started"}, [] { launch(early_peer, {2, 32, 16, 2}, nullptr); });
    expect_fault("bad rank, " + order, {"rank 2 in a cluster of 2"}, [] { launch(bad_rank, {2, 32, 16, 2}, nullptr); });
    expect_fault("divergent cluster barrier, " + order, {"divergent cluster_barrier: 96 of 128", "32 have exited"},
                 [] { launch(lone_cluster_barrier, {4, 32, 0, 4}, nullptr); });
    expect_fault("cluster and block barrier, " + order, {"divergent block_barrier: 32 of 64", "32 wait at cluster_barrier"},
                 [] { launch(cluster_barrier_in_one_warp, {2, 64, 0, 2}, nullptr); });
    std::vector<int> output(4 * 64);
    launch(overlapped_barriers, {4, 64, 0, 4}, nullptr, output.data());
    expect(output == std::vector<int>(4 * 64, 1), "split cluster barrier around a block barrier, " + order);
  });
}

// every block runs once; several host threads at a time

__global__ void count_blocks(int* count, int* order) {
  if (threadIdx.x != 0) return;
  ++count[blockIdx.x];
  order[order[0]++ + 1] = static_cast<int>(blockIdx.x);
}

void test_blocks() {
  in_every_order([](const std::string& order) {
    for (const int blocks : {1, 2, 3, 30, 31, 4096}) {
      std::vector<int> count(static_cast<std::size_t>(blocks)), sequence(static_cast<std::size_t>(blocks) + 1);
      launch(count_blocks, {blocks, 32}, nullptr, count.data(), sequence.data());
      expect(count == std::vector<int>(static_cast<std::size_t>(blocks), 1), "every block runs once, " + order);
      if (order == "forward") expect(sequence[1] == 0, "forward starts with block 0");
      if (order == "reverse") expect(sequence[1] == blocks - 1, "reverse starts with the last block");
    }
  });
}

void test_host_threads() {
  std::vector<std::thread> threads;
  std::vector<int> right(4, 1);
  for (std::size_t i = 0; i < right.size(); ++i) {
    threads.emplace_back([&right, i] {
      for (int round = 0; round < 5; ++round) right[i] &= two_sums_right<kNothing>(7, 32 << i) && cluster_right<kNothing>(4, 2);
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect(right == std::vector<int>(4, 1), "launches from four host threads");
}

}  // namespace

int main() {
  // Children first: device limits are read once per process.
  test_arch("80", 163 * 1024, 1);
  test_arch("90", 227 * 1024, 16);
  test_arch("120", 99 * 1024, 8);
  test_arch("89", 99 * 1024, 1);
  test_barriers();
  test_warps();
  test_faults();
  test_smem_bounds();
  test_poison();
  test_limits();
  test_clusters();
  test_blocks();
  test_host_threads();
  if (failures == 0) std::puts("emulator: all tests passed");
  return failures == 0 ? 0 : 1;
}
