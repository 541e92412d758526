// Row norm forward, the row in registers.
//
//   output[row, :] = norm(x[row, :]) * weight + bias,   x = input, or round(input + alpha * residual), which is stored too
//
// A warp computes one segment of a row (RowTree), or several short rows at once. A row of several segments takes `warps` warps of
// a block, and with blocks_per_row > 1 that many blocks of a cluster. Every input byte is read once. One barrier: each warp
// puts the moments of its segment into shared memory (of every block of the cluster) and, after the barrier, merges all of them by
// itself. Teams may take several short rows one after another. Weights are loaded before the reduction. A lane reads all its
// columns before it writes any, so output may be input. Does not do: rows that do not fit (row_wide.cuh).
#pragma once

#include "core/row_args.h"
#include "cuda/collectives.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "cuda/tuning.h"

namespace normext::cuda {

template <class A>
struct RowForwardParams {
  RowForwardArgs args;
  RowTree tree;
  RowMapping mapping;
  RowDivisors by;
  A cols, eps, alpha, weight_offset;
  void* partials;          // kSplit: [rows][values][segments]
  bool input_aligned;      // input and residual: vector accesses are legal
  bool output_aligned;     // output and residual_out
  bool param_aligned;      // weight and bias
  bool float_output;       // the output is float32 while T is a 16-bit type
  bool float_params;       // weight and bias are float32 while T is a 16-bit type
  bool statistics, apply;  // row_wide.cuh: which of its two phases this launch runs
};

// Loads this lane's columns of x, or of its sum with the residual.
template <class T, int V, int kSlots, class A>
__device__ __forceinline__ void load_rows(Tile<T, V, kSlots>& x, const RowForwardParams<A>& params, bool residual, std::int64_t row,
                                          const LaneColumns<V>& columns) {
  const RowForwardArgs& args = params.args;
  x.load(static_cast<const T*>(args.input) + args.input_layout.offset(row), columns, params.input_aligned);
  if (residual) {
    Tile<T, V, kSlots> r;
    r.load(static_cast<const T*>(args.residual) + args.residual_layout.offset(row), columns, params.input_aligned);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      A sum[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i] = params.alpha == A(1) ? x.slot[s][i] + r.slot[s][i] : fma(params.alpha, r.slot[s][i], x.slot[s][i]);
      }
      x.slot[s].assign(sum);
    }
  }
}

// Moments of a segment held by `lanes` lanes; every lane of the warp must call it.
template <class Norm, class T, int V, int kSlots, class A = Accumulate<T>>
__device__ __forceinline__ SegmentStats<Norm, A> segment_stats(Tile<T, V, kSlots>& x, const LaneColumns<V>& columns, int lanes,
                                                               A count) {
  A sums[kSlots] = {};
  A values[V];
  if constexpr (!Norm::kCentred) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (!columns.owns(s)) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A value = x.slot[s][i];
        values[i] = value * value;
      }
      sums[s] = pairwise(values);
    }
    return {lanes_sum(pairwise(sums), lanes)};
  } else {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (!columns.owns(s)) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = x.slot[s][i];
      sums[s] = pairwise(values);
    }
    const A divisor = count > A(0) ? count : A(1);
    const A mean = lanes_sum(pairwise(sums), lanes) / divisor;
    x.forget();
    A squares[kSlots] = {};
    A products[V];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      sums[s] = A(0);
      if (!columns.owns(s)) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        values[i] = x.slot[s][i] - mean;
        products[i] = values[i] * values[i];
      }
      sums[s] = pairwise(values);
      squares[s] = pairwise(products);
    }
    const A sum_d = lanes_sum(pairwise(sums), lanes);
    const A sum_d2 = lanes_sum(pairwise(squares), lanes);
    return {moments(mean, sum_d, sum_d2, divisor)};
  }
}

// y of one slot.
template <class Norm, class T, class Weights, int V, class A = Accumulate<T>>
__device__ __forceinline__ void apply_slot(const Columns<T, V>& x, const Weights& weight, const Weights& bias,
                                           const RowForwardParams<A>& params, const typename Norm::template Row<A>& row,
                                           A (&y)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A xhat = Norm::template normalise<A>(x[i], row);
    if constexpr (Norm::kCentred) {
      y[i] = Norm::template affine<A>(xhat, weight[i], bias[i]);
    } else {
      y[i] = Norm::template affine<A>(xhat, params.weight_offset + weight[i], A(0));
    }
  }
}

// P of kernels that are compiled once for parameters of T and of float32 with 16-bit input: they never hold any before the
// reduction, so that the type, known at run time, costs a branch and no registers.
template <class T>
using EitherParam = std::conditional_t<sizeof(T) == 2, void, T>;

