// Row norm backward: dx, and the partial sums of dweight and dbias, from one read of x and dy.
//
// x and dy come through row_ring.cuh, several rows ahead.
//
//   g = dy * weight;  dx = gradient(g, xhat, mean(g), mean(g * xhat)) + grad_residual_out;  dweight += dy * xhat;  dbias += dy
//
// The rows are cut into runs (row_runs of tuning.h), a run into groups of 16 rows. A team of lanes (for rows of one segment) or of
// `warps` warps takes the rows of a group one after another and adds their parameter gradients in registers. Groups are folded
// in index order into a second accumulator in shared memory, and each run writes one partial row; param_grad.cuh adds the
// partials pairwise. So no accumulator takes more than 16 terms in sequence, and neither the grid nor the mapping changes a bit.
// A row of several segments needs one barrier (of the block, or of the cluster when blocks_per_row > 1).
//
// kSplit, for rows that are wider still: one launch leaves the two sums of each segment in the workspace, the next applies them.
#pragma once

#include "core/row_args.h"
#include "cuda/collectives.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_ring.cuh"
#include "cuda/tile.cuh"
#include "cuda/tuning.h"

namespace normext::cuda {

enum class BackwardPhase : int { kWhole, kSums, kApply };

template <class A>
struct RowBackwardParams {
  RowBackwardArgs args;
  RowTree tree;
  RowMapping mapping;
  RowDivisors by;
  A cols, weight_offset;
  std::int64_t runs;
  BackwardPhase phase;
  A* row_sums;        // kSplit: [rows][2][segments]
  A* weight_partial;  // [runs][cols] or null
  A* bias_partial;    // [runs][cols] or null
  bool input_aligned, grad_output_aligned, grad_residual_aligned, grad_input_aligned, weight_aligned;
  bool float_grad;  // grad_output is float32 while T is a 16-bit type
};

// x and dy of one segment of one row, as they are stored. The gradient of a 16-bit RMSNorm may be float32 (llama rounding with
// float32 weights); it is then read where it is used, so that the common case pays no registers for it.
template <class Norm, class T, int V, int kSlots>
struct BackwardSegment {
  using A = Accumulate<T>;
  static constexpr bool kMaybeFloat = !Norm::kCentred && sizeof(T) == 2;
  Tile<T, V, kSlots> x;
  Tile<T, V, kSlots> dy;

  __device__ __forceinline__ void grad_output(const RowBackwardParams<A>& params, std::int64_t row, const LaneColumns<V>& columns,
                                              A (&out)[kSlots][V]) const {
    if constexpr (kMaybeFloat) {
      if (params.float_grad) {
        const RowBackwardArgs& args = params.args;
        const float* p = static_cast<const float*>(args.grad_output) + args.grad_output_layout.offset(row) + columns.first;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          Columns<float, V> wide;
          if (columns.owns(s)) wide.template load<false>(p + columns.offset(s));
#pragma unroll
          for (int i = 0; i < V; ++i) out[s][i] = wide[i];
        }
        return;
      }
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int i = 0; i < V; ++i) out[s][i] = dy.slot[s][i];
    }
  }
};

// The weight a lane needs, offset included.
template <class Norm, class P, int V, int kSlots, class A>
__device__ __forceinline__ void load_weight(const RowBackwardParams<A>& params, const LaneColumns<V>& columns,
                                            A (&weight)[kSlots][V]) {
  Tile<P, V, kSlots> tile;
  tile.load_or(static_cast<const P*>(params.args.weight), columns, params.weight_aligned, 1.0f);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      weight[s][i] = Norm::kCentred ? tile.slot[s][i] : params.weight_offset + tile.slot[s][i];
      forget_derived(weight[s][i]);  // else it is unpacked and added again for every row
    }
  }
}

template <class A>
struct RowSums {
  A g;   // sum of g, which only a centred norm needs
  A gx;  // sum of g * xhat
};

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

// What both the sums and dx are made of.
template <class A, int V, int kSlots>
struct BackwardValues {
  A dy[kSlots][V];
  A xhat[kSlots][V];
  A g[kSlots][V];  // dy * weight
};

template <class Norm, class T, int V, int kSlots, class A>
__device__ __forceinline__ void compute_values(const BackwardSegment<Norm, T, V, kSlots>& segment, const A (&weight)[kSlots][V],
                                               const RowBackwardParams<A>& params, std::int64_t row, const LaneColumns<V>& columns,
                                               const typename Norm::template Row<A>& stats, BackwardValues<A, V, kSlots>& out) {
  segment.grad_output(params, row, columns, out.dy);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out.xhat[s][i] = Norm::template normalise<A>(segment.x.slot[s][i], stats);
      out.g[s][i] = out.dy[s][i] * weight[s][i];
    }
  }
}

