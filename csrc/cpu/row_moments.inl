// Sums over a row, or over a segment of one, for one instruction set: of squares, or of deviations from a pivot and of their
// squares, from one pass over the values, which a second follows only where the pivot was not near the mean.

#pragma once

#include "cpu/prefetch.inl"
#include "cpu/row_sums.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

constexpr int kMaxBatch = 16;  // rows; a whole number of vectors

// unit(column, extent) for the units of columns [begin, end), a whole number of units from the start of the row.
template <class A, class Unit>
NORMEXT_INLINE void for_units(std::int64_t begin, std::int64_t end, Unit unit) {
  std::int64_t column = begin;
  for (; end - column >= kUnit<A>; column += kUnit<A>) unit(column, Whole{});
  if (column < end) unit(column, Partial{static_cast<int>(end - column)});
}

// One row as the statistics see it. A residual is added, and the sum is rounded once to T.
template <class T, bool kResidual>
struct RowSource {
  using A = Accumulate<T>;
  const T* input;
  const T* residual = nullptr;
  T* residual_out = nullptr;
  A alpha = 1;

  NORMEXT_INLINE explicit RowSource(const T* row) : input(row) { static_assert(!kResidual); }
  NORMEXT_INLINE RowSource(const RowForwardArgs& args, std::int64_t row)
      : input(static_cast<const T*>(args.input) + args.input_layout.offset(row)), alpha(static_cast<A>(args.alpha)) {
    if constexpr (kResidual) {
      residual = static_cast<const T*>(args.residual) + args.residual_layout.offset(row);
      residual_out = static_cast<T*>(args.residual_out) + args.residual_out_layout.offset(row);
    }
  }
  NORMEXT_INLINE const T* stored() const {
    if constexpr (kResidual) return residual_out;
    else return input;
  }
  template <class Extent>
  NORMEXT_INLINE Packed<T> rounded_sum(std::int64_t column, Extent extent) const {
    const Pair<A> x = load<T>(input + column, extent), r = load<T>(residual + column, extent);
    const Vector<A> scale = Vector<A>{} + alpha;  // by 1 the fma is the plain sum
    return Packed<T>::pack({fma(r.a, scale, x.a), fma(r.b, scale, x.b)});
  }
  // A unit of columns before it is stored.
  template <class Extent>
  NORMEXT_INLINE Pair<A> peek(std::int64_t column, Extent extent) const {
    if constexpr (kResidual) return keep<T>(rounded_sum(column, extent).unpack(), extent);
    else return load<T>(input + column, extent);
  }
  // The same, and it is stored.
  template <class Extent>
  NORMEXT_INLINE Pair<A> take(std::int64_t column, Extent extent) const {
    if constexpr (kResidual) {
      const Packed<T> sum = rounded_sum(column, extent);
      store_packed(residual_out + column, sum, extent);
      return keep<T>(sum.unpack(), extent);
    } else {
      return load<T>(input + column, extent);
    }
  }
};

// Sum of the squares of columns [begin, begin + cols).
template <class T, bool kResidual, class Next>
NORMEXT_INLINE Vector<Accumulate<T>> square_sum(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols,
                                                Next next) {
  using A = Accumulate<T>;
  Vector<A> sum[1];
  sum_columns<A>(
      cols,
      [&](std::int64_t column, auto extent, Sums<A, 1>& sums) __attribute__((always_inline)) {
        next.fetch(column);
        const Pair<A> x = row.take(begin + column, extent);
        Pair<A>& s = sums.of[0];
        s = {fma(x.a, x.a, s.a), fma(x.b, x.b, s.b)};
      },
      sum);
  return sum[0];
}

