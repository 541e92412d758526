// Channel norms forward on [batch, spatial, channels] for one instruction set, vectorised over channels.
//
// Statistics: runs of rows of an image give moments per channel; channels of a group and runs are merged together. A run is read,
// some of its rows twice, row by row as it lies in memory (down a column of channels, rows a power of two apart would share a few
// sets of L1), and eight rows at a time so that the accumulators, which are in L1, cost little. Batch norm is one image with groups
// of one channel. The output takes a few rows at a time, for which the channels' scalars are loaded once. It is written in the
// input's layout or, for instance norm, as planes.
// plan.partial: moments [3, batch * pieces, padded]; plan.rows: [batch, 4, padded], hi, lo and rstd of each channel, and of one
// merge_groups(); plan.params: [2, padded], weight and bias. rows and params are in the order of T (packed.h); where threads share
// one image each has its own.
#pragma once

#include "cpu/channel_scalars.inl"
#include "cpu/channel_unit.inl"
#include "cpu/transpose.inl"
#include "cpu/tuning.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

constexpr int kRowsAtOnce = 8;                    // of a run; plan.piece is at most 16 times as many
constexpr std::int64_t kBytesOfTask = 16 * 1024;  // of rows of output that one thread takes at least
constexpr std::int64_t kOutputBlock = 64;         // rows, or half of them and more, and channels, or up to twice as many
static_assert(kOutputBlock % cpu::kMaxUnit == 0 && kOutputBlock / 2 >= cpu::kLeastTransposed);

// Rows that share the scalars of a channel in a pass over all values. From memory two are faster in float32 and wider, and what
// follows is fetched [Zen 4, given statistics, against a row at a time: 32x256x14x14 162 -> 127 us, 8x144x56x56 473 -> 410], as
// long as the scalars leave room in L1 [8x2048x7x7: 139 us against 125 of four rows]. In 16 bits arithmetic counts as much.
constexpr int kSharedRows = 4;
template <class T>
constexpr int kMemoryRows = sizeof(T) == 2 ? kSharedRows : 2;
// In L2 16 bits gain from eight, for which 32 registers are enough [Zen 4, GroupNorm bfloat16: 1x1280x8x8 19.3 -> 18.4 us,
// 2x640x32x32 127 -> 122].
template <class T>
constexpr int kCacheRows = sizeof(T) == 2 && NORMEXT_VECTOR_BYTES == 64 ? 8 : kSharedRows;
constexpr std::int64_t kScalarBytes = 16 * 1024;
template <class T>
NORMEXT_INLINE bool fetches_later_rows(std::int64_t channels) {
  return sizeof(T) == 2 || 5 * channels * static_cast<std::int64_t>(sizeof(Accumulate<T>)) <= kScalarBytes;
}
// Whether a row is taken at a time instead of two: where next to nothing is in the caches, in float32 and wider, on AMD with AVX2
// alone. With AVX-512 it was slower (see kMemoryRows), on Intel not measured.
template <class T>
constexpr bool kKnowsSingleRows = sizeof(T) > 2 && NORMEXT_VECTOR_BYTES == 32;
template <class T>
NORMEXT_INLINE bool takes_single_rows(const ChannelShape& shape) {
  return kKnowsSingleRows<T> && cpu::is_amd() && fetches_later_rows<T>(shape.channels) &&
         shape.elements() * static_cast<std::int64_t>(sizeof(T)) > cpu::kMemoryBytes;
}