// Before the reduction, which hides some of the wait.
template <class T, int V, int kSlots, class A>
__device__ __forceinline__ void load_grad_residual(const RowBackwardParams<A>& params, std::int64_t row,
                                                   const LaneColumns<V>& columns, Tile<T, V, kSlots>& residual) {
  const RowBackwardArgs& args = params.args;
  const T* p = static_cast<const T*>(args.grad_residual_out) + args.grad_residual_out_layout.offset(row);
  residual.load(p, columns, params.grad_residual_aligned);
}

// This lane's share of the two sums of a segment.
template <class Norm, class A, int V, int kSlots>
__device__ __forceinline__ RowSums<A> lane_sums(const BackwardValues<A, V, kSlots>& values, const LaneColumns<V>& columns) {
  A g[kSlots];
  A gx[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    A gs[V];
    A products[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      gs[i] = values.g[s][i];
      products[i] = values.g[s][i] * values.xhat[s][i];
    }
    g[s] = Norm::kCentred && columns.owns(s) ? pairwise(gs) : A(0);
    gx[s] = columns.owns(s) ? pairwise(products) : A(0);
  }
  return {pairwise(g), pairwise(gx)};
}

// Parameter gradients of the columns a lane owns.
template <class Norm, class T, int V, int kSlots>
struct ParamGrad {
  using A = Accumulate<T>;
  A weight[kSlots][V];
  A bias[kSlots][V];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int i = 0; i < V; ++i) weight[s][i] = bias[s][i] = A(0);
    }
  }
  __device__ __forceinline__ void add(const BackwardValues<A, V, kSlots>& values, const LaneColumns<V>& columns,
                                      Rounding rounding) {
    if (!Norm::kCentred && rounding == Rounding::kLlama) {
      add_scaled(values, columns, [](A xhat) { return to_accumulate(from_accumulate<T>(xhat)); });
    } else {
      add_scaled(values, columns, [](A xhat) { return xhat; });
    }
  }

 private:
  template <class Scaled>
  __device__ __forceinline__ void add_scaled(const BackwardValues<A, V, kSlots>& values, const LaneColumns<V>& columns,
                                             Scaled scaled) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (!columns.owns(s)) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        weight[s][i] = fma(values.dy[s][i], scaled(values.xhat[s][i]), weight[s][i]);
        if constexpr (Norm::kCentred) bias[s][i] = bias[s][i] + values.dy[s][i];
      }
    }
  }
};

// dx of one segment; `residual` is the gradient that reaches x past the norm, if there is one.
template <class Norm, class T, int V, int kSlots, class A>
__device__ __forceinline__ void store_grad_input(const BackwardValues<A, V, kSlots>& values, const Tile<T, V, kSlots>& residual,
                                                 const RowBackwardParams<A>& params, std::int64_t row,
                                                 const LaneColumns<V>& columns, const typename Norm::template Row<A>& stats,
                                                 RowSums<A> mean) {
  A dx[kSlots][V];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dx[s][i] = Norm::template gradient<A>(values.g[s][i], values.xhat[s][i], stats, mean.g, mean.gx);
    }
  }
  if (params.args.grad_residual_out != nullptr) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int i = 0; i < V; ++i) dx[s][i] = dx[s][i] + residual.slot[s][i];
    }
  }
  Tile<T, V, kSlots> out;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) out.slot[s].assign(dx[s]);
  out.store(static_cast<T*>(params.args.grad_input) + row * params.args.cols, columns, params.grad_input_aligned);
}

template <class Norm, class A>
__device__ __forceinline__ typename Norm::template Row<A> saved_row(const RowBackwardArgs& args, std::int64_t row) {
  const A* stats = static_cast<const A*>(args.stats);
  if constexpr (Norm::kCentred) {
    return {stats[row], stats[args.rows + row], stats[2 * args.rows + row]};
  } else {
    return {stats[row]};
  }
}

// Shared memory of a block: RowRing, exchange[2][teams][2][segments], total[2][columns], group[teams][2][columns] when teams > 1.
template <class A>
struct BackwardShared {
  A* exchange;
  A* total;
  A* group;
  std::int64_t columns;  // of the row that this block holds

  __device__ __forceinline__ BackwardShared(const RowTree& tree, const RowMapping& mapping) {
    columns = block_columns(tree, mapping);
    exchange = reinterpret_cast<A*>(dynamic_smem() + blockDim.x * kRingBytes);
    total = exchange + exchange_values(tree, mapping);
    group = total + 2 * columns;
  }
};

// total (+)= group, in shared memory: `first` stores, later ones add.
template <class A>
__device__ __forceinline__ void fold(A* total, A value, bool first) {
  *total = first ? value : *total + value;
}
// V of them. In wide accesses: neighbouring lanes are V values apart, so single ones would meet in a few banks.
template <class A, int V>
__device__ __forceinline__ void fold(A* total, const A (&values)[V], bool first) {
  constexpr int kPack = V * sizeof(A) <= 16 ? V : 16 / static_cast<int>(sizeof(A));
#pragma unroll
  for (int p = 0; p < V; p += kPack) {
    A sum[kPack];
    const Pack<A, kPack> before = first ? Pack<A, kPack>{} : load_pack<A, kPack>(total + p);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum[i] = first ? values[p + i] : before.get(i) + values[p + i];
    store_pack(total + p, pack_from_accumulate<A, kPack>(sum));
  }
}

