// How the channel norms cut their input into blocks. Plain C++. Everything here but ResidentPlan, which changes no bit, follows
// from the shape alone (of one image, for group norm): it fixes the order of every sum, and with it the bits of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "core/channel_args.h"
#include "core/row_tree.h"
#include "core/views.h"
#include "cuda/tuning.h"

namespace normext::cuda {

constexpr int kPiece = 1024;         // elements that a warp of the forward statistics holds in registers
constexpr int kApplyPiece = 512;     // the same for all other kernels, which hold up to three tensors
constexpr int kLeastSegment = 4096;  // elements of a block's share of a slab
constexpr int kMostSegments = 128;   // per slab, except that
constexpr int kMostPieces = 2048;    // of kPiece in a segment: their results lie in shared memory
constexpr int kTeamWarps = 8;        // per segment at most

// Elements per access: 16 bytes, half of that where elements are of 2 bytes (planes of 14x14), else one, as always of float64.
// Every other width would cost 15 kernels per dtype, for sizes that are even and no more.
constexpr int widest_vector(int element_size) { return element_size < 8 ? 16 / element_size : 1; }
constexpr int narrower_vector(int vector) { return vector == 8 ? 4 : 1; }
inline int vector_of(std::int64_t n, int element_size) {
  int vector = widest_vector(element_size);
  while (n % vector != 0) vector = narrower_vector(vector);
  return vector;
}

// kPlanes: a slab is a sequence of planes of `spatial` elements. Its elements, plane after plane, are cut into segments, one block
// (or team of warps) each, and these into pieces, one warp each. Vectors never cross planes.
struct PlanesPlan {
  std::int64_t spatial, channels;
  std::int64_t slabs, slab_size;
  std::int64_t slab_step;     // planes from the first of a slab to the first of the next slab
  std::int64_t pitch;         // elements from one plane of a slab to its next
  std::int64_t channel_step;  // channels likewise
  std::int64_t segment, segments;
  FastDivisor fast;          // by spatial, where that is less than kPiece or slabs are small
  bool small;                // slabs of less than 2^31 elements
  int vector, warps, teams;  // warps per segment, segments per block

  NORMEXT_HOST_DEVICE constexpr std::int64_t count(std::int64_t s) const {
    return s + 1 < segments ? segment : slab_size - s * segment;
  }
  // Elements of piece p (of kPiece) of segment s; the last ones may be short or empty.
  NORMEXT_HOST_DEVICE constexpr std::int64_t piece_count(std::int64_t s, std::int64_t p) const {
    const std::int64_t rest = count(s) - p * kPiece;
    return rest < 0 ? 0 : (rest < kPiece ? rest : kPiece);
  }
  // Pieces of a segment at most.
  NORMEXT_HOST_DEVICE constexpr std::int64_t pieces(int piece) const { return ceil_div(segments > 1 ? segment : slab_size, piece); }
  constexpr std::int64_t blocks() const { return ceil_div(slabs * segments, teams); }
};

// The sums of group norm's backward are taken per channel of an image: `single_planes`.
inline PlanesPlan planes_plan(const ChannelShape& shape, int element_size, bool single_planes = false) {
  const bool batch_norm = shape.batch_norm();
  const bool single = single_planes && !batch_norm;
  PlanesPlan plan{};
  plan.spatial = shape.spatial;
  plan.channels = shape.channels;
  plan.slabs = single ? shape.batch * shape.channels : shape.slabs();
  plan.slab_size = single ? shape.spatial : shape.slab_size();
  plan.slab_step = batch_norm || single ? 1 : shape.group_channels();
  plan.pitch = (batch_norm ? shape.channels : 1) * shape.spatial;
  plan.channel_step = batch_norm ? 0 : 1;
  const std::int64_t pieces = ceil_div(ceil_div(plan.slab_size, kMostSegments), kPiece);
  plan.segment = kPiece * std::clamp<std::int64_t>(pieces, kLeastSegment / kPiece, kMostPieces);
  plan.segments = ceil_div(plan.slab_size, plan.segment);
  plan.small = plan.slab_size < (std::int64_t{1} << 31);
  if (plan.small || plan.spatial < kPiece) plan.fast = FastDivisor(static_cast<std::uint32_t>(plan.spatial));
  plan.vector = vector_of(shape.spatial, element_size);
  plan.warps = static_cast<int>(std::min<std::int64_t>(plan.pieces(kPiece), kTeamWarps));
  plan.teams = std::max(4 / plan.warps, 1);
  return plan;
}

// kPlanes, forward: a slab that fits into the shared memory of a block, or of the blocks of a cluster, is read once.
struct ResidentPlan {
  int blocks = 0;             // per slab, a power of two; 0: not resident
  int warps = 1;              // per slab and block
  int teams = 1;              // slabs per block
  std::int64_t segments = 0;  // per block at most