// Fetches the lines that follow kRows rows of `channels` values at p, as many as the units at channel c of these rows have.
template <class T, int kRows, int kLocality>
NORMEXT_INLINE void fetch_next_rows(const T* p, std::int64_t channels, std::int64_t c) {
  const T* next = p + kRows * (channels + c);
  for (int r = 0; r < kRows; ++r) fetch_unit<kLocality>(next + r * kUnit<Accumulate<T>>);
}
// Fetches what a pass from memory over all values needs later, read or written, at channel c of kRows rows at p. In 16 bits the
// next rows, as one sequence. Wider ones a page ahead, at most 8 rows, and to L2: the next rows of three tensors would push the
// present ones out of L1, which has 8 ways on Zen 4 [gradients of batch norm, to L1 and like this: 8x512x28x28 1330 -> 1040 us,
// 32x256x14x14 729 -> 638; with given statistics 1142 -> 683, 508 -> 461].
template <class T, int kRows>
NORMEXT_INLINE void fetch_later_rows(const T* p, std::int64_t channels, std::int64_t c) {
  if constexpr (sizeof(T) == 2) {
    fetch_next_rows<T, kRows, 3>(p, channels, c);
  } else {
    const std::int64_t page = smaller(8 * channels, cpu::kPageBytes / static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t distance = page < kRows * channels ? kRows * channels : page;
    for (int r = 0; r < kRows; ++r) fetch_unit<2>(p + distance + r * channels + c);
  }
}

// Rows that one thread takes at least in a pass over all values.
template <class T>
NORMEXT_INLINE std::int64_t rows_of_task(std::int64_t channels) {
  const std::int64_t fit = kBytesOfTask / (channels * static_cast<std::int64_t>(sizeof(T))) / kSharedRows * kSharedRows;
  return fit < kSharedRows ? kSharedRows : fit;
}

// group(row, count) over `rows` rows, kRowsAtOnce at a time; count is known at compile time but for the last.
template <class Group>
NORMEXT_INLINE void for_row_groups(std::int64_t rows, Group group) {
  std::int64_t row = 0;
  for (; rows - row >= kRowsAtOnce; row += kRowsAtOnce) group(row, kRowsAtOnce);
  if (row < rows) group(row, static_cast<int>(rows - row));
}

// out (+)= x for a unit of accumulators in memory.
template <class A>
NORMEXT_INLINE void accumulate(A* out, Pair<A> x, bool add) {
  Packed<A>::pack(add ? Packed<A>::read(out).unpack() + x : x).write(out);
}
// Sums of the deviations of `rows` rows from `shift`, and of their squares. The next run is fetched meanwhile: this one is in the
// caches, but for a thread's first, and memory would be idle [from memory up to 20 % less time for a forward and more for a
// backward; where all is in L2 anyway, up to 3 % more].
template <class T>
NORMEXT_INLINE void run_deviations(const T* x, std::int64_t rows, std::int64_t channels, Columns columns,
                                   const Accumulate<T>* shift, Accumulate<T>* sum, Accumulate<T>* square_sum) {
  using A = Accumulate<T>;
  for_row_groups(rows, [&](std::int64_t row, int count) __attribute__((always_inline)) {
    for_units<A>(columns.begin, columns.end, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      const T* p = x + row * channels + c;
      const Pair<A> m = Packed<A>::read(shift + c).unpack();
      Pair<A> d = {}, square = {};
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        fetch_unit<2>(p + (rows + r) * channels);
        const Pair<A> v = load<T>(p + r * channels, extent);
        const Pair<A> e = {v.a - m.a, v.b - m.b};
        d = d + e;
        square = {fma(e.a, e.a, square.a), fma(e.b, e.b, square.b)};
      }
      accumulate(sum + c, d, row > 0);
      accumulate(square_sum + c, square, row > 0);
    });
  });
}
template <class T>
__attribute__((noinline)) void run_deviations_again(const T* x, std::int64_t rows, std::int64_t channels, Columns columns,
                                                    const Accumulate<T>* shift, Accumulate<T>* sum, Accumulate<T>* square_sum) {
  run_deviations(x, rows, channels, columns, shift, sum, square_sum);
}

