// Sums over a row, or over a segment of one, for one instruction set: of squares, or moments, from a pass over deviations from a
// shift: the mean of all columns where they are few, else of a sample, and then a second pass follows only where that was not near
// the mean (shifted data: Chan, Golub and LeVeque, 1983).

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
  // A whole unit of columns before it is stored.
  NORMEXT_INLINE Pair<A> peek(std::int64_t column) const {
    if constexpr (kResidual) return rounded_sum(column, Whole{}).unpack();
    else return load<T>(input + column, Whole{});
  }
  // A unit of columns, which is stored.
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

// A segment is shifted by the mean of all its columns where they are few, else of some units, spread evenly. Those are a power of
// two, so that equal values have it exactly. The mean of s of n values is at most sqrt(n/s - 1) standard deviations off, so that
// once more, from the mean that comes of it, is always enough.
constexpr int kSampledUnits = NORMEXT_VECTOR_BYTES < 32 ? 8 : 4;  // of float 64 columns, 128 where vectors have 64 bytes
constexpr std::int64_t kLeastSampled = 256;
constexpr int kRowSlack = 4;
static_assert(kSampledUnits <= 8 && kLeastSampled / kSampledUnits >= kUnit<float>);
NORMEXT_INLINE bool samples_shift(std::int64_t cols) { return cols >= kLeastSampled; }
template <class A>
NORMEXT_INLINE A columns_of_shift(std::int64_t cols) {
  return static_cast<A>(samples_shift(cols) ? kSampledUnits * kUnit<A> : cols);
}
// The sum with a residual is stored by shift_sum() where that sees all columns, and in 16 bits, since rounding, storing and
// deviations at once want more registers than AVX2 has [LayerNorm of a sum, Zen 3, bfloat16: 4096x320 541 -> 501 us, 512x1024 132
// -> 123; in float32 3 % more]; else with the deviations.
template <class T, bool kResidual>
constexpr bool kStoredFirst = kResidual && sizeof(T) == 2;
// The lanes add up to the sum of the columns of which the shift is the mean.
template <class T, bool kResidual>
NORMEXT_INLINE Vector<Accumulate<T>> shift_sum(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols) {
  using A = Accumulate<T>;
  if (!samples_shift(cols)) {
    Vector<A> sum[1];
    sum_columns<A>(
        cols,
        [&](std::int64_t column, auto extent, Sums<A, 1>& sums)
            __attribute__((always_inline)) { sums.of[0] = sums.of[0] + row.take(begin + column, extent); },
        sum);
    return sum[0];
  }
  const auto sampled = [&](auto unit) __attribute__((always_inline)) {
    Pair<A> sum[2] = {unit(begin), unit(begin + cols / kSampledUnits)};  // of up to four equal values, in sequence, they are exact
#pragma GCC unroll 8
    for (int u = 2; u < kSampledUnits; ++u) sum[u % 2] = sum[u % 2] + unit(begin + u * (cols / kSampledUnits));
    return (sum[0].a + sum[1].a) + (sum[0].b + sum[1].b);
  };
  if constexpr (kStoredFirst<T, kResidual>) {
    for_units<A>(begin, begin + cols,
                 [&](std::int64_t column, auto extent) __attribute__((always_inline)) { row.take(column, extent); });
    return sampled([&](std::int64_t column) { return load<T>(row.stored() + column, Whole{}); });
  } else {
    return sampled([&](std::int64_t column) { return row.peek(column); });
  }
}
template <class T, bool kResidual>
NORMEXT_INLINE Accumulate<T> segment_shift(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols) {
  using A = Accumulate<T>;
  return sum_lanes<A>(shift_sum(row, begin, cols)) / columns_of_shift<A>(cols);
}

