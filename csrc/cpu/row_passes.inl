// LayerNorm and RMSNorm forward for one instruction set: the passes over rows that row_forward.inl puts together. Statistics of a
// batch of rows of one segment, or of a longer row; output of several rows.
// A residual is added and stored while the statistics are taken; the output reads the stored, rounded row.

#pragma once

#include "cpu/row_moments.inl"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// Of a batch. In 16 bits arithmetic counts for more than L1, which the batch fills, and batches save some [Zen 4, LayerNorm and
// RMSNorm bfloat16, 16 and 32 KB: 256x768 20.0 -> 19.4, 14.3 -> 13.9 us; float32 23.0 -> 24.9, 17.3 -> 18.8].
template <class T>
constexpr std::int64_t kBatchBytes = sizeof(T) == 2 ? 32768 : 16384;
constexpr std::int64_t kLeastBatch = 2;  // rows share parameters [LayerNorm float32 32x4096, batches of a row: 19.9 -> 19.2 us]
// Where a batch lies. Rows that come from memory are fetched a batch ahead, in equal shares by all passes over the batch before, so
// that memory is busy during mere arithmetic, too: 3 to 10 % less time than fetching in one pass, 20 % at 4096x4096 in bfloat16.
// For rows in L2 prefetches cost more than they bring.
enum class Source { kCache, kMemory };

// One of kShares shares of what a next row is read from.
template <class T, bool kResidual, int kShares>
struct SourcePrefetch {
  Prefetch<T, kShares> input, residual;

  NORMEXT_INLINE void fetch(std::int64_t column) const {
    input.fetch(column);
    if constexpr (kResidual) residual.fetch(column);
  }
};
// The same, and all that next rows are written to.
template <class T, class O, bool kResidual, int kShares>
struct RowPrefetch {
  SourcePrefetch<T, kResidual, kShares> source;
  L2Prefetch<T> residual_out;
  L2Prefetch<O> output;

  NORMEXT_INLINE void fetch(std::int64_t column) const {
    source.fetch(column);
    if constexpr (kResidual) residual_out.fetch(column);
    output.fetch(column);
  }
};
// How many passes share the work: that of the statistics and that of the output, or none.
template <Source kSource>
constexpr int kShares = kSource == Source::kMemory ? 2 : 0;

template <int kShares, class T>
NORMEXT_INLINE Prefetch<T, kShares> share_of_row(const T* row, std::int64_t cols, int share) {
  if constexpr (kShares == 0) return {};
  else return {row + cols * share / kShares};
}

// How the output is formed: bits, known at compile time.
constexpr int kWeight = 1, kBias = 2, kRoundBeforeWeight = 4;

template <class A>
struct RowBatch {
  alignas(NORMEXT_VECTOR_BYTES) A hi[kMaxBatch] = {};
  alignas(NORMEXT_VECTOR_BYTES) A lo[kMaxBatch] = {};
  alignas(NORMEXT_VECTOR_BYTES) A rstd[kMaxBatch] = {};

  template <class Policy>
  NORMEXT_INLINE typename Policy::template Row<A> row(int r) const {
    if constexpr (Policy::kCentred) return {hi[r], lo[r], rstd[r]};
    else return {rstd[r]};
  }
};

// Moments of one segment; without centring only m2 is meant: the sum of squares.
template <class Policy, class T, bool kResidual>
NORMEXT_INLINE Moments<Accumulate<T>> segment_moments(const RowSource<T, kResidual>& row, std::int64_t segment, std::int64_t cols) {
  using A = Accumulate<T>;
  const std::int64_t begin = segment * kSegment, n = segment_cols(segment, cols);
  if constexpr (Policy::kCentred) {
    return shifted_moments(row, begin, n, segment_shift(row, begin, n), Prefetch<T, 0>{});
  } else {
    return {0, 0, sum_lanes<A>(square_sum(row, begin, n, Prefetch<T, 0>{}))};
  }
}

template <class Policy, class A>
NORMEXT_INLINE typename Policy::template Row<A> finish_row(const Moments<A>* segment, std::int64_t cols, A eps, A* terms) {
  if constexpr (Policy::kCentred) {
    return merge_all(segment, cols, eps, terms);
  } else {
    for (std::int64_t s = 0; s < segments_of(cols); ++s) terms[s] = segment[s].m2;
    return Policy::finish(pairwise(terms, segments_of(cols)), static_cast<A>(cols), eps);
  }
}