// After every 16 rows: the groups' sums into the block's totals, in index order.
template <class Norm, class T, int V, int kSlots, class A>
__device__ __forceinline__ void fold_groups(const BackwardShared<A>& shared, const RowMapping& mapping,
                                            const ParamGrad<Norm, T, V, kSlots>& grads, const LaneColumns<V>& columns,
                                            std::int64_t block_start, int team, int groups, bool first) {
  const bool alone = mapping.rows_at_once == 1;
  A* mine = alone ? shared.total : shared.group + team * 2 * shared.columns;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (!columns.owns(s)) continue;
    A* place = mine + (columns.first + columns.offset(s) - block_start);
    fold(place, grads.weight[s], first || !alone);
    if constexpr (Norm::kCentred) fold(place + shared.columns, grads.bias[s], first || !alone);
  }
  if (alone) return;
  block_barrier();
  const std::int64_t values = (Norm::kCentred ? 2 : 1) * shared.columns;
  for (std::int64_t c = threadIdx.x; c < values; c += blockDim.x) {
    for (int t = 0; t < groups; ++t) fold(shared.total + c, shared.group[t * 2 * shared.columns + c], first && t == 0);
  }
  block_barrier();
}

// The block's columns of the run's partial rows.
template <class A>
__device__ __forceinline__ void store_partials(const RowBackwardParams<A>& params, const BackwardShared<A>& shared,
                                               std::int64_t run, std::int64_t block_start) {
  const std::int64_t cols = params.tree.cols;
  const std::int64_t end = cols - block_start < shared.columns ? cols - block_start : shared.columns;
  for (std::int64_t c = threadIdx.x; c < end; c += blockDim.x) {
    const std::int64_t place = run * cols + block_start + c;
    if (params.weight_partial != nullptr) params.weight_partial[place] = shared.total[c];
    if (params.bias_partial != nullptr) params.bias_partial[place] = shared.total[shared.columns + c];
  }
}

// What a launch does, in a register: conditions on its arguments are else looked up for every row.
enum BackwardStep : std::uint32_t { kTakesSums = 1, kTakesResidual = 2, kTakesParams = 4, kTakesInput = 8 };

template <class A>
__device__ __forceinline__ std::uint32_t row_backward_steps(const RowBackwardParams<A>& params) {
  const bool input = params.args.grad_input != nullptr && params.phase != BackwardPhase::kSums;
  const bool sums = params.args.grad_input != nullptr && params.phase != BackwardPhase::kApply;
  const bool weights = params.weight_partial != nullptr || params.bias_partial != nullptr;
  std::uint32_t steps = (input ? kTakesInput : 0) | (sums ? kTakesSums : 0);
  if (input && params.args.grad_residual_out != nullptr) steps |= kTakesResidual;
  if (weights && params.phase != BackwardPhase::kSums) steps |= kTakesParams;
  forget_derived(steps);
  return steps;
}

template <class Norm, class T, class P, int V>
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
  load_weight<Norm, P>(params, columns, weight);

  if (cluster) cluster_wait();
  const int table_values = mapping.rows_at_once * 2 * tree.segments;  // of the two tables that take turns
  A* const tables = shared.exchange + team * 2 * tree.segments;
  int turn = 0;
  TeamRow next_row(run_start, in_team ? run_rows : 0, team, mapping.rows_at_once);
  const bool only_input = BackwardSegment<Norm, T, V, kSlots>::kMaybeFloat && params.float_grad;
  RowRing<T, V, kSlots> ring(args, next_row, columns, params.input_aligned, params.grad_output_aligned, only_input);
  auto next_stats = saved_row<Norm, A>(args, next_row.row());
  unsigned n = 0;  // of the team's rows
  for (int base = 0; base < groups; base += mapping.rows_at_once) {
    ParamGrad<Norm, T, V, kSlots> grads;
    grads.clear();
    for (int r = 0; r < kGroupRows && base * kGroupRows + r < run_rows; ++r, ++n) {
      // Of a row that does not exist, nothing is loaded or kept: the team only takes part in the barriers.
      const std::int64_t row = next_row.row();
      const LaneColumns<V> here{columns.first, next_row.exists() ? columns.left : 0};
      next_row.next();
      Tile<T, V, kSlots> residual;
      if (takes(kTakesResidual)) load_grad_residual(params, row, here, residual);
      BackwardSegment<Norm, T, V, kSlots> data;
      ring.take(n, data.x, data.dy, here);
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
