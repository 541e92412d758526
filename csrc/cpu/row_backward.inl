// LayerNorm and RMSNorm backward for one instruction set.
//
// A block of a few rows is read once from memory: the row sums (of g and of g*xhat), then, from cache, grad_input (row by row, if
// it is wanted alone) and the block's share of the parameter gradients, which is summed in registers over the rows of the block and
// added to the accumulators of the run. Sums over rows follow BackwardPlan. Threads take whole runs. Where there are too few runs,
// threads take rows for grad_input, as in the forward (so that they find in their cache what they left there), then columns of all
// rows for the parameter gradients; with fewer rows than threads, segments, then columns for both; in chunks of rows that fit L2.
// All of this gives the same bits: every column of a run goes through the same additions.

#pragma once

#include "core/dtypes.h"
#include "cpu/prefetch.inl"
#include "cpu/row_sums.inl"
#include "norms/layer_norm.h"
#include "norms/rms_norm.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

using cpu::kColumnTask;
using cpu::kTermsPerSum;

constexpr std::int64_t kFinishSerial = 1 << 17;  // sums; fewer are not worth waking threads for

// Mean of g and mean of g*xhat of a row.
template <class A>
struct GradientMeans {
  A g, gx;
};

// The arithmetic of one backward call. T: storage of a row, P: of parameters, G: of grad_output.
template <class Policy, class T, class P, class G>
struct RowGradient {
  using A = Accumulate<T>;
  using V = Vector<A>;
  using Row = typename Policy::template Row<A>;
  static constexpr int kSums = Policy::kCentred ? 2 : 1;  // row sums; also kinds of parameter gradients

  // Row sums of a block, their lanes still to be added, with room for whole vectors of rows as sum_lanes_of_rows() wants.
  static constexpr std::int64_t kRoom = kLanes<A> > cpu::kBlockRows ? kLanes<A> : cpu::kBlockRows;
  struct RowLanes {
    V of[kSums][kRoom];
  };

  const RowBackwardArgs& args;
  const cpu::BackwardPlan& plan;

  NORMEXT_INLINE const T* input(std::int64_t row) const {
    return static_cast<const T*>(args.input) + args.input_layout.offset(row);
  }
  NORMEXT_INLINE const G* grad_output(std::int64_t row) const {
    return static_cast<const G*>(args.grad_output) + args.grad_output_layout.offset(row);
  }
  NORMEXT_INLINE Row statistics(std::int64_t row) const {
    const A* stats = static_cast<const A*>(args.stats);
    if constexpr (Policy::kCentred) return {stats[row], stats[args.rows + row], stats[2 * args.rows + row]};
    else return {stats[row]};
  }
  struct Weight {
    const P* values;
    A offset;

    template <class Extent>
    NORMEXT_INLINE Pair<A> at(std::int64_t column, Extent extent) const {
      if (values == nullptr) return {V{} + A(1), V{} + A(1)};
      const Pair<A> w = load<T>(values + column, extent);
      if constexpr (Policy::kCentred) return w;
      else return {w.a + offset, w.b + offset};
    }
  };
  NORMEXT_INLINE Weight weight() const { return {static_cast<const P*>(args.weight), static_cast<A>(args.weight_offset)}; }
  template <class Extent>
  NORMEXT_INLINE Pair<A> normalised(const T* x, Row row, Extent extent) const {
    const Pair<A> v = load<T>(x, extent);
    return keep<T>({Policy::normalise(v.a, row), Policy::normalise(v.b, row)}, extent);
  }

