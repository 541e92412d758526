// Channel norm forward over planes ([batch, channels, spatial], spatial > 1).
//
//   output = activation(xhat * weight + bias + residual),   statistics per slab (core/channel_args.h)
//
// Two launches, in evaluation the second alone, a team of warps per segment of a slab (channel_plan.h) in both, so that one slab
// fills many multiprocessors:
//   moments  each warp takes pieces of 1024 elements in registers; their moments meet in shared memory, are merged by one warp and
//            go to the workspace
//   apply    one warp merges the moments of the slab's segments; all normalise, add, activate, and round once. The first segment's
//            team writes the statistics. Without an output, channel_finalise_kernel does just that
// Input is read twice, the second time from L2 where it fits. A lane reads all elements of a piece before it writes any, so output
// may be input or residual. Chosen where channel_resident.cuh is not.
#pragma once

#include "cuda/channel_entry.h"
#include "cuda/channel_launch.cuh"
#include "cuda/channel_merge.cuh"
#include "cuda/channel_tile.cuh"
#include "cuda/row_forward.cuh"

namespace normext::cuda {

template <class A>
struct PlanesForwardParams {
  ChannelForwardArgs args;
  PlanesPlan plan;
  A eps;
  SlabSink<A> sink;
  A* partials;         // [slabs][3][segments]
  bool input_aligned;  // input and residual
  bool output_aligned;
  bool wide;              // weight and bias are float32 while T is a 16-bit type
  ResidentPlan resident;  // channel_resident.cuh
};

template <class T, int V>
__global__ void __launch_bounds__(kTeamWarps * 32, 1)
    planes_moments_kernel(const __grid_constant__ PlanesForwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  const PlanesPlan& plan = params.plan;
  const Team team(plan);
  const std::int64_t pieces = team.active ? ceil_div(plan.count(team.segment), kPiece) : 0;
  const std::int64_t room = plan.pieces(kPiece);
  A* table = reinterpret_cast<A*>(dynamic_smem()) + team.index * 3 * room;

  dependency_wait();
  for (std::int64_t p = team.warp; p < pieces; p += plan.warps) {
    const PlanePiece<V> piece(plan, team, p, kPiece);
    Tile<T, V, kSlotsOf<kPiece, V>> x;
    piece.load(x, params.args.input, params.input_aligned);
    const A count = static_cast<A>(static_cast<int>(plan.piece_count(team.segment, p)));
    const auto stats = segment_stats<LayerNorm>(x, piece.columns(), kWarpSize, count);
    if (lane_id() == 0) put_moments(table, room, p, stats.moments);
  }
  launch_dependents();
  block_barrier();
  if (team.warp != 0 || !team.active) return;
  const auto merged = merge_table(table, room, [&](std::int64_t p) { return plan.piece_count(team.segment, p); });
  if (lane_id() == 0) put_moments(params.partials + team.slab * 3 * plan.segments, plan.segments, team.segment, merged.moments);
}

// The statistics of the team's slab, given, running or merged; all threads of the block must call it.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ CentredRow<A> team_stats(const PlanesForwardParams<A>& params, const Team& team) {
  const PlanesPlan& plan = params.plan;
  const ChannelForwardArgs& args = params.args;
  if (args.given_stats) return team.active ? load_stats<A>(args.stats, plan.slabs, team.slab) : CentredRow<A>{};
  if (args.running_mean != nullptr) {
    if (!team.active) return {};
    const auto row = running_stats<T>(args, params.wide, team.slab, params.eps);
    const bool first = team.segment == 0 && team.warp == 0 && lane_id() == 0;
    if (first && params.sink.stats != nullptr) put_stats(params.sink.stats, plan.slabs, team.slab, row, A(0));
    return row;
  }
  A* shared = reinterpret_cast<A*>(dynamic_smem()) + team.index * 3;
  if (team.warp == 0 && team.active) {
    const auto merged =
        merge_table(params.partials + team.slab * 3 * plan.segments, plan.segments, [&](std::int64_t s) { return plan.count(s); });
    const SlabStats<A> stats(merged.moments, static_cast<A>(plan.slab_size), params.eps);
    if (lane_id() == 0) {
      shared[0] = stats.row.hi;
      shared[1] = stats.row.lo;
      shared[2] = stats.row.rstd;
      if (team.segment == 0) stats.save(params.sink, team.slab);
    }
  }
  block_barrier();
  return {shared[0], shared[1], shared[2]};
}

// Replaces the x of one slot by y.
template <bool kFused, class T, int V, class A = Accumulate<T>>
__device__ __forceinline__ void apply_plane(Columns<T, V>& x, const Columns<T, V>& residual, const PlanesForwardParams<A>& params,
                                            const CentredRow<A>& row, std::int64_t channel) {
  const ChannelForwardArgs& args = params.args;
  const A weight = load_parameter<T>(args.weight, params.wide, channel, 1.0f);
  const A bias = load_parameter<T>(args.bias, params.wide, channel, 0.0f);
  A z[V];
#pragma unroll
  for (int i = 0; i < V; ++i) z[i] = ChannelNorm::affine<A>(x[i], row, weight, bias);
  if constexpr (kFused) {
    if (args.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = z[i] + residual[i];
    }
    activate_all(args.activation, z);
  }
  x.assign(z);
}

template <class T, int V, bool kFused>
__global__ void __launch_bounds__(kTeamWarps * 32, 1)
    planes_apply_kernel(const __grid_constant__ PlanesForwardParams<Accumulate<T>> params) {
  constexpr int kSlots = kSlotsOf<kApplyPiece, V>;
  const ChannelForwardArgs& args = params.args;
  const PlanesPlan& plan = params.plan;
  const Team team(plan);

  dependency_wait();
  const auto row = team_stats<T>(params, team);
  if (!team.active) return;
  const std::int64_t channel = team.slab * plan.slab_step % plan.channels;
  const std::int64_t pieces = ceil_div(plan.count(team.segment), kApplyPiece);
  for (std::int64_t p = team.warp; p < pieces; p += plan.warps) {
    const PlanePiece<V> piece(plan, team, p, kApplyPiece);
    Tile<T, V, kSlots> x, residual;
    piece.load(x, args.input, params.input_aligned);
    if (kFused && args.residual != nullptr) piece.load(residual, args.residual, params.input_aligned);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (!piece.owns(s)) continue;
      apply_plane<kFused>(x.slot[s], residual.slot[s], params, row, channel + piece.place(s).plane * plan.channel_step);
    }
    piece.store(x, args.output, params.output_aligned);
  }
  launch_dependents();
}

}  // namespace normext::cuda