// Weight and bias of the columns a lane owns. They are loaded before the reduction where there are registers for them, else slot by
// slot when they are used (from L1 or L2: all rows share them).
template <class Norm, class T, class P, int V, int kSlots, bool kEarly>
struct Params {
  using Value = Columns<P, V>;
  static constexpr int kRegisters = (Norm::kCentred ? 2 : 1) * kSlots * V * sizeof(P) / 4 + kSlots * (V * sizeof(T) + 3) / 4;
  static constexpr bool kHoist = kEarly && V > 1 && kRegisters <= 96;
  Tile<P, V, kHoist ? kSlots : 1> weight;
  Tile<P, V, kHoist ? kSlots : 1> bias;

  template <class A>
  __device__ __forceinline__ void prefetch(const RowForwardParams<A>& params, const LaneColumns<V>& columns) {
    if constexpr (kHoist) {
      weight.load_or(static_cast<const P*>(params.args.weight), columns, params.param_aligned, 1.0f);
      if constexpr (Norm::kCentred) {
        bias.load_or(static_cast<const P*>(params.args.bias), columns, params.param_aligned, 0.0f);
      }
    }
  }
  __device__ __forceinline__ void forget() {
    if constexpr (kHoist) {
      weight.forget();
      if constexpr (Norm::kCentred) bias.forget();
    }
  }
  template <class A>
  __device__ __forceinline__ void get(const RowForwardParams<A>& params, const LaneColumns<V>& columns, int s, Value& w,
                                      Value& b) const {
    if constexpr (kHoist) {
      w = weight.slot[s];
      if constexpr (Norm::kCentred) b = bias.slot[s];
    } else if (columns.owns(s)) {
      const std::int64_t column = columns.first + columns.offset(s);
      const P* pw = static_cast<const P*>(params.args.weight);
      w = load_param<P, V>(pw != nullptr ? pw + column : pw, params.param_aligned, 1.0f);
      if constexpr (Norm::kCentred) {
        const P* pb = static_cast<const P*>(params.args.bias);
        b = load_param<P, V>(pb != nullptr ? pb + column : pb, params.param_aligned, 0.0f);
      }
    }
  }
};

template <class Norm, class T, int V, int kSlots, bool kEarly>
struct Params<Norm, T, void, V, kSlots, kEarly> {
  using Value = Columns<float, V>;

  __device__ __forceinline__ void prefetch(const RowForwardParams<float>&, const LaneColumns<V>&) {}
  __device__ __forceinline__ void forget() {}
  __device__ __forceinline__ void get(const RowForwardParams<float>& params, const LaneColumns<V>& columns, int s, Value& w,
                                      Value& b) const {
    if (!columns.owns(s)) return;
    const std::int64_t column = columns.first + columns.offset(s);
    w = load(params, params.args.weight, column, 1.0f);
    if constexpr (Norm::kCentred) b = load(params, params.args.bias, column, 0.0f);
  }

 private:
  __device__ __forceinline__ static Value load(const RowForwardParams<float>& params, const void* p, std::int64_t column,
                                               float absent) {
    Value out;
    if (p == nullptr) {
      out.fill(absent);
    } else if (params.float_params) {
      out = load_param<float, V>(static_cast<const float*>(p) + column, params.param_aligned, absent);
    } else {
      const auto narrow = load_param<T, V>(static_cast<const T*>(p) + column, params.param_aligned, absent);
      float values[V];
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = narrow[i];
      out.assign(values);
    }
    return out;
  }
};

// Llama rounding: replaces x by xhat, rounded, and rstd by 1. Here, and not value by value, it is one branch for all.
template <class Norm, class T, int V, int kSlots, class A = Accumulate<T>>
__device__ __forceinline__ void round_normalised(Tile<T, V, kSlots>& x, ScaledRow<A>& row) {
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    A xhat[V];
#pragma unroll
    for (int i = 0; i < V; ++i) xhat[i] = Norm::template normalise<A>(x.slot[s][i], row);
    x.slot[s].assign(xhat);
  }
  row.rstd = A(1);
}

