// The reduction tree of a row on the CPU, written once: sums over a segment, pairwise sums, merging of segments.
//
// A segment is at most kSegment columns. Its sums are taken in kSteps * 2 vector accumulators, each over at most 16 terms; blocks
// of that size are added pairwise, then lanes by halves. Segments are added pairwise in index order.

#pragma once

#include "core/portable.h"
#include "cpu/packed.h"
#include "cpu/row_kernels.h"
#include "norms/stats.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

using cpu::kMaxSegments;
using cpu::kSegment;

NORMEXT_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
NORMEXT_INLINE std::int64_t segments_of(std::int64_t cols) { return (cols + kSegment - 1) / kSegment; }
NORMEXT_INLINE std::int64_t segment_cols(std::int64_t segment, std::int64_t cols) {
  return smaller(kSegment, cols - segment * kSegment);
}

template <class A>
NORMEXT_INLINE Pair<A> operator+(Pair<A> x, Pair<A> y) {
  return {x.a + y.a, x.b + y.b};
}

// Sum over lanes by halves; every lane holds the result.
template <int kXor, class V, int... I>
NORMEXT_INLINE V add_across(V v, std::integer_sequence<int, I...> lanes) {
  v = v + __builtin_shufflevector(v, v, (I ^ kXor)...);
  if constexpr (kXor > 1) v = add_across<kXor / 2>(v, lanes);
  return v;
}
template <class A>
NORMEXT_INLINE A sum_lanes(Vector<A> v) {
  return add_across<kLanes<A> / 2>(v, std::make_integer_sequence<int, kLanes<A>>())[0];
}

// Of every 2 * kHalf lanes, the halves of x added, then those of y.
template <int kHalf, class V, int... I>
NORMEXT_INLINE V add_halves(V x, V y, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(x, y, (I / kHalf % 2 * n + I / kHalf / 2 * 2 * kHalf + I % kHalf)...) +
         __builtin_shufflevector(x, y, (I / kHalf % 2 * n + I / kHalf / 2 * 2 * kHalf + I % kHalf + kHalf)...);
}
// The sums of kRows vectors at once: a transposition by halves, with the additions of sum_lanes. That of v[r] is left in every lane
// from r * kLanes / kRows on, up to the next. Overwrites v; kHalf is for the steps.
template <class A, int kRows, int kHalf = kLanes<A> / 2>
NORMEXT_INLINE Vector<A> transposed_sums(Vector<A>* v) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>();
  if constexpr (kRows == 1) {
    return add_across<kHalf>(v[0], lanes);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i) v[i] = add_halves<kHalf>(v[i], v[i + kRows / 2], lanes);
    if constexpr (kHalf > 1) return transposed_sums<A, kRows / 2, kHalf / 2>(v);
    else return v[0];
  }
}
// Lanes 0, kStride, 2 * kStride, ... first.
template <int kStride, class V, int... I>
NORMEXT_INLINE V every(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I * kStride % static_cast<int>(sizeof...(I)))...);
}
// One vector of sum_lanes_of_rows(), of which `count` <= kRows rows are there. It is stored whole, as it will be read.
template <class A, int kRows = kLanes<A>>
NORMEXT_INLINE void sum_lanes_of_some(Vector<A>* row, int count, A* out) {
  if constexpr (kRows > 1) {
    if (count <= kRows / 2) return sum_lanes_of_some<A, kRows / 2>(row, count, out);
  }
  for (int absent = count; absent < kRows; ++absent) row[absent] = row[0];
  store_bytes(out, every<kLanes<A> / kRows>(transposed_sums<A, kRows>(row), std::make_integer_sequence<int, kLanes<A>>()));
}
// out[r] = sum of the lanes of row[r], for `count` rows; both arrays hold a whole number of vectors, of which the absent ones count
// for nothing. Overwrites row.
template <class A>
NORMEXT_INLINE void sum_lanes_of_rows(Vector<A>* row, int count, A* out) {
  for (int r = 0; r < count; r += kLanes<A>) sum_lanes_of_some<A>(row + r, count - r < kLanes<A> ? count - r : kLanes<A>, out + r);
}

// Sum of n > 0 values in index order: neighbours first. Overwrites them.
template <class X>
NORMEXT_INLINE X pairwise(X* x, std::int64_t n) {
  if (n <= 0) __builtin_unreachable();
  while (n > 1) {
    const std::int64_t half = n / 2;
    for (std::int64_t i = 0; i < half; ++i) x[i] = x[2 * i] + x[2 * i + 1];
    if (n % 2 != 0) x[half] = x[n - 1];
    n = half + n % 2;
  }
  return x[0];
}