  // Row sums over one segment of `count` rows, whose lanes are still to be added; the last is that of g*xhat.
  __attribute__((noinline)) void segment_lanes(std::int64_t row, int count, std::int64_t segment, RowLanes& out) const {
    const std::int64_t begin = segment * kSegment, cols = segment_cols(segment, args.cols);
    const Weight weights = weight();
    for (int r = 0; r < count; ++r) {
      const T* x = input(row + r) + begin;
      const G* dy = grad_output(row + r) + begin;
      const Row stats = statistics(row + r);
      const L2Prefetch<T> output = {plan.fetch ? static_cast<const T*>(args.grad_input) + (row + r) * args.cols + begin : nullptr};
      V lanes[kSums];
      sum_columns<A>(
          cols,
          [&](std::int64_t column, auto extent, Sums<A, kSums>& sum) __attribute__((always_inline)) {
            output.fetch(column);
            const Pair<A> xhat = normalised(x + column, stats, extent);
            const Pair<A> w = weights.at(begin + column, extent);
            Pair<A> g = load<T>(dy + column, extent);
            g = {g.a * w.a, g.b * w.b};
            if constexpr (Policy::kCentred) sum.of[0] = {sum.of[0].a + g.a, sum.of[0].b + g.b};
            Pair<A>& gx = sum.of[kSums - 1];
            gx = {fma(g.a, xhat.a, gx.a), fma(g.b, xhat.b, gx.b)};
          },
          lanes);
      for (int q = 0; q < kSums; ++q) out.of[q][r] = lanes[q];
    }
  }
  NORMEXT_INLINE void segment_sums(std::int64_t row, std::int64_t segment, A (&sums)[kSums]) const {
    RowLanes lanes;
    segment_lanes(row, 1, segment, lanes);
    for (int q = 0; q < kSums; ++q) sums[q] = sum_lanes<A>(lanes.of[q][0]);
  }

  // Means of the rows of a block.
  NORMEXT_INLINE void row_means(std::int64_t row, std::int64_t count, GradientMeans<A>* out) const {
    const std::int64_t segments = segments_of(args.cols);
    const A n = static_cast<A>(args.cols);
    if (segments == 1) {  // lanes of all rows together
      RowLanes lanes;
      alignas(V) A sums[kSums][kRoom];
      segment_lanes(row, static_cast<int>(count), 0, lanes);
      for (int q = 0; q < kSums; ++q) sum_lanes_of_rows(lanes.of[q], static_cast<int>(count), sums[q]);
      for (std::int64_t r = 0; r < count; ++r) out[r] = {Policy::kCentred ? sums[0][r] / n : 0, sums[kSums - 1][r] / n};
      return;
    }
    for (std::int64_t r = 0; r < count; ++r) {
      A of_segment[kSums][kMaxSegments];
      for (std::int64_t s = 0; s < segments; ++s) {
        A sums[kSums];
        segment_sums(row + r, s, sums);
        for (int q = 0; q < kSums; ++q) of_segment[q][s] = sums[q];
      }
      out[r] = {Policy::kCentred ? pairwise(of_segment[0], segments) / n : 0, pairwise(of_segment[kSums - 1], segments) / n};
    }
  }