// Sums of the deviations from `shift` and of their squares. Half of the deviations come by fma, with the bits of a subtraction,
// since processors that add and multiply in units of their own would wait for those that add [Zen 4, LayerNorm: 3 % less time].
template <class T, bool kResidual, class Next>
NORMEXT_INLINE void shifted_sums(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols, Next next,
                                 Accumulate<T> shift, Vector<Accumulate<T>> (&sums_out)[2]) {
  using A = Accumulate<T>;
  const Vector<A> one = Vector<A>{} + A(1), centre = Vector<A>{} + shift;
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
// The same after shift_sum().
template <class T, bool kResidual, class Next>
NORMEXT_INLINE void sums_after_shift(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols, Next next,
                                     Accumulate<T> shift, Vector<Accumulate<T>> (&sums_out)[2]) {
  constexpr bool kFirst = kStoredFirst<T, kResidual>;
  const bool is_stored = kResidual && (kFirst || !samples_shift(cols));
  if (is_stored) shifted_sums(RowSource<T, false>(row.stored()), begin, cols, next, shift, sums_out);
  else if constexpr (!kFirst) shifted_sums(row, begin, cols, next, shift, sums_out);
}

// Moments of columns x from their mean.
template <class T>
__attribute__((noinline)) Moments<Accumulate<T>> moments_again(const T* x, std::int64_t cols, Accumulate<T> mean) {
  using A = Accumulate<T>;
  Vector<A> sums[2];
  shifted_sums<T, false>(RowSource<T, false>(x), 0, cols, Prefetch<T, 0>{}, mean, sums);
  return moments(mean, sum_lanes<A>(sums[0]), sum_lanes<A>(sums[1]), static_cast<A>(cols));
}
// Moments of columns x: those found, or, if the shift was not near the mean, those from the mean that it gave.
template <class T>
NORMEXT_INLINE Moments<Accumulate<T>> checked(Moments<Accumulate<T>> found, const T* x, std::int64_t cols) {
  if (!samples_shift(cols) || __builtin_expect(near_mean(found, static_cast<Accumulate<T>>(cols), kRowSlack), 1)) return found;
  return moments_again<T>(x, cols, recentred(found));
}
// Whether a vector of moments came from shifts near their means.
template <class A>
NORMEXT_INLINE bool all_near(const Moments<Vector<A>>& found, Vector<A> n, int slack) {
  const Vector<A> none = {};
  return sum_lanes<A>(near_mean(found, n, slack) ? none : none + A(1)) == 0;
}

// Moments of a segment after shift_sum().
template <class T, bool kResidual, class Next>
NORMEXT_INLINE Moments<Accumulate<T>> shifted_moments(const RowSource<T, kResidual>& row, std::int64_t begin, std::int64_t cols,
                                                      Accumulate<T> shift, Next next) {
  using A = Accumulate<T>;
  Vector<A> sums[2];
  sums_after_shift(row, begin, cols, next, shift, sums);
  const Moments<A> found = moments(shift, sum_lanes<A>(sums[0]), sum_lanes<A>(sums[1]), static_cast<A>(cols));
  return at_mean(checked<T>(found, row.stored() + begin, cols));
}

// Moments of the rows of a batch.
template <class A>
struct BatchMoments {
  alignas(NORMEXT_VECTOR_BYTES) A of[3][kMaxBatch] = {};

  template <class V = A>
  NORMEXT_INLINE Moments<V> read(int r) const {
    return {load_bytes<V>(of[0] + r), load_bytes<V>(of[1] + r), load_bytes<V>(of[2] + r)};
  }
  template <class V>
  NORMEXT_INLINE void write(int r, Moments<V> m) {
    store_bytes(of[0] + r, m.mean);
    store_bytes(of[1] + r, m.correction);
    store_bytes(of[2] + r, m.m2);
  }
};
// Moments of `count` rows of one segment, shift included, a step for all of them at a time. What comes after row r is fetched as
// next_of(r) says.
template <class T, class SourceOf, class NextOf>
NORMEXT_INLINE void shifted_moments_of_rows(int count, std::int64_t cols, SourceOf source_of, NextOf next_of,
                                            BatchMoments<Accumulate<T>>& rows) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  V of_row[2][kMaxBatch];
  A(&shifts)[kMaxBatch] = rows.of[0];
  for (int r = 0; r < count; ++r) of_row[0][r] = shift_sum(source_of(r), 0, cols);
  sum_lanes_of_rows(of_row[0], count, shifts);
  const V of_shift = V{} + columns_of_shift<A>(cols), n = V{} + static_cast<A>(cols);
  for (int r = 0; r < count; r += kLanes<A>) store_bytes(shifts + r, load_bytes<V>(shifts + r) / of_shift);
  for (int r = 0; r < count; ++r) {
    V sums[2];
    sums_after_shift(source_of(r), 0, cols, next_of(r), shifts[r], sums);
    of_row[0][r] = sums[0];
    of_row[1][r] = sums[1];
  }
  sum_lanes_of_rows(of_row[0], count, rows.of[1]);
  sum_lanes_of_rows(of_row[1], count, rows.of[2]);
  for (int first = 0; first < count; first += kLanes<A>) {
    const Moments<V> sums = rows.template read<V>(first);
    Moments<V> found = moments(sums.mean, sums.correction, sums.m2, n);
    if (samples_shift(cols) && __builtin_expect(!all_near<A>(found, n, kRowSlack), 0)) {
      rows.write(first, found);
      for (int r = first; r < count && r < first + kLanes<A>; ++r) {
        rows.write(r, checked<T>(rows.read(r), source_of(r).stored(), cols));
      }
      found = rows.template read<V>(first);
    }
    rows.write(first, at_mean(found));
  }
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
