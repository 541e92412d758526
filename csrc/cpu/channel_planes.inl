// Channel norms forward on [batch, channels, spatial] for one instruction set.
//
// Statistics see lines: contiguous values of one slab. A group is one line; a channel of a batch norm has one in each image, or all
// its values count as one where planes are short (channel_short.inl). Lines are cut into segments; short lines are taken several at
// a time, as rows are in row_moments.inl. The output sees planes, each with its own scalars, and may be cut anywhere.
// plan.partial: moments [3, images * pieces, padded columns], a column for each slab.
#pragma once

#include "cpu/channel_short.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

constexpr std::int64_t kBatchOfLines = 16384;  // bytes; in 16 bits 32 KB take 0.5 % longer

// Moments of `count` <= kMaxBatch lines of n <= kSegment values, one after the other. What follows is fetched meanwhile, and so is
// `output`, where these lines will be written, or null.
template <class T>
__attribute__((noinline)) void line_moments(const T* x, std::int64_t n, int count, Accumulate<T>* mean, Accumulate<T>* correction,
                                            Accumulate<T>* m2, const T* output) {
  using A = Accumulate<T>;
  const auto source_of = [&](int r) { return RowSource<T, false>(x + r * n); };
  const auto next_of = [&](int r) {
    RowPrefetch<T, T, false, 1> next = {};
    next.source.input = {x + (r + count) * n};
    next.output = {at(output, r * n)};
    return next;
  };
  BatchMoments<A> lines;
  shifted_moments_of_rows<T>(count, n, source_of, next_of, lines);
  for (int r = 0; r < count; ++r) {
    mean[r] = lines.of[0][r];
    correction[r] = lines.of[1][r];
    m2[r] = lines.of[2][r];
  }
}

template <class T, bool kFused>
struct PlanesForward {
  using A = Accumulate<T>;
  using V = Vector<A>;

  const ChannelForwardArgs& args;
  const cpu::ChannelPlan& plan;
  const ChannelShape& shape = args.shape;
  const std::int64_t images = shape.batch_norm() && plan.images == 0 ? shape.batch : 1;
  const std::int64_t columns = shape.slabs();
  // Short planes: those of a channel.
  const std::int64_t line = plan.images != 0     ? shape.batch * shape.spatial
                            : shape.batch_norm() ? shape.spatial
                                                 : shape.group_channels() * shape.spatial;

  NORMEXT_INLINE Segments<A> segments() const {
    const std::int64_t count = images * plan.pieces;
    return {static_cast<const A*>(plan.partial),  count * plan.padded, plan.padded, count, plan.piece, plan.pieces,
            line - (plan.pieces - 1) * plan.piece};
  }

