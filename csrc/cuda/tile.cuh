// One lane's share of a segment: kSlots vectors of V consecutive columns, kept packed in registers as they are stored.
// Ownership is by column index, never by address: a misaligned row is read and written by the same lanes, with element
// accesses instead of vector accesses.
#pragma once

#include "core/row_tree.h"
#include "cuda/intrinsics.cuh"

namespace normext::cuda {

// Which columns a lane owns in one segment. Rows with more than one slot use all 32 lanes, so slots lie 32 vectors apart.
template <int V>
struct LaneColumns {
  std::int64_t first;  // column of slot 0
  int left;            // columns from there to the end of the segment; 0 or less: none

  __device__ __forceinline__ static constexpr int offset(int slot) { return slot * 32 * V; }
  __device__ __forceinline__ bool owns(int slot) const { return offset(slot) < left; }
};

template <int V>
__device__ __forceinline__ LaneColumns<V> lane_columns(const RowTree& tree, int segment, int lane, bool active) {
  const int within = lane * V;
  return {static_cast<std::int64_t>(segment) * tree.segment_cols() + within, active ? tree.count(segment) - within : 0};
}

// V columns in accesses of at most 16 bytes.
template <class T, int V>
struct Columns {
  static constexpr int kPack = V * sizeof(T) <= 16 ? V : 16 / static_cast<int>(sizeof(T));
  Pack<T, kPack> pack[V / kPack];

  __device__ __forceinline__ Accumulate<T> operator[](int i) const { return accumulate_at(pack[i / kPack], i % kPack); }
  template <class A>
  __device__ __forceinline__ void assign(const A (&values)[V]) {
#pragma unroll
    for (int i = 0; i < V / kPack; ++i) pack[i] = pack_from_accumulate<T, kPack>(values + i * kPack);
  }
  __device__ __forceinline__ void fill(float value) {
    Accumulate<T> values[V];
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = value;
    assign(values);
  }

  template <bool kAligned>
  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < V / kPack; ++i) {
      pack[i] = kAligned ? load_pack<T, kPack>(p + i * kPack) : load_elements<T, kPack>(p + i * kPack);
    }
  }
  template <bool kAligned>
  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < V / kPack; ++i) {
      if (kAligned) {
        store_pack(p + i * kPack, pack[i]);
      } else {
        store_elements(p + i * kPack, pack[i]);
      }
    }
  }
};

// V columns of a parameter that may be absent: all are then `absent`. `p` points at the first of them, or is null.
template <class P, int V>
__device__ __forceinline__ Columns<P, V> load_param(const P* p, bool aligned, float absent) {
  Columns<P, V> out;
  if (p == nullptr) {
    out.fill(absent);
  } else if (V == 1 || aligned) {
    out.template load<true>(p);
  } else {
    out.template load<false>(p);
  }
  return out;
}

template <class T, int V, int kSlots>
struct Tile {
  Columns<T, V> slot[kSlots];

  // Between two passes over the tile: see forget_derived.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (auto& pack : slot[s].pack) {
#pragma unroll
        for (auto& unit : pack.unit) forget_derived(unit);
      }
    }
  }

  // `row` points at column 0. One uniform branch around the whole batch: all accesses are issued before the first is used.
  __device__ __forceinline__ void load(const T* row, const LaneColumns<V>& columns, bool aligned) {
    if (V == 1 || aligned) {
      load_batch<true>(row + columns.first, columns);
    } else {
      load_batch<false>(row + columns.first, columns);
    }
  }
  // Parameters that may be absent: all columns are then `absent`.
  __device__ __forceinline__ void load_or(const T* row, const LaneColumns<V>& columns, bool aligned, float absent) {
    if (row != nullptr) return load(row, columns, aligned);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) slot[s].fill(absent);
  }
  __device__ __forceinline__ void store(T* row, const LaneColumns<V>& columns, bool aligned) const {
    if (V == 1 || aligned) {
      store_batch<true>(row + columns.first, columns);
    } else {
      store_batch<false>(row + columns.first, columns);
    }
  }

 private:
  template <bool kAligned>
  __device__ __forceinline__ void load_batch(const T* p, const LaneColumns<V>& columns) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (columns.owns(s)) slot[s].template load<kAligned>(p + columns.offset(s));
    }
  }
  template <bool kAligned>
  __device__ __forceinline__ void store_batch(T* p, const LaneColumns<V>& columns) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (columns.owns(s)) slot[s].template store<kAligned>(p + columns.offset(s));
    }
  }
};

}  // namespace normext::cuda
