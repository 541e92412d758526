// The emulated processor: runs the clusters of a grid one after another on the calling thread, each CUDA thread on a fiber.
//
// A warp runs until every lane of it waits at a block or cluster barrier or has exited; only then does the next warp run
// (run-ahead: the order that shows a missing barrier). Within a warp, a lane runs until it needs another lane. A fiber waits at
// a gate, a counter that somebody else advances: so a barrier is released by one increment, and finished fibers wait for the
// next block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "schedule.h"
#include "shared_memory.h"
#include "simt.h"

#pragma GCC visibility push(hidden)

namespace simt {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMaxWarps = 32;  // per block

struct Warp;
struct Block;

enum class Wait { kWarp, kBlockBarrier, kClusterBarrier, kExited };

struct alignas(64) Lane {
  Fiber fiber;
  Lane* next = nullptr;  // of the same warp, in the order of the schedule; a ring
  Warp* warp = nullptr;
  unsigned thread = 0;  // threadIdx.x
  // Runnable once *gate differs from what was seen.
  const std::uint64_t* gate = nullptr;
  std::uint64_t seen = 0;
  Wait wait = Wait::kExited;
  bool cluster_arrived = false;  // and has not waited yet
  std::uint64_t cluster_seen = 0;

  bool runnable() const { return *gate != seen; }
};

// What the lanes of a warp must do together.
struct WarpOperation {
  enum class Kind : std::uint8_t { kSync, kShuffle } kind = Kind::kSync;
  std::uint8_t bytes = 0;
  unsigned mask = 0;

  bool operator==(const WarpOperation& o) const { return kind == o.kind && bytes == o.bytes && mask == o.mask; }
  std::string name() const;
};

struct Warp {
  Block* block = nullptr;
  unsigned index = 0;  // in the block
  unsigned lanes = 0;
  unsigned arrived = 0;          // at `operation`
  std::uint64_t operations = 0;  // completed
  WarpOperation operation;
  std::uint64_t exchange[2][kWarpLanes];  // alternating: a lane may deposit for the next shuffle before others read this one
  Lane lane[kWarpLanes];
  WarpStacks stacks;
};

struct Block {
  unsigned index = 0;  // blockIdx.x
  unsigned rank = 0;   // in the cluster
  unsigned threads = 0;
  std::vector<Warp*> warps;
  bool started = false;
  unsigned at_barrier = 0;
  unsigned exited = 0;
  std::uint64_t barriers = 0;  // completed
  std::uint64_t runs = 0;      // blocks run in this place so far
  SharedMemory smem;

  bool finished() const { return started && exited == threads; }
};

struct Grid {
  std::uint64_t blocks = 0;
  unsigned threads = 0;
  std::size_t smem = 0;
  unsigned cluster = 1;
};

class Machine {
 public:
  // The calling thread's.
  static Machine& mine();

  void run(const Grid& grid, const Schedule& schedule, Kernel kernel);

  // For the fiber that is running.
  void warp_operation(WarpOperation operation);
  std::uint64_t shuffle(std::uint64_t bits, unsigned mask, std::size_t bytes);
  void block_barrier();
  void cluster_arrive();
  void cluster_wait();
  unsigned char* peer_smem(unsigned char* mine, unsigned rank);
  Block& block() { return *current_->warp->block; }
  unsigned cluster_size() const { return grid_.cluster; }

 private:
  static void lane_main(void* lane);
  void run_lane(Lane& lane);
  void pause(Lane& lane, Wait wait, const std::uint64_t& gate);
  void resume(Lane& lane) {
    current_ = &lane;
    threadIdx.x = lane.thread;
  }

  void prepare(const Grid& grid);
  void link_lanes(Warp& warp);
  void run_cluster(std::uint64_t cluster);
  bool run_block(Block& block);
  bool run_warp(Warp& warp);
  void finish_block(Block& block);
  [[noreturn]] void report_stuck();

  Fiber caller_;
  Lane* current_ = nullptr;
  Kernel kernel_{};
  Grid grid_;
  Schedule schedule_;
  Random random_{0};
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<std::unique_ptr<Block>> blocks_;  // of the cluster that is running
  unsigned cluster_arrivals_ = 0;
  std::uint64_t cluster_barriers_ = 0;  // completed
  std::string fault_;                   // of a fiber
};

}  // namespace simt

#pragma GCC visibility pop
