// Row norm forward, the row not in registers: the schedule for rows wider than a block (or, on sm_90 and later, a cluster) holds.
//
// The warps of a block take the segments of a row in turn, in two phases that one kernel serves:
//   statistics  load the segment (and add and store the residual sum), take its moments
//   apply       merge all moments, load the segment again, normalise, store
// kShared: one launch does both; the row is kept in shared memory, so device memory is read once.
// kSplit:  two launches with several blocks per row; the moments travel through the workspace, and the second launch reads x,
//          or the stored sum, again (from L2 where it fits). No grid-wide barrier.
// Compiled once for both types of parameters, with and without a residual. Plain calls get the registers of fused ones, up to 27
// more; a warp asks for all of a segment before it uses any, so that few warps keep memory busy. Not yet measured.
#pragma once

#include "cuda/row_forward.cuh"

namespace normext::cuda {

template <class Norm, class T, int V, int kSlots>
__device__ __forceinline__ void wide_statistics(const RowForwardParams<Accumulate<T>>& params, std::int64_t row, int segment,
                                                T* cache, Accumulate<T>* table) {
  using A = Accumulate<T>;
  const RowForwardArgs& args = params.args;
  const bool residual = args.residual != nullptr;
  const LaneColumns<V> columns = lane_columns<V>(params.tree, segment, static_cast<int>(lane_id()), true);
  Tile<T, V, kSlots> x;
  load_rows(x, params, residual, row, columns);
  const auto stats = segment_stats<Norm>(x, columns, params.tree.lanes, static_cast<A>(params.tree.count(segment)));
  if (lane_id() == 0) stats.put(table, params.tree.segments, segment);
  if (residual) {
    x.store(static_cast<T*>(args.residual_out) + args.residual_out_layout.offset(row), columns, params.output_aligned);
  }
  if (cache != nullptr) x.store(cache, columns, true);
}

template <class Norm, class T, int V, int kSlots>
__device__ __forceinline__ void wide_apply(const RowForwardParams<Accumulate<T>>& params, std::int64_t output, int segment,
                                           const T* source, bool aligned, const typename Norm::template Row<Accumulate<T>>& stats) {
  const LaneColumns<V> columns = lane_columns<V>(params.tree, segment, static_cast<int>(lane_id()), true);
  Tile<T, V, kSlots> x;
  x.load(source, columns, aligned);
  Params<Norm, T, EitherParam<T>, V, kSlots, false> weights;
  apply_and_store(x, weights, params, stats, output, columns);
}

template <class Norm, class T, int V, int kSlots>
__global__ void __launch_bounds__(max_warps(sizeof(T), V) * 32, 1)
    row_wide_kernel(const __grid_constant__ RowForwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  constexpr int kValues = SegmentStats<Norm, A>::kValues;
  const RowForwardArgs& args = params.args;
  const RowTree& tree = params.tree;
  const RowMapping& mapping = params.mapping;
  const bool shared = mapping.tier == RowTier::kShared;

  const std::int64_t row = params.by.blocks.divide(blockIdx.x);
  const int part = static_cast<int>(blockIdx.x - row * mapping.blocks_per_row);
  const int first = part * mapping.warps + warp_id();
  const int stride = mapping.blocks_per_row * mapping.warps;
  const std::int64_t table_bytes = ceil_div(kValues * tree.segments * static_cast<int>(sizeof(A)), 16) * 16;
  A* table = shared ? reinterpret_cast<A*>(dynamic_smem()) : static_cast<A*>(params.partials) + row * kValues * tree.segments;
  T* cache = shared ? reinterpret_cast<T*>(dynamic_smem() + table_bytes) : nullptr;

  dependency_wait();
  if (params.statistics) {
    for (int s = first; s < tree.segments; s += stride) {
      wide_statistics<Norm, T, V, kSlots>(params, row, s, cache, table);
    }
  }
  if (!params.apply) return;
  if (shared) block_barrier();

  const auto stats = merge_segments<Norm, kSplitLevels>(tree, params.cols, params.eps, false, {}, table);
  if (args.stats != nullptr && first == 0 && lane_id() == 0) save_stats<Norm>(params, row, stats);
  const bool residual = args.residual != nullptr;
  const T* source = shared     ? cache
                    : residual ? static_cast<const T*>(args.residual_out) + args.residual_out_layout.offset(row)
                               : static_cast<const T*>(args.input) + args.input_layout.offset(row);
  const bool aligned = shared || (residual ? params.output_aligned : params.input_aligned);
  const std::int64_t output = args.output_layout.offset(row);
  for (int s = first; s < tree.segments; s += stride) {
    wide_apply<Norm, T, V, kSlots>(params, output, s, source, aligned, stats);
  }
  launch_dependents();
}

}  // namespace normext::cuda
