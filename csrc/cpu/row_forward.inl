// LayerNorm and RMSNorm forward, with or without a fused residual, for one instruction set.
//
// Rows of one segment are handled in batches that stay in L1: the statistics of all rows of the batch, then the output of all, so
// that the long latencies of one row (sums across lanes, divisions, a root) overlap with the next. Or in a pipeline: the statistics
// of a row, the output of the row before. Longer rows are handled one at a time, a segment's moments from L1, the output from L2. A
// row that is split over threads goes through the same sums.

#pragma once

#include "core/dtypes.h"
#include "cpu/row_passes.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// Output and saved statistics of `count` rows, of which `following` more come after.
template <class Policy, class T, class P, class O, int kMode, Source kSource>
__attribute__((noinline)) void apply_batch(const RowForwardArgs& args, bool stream, std::int64_t first_row, int count,
                                           std::int64_t following, const RowBatch<Accumulate<T>>& batch) {
  constexpr int shares = kShares<kSource>;
  const T* x[kMaxBatch];
  Prefetch<T, shares> next[kMaxBatch];
  OutputRow<O, kSource == Source::kMemory> output[kMaxBatch];
  typename Policy::template Row<Accumulate<T>> row[kMaxBatch];
  for (int r = 0; r < count; ++r) {
    x[r] = stored_row<T>(args, first_row + r);
    next[r] = share_of_row<shares>(next_row<T>(args, first_row, count, following, r), args.cols, shares - 1);
    output[r] = {args, stream, first_row + r};
    row[r] = batch.template row<Policy>(r);
    save_statistics<Policy, Accumulate<T>>(args, first_row + r, row[r]);
  }
  int r = 0;
  const auto rows = [&](auto how_many) __attribute__((always_inline)) {
    constexpr int kRows = decltype(how_many)::value;
    for (; count - r >= kRows; r += kRows) {
      apply<Policy, T, P, kMode, kRows>(args, x + r, output + r, next + r, row + r, 0, args.cols);
    }
  };
  // Several rows share the conversion of parameters: four gain 4 % in bfloat16 and lose as much in float32.
  if constexpr (sizeof(T) == 2) rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 2>());
  rows(std::integral_constant<int, 1>());
}

// Rows [begin, end) of one segment in a pipeline of one row per stage, so that each tensor is read or written as one sequence of
// lines, fetched a row ahead, and the scalar arithmetic of a row overlaps with the passes over the others.
template <class Policy, class T, class P, class O, int kMode, bool kResidual>
__attribute__((noinline)) void pipeline(const RowForwardArgs& args, bool stream, std::int64_t begin, std::int64_t end) {
  using A = Accumulate<T>;
  using Row = typename Policy::template Row<A>;
  constexpr int kShared = Policy::kCentred ? 2 : 1;  // passes that fetch what is read next [LayerNorm 16384x1024: 5.28 -> 4.74 ms]
  const std::int64_t cols = args.cols, last = args.rows - 1;
  const A n = static_cast<A>(cols), eps = static_cast<A>(args.eps);
  if (begin >= end) return;
  const auto shift_of = [&](std::int64_t r) { return segment_shift(RowSource<T, kResidual>(args, r), 0, cols); };
  A shift = 0;  // of the row whose statistics are next
  if constexpr (Policy::kCentred) shift = shift_of(begin);
  Row row = {};  // of the row whose output is next
  for (std::int64_t r = begin; r <= end; ++r) {
    const std::int64_t following = smaller(r + 1, last);
    Row finished = {};
    if (r < end) {
      const RowSource<T, kResidual> source(args, r);
      if constexpr (Policy::kCentred) {
        const auto next = source_prefetch<T, kResidual, kShared>(RowSource<T, kResidual>(args, following), cols, 0);
        finished = finish_single(shifted_moments(source, 0, cols, shift, next), n, eps);
      } else {
        finished = finish_single<Policy>(sum_lanes<A>(square_sum(source, 0, cols, Prefetch<T, 0>{})), n, eps);
      }
    }
    if (r > begin) {
      const std::int64_t out = r - 1;
      const T* x = stored_row<T>(args, out);
      const OutputRow<O, true> output(args, stream, out);
      const auto next = row_prefetch<T, O, kResidual, kShared>(args, stream, following, smaller(r, last));
      save_statistics<Policy, A>(args, out, row);
      apply<Policy, T, P, kMode, 1>(args, &x, &output, &next, &row, 0, cols);
    }
    if constexpr (Policy::kCentred) {
      if (r + 1 < end) shift = shift_of(r + 1);
    }
    row = finished;
  }
}