  // A pass over columns [begin, end) of kRows rows: with kValues grad_input, by the rows' means; with kParameters the rows' share
  // of the parameter gradients, which the accumulators `sums` take.
  template <int kRows, bool kValues, bool kParameters>
  NORMEXT_INLINE void pass(std::int64_t row, const GradientMeans<A>* means, A* sums, bool add, std::int64_t begin,
                           std::int64_t end) const {
    const T* x[kRows];
    const G* dy[kRows];
    const T* extra[kRows];
    T* dx[kRows];
    Row stats[kRows];
    const T* next_x[kRows] = {};
    const G* next_dy[kRows] = {};
    GradientMeans<A> mean[kRows];
    // A pass for one of the two is no faster for it, or a tenth slower [Zen 3].
    const bool fetch = kValues && kParameters && plan.fetch;
    for (int r = 0; r < kRows; ++r) {
      x[r] = input(row + r);
      dy[r] = grad_output(row + r);
      stats[r] = statistics(row + r);
      if (fetch) {
        const std::int64_t following = smaller(row + kRows + r, args.rows - 1);
        next_x[r] = input(following);
        next_dy[r] = grad_output(following);
      }
      if constexpr (kValues) {
        mean[r] = means[r];
        extra[r] = args.grad_residual_out == nullptr
                       ? nullptr
                       : static_cast<const T*>(args.grad_residual_out) + args.grad_residual_out_layout.offset(row + r);
        dx[r] = static_cast<T*>(args.grad_input) + (row + r) * args.cols;
      }
    }
    const bool round_xhat = args.rounding == Rounding::kLlama;
    const Weight weights = weight();
    A* const bias_sums = kParameters && Policy::kCentred ? sums + plan.padded_cols : nullptr;
    const auto unit = [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
      const Pair<A> w = kValues ? weights.at(column, extent) : Pair<A>{};
      Pair<A> dw = {}, db = {};
      if (fetch) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          fetch_unit<2>(next_dy[r] + column);
          fetch_unit<2>(next_x[r] + column);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Pair<A> g = load<T>(dy[r] + column, extent);
        const Pair<A> xhat = normalised(x[r] + column, stats[r], extent);
        if constexpr (kParameters) {
          Pair<A> factor = xhat;  // of the weight, as the forward saw it
          if constexpr (sizeof(T) == 2 && !Policy::kCentred) {
            if (round_xhat) factor = Packed<T>::pack(xhat).unpack();
          }
          dw = {fma(g.a, factor.a, dw.a), fma(g.b, factor.b, dw.b)};
          if constexpr (Policy::kCentred) db = {db.a + g.a, db.b + g.b};
        }
        if constexpr (kValues) {
          g = {g.a * w.a, g.b * w.b};
          Pair<A> d = {Policy::gradient(g.a, xhat.a, stats[r], mean[r].g, mean[r].gx),
                       Policy::gradient(g.b, xhat.b, stats[r], mean[r].g, mean[r].gx)};
          if (extra[r] != nullptr) {
            const Pair<A> e = load<T>(extra[r] + column, extent);
            d = {d.a + e.a, d.b + e.b};
          }
          store<T>(dx[r] + column, d, extent);
        }
      }
      if constexpr (kParameters) {
        accumulate(sums + column, dw, add);
        if constexpr (Policy::kCentred) accumulate(bias_sums + column, db, add);
      }
    };
    std::int64_t column = begin;
    for (; end - column >= kUnit<A>; column += kUnit<A>) unit(column, Whole{});
    if (column < end) unit(column, Partial{static_cast<int>(end - column)});
  }
  // The parameter gradients' share of a block, and its grad_input with kValues.
  template <int kRows, bool kValues>
  __attribute__((noinline)) void block(std::int64_t row, const GradientMeans<A>* means, A* sums, bool add, std::int64_t begin,
                                       std::int64_t end) const {
    pass<kRows, kValues, true>(row, means, sums, add, begin, end);
  }
  // grad_input alone: row by row, so that a row's scalars stay in registers.
  __attribute__((noinline)) void grad_input_rows(std::int64_t row, int count, const GradientMeans<A>* means, std::int64_t begin,
                                                 std::int64_t end) const {
    for (int r = 0; r < count; ++r) pass<1, true, false>(row + r, means + r, nullptr, false, begin, end);
  }

  NORMEXT_INLINE static void accumulate(A* sums, Pair<A> x, bool add) {
    if (add) {
      const Pair<A> old = Packed<A>::read(sums).unpack();
      x = {old.a + x.a, old.b + x.b};
    }
    Packed<A>::pack(x).write(sums);
  }

  // Adds the sums of one level to another, both kinds of parameter gradients, columns [begin, end).
  void fold(const A* from, A* to, bool add, std::int64_t begin, std::int64_t end) const {
    for (int kind = 0; kind < kSums; ++kind) {
      for (std::int64_t c = begin; c < end; c += kUnit<A>) {
        const std::int64_t at = kind * plan.padded_cols + c;
        accumulate(to + at, Packed<A>::read(from + at).unpack(), add);
      }
    }
  }

  // Rows [begin, end) of the run [run_begin, run_end), columns [c0, c1); `begin` is a whole number of blocks into the run.
  // means(row, count, out) supplies the row means, and says whether grad_input is wanted. After the last row, level 0 of `sums`
  // holds the run's sums.
  template <class Means>
  void rows_of_run(std::int64_t run_begin, std::int64_t run_end, std::int64_t begin, std::int64_t end, std::int64_t c0,
                   std::int64_t c1, A* sums, const Means& means) const {
    const std::int64_t level_size = kSums * plan.padded_cols;
    std::int64_t blocks = (begin - run_begin) / plan.block;
    GradientMeans<A> block_means[cpu::kBlockRows];
    for (std::int64_t row = begin; row < end;) {
      const std::int64_t count = end - row >= plan.block ? plan.block : 1;
      const bool wanted = means(row, count, block_means);
      const bool add = blocks % kTermsPerSum != 0;
      const auto with_parameters = [&](auto has_values) {
        constexpr bool kValues = decltype(has_values)::value;
        if (count == cpu::kBlockRows) block<cpu::kBlockRows, kValues>(row, block_means, sums, add, c0, c1);
        else block<1, kValues>(row, block_means, sums, add, c0, c1);
      };
      if (sums == nullptr) {
        if (wanted) grad_input_rows(row, static_cast<int>(count), block_means, c0, c1);
      } else if (wanted) {
        with_parameters(std::true_type());
      } else {
        with_parameters(std::false_type());
      }
      row += count;
      ++blocks;
      if (sums == nullptr) continue;
      // Every 16 terms a level is full: it becomes one term of the next.
      std::int64_t terms = blocks;
      for (A* level = sums; terms % kTermsPerSum == 0; level += level_size) {
        terms /= kTermsPerSum;
        fold(level, level + level_size, (terms - 1) % kTermsPerSum != 0, c0, c1);
      }
    }
    if (sums == nullptr || end != run_end) return;
    bool started = blocks % kTermsPerSum != 0;
    A* level = sums;
    for (std::int64_t terms = blocks / kTermsPerSum; terms > 0; terms /= kTermsPerSum) {
      level += level_size;
      if (terms % kTermsPerSum == 0) continue;
      fold(level, sums, started, c0, c1);
      started = true;
    }
  }

  A* sums_of_run(std::int64_t run) const {
    return plan.runs == 0 ? nullptr : static_cast<A*>(plan.sums) + run * plan.levels * kSums * plan.padded_cols;
  }
  std::int64_t first_row(std::int64_t run) const { return args.rows * run / plan.runs; }

  // Row means from the rows themselves.
  NORMEXT_INLINE bool compute_means(std::int64_t row, std::int64_t count, GradientMeans<A>* out) const {
    if (args.grad_input == nullptr) return false;
    row_means(row, count, out);
    return true;
  }

  void run_by_run() const {
    const auto means = [&](std::int64_t row, std::int64_t count, GradientMeans<A>* out) { return compute_means(row, count, out); };
    for_ranges(plan.parallel, plan.runs == 0 ? args.rows : plan.runs, [&](std::int64_t begin, std::int64_t end) {
      if (plan.runs == 0) return rows_of_run(begin, end, begin, end, 0, args.cols, nullptr, means);
      for (std::int64_t run = begin; run < end; ++run) {
        const std::int64_t from = first_row(run), to = first_row(run + 1);
        rows_of_run(from, to, from, to, 0, args.cols, sums_of_run(run), means);
      }
    });
  }

  // The same columns of the rows [begin, end), shared out.
  template <class Means>
  void columns_of_rows(std::int64_t run_begin, std::int64_t run_end, std::int64_t begin, std::int64_t end, A* sums,
                       const Means& means) const {
    for_ranges(plan.parallel, (args.cols + kColumnTask - 1) / kColumnTask, [&](std::int64_t first, std::int64_t last) {
      rows_of_run(run_begin, run_end, begin, end, first * kColumnTask, smaller(last * kColumnTask, args.cols), sums, means);
    });
  }

  // One chunk of at least as many rows as threads: rows shared out for grad_input, then columns for the parameter gradients.
  void chunk_by_rows(std::int64_t run_begin, std::int64_t run_end, std::int64_t begin, std::int64_t end, A* sums) const {
    const auto means = [&](std::int64_t row, std::int64_t count, GradientMeans<A>* out) { return compute_means(row, count, out); };
    const auto none = [](std::int64_t, std::int64_t, GradientMeans<A>*) { return false; };
    if (args.grad_input != nullptr) {
      for_ranges(plan.parallel, end - begin, [&](std::int64_t first, std::int64_t last) {
        rows_of_run(begin + first, begin + last, begin + first, begin + last, 0, args.cols, nullptr, means);
      });
    }
    if (sums != nullptr) columns_of_rows(run_begin, run_end, begin, end, sums, none);
  }

  // One chunk of few rows: its row sums, segments shared out; then everything else, columns shared out.
  void chunk_by_segments(std::int64_t run_begin, std::int64_t run_end, std::int64_t begin, std::int64_t end, A* sums) const {
    const std::int64_t segments = segments_of(args.cols), rows = end - begin;
    A* row_sums = static_cast<A*>(plan.row_sums);
    const auto of_row = [&](std::int64_t r, int q) { return row_sums + (r * 2 + q) * segments; };
    if (args.grad_input != nullptr) {
      for_ranges(plan.parallel, rows * segments, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t task = first; task < last; ++task) {
          const std::int64_t r = task % rows, segment = task / rows;
          A values[kSums];
          segment_sums(begin + r, segment, values);
          for (int q = 0; q < kSums; ++q) of_row(r, q)[segment] = values[q];
        }
      });
      for (std::int64_t r = 0; r < rows; ++r) {
        for (int q = 0; q < kSums; ++q) of_row(r, q)[0] = pairwise(of_row(r, q), segments) / static_cast<A>(args.cols);
      }
    }
    columns_of_rows(run_begin, run_end, begin, end, sums, [&](std::int64_t row, std::int64_t count, GradientMeans<A>* out) {
      if (args.grad_input == nullptr) return false;
      for (std::int64_t r = 0; r < count; ++r) out[r] = {of_row(row + r - begin, 0)[0], of_row(row + r - begin, kSums - 1)[0]};
      return true;
    });
  }

  void inside_runs() const {
    const std::int64_t runs = plan.runs == 0 ? 1 : plan.runs;
    const bool wide = segments_of(args.cols) > kMaxSegments;  // a row's sums do not fit one thread's stack
    for (std::int64_t run = 0; run < runs; ++run) {
      const std::int64_t from = args.rows * run / runs, to = args.rows * (run + 1) / runs;
      for (std::int64_t row = from; row < to; row += plan.chunk) {
        const std::int64_t end = smaller(row + plan.chunk, to);
        if (wide || end - row < plan.parallel.threads) chunk_by_segments(from, to, row, end, sums_of_run(run));
        else chunk_by_rows(from, to, row, end, sums_of_run(run));
      }
    }
  }

  // Runs pairwise in index order, then the cast.
  void finish_parameters(int kind, P* gradient) const {
    if (gradient == nullptr) return;
    const cpu::Parallel serial;
    const bool small = plan.runs * args.cols < kFinishSerial;
    for_ranges(small ? serial : plan.parallel, (args.cols + kColumnTask - 1) / kColumnTask,
               [&](std::int64_t first, std::int64_t last) {
                 const std::int64_t end = smaller(last * kColumnTask, args.cols);
                 for (std::int64_t column = first * kColumnTask; column < end; column += kUnit<A>) {
                   V a[cpu::kMaxRuns], b[cpu::kMaxRuns];
                   for (std::int64_t run = 0; run < plan.runs; ++run) {
                     const Pair<A> of_run = Packed<A>::read(sums_of_run(run) + kind * plan.padded_cols + column).unpack();
                     a[run] = of_run.a;
                     b[run] = of_run.b;
                   }
                   const Pair<A> total = {pairwise(a, plan.runs), pairwise(b, plan.runs)};
                   if (end - column >= kUnit<A>) store<T>(gradient + column, total, Whole{});
                   else store<T>(gradient + column, total, Partial{static_cast<int>(end - column)});
                 }
               });
  }
};

template <class Policy, class T, class P, class G>
void backward_with_types(const RowBackwardArgs& args, const cpu::BackwardPlan& plan) {
  const RowGradient<Policy, T, P, G> gradient{args, plan};
  if (plan.inside_runs) gradient.inside_runs();
  else gradient.run_by_run();
  if (plan.runs == 0) return;
  gradient.finish_parameters(0, static_cast<P*>(args.grad_weight));
  if constexpr (Policy::kCentred) gradient.finish_parameters(1, static_cast<P*>(args.grad_bias));
}

template <class Policy>
void backward(const RowBackwardArgs& args, const cpu::BackwardPlan& plan) {
  visit(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      const bool float_params = args.param_dtype != args.dtype, float_grad = args.grad_output_dtype != args.dtype;
      if (float_params && float_grad) return backward_with_types<Policy, T, float, float>(args, plan);
      if (float_params) return backward_with_types<Policy, T, float, T>(args, plan);
      if (float_grad) return backward_with_types<Policy, T, T, float>(args, plan);
    }
    backward_with_types<Policy, T, T, T>(args, plan);
  });
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
