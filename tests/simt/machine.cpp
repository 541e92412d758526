#include "machine.h"

#include <algorithm>
#include <exception>
#include <stdexcept>

__thread uint3 threadIdx __attribute__((tls_model("initial-exec")));
__thread uint3 blockIdx __attribute__((tls_model("initial-exec")));
__thread uint3 blockDim __attribute__((tls_model("initial-exec")));
__thread uint3 gridDim __attribute__((tls_model("initial-exec")));

namespace simt {

namespace {

// Set while this thread runs a grid: what device code finds without a call.
__thread Machine* running __attribute__((tls_model("initial-exec"))) = nullptr;

std::string number(std::uint64_t n) { return std::to_string(n); }

// "12 of 32 lanes of warp 1 of block 3 arrived, 20 wait at block_barrier": what the others do is most of the diagnosis.
struct Census {
  unsigned count[4] = {};

  void add(const Warp& warp) {
    for (unsigned i = 0; i < warp.lanes; ++i) ++count[static_cast<int>(warp.lane[i].wait)];
  }
  unsigned of(Wait wait) const { return count[static_cast<int>(wait)]; }
  std::string others(Wait except) const {
    static constexpr const char* kDoing[] = {" wait for their warp", " wait at block_barrier", " wait at cluster_barrier",
                                             " have exited"};
    std::string text;
    for (int i = 0; i < 4; ++i) {
      if (count[i] > 0 && i != static_cast<int>(except)) text += ", " + number(count[i]) + kDoing[i];
    }
    return text;
  }
};

}  // namespace

std::string WarpOperation::name() const {
  return kind == Kind::kSync ? "warp_sync" : "shuffle_xor of " + number(bytes) + " bytes with mask " + number(mask);
}

Machine& Machine::mine() {
  thread_local Machine machine;
  return machine;
}

void Machine::lane_main(void* argument) {
  Lane& lane = *static_cast<Lane*>(argument);
  Machine& machine = *running;
  fiber_entered(machine.caller_);
  for (;;) machine.run_lane(lane);
}

void Machine::run_lane(Lane& lane) {
  const auto where = [&lane] { return " (block " + number(lane.warp->block->index) + ", thread " + number(lane.thread) + ")"; };
  try {
    kernel_.call(kernel_.context);
    if (lane.cluster_arrived) throw std::runtime_error("simt: exit after cluster_arrive without cluster_wait");
  } catch (const std::exception& error) {
    fault_ = error.what() + where();
  } catch (...) {
    fault_ = "simt: unknown exception" + where();
  }
  if (!fault_.empty()) switch_fiber(lane.fiber, caller_);  // never comes back
  Block& block = *lane.warp->block;
  ++block.exited;
  pause(lane, Wait::kExited, block.runs);
}

// Waits at the gate: runs the next runnable lane of the warp, or the scheduler if there is none.
inline void Machine::pause(Lane& lane, Wait wait, const std::uint64_t& gate) {
  lane.wait = wait;
  lane.gate = &gate;
  lane.seen = gate;
  for (Lane* next = lane.next; next != &lane; next = next->next) {
    if (next->runnable()) {
      resume(*next);
      switch_fiber(lane.fiber, next->fiber);
      return;
    }
  }
  switch_fiber(lane.fiber, caller_);
}

void Machine::warp_operation(WarpOperation operation) {
  Lane& lane = *current_;
  Warp& warp = *lane.warp;
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (!(warp.operation == operation)) {
    throw std::runtime_error("simt: divergent warp: " + number(warp.arrived) + " of 32 lanes of warp " + number(warp.index) +
                             " call " + warp.operation.name() + ", another calls " + operation.name());
  }
  if (++warp.arrived == kWarpLanes) {
    warp.arrived = 0;
    ++warp.operations;
  } else {
    pause(lane, Wait::kWarp, warp.operations);
  }
}

std::uint64_t Machine::shuffle(std::uint64_t bits, unsigned mask, std::size_t bytes) {
  if (mask >= kWarpLanes) throw std::runtime_error("simt: shuffle_xor: the mask is not 0..31, or not all lanes are members");
  Warp& warp = *current_->warp;
  const unsigned lane = current_->thread % kWarpLanes;
  std::uint64_t* exchange = warp.exchange[warp.operations % 2];
  exchange[lane] = bits;
  warp_operation({WarpOperation::Kind::kShuffle, static_cast<std::uint8_t>(bytes), mask});
  return exchange[lane ^ mask];
}

void Machine::block_barrier() {
  Block& block = this->block();
  ++block.at_barrier;
  pause(*current_, Wait::kBlockBarrier, block.barriers);
}

void Machine::cluster_arrive() {
  Lane& lane = *current_;
  if (lane.cluster_arrived) throw std::runtime_error("simt: cluster_arrive twice without cluster_wait");
  lane.cluster_arrived = true;
  lane.cluster_seen = cluster_barriers_;
  if (++cluster_arrivals_ == grid_.cluster * grid_.threads) {
    cluster_arrivals_ = 0;
    ++cluster_barriers_;
  }
}

void Machine::cluster_wait() {
  Lane& lane = *current_;
  if (!lane.cluster_arrived) throw std::runtime_error("simt: cluster_wait without cluster_arrive");
  lane.cluster_arrived = false;
  if (lane.cluster_seen == cluster_barriers_) pause(lane, Wait::kClusterBarrier, cluster_barriers_);
}

unsigned char* Machine::peer_smem(unsigned char* mine, unsigned rank) {
  const SharedMemory& smem = block().smem;
  if (rank >= grid_.cluster) {
    throw std::runtime_error("simt: peer_smem: rank " + number(rank) + " in a cluster of " + number(grid_.cluster));
  }
  if (mine < smem.data() || mine > smem.data() + smem.size()) {
    throw std::runtime_error("simt: peer_smem: the pointer is not into the shared memory of the calling block");
  }
  const Block& peer = *blocks_[rank];
  if (!peer.started || peer.finished()) {
    throw std::runtime_error("simt: peer_smem: block " + number(rank) + " of the cluster " +
                             (peer.started ? "has exited" : "has not started") + "; a cluster_barrier is missing");
  }
  return peer.smem.data() + (mine - smem.data());
}

void Machine::link_lanes(Warp& warp) {
  unsigned order[kWarpLanes];
  permute(schedule_.order, random_, order, warp.lanes);
  for (unsigned i = 0; i < warp.lanes; ++i) warp.lane[order[i]].next = &warp.lane[order[(i + 1) % warp.lanes]];
}

// Lays out lanes, warps and blocks for the clusters of this grid; fibers and stacks are reused.
void Machine::prepare(const Grid& grid) {
  const unsigned block_warps = (grid.threads + kWarpLanes - 1) / kWarpLanes;
  while (blocks_.size() < grid.cluster) blocks_.push_back(std::make_unique<Block>());
  while (warps_.size() < grid.cluster * block_warps) {
    auto warp = std::make_unique<Warp>();
    for (unsigned i = 0; i < kWarpLanes; ++i) {
      Lane& lane = warp->lane[i];
      lane.warp = warp.get();
      make_fiber(lane.fiber, warp->stacks.stack(i), static_cast<unsigned>(warps_.size()) * kWarpLanes + i, lane_main, &lane);
    }
    warps_.push_back(std::move(warp));
  }
  const bool same = grid.threads == grid_.threads && grid.cluster == grid_.cluster;
  grid_ = grid;
  for (unsigned rank = 0; rank < grid.cluster; ++rank) {
    Block& block = *blocks_[rank];
    block.smem.resize(grid.smem);
    if (same) continue;
    block.rank = rank;
    block.threads = grid.threads;
    block.warps.clear();
    for (unsigned w = 0; w < block_warps; ++w) {
      Warp& warp = *warps_[rank * block_warps + w];
      block.warps.push_back(&warp);
      warp.block = &block;
      warp.index = w;
      warp.lanes = std::min(kWarpLanes, grid.threads - w * kWarpLanes);
      for (unsigned i = 0; i < warp.lanes; ++i) {
        Lane& lane = warp.lane[i];
        lane.thread = w * kWarpLanes + i;
        lane.gate = &block.runs;
        lane.seen = block.runs;
      }
    }
  }
}

void Machine::run(const Grid& grid, const Schedule& schedule, Kernel kernel) {
  if (running != nullptr) throw std::runtime_error("simt: a launch from within a kernel");
  prepare(grid);
  kernel_ = kernel;
  schedule_ = schedule;
  random_ = Random(schedule.seed);
  for (unsigned rank = 0; rank < grid.cluster; ++rank) {
    for (Warp* warp : blocks_[rank]->warps) link_lanes(*warp);
  }
  blockDim = {grid.threads, 1, 1};
  gridDim = {static_cast<unsigned>(grid.blocks), 1, 1};
  running = this;
  try {
    const std::uint64_t clusters = grid.blocks / grid.cluster;
    const LargePermutation order(schedule.order, random_, clusters);
    for (std::uint64_t i = 0; i < clusters; ++i) run_cluster(order[i]);
    running = nullptr;
  } catch (...) {
    // Fibers were left in mid-kernel: the next launch starts with new ones.
    warps_.clear();
    blocks_.clear();
    grid_ = Grid();
    fault_.clear();
    cluster_arrivals_ = 0;
    running = nullptr;
    throw;
  }
}

void Machine::run_cluster(std::uint64_t cluster) {
  for (unsigned rank = 0; rank < grid_.cluster; ++rank) {
    Block& block = *blocks_[rank];
    block.index = static_cast<unsigned>(cluster * grid_.cluster + rank);
    block.started = false;
    block.exited = 0;
  }
  unsigned order[64];
  for (unsigned finished = 0; finished < grid_.cluster;) {
    permute(schedule_.order, random_, order, grid_.cluster);
    bool progress = false;
    for (unsigned i = 0; i < grid_.cluster; ++i) {
      Block& block = *blocks_[order[i]];
      if (block.finished()) continue;
      progress |= run_block(block);
      if (block.finished()) ++finished;
    }
    if (!progress) report_stuck();
  }
}

// Runs the block until all its threads have exited or wait for other blocks. False if nothing could run.
bool Machine::run_block(Block& block) {
  blockIdx = {block.index, 0, 0};
  bool progress = false;
  if (!block.started) {
    block.started = true;
    block.smem.poison();
    ++block.runs;
  }
  unsigned order[kMaxWarps];
  while (!block.finished()) {
    const unsigned count = static_cast<unsigned>(block.warps.size());
    permute(schedule_.order, random_, order, count);
    bool ran = false;
    for (unsigned i = 0; i < count; ++i) ran |= run_warp(*block.warps[order[i]]);
    if (block.at_barrier == block.threads) {
      block.at_barrier = 0;
      ++block.barriers;
    } else if (!ran) {
      return progress;
    } else if (block.at_barrier > 0 && block.exited > 0) {
      report_stuck();
    }
    progress = true;
  }
  finish_block(block);
  return true;
}

bool Machine::run_warp(Warp& warp) {
  // The ring, entered at the first lane in order: lane[0] may be anywhere in it, which does not matter.
  Lane* lane = schedule_.order == Schedule::Order::kReverse ? &warp.lane[warp.lanes - 1] : &warp.lane[0];
  for (unsigned i = 0; !lane->runnable(); lane = lane->next) {
    if (++i == warp.lanes) return false;
  }
  resume(*lane);
  switch_fiber(caller_, lane->fiber);
  if (!fault_.empty()) throw std::runtime_error(fault_);
  if (warp.arrived > 0) {
    Census census;
    census.add(warp);
    throw std::runtime_error("simt: " + warp.operation.name() + ": " + number(warp.arrived) + " of 32 lanes of warp " +
                             number(warp.index) + " of block " + number(warp.block->index) + " arrived" +
                             census.others(Wait::kWarp) +
                             (warp.lanes < kWarpLanes ? "; the block ends after lane " + number(warp.lanes - 1) : ""));
  }
  return true;
}

void Machine::finish_block(Block& block) {
  if (!block.smem.intact()) {
    throw std::runtime_error("simt: block " + number(block.index) + " wrote outside its " + number(block.smem.size()) +
                             " bytes of shared memory");
  }
  // Whoever reads it from another block now reads NaN.
  block.smem.poison();
}

void Machine::report_stuck() {
  Census cluster;
  for (unsigned rank = 0; rank < grid_.cluster; ++rank) {
    const Block& block = *blocks_[rank];
    Census census;
    for (const Warp* warp : block.warps) census.add(*warp);
    if (block.started && block.at_barrier > 0) {
      throw std::runtime_error("simt: divergent block_barrier: " + number(block.at_barrier) + " of " + number(block.threads) +
                               " threads of block " + number(block.index) + " arrived" + census.others(Wait::kBlockBarrier));
    }
    for (const Warp* warp : block.warps) cluster.add(*warp);
  }
  throw std::runtime_error("simt: divergent cluster_barrier: " + number(cluster_arrivals_) + " of " +
                           number(std::uint64_t{grid_.cluster} * grid_.threads) + " threads of the cluster of block " +
                           number(blocks_[0]->index) + " arrived" + cluster.others(Wait::kClusterBarrier));
}

unsigned char* dynamic_smem() { return running->block().smem.data(); }
void warp_sync() { running->warp_operation({}); }
std::uint64_t shuffle_xor(std::uint64_t bits, unsigned mask, std::size_t bytes) { return running->shuffle(bits, mask, bytes); }
void block_barrier() { running->block_barrier(); }
unsigned cluster_rank() { return running->block().rank; }
unsigned cluster_size() { return running->cluster_size(); }
void cluster_arrive() { running->cluster_arrive(); }
void cluster_wait() { running->cluster_wait(); }
unsigned char* peer_smem(unsigned char* mine, unsigned rank) { return running->peer_smem(mine, rank); }

void require_aligned(const void* p, std::size_t bytes, const char* what) {
  const auto excess = reinterpret_cast<std::uintptr_t>(p) % bytes;
  if (excess == 0) return;
  throw std::runtime_error(std::string("simt: ") + what + " of " + number(bytes) + " bytes at an address that is " +
                           number(excess) + " bytes past alignment");
}

}  // namespace simt