template <class Policy, class T, class P, class O, int kMode, Source kSource>
void batches(const RowForwardArgs& args, bool stream, std::int64_t begin, std::int64_t end) {
  const std::int64_t fit = kBatchBytes<T> / (args.cols * static_cast<std::int64_t>(sizeof(T)));
  const std::int64_t most = fit < kLeastBatch ? kLeastBatch : smaller(fit, kMaxBatch);
  const std::int64_t batch_rows = most > 4 ? most - most % 4 : most;
  RowBatch<Accumulate<T>> batch;
  for (std::int64_t row = begin; row < end; row += batch_rows) {
    const int count = static_cast<int>(smaller(batch_rows, end - row));
    const std::int64_t following = smaller(batch_rows, args.rows - row - count);
    if (args.residual != nullptr) batch_statistics<Policy, T, true, kSource>(args, row, count, following, batch);
    else batch_statistics<Policy, T, false, kSource>(args, row, count, following, batch);
    apply_batch<Policy, T, P, O, kMode, kSource>(args, stream, row, count, following, batch);
  }
}

// Rows of several segments. next_of(row) is what to fetch before that row.
template <class Policy, class T, class P, class O, int kMode, class Next>
__attribute__((noinline)) void long_rows(const RowForwardArgs& args, bool stream, std::int64_t begin, std::int64_t end,
                                         Next next_of) {
  for (std::int64_t r = begin; r < end; ++r) {
    const auto row =
        args.residual != nullptr ? long_row_statistics<Policy, T, true>(args, r) : long_row_statistics<Policy, T, false>(args, r);
    const T* x = stored_row<T>(args, r);
    const OutputRow<O, true> output(args, stream, r);
    const auto next = next_of(smaller(r + 1, args.rows - 1));
    save_statistics<Policy, Accumulate<T>>(args, r, row);
    apply<Policy, T, P, kMode, 1>(args, &x, &output, &next, &row, 0, args.cols);
  }
}

// The plan's schedule is followed. Not without fma, the baseline that nobody runs for its speed (it compiles in 100 s rather than
// 170), and not in float64.
template <class T>
constexpr bool kFollowsPlan = NORMEXT_HAS_FMA != 0 && sizeof(T) < 8;

template <class Policy, class T, class P, class O, int kMode>
void forward_rows(const RowForwardArgs& args, const cpu::ForwardPlan& plan, std::int64_t begin, std::int64_t end) {
  using cpu::RowSchedule;
  const bool stream = plan.stream, fused = args.residual != nullptr;
  if constexpr (!kFollowsPlan<T>) {
    if (args.cols <= kSegment) batches<Policy, T, P, O, kMode, Source::kCache>(args, false, begin, end);
    else long_rows<Policy, T, P, O, kMode>(args, false, begin, end, [](std::int64_t) { return Prefetch<T, 0>{}; });
  } else if (args.cols > kSegment) {
    const auto rows = [&](auto next_of) { long_rows<Policy, T, P, O, kMode>(args, stream, begin, end, next_of); };
    const bool input_only = plan.schedule == RowSchedule::kMemoryBatches;
    const auto fetched = [&](auto residual, std::int64_t r) {
      auto next = row_prefetch<T, O, decltype(residual)::value, 1>(args, stream, r, r);
      if (input_only) next.output = {};
      return next;
    };
    if (plan.schedule == RowSchedule::kBatches) rows([](std::int64_t) { return Prefetch<T, 0>{}; });
    else if (fused && !input_only) rows([&](std::int64_t r) { return fetched(std::true_type(), r); });
    else rows([&](std::int64_t r) { return fetched(std::false_type(), r); });
  } else {
    if (plan.schedule == RowSchedule::kBatches) batches<Policy, T, P, O, kMode, Source::kCache>(args, stream, begin, end);
    else if (plan.schedule == RowSchedule::kMemoryBatches)
      batches<Policy, T, P, O, kMode, Source::kMemory>(args, stream, begin, end);
    else if (fused) pipeline<Policy, T, P, O, kMode, true>(args, stream, begin, end);
    else pipeline<Policy, T, P, O, kMode, false>(args, stream, begin, end);
  }
  if (stream) stream_fence();
}

