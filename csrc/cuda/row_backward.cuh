// Row norm backward: dx, and the partial sums of dweight and dbias, from one read of x and dy.
//
//   g = dy * weight;  dx = gradient(g, xhat, mean(g), mean(g * xhat)) + grad_residual_out;  dweight += dy * xhat;  dbias += dy
//
// x and dy come through row_ring.cuh, several rows ahead; row_backward_values.cuh is what is made of them in one segment of a row,
// row_param_grad.cuh what becomes of dweight and dbias.
//
// The rows are cut into runs (row_runs of tuning.h), a run into groups of 16 rows. A team of lanes (for rows of one segment) or of
// `warps` warps takes the rows of a group one after another and adds their parameter gradients in registers. Groups are folded
// in index order into a second accumulator in shared memory, and each run writes one partial row; param_grad.cuh adds the
// partials pairwise. So no accumulator takes more than 16 terms in sequence, and neither the grid nor the mapping changes a bit.
// A row of several segments needs one barrier (of the block, or of the cluster when blocks_per_row > 1).
//
// kSplit, for rows that are wider still: one launch leaves the two sums of each segment in the workspace, the next applies them.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row_param_grad.cuh"
#include "cuda/row_ring.cuh"

namespace normext::cuda {

template <class Norm, class A>
__device__ __forceinline__ void put_sums(A* table, int segments, int s, RowSums<A> sums) {
  if constexpr (Norm::kCentred) table[s] = sums.g;
  table[segments + s] = sums.gx;
}

// Every warp's sums into the table of its block, or of all `blocks` blocks of the cluster. The caller alternates between two
// tables, so one barrier per row is enough.
template <class Norm, class A>
__device__ __forceinline__ void exchange_sums(A* table, int segments, int segment, int lane, int blocks, RowSums<A> sums) {
  if (blocks > 1) {
    if (lane < blocks && segment < segments) put_sums<Norm>(peer_smem(table, static_cast<unsigned>(lane)), segments, segment, sums);
    cluster_barrier();
  } else {
    if (lane == 0 && segment < segments) put_sums<Norm>(table, segments, segment, sums);
    block_barrier();
  }
}

// Sums over all segments, pairwise in index order, by one whole warp.
template <class Norm, int kLevels, class A>
__device__ __forceinline__ RowSums<A> merge_sums(const A* table, int segments) {
  A g = A(0);
  if constexpr (Norm::kCentred) g = warp_pairwise<kLevels, A>(segments, [&](int s) { return table[s]; });
  return {g, warp_pairwise<kLevels, A>(segments, [&](int s) { return table[segments + s]; })};
}

// What a launch does, in a register: conditions on its arguments are else looked up for every row.
enum BackwardStep : std::uint32_t { kTakesSums = 1, kTakesResidual = 2, kTakesParams = 4, kTakesInput = 8 };

template <class A>
__device__ __forceinline__ std::uint32_t row_backward_steps(const RowBackwardParams<A>& params) {
  const bool input = params.args.grad_input != nullptr && params.phase != BackwardPhase::kSums;
  const bool sums = params.args.grad_input != nullptr && params.phase != BackwardPhase::kApply;
  const bool weights = params.weight_partial != nullptr || params.bias_partial != nullptr;
  std::uint32_t steps = 0;
  if (input) steps |= kTakesInput;
  if (sums) steps |= kTakesSums;
  if (input && params.args.grad_residual_out != nullptr) steps |= kTakesResidual;
  if (weights && params.phase != BackwardPhase::kSums) steps |= kTakesParams;
  forget_derived(steps);
  return steps;
}

template <class Norm, class T, int V>
__global__ void __launch_bounds__(max_warps(sizeof(T), V) * 32, 1)
    row_backward_kernel(const __grid_constant__ RowBackwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  constexpr int kSlots = 8 / V;
  const RowBackwardArgs& args = params.args;
  const RowTree& tree = params.tree;
  const RowMapping& mapping = params.mapping;
  const bool several = tree.segments > 1;
  const bool cluster = mapping.tier == RowTier::kRegisters && mapping.blocks_per_row > 1;
  const std::uint32_t steps = row_backward_steps(params);
  const auto takes = [&](std::uint32_t step) { return (steps & step) != 0; };
  const BackwardShared<A> shared(tree, mapping);

  const RowDivisors& by = params.by;
  const int lane = static_cast<int>(lane_id()) & (tree.lanes - 1);
  const int warp = warp_id();
  const int team = several ? by.warps.divide(warp) : by.lanes.divide(threadIdx.x);
  const std::int64_t run = by.blocks.divide(blockIdx.x);
  const int part = static_cast<int>(blockIdx.x - run * mapping.blocks_per_row);
  const std::int64_t run_start = run_begin(args.rows, params.runs, run);
  const int run_rows = static_cast<int>(run_begin(args.rows, params.runs, run + 1) - run_start);
  const int groups = static_cast<int>(ceil_div(run_rows, kGroupRows));
  const std::int64_t block_start = part * shared.columns;
  const bool in_team = team < mapping.rows_at_once;

  // Shared memory of a peer may be written only once the peer runs: say so now, ask before the first row.
  if (cluster) cluster_arrive();
  const int segment = several ? (part - team) * mapping.warps + warp : 0;
  const LaneColumns<V> columns = lane_columns<V>(tree, segment, lane, in_team && segment < tree.segments);
  dependency_wait();
  A weight[kSlots][V];
  load_weight<Norm, T>(params, columns, weight);

  if (cluster) cluster_wait();
  const int table_values = mapping.rows_at_once * 2 * tree.segments;  // of the two tables that take turns
  A* const tables = shared.exchange + team * 2 * tree.segments;
  int turn = 0;
  TeamRow next_row(run_start, in_team ? run_rows : 0, team, mapping.rows_at_once);
  const bool only_input = BackwardSegment<Norm, T, V, kSlots>::kMaybeFloat && params.float_grad;
  RowRing<T, V, kSlots> ring(args, next_row, columns, params.input_aligned, params.grad_output_aligned, only_input);
  auto next_stats = saved_row<Norm, A>(args, next_row.row());
  for (int base = 0; base < groups; base += mapping.rows_at_once) {
    ParamGrad<Norm, T, V, kSlots> grads;
    grads.clear();
    for (int r = 0; r < kGroupRows && base * kGroupRows + r < run_rows; ++r) {
      // Of a row that does not exist, nothing is loaded or kept: the team only takes part in the barriers.
      const std::int64_t row = next_row.row();
      const LaneColumns<V> here{columns.first, next_row.exists() ? columns.left : 0};
      next_row.next();
      Tile<T, V, kSlots> residual;
      if (takes(kTakesResidual)) load_grad_residual(params, row, here, residual);
      BackwardSegment<Norm, T, V, kSlots> data;
      ring.take(data.x, data.dy, here);
      const auto stats = next_stats;
      next_stats = saved_row<Norm, A>(args, next_row.row());
      BackwardValues<A, V, kSlots> values;
      compute_values<Norm>(data, weight, params, row, here, stats, values);
      RowSums<A> sums{A(0), A(0)};
      if (takes(kTakesSums)) {
        sums = lane_sums<Norm>(values, here);
        if constexpr (Norm::kCentred) sums.g = lanes_sum(sums.g, tree.lanes);
        sums.gx = lanes_sum(sums.gx, tree.lanes);
        if (!takes(kTakesInput)) {
          if (lane == 0 && here.left > 0) put_sums<Norm>(params.row_sums + row * 2 * tree.segments, tree.segments, segment, sums);
          continue;
        }
        if (several) {
          A* table = tables + turn;
          exchange_sums<Norm>(table, tree.segments, segment, lane, cluster ? mapping.blocks_per_row : 1, sums);
          sums = merge_sums<Norm, kClusterLevels>(table, tree.segments);
          turn = table_values - turn;
        }
      } else if (takes(kTakesInput)) {
        sums = merge_sums<Norm, kSplitLevels>(params.row_sums + row * 2 * tree.segments, tree.segments);
      }
      if (takes(kTakesParams)) grads.add(values, here, args.rounding);
      if (!takes(kTakesInput)) continue;
      store_grad_input<Norm>(values, residual, params, row, here, stats, {sums.g / params.cols, sums.gx / params.cols});
    }
    if (takes(kTakesParams)) {
      fold_groups<Norm>(shared, mapping, grads, columns, block_start, team,
                        groups - base < mapping.rows_at_once ? groups - base : mapping.rows_at_once, base == 0);
    }
  }
  launch_dependents();
  if (!takes(kTakesParams)) return;
  block_barrier();
  store_partials(params, shared, run, block_start);
}

}  // namespace normext::cuda