// The row to fetch while row r of a batch is worked on: the same of the next batch, of which `following` rows exist.
template <class T>
NORMEXT_INLINE const T* next_row(const RowForwardArgs& args, std::int64_t first_row, int count, std::int64_t following, int r) {
  return static_cast<const T*>(args.input) + args.input_layout.offset(first_row + (r < following ? count : 0) + r);
}

// Statistics of a row of one segment. On vectors, as those of several rows: where there is no fma, scalars are rounded otherwise.
template <class A>
NORMEXT_INLINE CentredRow<A> finish_single(Moments<A> found, A n, A eps) {
  using V = Vector<A>;
  const CentredRow<V> row = finish_centred(V{} + found.mean, V{} + found.correction, V{} + found.m2, V{} + n, V{} + eps);
  return {row.hi[0], row.lo[0], row.rstd[0]};
}
template <class Policy, class A>
NORMEXT_INLINE ScaledRow<A> finish_single(A sum_square, A n, A eps) {
  using V = Vector<A>;
  return {Policy::finish(V{} + sum_square, V{} + n, V{} + eps).rstd[0]};
}

// Statistics of `count` rows of one segment each. The last step runs on vectors of rows.
template <class Policy, class T, bool kResidual, Source kSource>
__attribute__((noinline)) void batch_statistics(const RowForwardArgs& args, std::int64_t first_row, int count,
                                                std::int64_t following, RowBatch<Accumulate<T>>& batch) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  const V n = V{} + static_cast<A>(args.cols), eps = V{} + static_cast<A>(args.eps);
  const auto source_of = [&](int r) { return RowSource<T, kResidual>(args, first_row + r); };
  const auto next_of = [&](int r) {
    return share_of_row<kShares<kSource>>(next_row<T>(args, first_row, count, following, r), args.cols, 0);
  };
  if constexpr (Policy::kCentred) {
    BatchMoments<A> rows;
    shifted_moments_of_rows<T>(count, args.cols, source_of, next_of, rows);
    for (int r = 0; r < count; r += kLanes<A>) {
      const Moments<V> found = rows.template read<V>(r);
      const CentredRow<V> row = finish_centred(found.mean, found.correction, found.m2, n, eps);
      store_bytes(batch.hi + r, row.hi);
      store_bytes(batch.lo + r, row.lo);
      store_bytes(batch.rstd + r, row.rstd);
    }
  } else {
    alignas(V) A sums[kMaxBatch] = {};
    V of_row[kMaxBatch];
    for (int r = 0; r < count; ++r) of_row[r] = square_sum(source_of(r), 0, args.cols, next_of(r));
    sum_lanes_of_rows(of_row, count, sums);
    for (int r = 0; r < count; r += kLanes<A>) {
      store_bytes(batch.rstd + r, Policy::finish(load_bytes<V>(sums + r), n, eps).rstd);
    }
  }
}

template <class Policy, class T, bool kResidual>
__attribute__((noinline)) typename Policy::template Row<Accumulate<T>> long_row_statistics(const RowForwardArgs& args,
                                                                                           std::int64_t row) {
  using A = Accumulate<T>;
  const RowSource<T, kResidual> source(args, row);
  Moments<A> segment[kMaxSegments];
  A terms[kMaxSegments];
  for (std::int64_t s = 0; s < segments_of(args.cols); ++s) segment[s] = segment_moments<Policy>(source, s, args.cols);
  return finish_row<Policy>(segment, args.cols, static_cast<A>(args.eps), terms);
}

// A row of the output. Past the caches if the plan says so, the instruction set can and the row is a matter of whole lines.
template <class O, bool kMayStream>
struct OutputRow {
  O* row;
  bool streamed = false;