// Moments of segments [begin, end), counted from row `first_row` on.
template <class Policy, class T, bool kResidual>
__attribute__((noinline)) void moments_of_segments(const RowForwardArgs& args, std::int64_t first_row, std::int64_t begin,
                                                   std::int64_t end, Moments<Accumulate<T>>* moments) {
  const std::int64_t segments = segments_of(args.cols);
  for (std::int64_t task = begin; task < end; ++task) {
    const RowSource<T, kResidual> row(args, first_row + task / segments);
    moments[task] = segment_moments<Policy>(row, task % segments, args.cols);
  }
}

// Rows that several threads share: moments of all segments, then, after every row is merged, the output.
template <class Policy, class T, class P, class O, int kMode>
void forward_segments(const RowForwardArgs& args, const cpu::ForwardPlan& plan, std::int64_t first_row, std::int64_t rows) {
  using A = Accumulate<T>;
  using Row = typename Policy::template Row<A>;
  const std::int64_t segments = segments_of(args.cols);
  Moments<A>* moments = static_cast<Moments<A>*>(plan.scratch);
  A* terms = reinterpret_cast<A*>(moments + rows * segments);
  Row* merged = reinterpret_cast<Row*>(terms + segments);
  for_ranges(plan.parallel, rows * segments, [&](std::int64_t begin, std::int64_t end) {
    if (args.residual != nullptr) moments_of_segments<Policy, T, true>(args, first_row, begin, end, moments);
    else moments_of_segments<Policy, T, false>(args, first_row, begin, end, moments);
  });
  for (std::int64_t r = 0; r < rows; ++r) {
    merged[r] = finish_row<Policy>(moments + r * segments, args.cols, static_cast<A>(args.eps), terms);
    save_statistics<Policy, A>(args, first_row + r, merged[r]);
  }
  for_ranges(plan.parallel, rows * segments, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t r = task / segments, column = task % segments * kSegment;
      const T* x = stored_row<T>(args, first_row + r);
      const OutputRow<O, false> output(args, false, first_row + r);
      const Prefetch<T, 0> none{};
      apply<Policy, T, P, kMode, 1>(args, &x, &output, &none, merged + r, column, smaller(column + kSegment, args.cols));
    }
  });
}

template <class Policy, class T, class P, class O, int kMode>
void forward_as(const RowForwardArgs& args, const cpu::ForwardPlan& plan) {
  if (plan.scratch == nullptr) {
    for_ranges(plan.parallel, args.rows,
               [&](std::int64_t begin, std::int64_t end) { forward_rows<Policy, T, P, O, kMode>(args, plan, begin, end); });
    return;
  }
  for (std::int64_t row = 0; row < args.rows; row += plan.group) {
    forward_segments<Policy, T, P, O, kMode>(args, plan, row, smaller(plan.group, args.rows - row));
  }
}

template <class Policy, class T, class P, class O>
void forward_with_types(const RowForwardArgs& args, const cpu::ForwardPlan& plan) {
  if constexpr (Policy::kCentred) {
    if (args.weight != nullptr && args.bias != nullptr) return forward_as<Policy, T, P, O, kWeight | kBias>(args, plan);
    if (args.weight != nullptr) return forward_as<Policy, T, P, O, kWeight>(args, plan);
  } else if (args.weight != nullptr) {
    if constexpr (sizeof(T) == 2) {
      if (args.rounding == Rounding::kLlama) return forward_as<Policy, T, P, O, kWeight | kRoundBeforeWeight>(args, plan);
    }
    return forward_as<Policy, T, P, O, kWeight>(args, plan);
  }
  forward_as<Policy, T, P, O, 0>(args, plan);
}

template <class Policy>
void forward(const RowForwardArgs& args, const cpu::ForwardPlan& plan) {
  visit(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if constexpr (!Policy::kCentred) {
        if (args.output_dtype != args.dtype) return forward_with_types<Policy, T, float, float>(args, plan);
      }
      if (args.param_dtype != args.dtype) return forward_with_types<Policy, T, float, T>(args, plan);
    }
    forward_with_types<Policy, T, T, T>(args, plan);
  });
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
