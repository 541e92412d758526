// Sums in the order of RowTree: columns and slots in registers, lanes by shuffle, segments by one warp.
#pragma once

#include "core/row_tree.h"
#include "cuda/intrinsics.cuh"
#include "norms/stats.h"

namespace normext::cuda {

// Adjacent values pairwise; N is a power of two. Overwrites the array.
template <class A, int N>
__device__ __forceinline__ A pairwise(A (&v)[N]) {
#pragma unroll
  for (int width = 1; width < N; width *= 2) {
#pragma unroll
    for (int i = 0; i + width < N; i += 2 * width) v[i] = v[i] + v[i + width];
  }
  return v[0];
}

// Sum over the `lanes` (8, 16 or 32) neighbouring lanes that share a row; every lane of the warp must call it.
template <class A>
__device__ __forceinline__ A lanes_sum(A value, int lanes) {
  if (lanes > 16) value = value + shuffle_xor(value, 16);
  if (lanes > 8) value = value + shuffle_xor(value, 8);
#pragma unroll
  for (int mask = 4; mask >= 1; mask /= 2) value = value + shuffle_xor(value, mask);
  return value;
}

// Sum of one value per lane, neighbours first; every lane gets it.
template <class A>
__device__ __forceinline__ A neighbours_sum(A value) {
#pragma unroll
  for (int mask = 1; mask <= 16; mask *= 2) value = value + shuffle_xor(value, mask);
  return value;
}

// sum(term(0), ..., term(count - 1)) pairwise in index order, by one whole warp; every lane gets it. count <= 32^(kLevels+1).
// Every 32 terms make a block; lane i of level l holds the i-th block of that level until it is complete.
template <int kLevels, class A, class Count, class Term>
__device__ __forceinline__ A warp_pairwise_blocks(Count count, Term term) {
  A level[kLevels] = {};
  A block = A(0);
  NORMEXT_NO_UNROLL
  for (Count first = 0; first < count; first += 32) {
    const Count i = first + static_cast<int>(lane_id());
    block = neighbours_sum(i < count ? term(i) : A(0));
    const bool last = first + 32 >= count;
    Count index = first / 32;
    bool complete = last ? count > 32 : true;
#pragma unroll
    for (int l = 0; l < kLevels; ++l) {
      if (!complete) break;
      if (lane_id() == static_cast<unsigned>(index % 32)) level[l] = block;
      complete = last || index % 32 == 31;
      if (!complete) break;
      block = neighbours_sum(level[l]);
      level[l] = A(0);
      index /= 32;
    }
  }
  return block;
}

// The same, without a loop where a lane has one term at most.
template <int kLevels, class A, class Count, class Term>
__device__ __forceinline__ A warp_pairwise(Count count, Term term) {
  if (count > 32) return warp_pairwise_blocks<kLevels, A>(count, term);
  const int lane = static_cast<int>(lane_id());
  return neighbours_sum(lane < static_cast<int>(count) ? term(lane) : A(0));
}

constexpr int kClusterLevels = 1;  // up to 1024 segments: more than the 512 that a cluster holds
constexpr int kSplitLevels = 4;    // up to 2^25 segments

// A segment's contribution to its row: (m, c, q) for a centred norm, sum(x^2) for RMSNorm.
template <class Norm, class A, bool kCentred = Norm::kCentred>
struct SegmentStats {
  static constexpr int kValues = 3;
  Moments<A> moments;

  // `segments` entries of each value, one value after the other.
  __device__ __forceinline__ void put(A* table, int segments, int s) const {
    table[s] = moments.mean;
    table[segments + s] = moments.correction;
    table[2 * segments + s] = moments.m2;
  }
  __device__ __forceinline__ static SegmentStats get(const A* table, int segments, int s) {
    return {{table[s], table[segments + s], table[2 * segments + s]}};
  }
};

template <class Norm, class A>
struct SegmentStats<Norm, A, false> {
  static constexpr int kValues = 1;
  A sum_x2;

  __device__ __forceinline__ void put(A* table, int, int s) const { table[s] = sum_x2; }
  __device__ __forceinline__ static SegmentStats get(const A* table, int, int s) { return {table[s]}; }
};

// The merge of norms/stats.h: sums over all segments pairwise in index order, by one whole warp; every lane gets the row. From a
// table in shared or global memory or, if `single`, from the one segment that registers hold.
template <class Norm, int kLevels, class A>
__device__ __forceinline__ typename Norm::template Row<A> merge_segments(const RowTree& tree, A cols, A eps, bool single,
                                                                         const SegmentStats<Norm, A>& only, const A* table) {
  using Stats = SegmentStats<Norm, A>;
  const auto count = [&](int s) { return static_cast<A>(tree.count(s)); };
  // Where a lane has one segment at most, it keeps it.
  const bool few = tree.segments <= kWarpSize;
  const int lane = static_cast<int>(lane_id());
  const bool has_segment = lane < tree.segments;
  Stats mine = only;
  A n = cols;
  if (!single && few && has_segment) {
    mine = Stats::get(table, tree.segments, lane);
    n = count(lane);
  }
  const auto sum = [&](auto term) {
    if (single) return term(mine, n);
    if (few) return neighbours_sum(has_segment ? term(mine, n) : A(0));
    return warp_pairwise_blocks<kLevels, A>(tree.segments,
                                            [&](int s) { return term(Stats::get(table, tree.segments, s), count(s)); });
  };
  if constexpr (Norm::kCentred) {
    if (single) return finish_centred(only.moments.mean, only.moments.correction, only.moments.m2, cols, eps);
    const A pivot = table[0];
    const Centre<A> centre =
        centre_at(pivot, sum([&](const Stats& s, A values) { return values * relative_mean(s.moments, pivot); }) / cols);
    const A rest = sum([&](const Stats& s, A values) { return values * relative_mean(s.moments, centre); }) / cols;
    const A m2 = sum([&](const Stats& s, A values) { return centred_square(s.moments, values, centre); });
    return finish_centred(centre, rest, m2, cols, eps);
  } else {
    return Norm::finish(sum([](const Stats& s, A) { return s.sum_x2; }), cols, eps);
  }
}

}  // namespace normext::cuda