// Accumulators of kSums quantities.
template <class A, int kSums>
struct Sums {
  Pair<A> of[kSums];
};

// 32 vector registers hold 16 accumulators, 16 hold 8; two additions per cycle of 4 cycles latency want 8.
template <int kSums>
constexpr int kSteps = NORMEXT_VECTOR_BYTES == 64 ? 4 : (kSums == 1 ? 4 : 2);

// The lanes of out[q] add up to the sum of quantity q over `cols` columns. add(column, extent, sums) adds the columns of one unit.
template <class A, int kSums, class Add>
NORMEXT_INLINE void sum_columns(std::int64_t cols, Add add, Vector<A> (&out)[kSums]) {
  constexpr int steps = kSteps<kSums>;
  constexpr std::int64_t unit = kUnit<A>;
  constexpr std::int64_t block = cpu::kTermsPerSum * steps * unit;
  Vector<A> partial[kSums][kSegment / block + 2];
  std::int64_t partials = 0;
  std::int64_t column = 0;
  const auto rest_sums = [&]() __attribute__((always_inline)) {
    Sums<A, kSums> rest = {};
    for (; cols - column >= unit; column += unit) add(column, Whole{}, rest);
    if (column < cols) add(column, Partial{static_cast<int>(cols - column)}, rest);
    return rest;
  };
  if (cols < steps * unit) {
    const Sums<A, kSums> rest = rest_sums();
#pragma GCC unroll 8
    for (int q = 0; q < kSums; ++q) out[q] = rest.of[q].a + rest.of[q].b;
    return;
  }
  while (cols - column >= steps * unit) {
    Sums<A, kSums> sums[steps] = {};
    const std::int64_t end = column + smaller(block, (cols - column) / (steps * unit) * (steps * unit));
    for (; column < end; column += steps * unit) {
#pragma GCC unroll 8
      for (int step = 0; step < steps; ++step) add(column + step * unit, Whole{}, sums[step]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kSums; ++q) {
      Vector<A> of[steps];
#pragma GCC unroll 8
      for (int step = 0; step < steps; ++step) of[step] = sums[step].of[q].a + sums[step].of[q].b;
      partial[q][partials] = steps == 4 ? (of[0] + of[1]) + (of[2] + of[steps - 1]) : of[0] + of[1];
    }
    ++partials;
  }
  if (column < cols) {  // at most `steps` units
    const Sums<A, kSums> rest = rest_sums();
#pragma GCC unroll 8
    for (int q = 0; q < kSums; ++q) partial[q][partials] = rest.of[q].a + rest.of[q].b;
    ++partials;
  }
#pragma GCC unroll 8
  for (int q = 0; q < kSums; ++q) out[q] = pairwise(partial[q], partials);
}

// The one merge of segments (norms/stats.h), here with pairwise sums. `terms` holds one value per segment.
template <class A>
NORMEXT_INLINE CentredRow<A> merge_all(const Moments<A>* segment, std::int64_t cols, A eps, A* terms) {
  const std::int64_t count = segments_of(cols);
  const A n = static_cast<A>(cols), pivot = segment[0].mean;
  const auto sum = [&](auto term) __attribute__((always_inline)) {
    for (std::int64_t s = 0; s < count; ++s) terms[s] = term(segment[s], static_cast<A>(segment_cols(s, cols)));
    return pairwise(terms, count);
  };
  const Centre<A> centre = centre_at(pivot, sum([&](Moments<A> s, A size) { return size * relative_mean(s, pivot); }) / n);
  const A rest = sum([&](Moments<A> s, A size) { return size * relative_mean(s, centre); }) / n;
  return finish_centred(centre, rest, sum([&](Moments<A> s, A size) { return centred_square(s, size, centre); }), n, eps);
}

// body(begin, end) over ranges of [0, tasks), on the caller's threads if there is more than one.
template <class Body>
NORMEXT_INLINE void for_ranges(const cpu::Parallel& parallel, std::int64_t tasks, const Body& body) {
  if (parallel.threads <= 1 || tasks <= 1) return body(0, tasks);
  parallel.run(
      tasks, [](void* ctx, std::int64_t begin, std::int64_t end) { (*static_cast<const Body*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
