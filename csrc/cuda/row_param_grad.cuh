// Row backward: parameter gradients of a run of rows. They are added in registers over a group of 16 rows, and groups in index
// order in shared memory; each run writes one partial row.
#pragma once

#include "cuda/row_backward_values.cuh"

namespace normext::cuda {

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

}  // namespace normext::cuda
