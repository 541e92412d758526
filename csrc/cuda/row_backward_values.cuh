// Row backward, one segment of one row: what is loaded, the values that the sums and dx are made of, and dx.
#pragma once

#include "core/row_args.h"
#include "cuda/collectives.cuh"
#include "cuda/intrinsics.cuh"
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
  bool float_grad;    // grad_output is float32 while T is a 16-bit type
  bool float_params;  // likewise the weight
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

template <class Norm, class P, int V, int kSlots, class A>
__device__ __forceinline__ void load_weight_as(const RowBackwardParams<A>& params, const LaneColumns<V>& columns,
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

// The weight a lane needs, offset included. It is kept as A for all rows, so that its type costs a branch of each block and no
// kernels of their own.
template <class Norm, class T, int V, int kSlots, class A>
__device__ __forceinline__ void load_weight(const RowBackwardParams<A>& params, const LaneColumns<V>& columns,
                                            A (&weight)[kSlots][V]) {
  if constexpr (sizeof(T) == 2) {
    if (params.float_params) return load_weight_as<Norm, float>(params, columns, weight);
  }
  load_weight_as<Norm, T>(params, columns, weight);
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

template <class A>
struct RowSums {
  A g;   // sum of g, which only a centred norm needs
  A gx;  // sum of g * xhat
};

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

// Before the reduction, which hides some of the wait.
template <class T, int V, int kSlots, class A>
__device__ __forceinline__ void load_grad_residual(const RowBackwardParams<A>& params, std::int64_t row,
                                                   const LaneColumns<V>& columns, Tile<T, V, kSlots>& residual) {
  const RowBackwardArgs& args = params.args;
  const T* p = static_cast<const T*>(args.grad_residual_out) + args.grad_residual_out_layout.offset(row);
  residual.load(p, columns, params.grad_residual_aligned);
}

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

}  // namespace normext::cuda
