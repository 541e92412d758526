// Which threads compute which part of a row. Plain C++, no CUDA: a mapping never changes a bit of the result (RowTree fixes the
// order of every sum), so it may depend on the number of rows and on the device, and tests may force any legal one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "core/row_tree.h"
#include "core/views.h"

namespace normext::cuda {

enum class RowTier : int {
  kRegisters,  // the row stays in registers: of lanes of a warp, of a warp, of a block, or of the blocks of a cluster
  kShared,     // forward only: a block keeps the row in shared memory and its warps take several segments each
  kSplit,      // several blocks per row, two launches, partial results through the workspace
};

struct RowMapping {
  RowTier tier = RowTier::kRegisters;
  int warps = 1;           // per row and block
  int rows_at_once = 1;    // rows in flight per block (backward: in different groups of 16 rows of one run)
  int blocks_per_row = 1;  // the cluster size in kRegisters
  int repeats = 1;         // forward: short rows that a team takes one after another
};

// By which a thread finds its place: `/` is 25 instructions.
struct RowDivisors {
  FastDivisor lanes, warps, blocks;

  RowDivisors() = default;
  RowDivisors(const RowTree& tree, const RowMapping& mapping)
      : lanes(tree.lanes), warps(mapping.warps), blocks(mapping.blocks_per_row) {}
};

// Warps per block at most: leaves 128 registers a thread, 255 for float64 and for odd widths, where a lane's values cannot be
// packed; enough for every kernel without spills.
constexpr int max_warps(std::size_t element_size, int vector) { return element_size == 8 || vector == 1 ? 8 : 16; }
constexpr int kBusyBlocks = 16;  // forward, short rows: per multiprocessor, before teams take several rows. Not yet tuned on a GPU
constexpr int kMostRepeats = 8;  // the same
constexpr int kRunRows = 256;    // backward: rows per run at most, 16 groups of 16
constexpr int kGroupRows = 16;   // backward: rows added in sequence in registers
constexpr int kRingBytes = 128;  // backward: of a thread's rows on their way from memory

struct Device {
  int sm_count;
  int max_cluster;   // 1 where clusters do not exist
  int shared_bytes;  // per block, with opt-in
};

// Forced mappings, for tests and tuning only: set through normext._C.plan().
struct RowOverrides {
  std::optional<RowMapping> forward, backward;
};
inline RowOverrides& row_overrides() {
  static RowOverrides overrides;
  return overrides;
}

constexpr int rows_per_warp(const RowTree& tree) { return tree.segments == 1 ? 32 / tree.lanes : 1; }

// Threads of a block whose rows are in registers; those of the last warp that short rows leave over only take part in shuffles.
inline std::int64_t block_threads(const RowTree& tree, const RowMapping& m) {
  return tree.segments == 1 ? ceil_div(std::int64_t{m.rows_at_once} * tree.lanes, 32) * 32
                            : std::int64_t{m.rows_at_once} * m.warps * 32;
}

// Whether teams may take several rows one after another: where rows are so short that finding them and loading the weights would
// cost more than the rows, and whole vectors.
constexpr bool may_repeat(const RowTree& tree, int element_size) {
  return tree.segments == 1 && element_size < 8 && tree.vector * element_size == 16 && tree.vector * tree.slots <= 8;
}

inline std::size_t forward_shared_bytes(const RowTree& tree, const RowMapping& m, int values, int element_size,
                                        int accumulate_size) {
  const std::size_t segments = static_cast<std::size_t>(tree.segments);
  const std::size_t table = segments * values * accumulate_size;
  switch (m.tier) {
    case RowTier::kRegisters:
      return tree.segments == 1 ? 0 : table * m.rows_at_once;
    case RowTier::kShared:
      return ceil_div(table, 16) * 16 + segments * tree.segment_cols() * element_size;
    case RowTier::kSplit:
      return 0;
  }
  return 0;
}

// Blocks that share a row, of a warp per segment and `most` warps at most; where clusters allow of 8, since a block of 16 has a
// multiprocessor to itself, which then idles whenever the block waits, and where none of them is left without a segment.
inline std::int64_t blocks_of_row(std::int64_t segments, std::int64_t most, const Device& device) {
  const std::int64_t small = power_of_two_at_least(ceil_div(segments, std::min<std::int64_t>(most, 8)));
  const bool all_busy = (small - 1) * ceil_div(segments, small) < segments;
  return small <= device.max_cluster && all_busy ? small : power_of_two_at_least(ceil_div(segments, most));
}

// Rows of up to 8 segments (8192 columns), 16 where there are no clusters but for odd widths and float64, stay in the registers of
// one block; wider ones in those of a cluster, else in shared memory, else they are split. None of the thresholds has been tuned on
// a GPU yet.
inline RowMapping forward_mapping(const RowTree& tree, std::int64_t rows, int element_size, const Device& device) {
  const std::int64_t segments = tree.segments;
  RowMapping m;
  if (segments == 1) {
    // Four warps a block hide latency; fewer when that leaves multiprocessors idle.
    const std::int64_t per_warp = rows_per_warp(tree);
    const std::int64_t warps = std::clamp<std::int64_t>(rows / (per_warp * device.sm_count), 1, 4);
    m.rows_at_once = static_cast<int>(warps * per_warp);
    if (may_repeat(tree, element_size)) {
      const std::int64_t once = std::int64_t{m.rows_at_once} * device.sm_count * kBusyBlocks;
      m.repeats = static_cast<int>(std::clamp<std::int64_t>(rows / once, 1, kMostRepeats));
    }
    return m;
  }
  int blocks = static_cast<int>(blocks_of_row(segments, max_warps(element_size, tree.vector), device));
  // Few wide rows: more blocks a row, so that more multiprocessors share the latency.
  while (blocks * 2 <= device.max_cluster && blocks < 8 && segments / blocks >= 8 && rows * blocks * 4 <= device.sm_count) {
    blocks *= 2;
  }
  if (blocks <= device.max_cluster) {
    m.blocks_per_row = blocks;
    m.warps = static_cast<int>(ceil_div(segments, blocks));
    m.rows_at_once = blocks == 1 ? std::max(1, 4 / m.warps) : 1;
    return m;
  }
  m.tier = RowTier::kShared;
  m.warps = max_warps(element_size, tree.vector);
  if (forward_shared_bytes(tree, m, 3, element_size, element_size == 8 ? 8 : 4) <= static_cast<std::size_t>(device.shared_bytes)) {
    return m;
  }
  m.tier = RowTier::kSplit;
  m.warps = 8;
  m.blocks_per_row = static_cast<int>(std::min<std::int64_t>(ceil_div(segments, m.warps), 1 << 16));
  return m;
}

// Parameter gradients: the number of contiguous row runs. Depends on the number of rows only.
constexpr std::int64_t row_runs(std::int64_t rows) {
  const std::int64_t fine = ceil_div(rows, 8) < 512 ? ceil_div(rows, 8) : 512;
  const std::int64_t bounded = ceil_div(rows, kRunRows);
  return fine > bounded ? fine : bounded;
}

// The first row of a run: runs differ by at most one row.
NORMEXT_HOST_DEVICE constexpr std::int64_t run_begin(std::int64_t rows, std::int64_t runs, std::int64_t run) {
  const std::int64_t each = rows / runs;
  const std::int64_t longer = rows % runs;
  return run * each + (run < longer ? run : longer);
}

// Columns of a row that one block of the backward holds.
NORMEXT_HOST_DEVICE constexpr std::int64_t block_columns(const RowTree& tree, const RowMapping& m) {
  return tree.segments == 1 ? tree.segment_cols() : m.warps * tree.segment_cols();
}

// Values of the buffer through which the warps of a block, or the blocks of a cluster, exchange the sums of a row.
NORMEXT_HOST_DEVICE constexpr std::int64_t exchange_values(const RowTree& tree, const RowMapping& m) {
  return tree.segments == 1 || m.tier == RowTier::kSplit ? 0 : std::int64_t{4} * m.rows_at_once * tree.segments;
}

inline std::size_t backward_shared_bytes(const RowTree& tree, const RowMapping& m, int accumulate_size) {
  const std::int64_t copies = m.rows_at_once == 1 ? 1 : 1 + m.rows_at_once;
  return static_cast<std::size_t>(block_threads(tree, m)) * kRingBytes +
         static_cast<std::size_t>(exchange_values(tree, m) + copies * 2 * block_columns(tree, m)) * accumulate_size;
}

// Rows of up to 16 segments (4096 columns; 8 for odd widths and float64) in one block, whose barrier costs less than a cluster's
// release, which waits for the row stored before; wider ones in a cluster, else split. Two segments per warp would double the width
// of a block but spill. Rows of few segments take several groups of a run at once. None of the thresholds has been tuned on a GPU
// yet.
inline RowMapping backward_mapping(const RowTree& tree, std::int64_t rows, int element_size, const Device& device) {
  const std::int64_t segments = tree.segments;
  const std::int64_t runs = std::max<std::int64_t>(row_runs(rows), 1);
  const std::int64_t groups = std::max<std::int64_t>(ceil_div(ceil_div(rows, runs), kGroupRows), 1);
  const std::int64_t most = max_warps(element_size, tree.vector);
  RowMapping m;
  if (segments == 1) {
    m.rows_at_once = static_cast<int>(std::min<std::int64_t>(groups, most * rows_per_warp(tree)));
    return m;
  }
  std::int64_t blocks = segments <= most ? 1 : blocks_of_row(segments, most, device);
  // Few runs: more blocks a row, so that more multiprocessors share them.
  while (blocks * 2 <= device.max_cluster && blocks < 8 && segments / blocks >= 4 && runs * blocks * 2 <= device.sm_count) {
    blocks *= 2;
  }
  if (blocks <= device.max_cluster) {
    m.blocks_per_row = static_cast<int>(blocks);
    m.warps = static_cast<int>(ceil_div(segments, blocks));
    m.rows_at_once = blocks == 1 ? static_cast<int>(std::clamp<std::int64_t>(8 / m.warps, 1, groups)) : 1;
    return m;
  }
  m.tier = RowTier::kSplit;
  m.warps = static_cast<int>(most);
  m.blocks_per_row = static_cast<int>(ceil_div(segments, most));
  return m;
}

// Why a forced mapping cannot run; empty if it can.
inline std::string mapping_error(Direction direction, const RowTree& tree, const RowMapping& m, int element_size,
                                 const Device& device) {
  const bool forward = direction == Direction::kForward;
  const bool single = tree.segments == 1;
  const int most = max_warps(element_size, tree.vector);
  const int accumulate_size = element_size == 8 ? 8 : 4;
  if (m.warps < 1 || m.rows_at_once < 1 || m.blocks_per_row < 1 || m.repeats < 1) {
    return "warps, rows_at_once, blocks_per_row and repeats start at 1";
  }
  if (m.repeats > 1 && (!forward || m.tier != RowTier::kRegisters || !may_repeat(tree, element_size))) {
    return "repeats are for the forward of short rows of whole vectors";
  }
  if (m.warps > most) return "at most " + std::to_string(most) + " warps fit a block";
  if (m.tier == RowTier::kRegisters) {
    const int blocks = m.blocks_per_row;
    if (single && (m.warps != 1 || blocks != 1)) return "a row of one segment takes one warp";
    if ((blocks & (blocks - 1)) != 0 || blocks > device.max_cluster) {
      return "blocks_per_row is a power of two up to " + std::to_string(device.max_cluster);
    }
    if (static_cast<std::int64_t>(m.warps) * blocks < tree.segments) return "every segment needs a warp";
    if (blocks > 1 && m.rows_at_once > 1) return "a cluster takes one row at a time";
  } else if (m.tier == RowTier::kShared) {
    if (!forward) return "the backward has no shared-memory tier";
    if (m.blocks_per_row != 1 || m.rows_at_once != 1) return "a row in shared memory takes one block, and a block one row";
  } else {
    if (m.rows_at_once != 1) return "split rows are taken one at a time";
    if (!forward && single && m.warps * m.blocks_per_row != 1) return "a row of one segment takes one warp";
    if (!forward && static_cast<std::int64_t>(m.warps) * m.blocks_per_row < tree.segments) return "every segment needs a warp";
  }
  if (ceil_div(m.rows_at_once, rows_per_warp(tree)) * m.warps > most) return "too many rows at once for a block";
  const std::size_t bytes =
      forward ? forward_shared_bytes(tree, m, 3, element_size, accumulate_size) : backward_shared_bytes(tree, m, accumulate_size);
  if (bytes > static_cast<std::size_t>(device.shared_bytes)) {
    return "needs " + std::to_string(bytes) + " bytes of shared memory, the device has " + std::to_string(device.shared_bytes);
  }
  return "";
}

// Published limits of an architecture, for plan() on machines without it; the launchers ask the device itself.
constexpr Device device_of_arch(int arch) {
  switch (arch) {
    case 80:
      return {108, 1, 163 * 1024};
    case 86:
      return {84, 1, 99 * 1024};
    case 89:
      return {142, 1, 99 * 1024};
    case 100:
    case 103:
      return {148, 16, 227 * 1024};
    case 120:
    case 121:
      return {170, 8, 99 * 1024};
    default:
      return {132, 16, 227 * 1024};
  }
}

}  // namespace normext::cuda