  NORMEXT_INLINE OutputRow() : row(nullptr) {}
  NORMEXT_INLINE OutputRow(const RowForwardArgs& args, bool stream, std::int64_t r)
      : row(static_cast<O*>(args.output) + args.output_layout.offset(r)),
        streamed(kMayStream && NORMEXT_VECTOR_BYTES >= 32 && stream && reinterpret_cast<std::uintptr_t>(row) % 64 == 0) {}
  template <class T>
  NORMEXT_INLINE void store_unit(std::int64_t column, Pair<Accumulate<T>> y, Whole whole) const {
    if constexpr (kMayStream) {
      if (streamed) return stream_packed(row + column, pack<T, O>(y));
    }
    store<T>(row + column, y, whole);
  }
  template <class T>
  NORMEXT_INLINE void store_unit(std::int64_t column, Pair<Accumulate<T>> y, Partial part) const {
    store<T>(row + column, y, part);
  }
};

// output = norm(x) of kRows rows, columns [begin, end). Parameters are loaded and converted once for all rows.
template <class Policy, class T, class P, int kMode, int kRows, class Output, class Next>
NORMEXT_INLINE void apply(const RowForwardArgs& args, const T* const* x, const Output* output, const Next* next,
                          const typename Policy::template Row<Accumulate<T>>* row, std::int64_t begin, std::int64_t end) {
  using A = Accumulate<T>;
  const P* weight = static_cast<const P*>(args.weight);
  const P* bias = static_cast<const P*>(args.bias);
  const A offset = static_cast<A>(args.weight_offset);
  for_units<A>(begin, end, [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
    Pair<A> w = {Vector<A>{} + A(1), Vector<A>{} + A(1)}, b = {};
    if constexpr ((kMode & kWeight) != 0) w = load<T>(weight + column, extent);
    if constexpr ((kMode & kBias) != 0) b = load<T>(bias + column, extent);
    if constexpr (!Policy::kCentred) w = {w.a + offset, w.b + offset};
    // All rows are loaded before any is stored: equal offsets within pages of 4 KB would make loads wait for the stores.
    Pair<A> v[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) v[r] = load<T>(x[r] + column, extent);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      next[r].fetch(column);
      Pair<A> y = {Policy::normalise(v[r].a, row[r]), Policy::normalise(v[r].b, row[r])};
      if constexpr ((kMode & kRoundBeforeWeight) != 0) y = Packed<T>::pack(y).unpack();
      if constexpr ((kMode & (kWeight | kBias)) != 0) y = {Policy::affine(y.a, w.a, b.a), Policy::affine(y.b, w.b, b.b)};
      output[r].template store_unit<T>(column, y, extent);
    }
  });
}

template <class Policy, class A>
NORMEXT_INLINE void save_statistics(const RowForwardArgs& args, std::int64_t row, typename Policy::template Row<A> value) {
  A* stats = static_cast<A*>(args.stats);
  if (stats == nullptr) return;
  if constexpr (Policy::kCentred) {
    stats[row] = value.hi;
    stats[args.rows + row] = value.lo;
    stats[2 * args.rows + row] = value.rstd;
  } else {
    stats[row] = value.rstd;
  }
}

template <class T>
NORMEXT_INLINE const T* stored_row(const RowForwardArgs& args, std::int64_t row) {
  return args.residual == nullptr ? static_cast<const T*>(args.input) + args.input_layout.offset(row)
                                  : static_cast<const T*>(args.residual_out) + args.residual_out_layout.offset(row);
}
template <class T, bool kResidual, int kShares>
NORMEXT_INLINE SourcePrefetch<T, kResidual, kShares> source_prefetch(const RowSource<T, kResidual>& row, std::int64_t cols,
                                                                     int share) {
  SourcePrefetch<T, kResidual, kShares> next = {};
  next.input = share_of_row<kShares>(row.input, cols, share);
  if constexpr (kResidual) next.residual = share_of_row<kShares>(row.residual, cols, share);
  return next;
}
// The last share of row `input`, which is read next, and all of row `output`, which is written next.
template <class T, class O, bool kResidual, int kShares>
NORMEXT_INLINE RowPrefetch<T, O, kResidual, kShares> row_prefetch(const RowForwardArgs& args, bool stream, std::int64_t input,
                                                                  std::int64_t output) {
  RowPrefetch<T, O, kResidual, kShares> next = {};
  const RowSource<T, kResidual> source(args, input);
  next.source = source_prefetch<T, kResidual, kShares>(source, args.cols, kShares - 1);
  if constexpr (kResidual) next.residual_out = {source.residual_out};
  const OutputRow<O, true> next_output(args, stream, output);
  if (!next_output.streamed) next.output = {next_output.row};
  return next;
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