// Replaces x by y and stores it: as T, or as float32 where the output of a 16-bit norm is.
template <class Norm, class P, bool kEarly, class T, int V, int kSlots, class A>
__device__ __forceinline__ void apply_and_store(Tile<T, V, kSlots>& x, Params<Norm, T, P, V, kSlots, kEarly>& weights,
                                                const RowForwardParams<A>& params, typename Norm::template Row<A> row,
                                                std::int64_t output, const LaneColumns<V>& columns) {
  const bool wide = !Norm::kCentred && sizeof(T) == 2 && params.float_output;
  x.forget();
  weights.forget();
  if constexpr (!Norm::kCentred) {
    if (params.args.rounding == Rounding::kLlama) round_normalised<Norm>(x, row);
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    typename Params<Norm, T, P, V, kSlots, kEarly>::Value weight, bias;
    weights.get(params, columns, s, weight, bias);
    A y[V];
    apply_slot<Norm, T>(x.slot[s], weight, bias, params, row, y);
    if (wide && columns.owns(s)) {
      Columns<float, V> out;
      out.assign(y);
      float* p = static_cast<float*>(params.args.output) + output + columns.first + columns.offset(s);
      if (params.output_aligned) {
        out.template store<true>(p);
      } else {
        out.template store<false>(p);
      }
    }
    x.slot[s].assign(y);
  }
  if (!wide) x.store(static_cast<T*>(params.args.output) + output, columns, params.output_aligned);
}

template <class Norm, class A>
__device__ __forceinline__ void save_stats(const RowForwardParams<A>& params, std::int64_t row,
                                           const typename Norm::template Row<A>& stats) {
  A* out = static_cast<A*>(params.args.stats);
  if constexpr (Norm::kCentred) {
    out[row] = stats.hi;
    out[params.args.rows + row] = stats.lo;
    out[2 * params.args.rows + row] = stats.rstd;
  } else {
    out[row] = stats.rstd;
  }
}

template <class Norm, class T, class P, int V, int kSlots, bool kResidual>
__global__ void __launch_bounds__(max_warps(sizeof(T), V) * 32, 1)
    row_forward_kernel(const __grid_constant__ RowForwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  using Stats = SegmentStats<Norm, A>;
  const RowForwardArgs& args = params.args;
  const RowTree& tree = params.tree;
  const RowMapping& mapping = params.mapping;
  // Kernels of fewer columns a lane only serve rows of one segment.
  const bool several = V * kSlots == 32 && tree.segments > 1;

  // Who: lane `lane` of the lanes that share a row, in team `team` of the block, on segment `segment`.
  const RowDivisors& by = params.by;
  const int lane = static_cast<int>(lane_id()) & (tree.lanes - 1);
  const int warp = warp_id();
  const int team = several ? by.warps.divide(warp) : by.lanes.divide(threadIdx.x);
  const std::int64_t block = by.blocks.divide(blockIdx.x);
  const int segment = several ? static_cast<int>(cluster_rank() - team) * mapping.warps + warp : 0;
  const bool in_team = team < mapping.rows_at_once && segment < tree.segments;
  const LaneColumns<V> columns = lane_columns<V>(tree, segment, lane, in_team);
  const int repeats = V * kSlots <= 8 ? mapping.repeats : 1;  // may_repeat() of tuning.h

  // Shared memory of a peer may be written only once the peer runs: say so now, ask just before the first write.
  if (several && mapping.blocks_per_row > 1) cluster_arrive();
  dependency_wait();
  Params<Norm, T, P, V, kSlots, true> weights;
  if constexpr (!kResidual) weights.prefetch(params, columns);

  for (int r = 0; r < repeats; ++r) {
    const std::int64_t row = (block * repeats + r) * mapping.rows_at_once + team;
    const bool active = in_team && row < args.rows;
    const LaneColumns<V> here{columns.first, active ? columns.left : 0};
    Tile<T, V, kSlots> x;
    if (active) load_rows(x, params, kResidual, row, here);
    if (kResidual && r == 0) weights.prefetch(params, columns);  // after the sum: the registers of the residual are free again

    const A count = static_cast<A>(active ? tree.count(segment) : 0);
    const Stats own = segment_stats<Norm>(x, here, tree.lanes, count);

    A* table = reinterpret_cast<A*>(dynamic_smem()) + team * Stats::kValues * tree.segments;
    if (several) {
      if (mapping.blocks_per_row == 1) {
        if (lane == 0 && active) own.put(table, tree.segments, segment);
        block_barrier();
      } else {
        cluster_wait();
        if (lane < mapping.blocks_per_row && active) {
          own.put(peer_smem(table, static_cast<unsigned>(lane)), tree.segments, segment);
        }
        cluster_barrier();
      }
    }
    const auto stats = merge_segments<Norm, kClusterLevels>(tree, params.cols, params.eps, !several, own, table);
    if (r + 1 == repeats) launch_dependents();
    if (here.left <= 0) continue;

    if (args.stats != nullptr && lane == 0 && segment == 0) save_stats<Norm>(params, row, stats);
    if constexpr (kResidual) {
      x.store(static_cast<T*>(args.residual_out) + args.residual_out_layout.offset(row), here, params.output_aligned);
    }
    apply_and_store(x, weights, params, stats, args.output_layout.offset(row), here);
  }
}

}  // namespace normext::cuda