// Moments of some channels of `rows` rows; the three arrays are accumulators until the end. A channel is shifted by the mean of
// kSampledRows rows, a power of two so that equal values have it exactly, spread evenly, since neighbours are alike; in short runs
// by that of all. Where this was not near the mean of one channel, its unit of channels is read once more.
constexpr int kSampledRows = 16;
constexpr std::int64_t kLeastSampledRows = 48;
constexpr int kRunSlack = 2;  // [128 rows of random numbers miss it in one of 400 channels, 4 in one of 30]
static_assert(kSampledRows % kRowsAtOnce == 0 && kSampledRows <= kLeastSampledRows);
template <class T>
__attribute__((noinline)) void run_moments(const T* x, std::int64_t rows, std::int64_t channels, Columns columns,
                                           Accumulate<T>* mean, Accumulate<T>* correction, Accumulate<T>* m2) {
  using A = Accumulate<T>;
  using V = Vector<A>;
  const bool sampled = rows >= kLeastSampledRows;
  const auto row_of = [&](std::int64_t r) { return sampled ? r * rows / kSampledRows : r; };
  const std::int64_t of_shift = sampled ? kSampledRows : rows;
  for_row_groups(of_shift, [&](std::int64_t row, int count) __attribute__((always_inline)) {
    const T* p[kRowsAtOnce] = {};
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) p[r] = x + row_of(row + r) * channels;
    for_units<A>(columns.begin, columns.end, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      Pair<A> sum[2] = {};  // of four equal values, in sequence, they are exact
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) sum[r % 2] = sum[r % 2] + load<T>(p[r] + c, extent);
      accumulate(mean + c, sum[0] + sum[1], row > 0);
    });
  });
  const V n = V{} + static_cast<A>(rows), n_shift = V{} + static_cast<A>(of_shift);
  for (std::int64_t c = columns.begin; c < columns.end; c += kUnit<A>) {
    const Pair<A> sum = Packed<A>::read(mean + c).unpack();
    Packed<A>::pack({sum.a / n_shift, sum.b / n_shift}).write(mean + c);
  }
  run_deviations(x, rows, channels, columns, mean, correction, m2);
  for (std::int64_t c = columns.begin; c < columns.end; c += kUnit<A>) {
    const auto moments_of = [&](int half) __attribute__((always_inline)) {
      const std::int64_t lanes = c + half * kLanes<A>;
      return moments(load_bytes<V>(mean + lanes), load_bytes<V>(correction + lanes), load_bytes<V>(m2 + lanes), n);
    };
    Moments<V> a = moments_of(0), b = moments_of(1);
    if (sampled && __builtin_expect(!(all_near<A>(a, n, kRunSlack) && all_near<A>(b, n, kRunSlack)), 0)) {
      const auto nearer = [&](const Moments<V>& s) { return near_mean(s, n, kRunSlack) ? s.mean : recentred(s); };
      Packed<A>::pack({nearer(a), nearer(b)}).write(mean + c);
      run_deviations_again(x, rows, channels, {c, smaller(c + kUnit<A>, columns.end)}, mean, correction, m2);
      a = moments_of(0);
      b = moments_of(1);
    }
    a = at_mean(a);
    b = at_mean(b);
    store<T>(mean + c, {a.mean, b.mean}, Whole{});
    store<T>(correction + c, {a.correction, b.correction}, Whole{});
    store<T>(m2 + c, {a.m2, b.m2}, Whole{});
  }
}

template <class T, bool kFused>
struct LastForward {
  using A = Accumulate<T>;
  using V = Vector<A>;

  const ChannelForwardArgs& args;
  const cpu::ChannelPlan& plan;
  const ChannelShape& shape = args.shape;
  const std::int64_t channels = shape.channels;
  const Columns all = {0, channels};

  NORMEXT_INLINE A* rows_of(std::int64_t image) const {
    return static_cast<A*>(plan.rows) + image * cpu::kForwardRows * plan.padded;
  }