  // Segments [begin, end), in the order of memory.
  void statistics(std::int64_t begin, std::int64_t end) const {
    A* mean = static_cast<A*>(plan.partial);
    const std::int64_t table = images * plan.pieces * plan.padded;
    const std::int64_t fit = kBatchOfLines / (plan.piece * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t most = plan.pieces > 1 || fit < 1 ? 1 : smaller(fit, kMaxBatch);
    while (begin < end) {
      const std::int64_t of_line = begin / plan.pieces, piece = begin % plan.pieces;
      const std::int64_t image = of_line / columns, column = of_line % columns;
      const std::int64_t count = smaller(most, smaller(end - begin, columns - column));
      const std::int64_t from = piece * plan.piece;
      A* out = mean + (image * plan.pieces + piece) * plan.padded + column;
      line_moments(static_cast<const T*>(args.input) + of_line * line + from, smaller(plan.piece, line - from),
                   static_cast<int>(count), out, out + table, out + 2 * table,
                   plan.fetch_output ? static_cast<const T*>(args.output) + of_line * line + from : nullptr);
      begin += count;
    }
  }

  // Output values [begin, end) of groups of short planes.
  __attribute__((noinline)) void apply_groups(std::int64_t begin, std::int64_t end) const {
    const Parameter<T> weight = weight_of<T>(args), bias = bias_of<T>(args);
    for_parts_of_groups<T>(
        shape, begin, end,
        [&](const ShortBlock<T>& block, std::int64_t slab, std::int64_t first, std::int64_t from, std::int64_t stop)
            __attribute__((always_inline)) {
              ShortColumns<A> w, b;
              block.spread(w, [&](std::int64_t c) { return weight[c]; });
              block.spread(b, [&](std::int64_t c) { return bias[c]; });
              const CentredRow<A> row = slab_of<T>(args, slab);
              const T* x = static_cast<const T*>(args.input) + from;
              T* y = static_cast<T*>(args.output) + from;
              for_output_units<A>(0, stop - from, [&](std::int64_t i, auto extent) __attribute__((always_inline)) {
                const std::int64_t column = from - first + i;
                const auto affine = affine_of_slab<A>(row, load<T>(w.of + column, extent), load<T>(b.of + column, extent));
                output_units<T, kFused, 1>(args.activation, x + i, nullptr, 0, y + i, 0, affine, extent);
              });
            });
  }

  // Output values [begin, end).
  __attribute__((noinline)) void apply(std::int64_t begin, std::int64_t end) const {
    if constexpr (kKnowsShortPlanes<T>) {
      if (groups_of_short_planes(shape)) return apply_groups(begin, end);
    }
    const Parameter<T> weight = weight_of<T>(args), bias = bias_of<T>(args);
    // Given statistics and no activation, wider types wait for memory alone, which is faster a unit at a time [Zen 4, us:
    // 8x64x112x112 939 -> 841, 8x256x56x56 1324 -> 1253; after statistics up to 4 % slower, with an activation up to 10 %].
    const bool single = args.given_stats && !kFused && sizeof(T) > 2;
    PlaneCursor at_plane(shape, begin / shape.spatial);
    std::int64_t offset = begin % shape.spatial;
    for (; begin < end; at_plane.next(), offset = 0) {
      const std::int64_t n = smaller(shape.spatial - offset, end - begin);
      const auto affine = affine_of_slab<A>(slab_of<T>(args, at_plane.slab), both<A>(V{} + weight[at_plane.channel]),
                                            both<A>(V{} + bias[at_plane.channel]));
      const T* x = static_cast<const T*>(args.input) + begin;
      const T* residual = at(static_cast<const T*>(args.residual), begin);
      T* y = static_cast<T*>(args.output) + begin;
      std::int64_t i = 0;
      for (; !single && n - i >= 2 * kUnit<A>; i += 2 * kUnit<A>) {
        output_units<T, kFused, 2>(args.activation, x + i, at(residual, i), kUnit<A>, y + i, kUnit<A>, affine, Whole{});
      }
      for_output_units<A>(i, n, [&](std::int64_t u, auto extent) __attribute__((always_inline)) {
        output_units<T, kFused, 1>(args.activation, x + u, at(residual, u), 0, y + u, 0, affine, extent);
      });
      begin += n;
    }
  }

  // Everything for columns [begin, end), a block at a time.
  void resident_columns(std::int64_t begin, std::int64_t end) const {
    const std::int64_t fit = kBlockBytes / (images * line * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t block = fit < 1 ? 1 : smaller(fit, cpu::kBlockColumns);
    for (std::int64_t column = begin; column < end; column += block) {
      const std::int64_t last = smaller(column + block, end);
      for (std::int64_t image = 0; image < images; ++image) {
        statistics((image * columns + column) * plan.pieces, (image * columns + last) * plan.pieces);
      }
      merge_columns(segments(), SlabSink<A>(args), 0, column, last);
      for (std::int64_t image = 0; args.output != nullptr && image < images; ++image) {
        apply((image * columns + column) * line, (image * columns + last) * line);
      }
    }
  }

  // Moments of segment `piece` of the channels of a block.
  __attribute__((noinline)) void short_moments(const ShortBlock<T>& block, std::int64_t piece) const {
    const std::int64_t begin = piece * plan.images, end = smaller(begin + plan.images, shape.batch);
    const T* x = static_cast<const T*>(args.input);
    alignas(V) A sums[3][kMostShortChannels<A>];
    ShortColumns<A> over_images[1], centre, deviations[2];
    block.template add_images<1>(begin, end, over_images,
                                 [&](std::int64_t i, std::int64_t, auto extent, Sums<A, 1>& s)
                                     __attribute__((always_inline)) { s.of[0] = s.of[0] + load<T>(x + i, extent); });
    block.add_positions(over_images[0], sums[0]);
    const V size = V{} + static_cast<A>((end - begin) * shape.spatial);
    for (std::int64_t c = 0; c < block.channels; c += kLanes<A>) store_bytes(sums[0] + c, load_bytes<V>(sums[0] + c) / size);
    block.spread(centre, [&](std::int64_t c) { return sums[0][c - block.first]; });
    block.template add_images<2>(begin, end, deviations,
                                 [&](std::int64_t i, std::int64_t column, auto extent, Sums<A, 2>& s)
                                     __attribute__((always_inline)) {
                                       const Pair<A> v = load<T>(x + i, extent), m = load<T>(centre.of + column, extent);
                                       const Pair<A> d = {v.a - m.a, v.b - m.b};
                                       s.of[0] = s.of[0] + d;
                                       s.of[1] = {fma(d.a, d.a, s.of[1].a), fma(d.b, d.b, s.of[1].b)};
                                     });
    for (int q = 0; q < 2; ++q) block.add_positions(deviations[q], sums[1 + q]);
    A* out = static_cast<A*>(plan.partial) + piece * plan.padded + block.first;
    for_units<A>(0, block.channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      const Pair<A> m = load<A>(sums[0] + c, extent), d = load<A>(sums[1] + c, extent), d2 = load<A>(sums[2] + c, extent);
      const Moments<V> a = moments(m.a, d.a, d2.a, size), b = moments(m.b, d.b, d2.b, size);
      store<A>(out + c, {a.mean, b.mean}, extent);
      store<A>(out + plan.pieces * plan.padded + c, {a.correction, b.correction}, extent);
      store<A>(out + 2 * plan.pieces * plan.padded + c, {a.m2, b.m2}, extent);
    });
  }

  // kImages images from `image` on.
  template <int kImages>
  NORMEXT_INLINE void short_output(const ShortBlock<T>& block, const ShortColumns<A> (&scalars)[kAffineScalars],
                                   std::int64_t image) const {
    const T* x = static_cast<const T*>(args.input) + block.offset(image);
    const T* residual = at(static_cast<const T*>(args.residual), block.offset(image));
    T* y = static_cast<T*>(args.output) + block.offset(image);
    for_units<A>(0, block.columns(), [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
      output_units<T, kFused, kImages>(args.activation, x + column, at(residual, column), block.image_stride(), y + column,
                                       block.image_stride(), affine_of_columns<T, true>(scalars, column), extent);
    });
  }
  // Output of a block in images [begin, end).
  __attribute__((noinline)) void short_outputs(const ShortBlock<T>& block, std::int64_t begin, std::int64_t end) const {
    const Parameter<T> weight = weight_of<T>(args), bias = bias_of<T>(args);
    const A* stats = static_cast<const A*>(args.stats);
    ShortColumns<A> scalars[kAffineScalars];
    for (int k = kOfHi; k <= kOfRstd; ++k)
      block.spread_in_order(scalars[k], [&](std::int64_t c) { return stats[k * columns + c]; });
    block.spread_in_order(scalars[kOfWeight], [&](std::int64_t c) { return weight[c]; });
    block.spread_in_order(scalars[kOfBias], [&](std::int64_t c) { return bias[c]; });
    std::int64_t image = begin;
    constexpr int shared = kSharedImages<kFused>;
    for (; end - image >= shared; image += shared) short_output<shared>(block, scalars, image);
    for (; shared > 1 && image < end; ++image) short_output<1>(block, scalars, image);
  }
  // body(block) over channels [begin, end), at most `most` to a block.
  template <class Body>
  NORMEXT_INLINE void for_short_blocks(std::int64_t begin, std::int64_t end, std::int64_t most, Body body) const {
    for (std::int64_t c = begin; c < end; c += most) body(ShortBlock<T>{shape, c, smaller(most, end - c)});
  }
  void run_short() const {
    if (args.given_stats) {
      if (args.output == nullptr) return;
      const std::int64_t most = ShortBlock<T>::most_channels(shape);
      const auto outputs = [&](std::int64_t c0, std::int64_t c1, std::int64_t begin, std::int64_t end) {
        for_short_blocks(c0, c1, most, [&](const ShortBlock<T>& block) { short_outputs(block, begin, end); });
      };
      // Images are shared, as what made the input and what reads the output will have done, unless they are too few.
      if (shape.batch >= kSharedImages<false> * plan.parallel.threads) {
        for_ranges(plan.parallel, shape.batch, [&](std::int64_t begin, std::int64_t end) { outputs(0, columns, begin, end); });
      } else {
        for_ranges(plan.parallel, columns, [&](std::int64_t begin, std::int64_t end) { outputs(begin, end, 0, shape.batch); });
      }
      return;
    }
    for_ranges(plan.parallel, columns, [&](std::int64_t begin, std::int64_t end) {
      for_short_blocks(begin, end, ShortBlock<T>::channels_of(shape, 1), [&](const ShortBlock<T>& block) {
        for (std::int64_t piece = 0; piece < plan.pieces; ++piece) short_moments(block, piece);
        merge_columns(segments(), SlabSink<A>(args), 0, block.first, block.first + block.channels);
        if (args.output != nullptr) short_outputs(block, 0, shape.batch);
      });
    });
  }

  void run() const {
    if constexpr (kKnowsShortPlanes<T>) {
      if (plan.images != 0) return run_short();
    }
    if (!args.given_stats) {
      if (plan.resident) {
        return for_ranges(plan.parallel, columns, [&](std::int64_t begin, std::int64_t end) { resident_columns(begin, end); });
      }
      for_ranges(plan.parallel, images * columns * plan.pieces,
                 [&](std::int64_t begin, std::int64_t end) { statistics(begin, end); });
      for_columns(plan.parallel, columns, columns * images * plan.pieces,
                  [&](std::int64_t begin, std::int64_t end) { merge_columns(segments(), SlabSink<A>(args), 0, begin, end); });
    }
    if (args.output == nullptr) return;
    const std::int64_t values = shape.elements(), tasks = (values + kValuesOfTask - 1) / kValuesOfTask;
    const auto output = [&](std::int64_t begin, std::int64_t end) {
      apply(begin * kValuesOfTask, smaller(end * kValuesOfTask, values));
    };
    if (args.given_stats) for_ranges(plan.parallel, tasks, output);
    else for_ranges_again(plan.parallel, tasks, output);
  }
};

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