// The pivot is the mean of all columns where they are few, else of some units, spread evenly. Those are a power of two, so that
// equal values have it exactly. A sum with a residual is stored before where its mean is taken, and in 16 bits: rounding, storing
// and deviations at once want more registers than AVX2 has [LayerNorm of a sum, bfloat16 4096x320 541 -> 501 us, 512x1024 132 ->
// 123; in float32 3 % more].
constexpr int kPivotUnits = 4;
constexpr std::int64_t kLeastSampled = 256;
NORMEXT_INLINE bool samples_pivot(std::int64_t cols) { return cols >= kLeastSampled; }
template <class A>
NORMEXT_INLINE A pivot_columns(std::int64_t cols) {
  return static_cast<A>(samples_pivot(cols) ? kPivotUnits * kUnit<A> : cols);
}
template <class T>
NORMEXT_INLINE bool stores_before(std::int64_t cols) {
  return sizeof(T) == 2 || !samples_pivot(cols);
}
template <class T, bool kResidual>
NORMEXT_INLINE Vector<Accumulate<T>> pivot_sum(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols) {
  using A = Accumulate<T>;
  if (!samples_pivot(cols)) {
    Vector<A> sum[1];
    sum_columns<A>(
        cols,
        [&](std::int64_t column, auto extent, Sums<A, 1>& sums)
            __attribute__((always_inline)) { sums.of[0] = sums.of[0] + row.take(begin + column, extent); },
        sum);
    return sum[0];
  }
  const auto sampled = [&](auto value) __attribute__((always_inline)) {
    Pair<A> sum = value(0);
#pragma GCC unroll 8
    for (int u = 1; u < kPivotUnits; ++u) sum = sum + value(u * (cols / kPivotUnits));
    return sum.a + sum.b;
  };
  if constexpr (kResidual && sizeof(T) == 2) {
    for_units<A>(begin, begin + cols,
                 [&](std::int64_t column, auto extent) __attribute__((always_inline)) { row.take(column, extent); });
    return sampled([&](std::int64_t column) { return load<T>(row.stored() + begin + column, Whole{}); });
  } else {
    return sampled([&](std::int64_t column) { return row.peek(begin + column, Whole{}); });
  }
}

// Sums of the deviations from `pivot` and of their squares. Half of the deviations come by fma, with the bits of a subtraction,
// since processors that add and multiply in units of their own would wait for those that add [Zen 4, LayerNorm: 3 % less time].
template <class T, bool kResidual, class Next>
NORMEXT_INLINE void deviation_sums(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols, Next next,
                                   Accumulate<T> pivot, Vector<Accumulate<T>> (&sums_out)[2]) {
  using A = Accumulate<T>;
  const Vector<A> one = Vector<A>{} + A(1), centre = Vector<A>{} + pivot;
  sum_columns<A>(
      cols,
      [&](std::int64_t column, auto extent, Sums<A, 2>& sums) __attribute__((always_inline)) {
        next.fetch(column);
        const Pair<A> x = row.take(begin + column, extent);
        const Pair<A> d = keep<T>({fma(x.a, one, -centre), x.b - centre}, extent);
        Pair<A>&s = sums.of[0], &s2 = sums.of[1];
        s = {s.a + d.a, s.b + d.b};
        s2 = {fma(d.a, d.a, s2.a), fma(d.b, d.b, s2.b)};
      },
      sums_out);
}

// The same after pivot_sum().
template <class T, bool kResidual, class Next>
NORMEXT_INLINE void sums_around(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols, Next next,
                                Accumulate<T> pivot, Vector<Accumulate<T>> (&sums_out)[2]) {
  if (kResidual && stores_before<T>(cols)) deviation_sums(RowSource<T, false>(row.stored()), begin, cols, next, pivot, sums_out);
  else if constexpr (!kResidual || sizeof(T) != 2) deviation_sums(row, begin, cols, next, pivot, sums_out);
}