  NORMEXT_INLINE Segments<A> segments(std::int64_t image) const {
    return {static_cast<const A*>(plan.partial) + image * plan.pieces * plan.padded,
            shape.batch * plan.pieces * plan.padded,
            plan.padded,
            plan.pieces,
            plan.piece,
            plan.pieces,
            shape.spatial - (plan.pieces - 1) * plan.piece};
  }

  // Runs [begin, end) of all images, some channels.
  void statistics(std::int64_t begin, std::int64_t end, Columns columns) const {
    const std::int64_t table = shape.batch * plan.pieces * plan.padded;
    for (; begin < end; ++begin) {
      const std::int64_t image = begin / plan.pieces, from = begin % plan.pieces * plan.piece;
      A* out = static_cast<A*>(plan.partial) + begin * plan.padded;
      run_moments(static_cast<const T*>(args.input) + (image * shape.spatial + from) * channels,
                  smaller(plan.piece, shape.spatial - from), channels, columns, out, out + table, out + 2 * table);
    }
  }

  // Groups [begin, end) of several channels. The image's place in plan.rows holds what a merge needs per channel: sums of the
  // channel or its share of the offsets, the centre of its group, and its share of M2.
  __attribute__((noinline)) void merge_groups(std::int64_t image, std::int64_t begin, std::int64_t end) const {
    const std::int64_t group = shape.group_channels();
    const Segments<A> found = segments(image);
    const SlabSink<A> sink(args);
    A* sums = rows_of(image);
    A* hi = sums + plan.padded;
    A* lo = hi + plan.padded;
    A* squares = lo + plan.padded;
    for (std::int64_t g = begin; g < end; ++g) fill(hi + g * group, group, found.mean[g * group]);
    const auto sum_of = [&](const A* of_group) {
      return sum_values<A>(
          group, [&](std::int64_t c, auto extent) __attribute__((always_inline)) { return load<A>(of_group + c, extent); });
    };
    for_units<A>(begin * group, end * group, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      store<A>(sums + c, found.sum_means(c, extent, load<A>(hi + c, extent)), extent);
    });
    for (std::int64_t first = begin * group; first < end * group; first += group) {
      const Centre<A> centre = centre_at(hi[first], sum_of(sums + first) / sink.n);
      fill(hi + first, group, centre.hi);
      fill(lo + first, group, centre.lo);
    }
    for_units<A>(begin * group, end * group, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      const Pair<A> h = load<A>(hi + c, extent), l = load<A>(lo + c, extent);
      const auto about = found.sum_about(c, extent, {{h.a, l.a}, {h.b, l.b}});
      store<A>(sums + c, about.offsets, extent);
      store<A>(squares + c, about.squares, extent);
    });
    for (std::int64_t g = begin; g < end; ++g) {
      const std::int64_t first = g * group;
      sink.write(image * shape.groups + g, {hi[first], lo[first]}, sum_of(sums + first) / sink.n, sum_of(squares + first));
    }
  }
  // Groups [begin, end).
  void merge(std::int64_t image, std::int64_t begin, std::int64_t end) const {
    if (shape.group_channels() > 1) merge_groups(image, begin, end);
    else merge_columns(segments(image), SlabSink<A>(args), image * shape.groups, begin, end);
  }

  // Values of channel c and what follows, of kRows rows: x and residual are in the input's rows, y in rows of y_stride values.
  template <int kRows, class Extent>
  NORMEXT_INLINE void apply_unit(const T* x, const T* residual, T* y, std::int64_t y_stride, const A* rows, std::int64_t c,
                                 Extent extent) const {
    const ChannelRows<A> row(rows, plan.padded, c);
    const A* params = static_cast<const A*>(plan.params) + c;
    const Pair<A> w = Packed<A>::read(params).unpack(), b = Packed<A>::read(params + plan.padded).unpack();
    output_units<T, kFused, kRows>(args.activation, x, residual, channels, y, y_stride, {{row.a, row.b}, w, b}, extent);
  }

  // Rows [begin, end) of all images, some channels.
  template <int kMost, bool kFetch>
  __attribute__((noinline)) void apply(std::int64_t begin, std::int64_t end, Columns columns) const {
    while (begin < end) {
      const A* rows = rows_of(begin / shape.spatial);
      const std::int64_t stop = smaller(end, (begin / shape.spatial + 1) * shape.spatial);
      const auto take = [&](auto how_many, auto fetch) __attribute__((always_inline)) {
        constexpr int kRows = decltype(how_many)::value;
        for (; stop - begin >= kRows; begin += kRows) {
          const T* x = static_cast<const T*>(args.input) + begin * channels;
          const T* residual = at(static_cast<const T*>(args.residual), begin * channels);
          T* y = static_cast<T*>(args.output) + begin * channels;
          for_units<A>(columns.begin, columns.end, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
            if constexpr (decltype(fetch)::value) {
              fetch_later_rows<T, kRows>(x, channels, c);
              fetch_later_rows<T, kRows>(y, channels, c);
              if (kFused && residual != nullptr) fetch_later_rows<T, kRows>(residual, channels, c);
            }
            apply_unit<kRows>(x + c, at(residual, c), y + c, channels, rows, c, extent);
          });
        }
      };
      take(std::integral_constant<int, kMost>(), std::bool_constant<kFetch>());
      if constexpr (kMost > 1) take(std::integral_constant<int, 1>(), std::false_type());
    }
  }

  // Output as planes, blocks [begin, end) of all images: normalised into a buffer, which is in L1 or not far, and transposed from
  // there.
  __attribute__((noinline)) void apply_transposed(std::int64_t begin, std::int64_t end) const {
    using Element =
        std::conditional_t<sizeof(T) == 2, std::uint16_t, std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;
    alignas(NORMEXT_VECTOR_BYTES) T buffer[kOutputBlock * 2 * kOutputBlock];
    const std::int64_t row_blocks = transpose_row_blocks(), column_blocks = transpose_column_blocks();
    for (; begin < end; ++begin) {
      const std::int64_t b = begin % row_blocks, column = begin / row_blocks % column_blocks;
      const std::int64_t image = begin / row_blocks / column_blocks;
      const std::int64_t first = b * shape.spatial / row_blocks, count = (b + 1) * shape.spatial / row_blocks - first;
      const std::int64_t c0 = column * kOutputBlock, width = (column + 1 < column_blocks ? c0 + kOutputBlock : channels) - c0;
      const T* x = static_cast<const T*>(args.input) + (image * shape.spatial + first) * channels;
      std::int64_t row = 0;
      const auto take = [&](auto how_many) __attribute__((always_inline)) {
        constexpr int kRows = decltype(how_many)::value;
        for (; count - row >= kRows; row += kRows) {
          for_units<A>(c0, c0 + width, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
            apply_unit<kRows>(x + row * channels + c, nullptr, buffer + row * width + (c - c0), width, rows_of(image), c, extent);
          });
        }
      };
      take(std::integral_constant<int, kSharedRows>());
      take(std::integral_constant<int, 1>());
      T* y = static_cast<T*>(args.output) + (image * channels + c0) * shape.spatial + first;
      Transposition<Element>{reinterpret_cast<const Element*>(buffer), reinterpret_cast<Element*>(y), shape.spatial, width}.block(
          0, count, 0, width);
    }
  }
  // Blocks of rows are as equal as can be, so never smaller than half; the last of channels has what is left.
  NORMEXT_INLINE std::int64_t transpose_row_blocks() const { return (shape.spatial + kOutputBlock - 1) / kOutputBlock; }
  NORMEXT_INLINE std::int64_t transpose_column_blocks() const { return channels < kOutputBlock ? 1 : channels / kOutputBlock; }
  void transposed_images(std::int64_t begin, std::int64_t end) const {
    const std::int64_t blocks = transpose_row_blocks() * transpose_column_blocks();
    apply_transposed(begin * blocks, end * blocks);
  }

  void resident_images(std::int64_t begin, std::int64_t end) const {
    const std::int64_t group = shape.group_channels();
    for (std::int64_t image = begin; image < end; ++image) {
      for (Columns columns = {0, 0}; columns.begin < channels; columns.begin = columns.end) {
        columns.end = smaller(columns.begin + plan.columns, channels);
        statistics(image * plan.pieces, (image + 1) * plan.pieces, columns);
        merge(image, columns.begin / group, columns.end / group);
        if (args.output == nullptr) continue;
        prepare_rows<T>(args, image, rows_of(image), plan.padded, columns);
        if (args.planes_output) transposed_images(image, image + 1);  // of all columns: there is one block then
        else apply<kCacheRows<T>, false>(image * shape.spatial, (image + 1) * shape.spatial, columns);
      }
    }
  }

  // Scalars of all channels of all images.
  void prepare_all() const {
    prepare_params<T>(args, static_cast<A*>(plan.params), plan.padded);
    for (std::int64_t image = 0; image < shape.batch; ++image) prepare_rows<T>(args, image, rows_of(image), plan.padded, all);
  }
  // Output of tasks [begin, end), as one thread takes them.
  void output(std::int64_t begin, std::int64_t end) const {
    const std::int64_t rows = shape.batch * shape.spatial, task = rows_of_task<T>(channels);
    const bool from_memory = comes_from_memory<T>(shape) && fetches_later_rows<T>(channels), single = takes_single_rows<T>(shape);
    const auto take = [&](std::int64_t first, std::int64_t last) {
      const std::int64_t from = first * task, to = smaller(last * task, rows);
      if constexpr (kKnowsSingleRows<T>) {
        if (single) return apply<1, true>(from, to, all);
      }
      if (from_memory) apply<kMemoryRows<T>, true>(from, to, all);
      else apply<kSharedRows, false>(from, to, all);
    };
    if (args.given_stats) take(begin, end);
    else in_reverse(begin, end, take);
  }
  std::int64_t output_tasks() const {
    const std::int64_t task = rows_of_task<T>(channels);
    return (shape.batch * shape.spatial + task - 1) / task;
  }

  void run() const {
    if (!args.given_stats) {
      if (plan.resident) {
        if (args.output != nullptr) prepare_params<T>(args, static_cast<A*>(plan.params), plan.padded);
        return for_ranges(plan.parallel, shape.batch, [&](std::int64_t begin, std::int64_t end) { resident_images(begin, end); });
      }
      for_ranges(plan.parallel, shape.batch * plan.pieces,
                 [&](std::int64_t begin, std::int64_t end) { statistics(begin, end, all); });
      const std::int64_t group = shape.group_channels();
      for (std::int64_t image = 0; image < shape.batch; ++image) {
        // Columns of a task are multiples of kColumnsOfTask: groups begin in the task where they have their first channel.
        for_columns(plan.parallel, channels, channels * plan.pieces, [&](std::int64_t begin, std::int64_t end) {
          const std::int64_t first = (begin + group - 1) / group, last = (end + group - 1) / group;
          if (first < last) merge(image, first, last);
        });
      }
    }
    if (args.output == nullptr) return;
    const bool own = !args.planes_output && wants_own_scalars(plan, shape.batch);
    if (!own) prepare_all();
    if (args.planes_output) {
      return for_ranges(plan.parallel, shape.batch * transpose_row_blocks() * transpose_column_blocks(),
                        [&](std::int64_t begin, std::int64_t end) { apply_transposed(begin, end); });
    }
    for_ranges_with_scalars<A, cpu::kForwardRows, 2>(
        *this, own, output_tasks(), [](const LastForward& self) { self.prepare_all(); },
        [](const LastForward& self, std::int64_t begin, std::int64_t end) { self.output(begin, end); });
  }
};

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
