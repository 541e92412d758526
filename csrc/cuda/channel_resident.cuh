// Channel norm forward over planes, the slab in shared memory: input is read once.
//
// A slab takes a team of warps of a block, or the blocks of a cluster (sm_90 and later), each of which takes whole segments. In one
// launch: each warp takes pieces of 1024 elements, puts them into shared memory and their moments into a table; warps merge the
// pieces of a segment and tell every block of the cluster; after a barrier each warp merges all segments and applies the result to
// its own pieces. The order of every sum is that of channel_planes.cuh, and so are the bits. A warp reads from shared memory only
// what it wrote. All input is read before any output is written, but for the residual, which is read by the lanes that write the
// same elements. Compiled once for plain and fused calls: plain ones get up to 20 registers more, which were not yet measured on a
// GPU. Chosen where slabs fit and fill the device (resident_plan). Does not do: statistics that are given or running ones,
// statistics alone.
#pragma once

#include "cuda/channel_planes.cuh"

namespace normext::cuda {

template <class T, int V>
__device__ __forceinline__ void apply_resident(const PlanesForwardParams<Accumulate<T>>& params, std::int64_t slab,
                                               std::int64_t begin, const T* cache, const CentredRow<Accumulate<T>>& row) {
  constexpr int kSlots = kSlotsOf<kApplyPiece, V>;
  const ChannelForwardArgs& args = params.args;
  const PlanesPlan& plan = params.plan;
  const PlanePiece<V> piece(plan, slab, begin, kApplyPiece);
  Tile<T, V, kSlots> x, residual;
  if (args.residual != nullptr) piece.load(residual, args.residual, params.input_aligned);
  x.load(cache, piece.columns(), true);
  const std::int64_t channel = slab * plan.slab_step % plan.channels;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (!piece.owns(s)) continue;
    apply_plane<true>(x.slot[s], residual.slot[s], params, row, channel + piece.place(s).plane * plan.channel_step);
  }
  piece.store(x, args.output, params.output_aligned);
}

template <class T, int V>
__global__ void __launch_bounds__(kTeamWarps * 32, 1)
    planes_resident_kernel(const __grid_constant__ PlanesForwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  const PlanesPlan& plan = params.plan;
  const ResidentPlan& resident = params.resident;
  const int block_warp = warp_id();
  const int team = block_warp / resident.warps;
  const int warp = block_warp % resident.warps;
  const std::int64_t slab = static_cast<std::int64_t>(blockIdx.x) / resident.blocks * resident.teams + team;
  const bool active = slab < plan.slabs;
  const int room = static_cast<int>(plan.pieces(kPiece));
  const std::int64_t first = resident.blocks == 1 ? 0 : cluster_rank() * resident.segments;
  const std::int64_t rest = active ? plan.segments - first : 0;
  const int segments = static_cast<int>(rest < resident.segments ? rest : resident.segments);

  unsigned char* memory = dynamic_smem() + team * resident.team_bytes(plan, sizeof(T), sizeof(A));
  A* slab_table = reinterpret_cast<A*>(memory);
  A* piece_table = slab_table + 3 * plan.segments;
  T* cache = reinterpret_cast<T*>(memory + ceil_div(resident.table_values(plan) * static_cast<int>(sizeof(A)), 16) * 16);
  if (resident.blocks > 1) cluster_arrive();

  dependency_wait();
  for (int p = warp; p < segments * room; p += resident.warps) {
    const int s = p / room;
    const PlanePiece<V> piece(plan, slab, (first * room + p) * kPiece, kPiece);
    Tile<T, V, kSlotsOf<kPiece, V>> x;
    piece.load(x, params.args.input, params.input_aligned);
    const A count = static_cast<A>(static_cast<int>(plan.piece_count(first + s, p - s * room)));
    const auto stats = segment_stats<LayerNorm>(x, piece.columns(), kWarpSize, count);
    if (lane_id() == 0) put_moments(piece_table + s * 3 * room, room, p - s * room, stats.moments);
    x.store(cache + static_cast<std::int64_t>(p) * kPiece, piece.columns(), true);
  }
  if (resident.blocks > 1) cluster_wait();
  block_barrier();
  for (int s = warp; s < segments; s += resident.warps) {
    const auto merged =
        merge_table(piece_table + s * 3 * room, room, [&](std::int64_t p) { return plan.piece_count(first + s, p); });
    if (lane_id() >= static_cast<unsigned>(resident.blocks)) continue;
    A* table = resident.blocks == 1 ? slab_table : peer_smem(slab_table, lane_id());
    put_moments(table, plan.segments, first + s, merged.moments);
  }
  if (resident.blocks > 1) {
    cluster_barrier();
  } else {
    block_barrier();
  }
  if (!active) return;

  const auto merged = merge_table(slab_table, plan.segments, [&](std::int64_t s) { return plan.count(s); });
  const SlabStats<A> stats(merged.moments, static_cast<A>(plan.slab_size), params.eps);
  if (first == 0 && threadIdx.x % (resident.warps * kWarpSize) == 0) {
    stats.save(params.sink, slab);
  }
  for (int p = warp; p < segments * room; p += resident.warps) {
    NORMEXT_NO_UNROLL
    for (int part = 0; part < kPiece; part += kApplyPiece) {
      apply_resident<T, V>(params, slab, (first * room + p) * kPiece + part, cache + static_cast<std::int64_t>(p) * kPiece + part,
                           stats.row);
    }
  }
  launch_dependents();
}

}  // namespace normext::cuda