  // Moments of all segments of the slab, of the pieces of the block's own, then those pieces.
  NORMEXT_HOST_DEVICE constexpr std::int64_t table_values(const PlanesPlan& plan) const {
    return 3 * (plan.segments + segments * plan.pieces(kPiece));
  }
  NORMEXT_HOST_DEVICE constexpr std::int64_t team_bytes(const PlanesPlan& plan, int element_size, int accumulate_size) const {
    return ceil_div(table_values(plan) * accumulate_size, 16) * 16 + segments * plan.pieces(kPiece) * kPiece * element_size;
  }
};

// For tests and tuning only: ResidentPlan::blocks, where they fit.
inline std::optional<int>& forced_resident_blocks() {
  static std::optional<int> blocks;
  return blocks;
}

// Two blocks share a multiprocessor, so that one computes while the other waits. Not for few large slabs, which would leave most
// multiprocessors idle. The mapping does not change a bit of the result. None of the thresholds has been tuned on a GPU yet.
inline ResidentPlan resident_plan(const PlanesPlan& plan, int element_size, int accumulate_size, const Device& device) {
  constexpr std::int64_t kSmallSlab = 64 * 1024;  // bytes that a block reads in about the time of a launch
  const auto with_blocks = [&](int blocks) {
    ResidentPlan m;
    m.blocks = blocks;
    m.segments = ceil_div(plan.segments, blocks);
    m.warps = static_cast<int>(std::min<std::int64_t>(m.segments * plan.pieces(kPiece), kTeamWarps));
    m.teams = blocks == 1 ? std::max(4 / m.warps, 1) : 1;
    return m;
  };
  const auto fits = [&](const ResidentPlan& m, std::int64_t bytes) {
    return m.teams * m.team_bytes(plan, element_size, accumulate_size) <= bytes;
  };
  if (const int forced = forced_resident_blocks().value_or(-1); forced >= 0) {
    return forced > 0 && fits(with_blocks(forced), device.shared_bytes) ? with_blocks(forced) : ResidentPlan{};
  }
  ResidentPlan m = with_blocks(1);
  while (m.blocks * 2 <= device.max_cluster && m.blocks < plan.segments &&
         (!fits(m, device.shared_bytes / 2 - 1024) || plan.slabs * m.blocks * 2 <= device.sm_count)) {
    m = with_blocks(m.blocks * 2);
  }
  const bool idle = plan.slabs * m.blocks * 2 < device.sm_count && plan.slab_size * element_size > kSmallSlab;
  return idle || !fits(m, device.shared_bytes) ? ResidentPlan{} : m;
}

// kChannelsLast: a thread owns `vector` neighbouring channels of every row_lanes-th row. A block takes `lanes` such vectors of a
// run of rows of an image; for batch norm the whole batch is one image.
constexpr int kThreadRows = 16;  // rows that a thread holds in registers, or adds in sequence: a chunk
constexpr int kLastThreads = 128;
constexpr int kMostRuns = 1024;  // per image, except that
constexpr int kMostChunks = 16;  // a run has no more chunks, for they are added in sequence as well

struct LastPlan {
  std::int64_t images, rows, channels;
  std::int64_t groups, group_channels;  // groups per image; batch norm: every channel is one
  std::int64_t run_rows, runs, tiles;
  int vector, lanes, row_lanes;