// What moments() takes of a segment, but for n.
template <class A>
struct CentredSums {
  A pivot, d, d2;
};
// Columns x, of which the pivot was not near the mean, again from the mean that it gave.
template <class T>
__attribute__((noinline, cold)) CentredSums<Accumulate<T>> sums_from(const T* x, std::int64_t cols, Accumulate<T> mean) {
  using A = Accumulate<T>;
  Vector<A> sums[2];
  deviation_sums<T, false>(RowSource<T, false>(x), 0, cols, Ahead<T, 0>{}, mean, sums);
  return {mean, sum_lanes<A>(sums[0]), sum_lanes<A>(sums[1])};
}
// Whether the pivots of a vector of segments were near their means.
template <class A>
NORMEXT_INLINE bool all_near(const Moments<Vector<A>>& found, Vector<A> n) {
  const Vector<A> none = {};
  return sum_lanes<A>(near_mean(found, n) ? none : none + A(1)) == 0;
}
template <class T>
NORMEXT_INLINE CentredSums<Accumulate<T>> near_mean_sums(const T* x, std::int64_t cols, CentredSums<Accumulate<T>> sums) {
  using A = Accumulate<T>;
  const A n = static_cast<A>(cols);
  const Moments<A> found = moments(sums.pivot, sums.d, sums.d2, n);
  if (__builtin_expect(near_mean(found, n), 1)) return sums;
  return sums_from<T>(x, cols, found.mean + found.correction);
}

template <class T, bool kResidual, class Next>
NORMEXT_INLINE CentredSums<Accumulate<T>> segment_sums(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols,
                                                       Accumulate<T> pivot, Next next) {
  using A = Accumulate<T>;
  Vector<A> sums[2];
  sums_around(row, begin, cols, next, pivot, sums);
  const CentredSums<A> found = {pivot, sum_lanes<A>(sums[0]), sum_lanes<A>(sums[1])};
  return near_mean_sums<T>(row.stored() + begin, cols, found);
}
template <class T, bool kResidual>
NORMEXT_INLINE Accumulate<T> segment_pivot(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols) {
  using A = Accumulate<T>;
  return sum_lanes<A>(pivot_sum(row, begin, cols)) / pivot_columns<A>(cols);
}

// The same of `count` rows: pivots, sums of deviations and of their squares. What comes after row r is fetched as next_of(r) says.
template <class T, class SourceOf, class NextOf>
NORMEXT_INLINE void centred_sums(int count, std::int64_t cols, SourceOf source_of, NextOf next_of,
                                 Accumulate<T> (&sums)[3][kMaxBatch]) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  V of_row[2][kMaxBatch];
  for (int r = 0; r < count; ++r) of_row[0][r] = pivot_sum(source_of(r), 0, cols);
  sum_lanes_of_rows(of_row[0], count, sums[0]);
  const V in_pivot = V{} + pivot_columns<A>(cols);
  for (int r = 0; r < count; r += kLanes<A>) store_bytes(sums[0] + r, load_bytes<V>(sums[0] + r) / in_pivot);
  for (int r = 0; r < count; ++r) {
    V deviations[2];
    sums_around(source_of(r), 0, cols, next_of(r), sums[0][r], deviations);
    of_row[0][r] = deviations[0];
    of_row[1][r] = deviations[1];
  }
  sum_lanes_of_rows(of_row[0], count, sums[1]);
  sum_lanes_of_rows(of_row[1], count, sums[2]);
  if (!samples_pivot(cols)) return;
  const V n = V{} + static_cast<A>(cols);
  for (int first = 0; first < count; first += kLanes<A>) {
    const Moments<V> found =
        moments(load_bytes<V>(sums[0] + first), load_bytes<V>(sums[1] + first), load_bytes<V>(sums[2] + first), n);
    if (__builtin_expect(all_near<A>(found, n), 1)) continue;
    for (int r = first; r < count && r < first + kLanes<A>; ++r) {
      const CentredSums<A> again = near_mean_sums<T>(source_of(r).stored(), cols, {sums[0][r], sums[1][r], sums[2][r]});
      sums[0][r] = again.pivot;
      sums[1][r] = again.d;
      sums[2][r] = again.d2;
    }
  }
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