  // Rows of a run.
  NORMEXT_HOST_DEVICE constexpr std::int64_t count(std::int64_t run) const {
    return run + 1 < runs ? run_rows : rows - run * run_rows;
  }
  NORMEXT_HOST_DEVICE constexpr std::int64_t slab(std::int64_t image, std::int64_t channel) const {
    return image * groups + (group_channels == 1 ? channel : channel / group_channels);
  }
  constexpr std::int64_t slabs() const { return images * groups; }
  constexpr std::int64_t entries() const { return runs * group_channels; }  // of a slab's table of partial results
  constexpr std::int64_t blocks() const { return images * runs * tiles; }
  constexpr int threads() const { return lanes * row_lanes; }
};

inline LastPlan last_plan(const ChannelShape& shape, int element_size) {
  const bool batch_norm = shape.batch_norm();
  LastPlan plan{};
  plan.images = batch_norm ? 1 : shape.batch;
  plan.rows = batch_norm ? shape.batch * shape.spatial : shape.spatial;
  plan.channels = shape.channels;
  plan.groups = batch_norm ? shape.channels : shape.groups;
  plan.group_channels = shape.group_channels();
  plan.vector = vector_of(shape.channels, element_size);
  const std::int64_t vectors = shape.channels / plan.vector;
  plan.lanes = static_cast<int>(std::min<std::int64_t>(power_of_two_at_least(vectors), 32));
  plan.tiles = ceil_div(vectors, plan.lanes);
  const std::int64_t useful = power_of_two_at_least(ceil_div(plan.rows, kThreadRows));
  plan.row_lanes = static_cast<int>(std::clamp<std::int64_t>(useful, 32 / plan.lanes, kLastThreads / plan.lanes));
  const std::int64_t chunk = plan.row_lanes * kThreadRows;
  plan.run_rows = chunk * std::clamp<std::int64_t>(ceil_div(ceil_div(plan.rows, chunk), kMostRuns), 1, kMostChunks);
  plan.runs = ceil_div(plan.rows, plan.run_rows);
  return plan;
}

// The same threads, with runs that only say which rows they write: enough blocks to keep any GPU busy to the end, of at least as
// many rows as a thread has in flight and at most so many that the parameters of its channels no longer count.
inline LastPlan apply_plan(LastPlan plan) {
  constexpr std::int64_t kBlocks = 2048, kLeastRows = 4, kMostRows = 64;  // rows of a thread
  const std::int64_t runs = ceil_div(kBlocks, std::max<std::int64_t>(plan.images * plan.tiles, 1));
  const std::int64_t rows = ceil_div(ceil_div(plan.rows, runs * plan.row_lanes), kLeastRows) * kLeastRows;
  plan.run_rows = plan.row_lanes * std::clamp(rows, kLeastRows, kMostRows);
  plan.runs = ceil_div(plan.rows, plan.run_rows);
  return plan;
}

// What a backward needs, and the workspace for it, in values of the accumulate type.
struct GradWorkspace {
  bool needs_sums, needs_means;
  bool apply_finishes = false;  // on planes the kernel that forms dx finds the means of its slab by itself, from few sums
  std::int64_t runs;            // entries per image (batch norm: in all) of the partial sums
  std::int64_t partials = 0;    // [2][images * runs][channels], or [channels][2][runs]
  std::int64_t means = 0;       // [2][slabs]

  GradWorkspace(const ChannelBackwardArgs& args, const ChannelShape& shape, int element_size)
      : needs_means(args.grad_input != nullptr && !args.fixed_stats),
        runs(shape.layout == ChannelLayout::kPlanes ? planes_plan(shape, element_size, true).segments
                                                    : last_plan(shape, element_size).runs) {
    needs_sums =
        args.grad_weight != nullptr || args.grad_bias != nullptr || (!args.given_sums && (needs_means || args.sums != nullptr));
    if (needs_sums) partials = 2 * (shape.batch_norm() ? 1 : shape.batch) * runs * shape.channels;
    constexpr std::int64_t kFewSums = 256;  // of a slab, which each of its blocks adds
    apply_finishes =
        shape.layout == ChannelLayout::kPlanes && needs_means && args.sums == nullptr && runs * shape.group_channels() <= kFewSums;
    if (needs_means && !apply_finishes) means = 2 * shape.slabs();
  }
};

}  // namespace normext::cuda
