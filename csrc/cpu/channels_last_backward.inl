// Channel norms backward on [batch, spatial, channels] for one instruction set, vectorised over channels.
//
// Runs of rows give sum(dz) and sum(dz*xhat) per channel; runs are added per image, then images for the parameter gradients, and
// channels of a group for its means. dx and dz are formed from the input once more, or dx from dz (plan.kept), a few rows at a
// time. With fixed statistics they are formed in the first pass. plan.partial: sums [2, batch * pieces, padded]; plan.merged: the
// same of whole images; plan.rows: [batch, 5, padded], hi, lo, rstd and the means of g and g*xhat of each channel; plan.params: [4,
// padded], weight, bias, sums over all images. rows, weight and bias are in the order of T (packed.h).
#pragma once

#include "cpu/channels_last.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// Rows that share the scalars of a channel. From memory two are faster than four, which are too many sequences of lines, and than
// one, which loads too many scalars [Zen 4, forward+backward: 9 % less time than with four in float32, 4 % in bfloat16].
constexpr int kGradientRows = 2;  // or one, where AVX2 is all there is: takes_single_rows()
// Rows up to this are fetched to L1 for the pass that sums, longer ones to L2: they would push each other out, L1 of Zen 4 having 8
// ways [8x512x28x28: 2022 -> 1871 us; 8x64x56x56, whose rows these are, would take 5 % more]. Nothing between was measured.
constexpr std::int64_t kShortRowBytes = 256;

// Dz: grad_output is dz that was kept.
template <class T, bool kFused, class Dz = T>
struct LastBackward {
  using A = Accumulate<T>;

  const ChannelBackwardArgs& args;
  const cpu::ChannelPlan& plan;
  const ChannelShape& shape = args.shape;
  const std::int64_t channels = shape.channels;
  const Columns all = {0, channels};
  const std::int64_t padded = plan.padded;
  const bool second_pass = wants_second_pass(args), single_rows = takes_single_rows<T>(shape);
  const T* const input = static_cast<const T*>(args.input);
  const Dz* const grad_output = static_cast<const Dz*>(args.grad_output);
  const T* const residual = static_cast<const T*>(args.residual);
  A* const image_sums = static_cast<A*>(plan.merged);
  A* const params = static_cast<A*>(plan.params);
  A* const totals = params + 2 * padded;

  NORMEXT_INLINE A* rows_of(std::int64_t image) const { return static_cast<A*>(plan.rows) + image * 5 * padded; }

  NORMEXT_INLINE UnitAffine<A> affine_of_channels(const A* rows, std::int64_t c) const {
    const ChannelRows<A> row(rows, padded, c);
    return {{row.a, row.b}, Packed<A>::read(params + c).unpack(), Packed<A>::read(params + padded + c).unpack()};
  }

  // dx and dz of `count` rows from value `first` on, which need no sums, before these are taken: so they are written in sequence,
  // and the input of this group or later ones is fetched meanwhile. With an activation, dz is formed once, in the pass that sums.
  // [Zen 4, float32, fixed statistics: 32x256x14x14 816 -> 620 us, 8x64x56x56 675 -> 590 us]
  NORMEXT_INLINE void values_before_sums(std::int64_t first, int count, const A* rows) const {
    const auto take = [&](int row, auto how_many) __attribute__((always_inline)) {
      constexpr int kRows = decltype(how_many)::value;
      for_units<A>(0, channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
        const std::int64_t i = first + row * channels;
        fetch_later_rows<T, kRows>(input + i, channels, c);
        value_units<true, kRows>(i, rows, c, extent);
      });
    };
    int row = 0;
    for (; !single_rows && count - row >= kGradientRows; row += kGradientRows)
      take(row, std::integral_constant<int, kGradientRows>());
    for (; row < count; ++row) take(row, std::integral_constant<int, 1>());
  }

  // Fetches what the sums read, and with kValues write, for the group of rows that follows the one at value `first`.
  template <bool kValues, int kLocality>
  NORMEXT_INLINE void fetch_next_group(std::int64_t first, std::int64_t c) const {
    fetch_next_rows<Dz, kRowsAtOnce, kLocality>(grad_output + first, channels, c);
    fetch_next_rows<T, kRowsAtOnce, kLocality>(input + first, channels, c);
    if (kValues && args.grad_input != nullptr) {
      fetch_next_rows<T, kRowsAtOnce, kLocality>(static_cast<const T*>(args.grad_input) + first, channels, c);
    }
  }

  // Sums of runs [begin, end) of all images; with kValues dx and dz, too, which need no sums then; with kKeep dz to plan.kept.
  template <bool kValues, bool kKeep = false>
  __attribute__((noinline)) void sums(std::int64_t begin, std::int64_t end) const {
    const std::int64_t table = shape.batch * plan.pieces * padded;
    const bool fit_l1 = channels * static_cast<std::int64_t>(sizeof(T)) <= kShortRowBytes;
    for (; begin < end; ++begin) {
      const std::int64_t image = begin / plan.pieces, from = begin % plan.pieces * plan.piece;
      const std::int64_t first = (image * shape.spatial + from) * channels;
      A* out = static_cast<A*>(plan.partial) + begin * padded;
      for_row_groups(smaller(plan.piece, shape.spatial - from), [&](std::int64_t row, int count) __attribute__((always_inline)) {
        constexpr bool kApart = kValues && !kFused;
        if constexpr (kApart) values_before_sums(first + row * channels, count, rows_of(image));
        for_units<A>(0, channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
          const UnitAffine<A> affine = affine_of_channels(rows_of(image), c);
          Pair<A> sum = {}, sum_x = {};
          if constexpr (!kApart) {
            if (fit_l1) fetch_next_group<kValues, 3>(first + row * channels, c);
            else fetch_next_group<kValues, 2>(first + row * channels, c);
          }
          for (int r = 0; r < count; ++r) {
            const std::int64_t i = first + (row + r) * channels + c;
            Pair<A> xhat[1] = {load<T>(input + i, extent)}, dz[1] = {load<T>(grad_output + i, extent)};
            const T* const extra[1] = {at(residual, i)};
            backward_units<T, kFused>(args.activation, extra, affine, xhat, dz, extent);
            if constexpr (kValues && !kApart) {
              store_gradients<T, true>(args, i, affine, dz[0], xhat[0], Pair<A>{}, Pair<A>{}, extent);
            }
            if constexpr (kKeep) store<T>(static_cast<KeptDz<T>*>(plan.kept) + i, dz[0], extent);
            sum = sum + dz[0];
            sum_x = {fma(dz[0].a, xhat[0].a, sum_x.a), fma(dz[0].b, xhat[0].b, sum_x.b)};
          }
          if (row > 0) {
            sum = Packed<A>::read(out + c).unpack() + sum;
            sum_x = Packed<A>::read(out + table + c).unpack() + sum_x;
          }
          Packed<A>::pack(sum).write(out + c);
          Packed<A>::pack(sum_x).write(out + table + c);
        });
      });
      if constexpr (Packed<T>::kEvenOdd) {
        for (std::int64_t c = 0; c < channels; c += kUnit<A>) {
          store<T>(out + c, Packed<A>::read(out + c).unpack(), Whole{});
          store<T>(out + table + c, Packed<A>::read(out + table + c).unpack(), Whole{});
        }
      }
    }
  }
  void sums_of(std::int64_t begin, std::int64_t end) const {
    if constexpr (kKeepsDz<kFused>) {
      if (plan.kept != nullptr) return sums<false, true>(begin, end);
    }
    if (wants_values(args) && !second_pass) sums<true>(begin, end);
    else sums<false>(begin, end);
  }
  // Sums of an image from those of its runs.
  void merge_runs(std::int64_t image, std::int64_t begin, std::int64_t end) const {
    if (plan.pieces == 1) return;
    for (int q = 0; q < 2; ++q) {
      const A* partial = static_cast<const A*>(plan.partial) + (q * shape.batch + image) * plan.pieces * padded;
      sum_table(partial, padded, plan.pieces, image_sums + (q * shape.batch + image) * padded, begin, end);
    }
  }

  // Means of the groups of an image, one value per channel.
  void means(std::int64_t image) const {
    const std::int64_t group = shape.group_channels();
    const A n = args.given_sums ? static_cast<A>(*args.count) : static_cast<A>(shape.slab_size());
    for (int q = 0; q < 2; ++q) {
      const A* sums =
          args.given_sums ? static_cast<const A*>(args.sums) + q * channels : image_sums + (q * shape.batch + image) * padded;
      A* mean = rows_of(image) + (3 + q) * padded;
      if (group == 1) channel_means<T>(args, 0, channels, sums, n, mean);
      for (std::int64_t first = 0; group > 1 && first < channels; first += group) {
        fill(mean + first, group, group_mean<T>(args, first, group, sums + first, n));
      }
      reorder<T>(mean, all);
    }
  }

  template <bool kFixed, int kRows, class Extent>
  NORMEXT_INLINE void value_units(std::int64_t first, const A* rows, std::int64_t c, Extent extent) const {
    constexpr bool kInput = kFused || !kFixed;
    const UnitAffine<A> affine = affine_of_channels(rows, c);
    const T* extra[kRows];
    Pair<A> xhat[kRows] = {}, dz[kRows];
    fetch_later_rows<Dz, kRows>(grad_output + first, channels, c);
    if (kInput) fetch_later_rows<T, kRows>(input + first, channels, c);
    if (args.grad_input != nullptr) fetch_later_rows<T, kRows>(static_cast<const T*>(args.grad_input) + first, channels, c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t i = first + r * channels + c;
      extra[r] = at(residual, i);
      dz[r] = load<T>(grad_output + i, extent);
      if constexpr (kInput) xhat[r] = load<T>(input + i, extent);
    }
    if constexpr (kInput) {
      backward_units<T, kFused, kRows>(args.activation, extra, affine, xhat, dz, extent);
    }
    Pair<A> mean_g = {}, mean_gx = {};
    if constexpr (!kFixed) {
      mean_g = Packed<A>::read(rows + 3 * padded + c).unpack();
      mean_gx = Packed<A>::read(rows + 4 * padded + c).unpack();
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      store_gradients<T, kFixed>(args, first + r * channels + c, affine, dz[r], xhat[r], mean_g, mean_gx, extent);
    }
  }

  // dx and dz of rows [begin, end) of all images.
  template <bool kFixed>
  __attribute__((noinline)) void values(std::int64_t begin, std::int64_t end) const {
    while (begin < end) {
      const A* rows = rows_of(begin / shape.spatial);
      const std::int64_t stop = smaller(end, (begin / shape.spatial + 1) * shape.spatial);
      const auto take = [&](auto how_many) __attribute__((always_inline)) {
        constexpr int kRows = decltype(how_many)::value;
        for (; stop - begin >= kRows; begin += kRows) {
          for_units<A>(0, channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
            value_units<kFixed, kRows>(begin * channels, rows, c, extent);
          });
        }
      };
      if (!single_rows) take(std::integral_constant<int, kGradientRows>());
      take(std::integral_constant<int, 1>());
    }
  }
  void values_of(std::int64_t begin, std::int64_t end) const {
    if constexpr (kKeepsDz<kFused>) {
      if (plan.kept != nullptr) {
        const ChannelBackwardArgs rest = args_after_dz(args, plan.kept);
        return LastBackward<T, false, KeptDz<T>>{rest, plan}.template values<false>(begin, end);
      }
    }
    if (values_need_no_sums(args)) values<true>(begin, end);
    else values<false>(begin, end);
  }

  void resident_images(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t image = begin; image < end; ++image) {
      prepare_rows<T>(args, image, rows_of(image), padded, all);
      if (wants_sums(args)) {
        sums_of(image * plan.pieces, (image + 1) * plan.pieces);
        merge_runs(image, 0, channels);
      }
      if (wants_means(args)) means(image);
      if (second_pass) values_of(image * shape.spatial, (image + 1) * shape.spatial);
    }
  }

  // Scalars of all images: what is known beforehand, and the means, once the sums are there.
  void prepare() const {
    prepare_params<T>(args, params, padded);
    for (std::int64_t image = 0; image < shape.batch; ++image) prepare_rows<T>(args, image, rows_of(image), padded, all);
  }
  void prepare_means() const {
    for (std::int64_t image = 0; wants_means(args) && image < shape.batch; ++image) means(image);
  }

  void in_phases() const {
    const bool own = wants_own_scalars(plan, shape.batch);
    if (!own) prepare();
    if (wants_sums(args)) {
      for_ranges_with_scalars<A, 5, 2>(
          *this, own, shape.batch * plan.pieces, [](const LastBackward& self) { self.prepare(); },
          [](const LastBackward& self, std::int64_t begin, std::int64_t end) { self.sums_of(begin, end); });
      for (std::int64_t image = 0; image < shape.batch; ++image) {
        for_columns(plan.parallel, channels, channels * plan.pieces,
                    [&](std::int64_t begin, std::int64_t end) { merge_runs(image, begin, end); });
      }
    }
    if (!second_pass) return;
    if (!own) prepare_means();
    const std::int64_t rows = shape.batch * shape.spatial, task = rows_of_task<T>(channels);
    const auto prepare_with_means = [](const LastBackward& self) {
      self.prepare();
      self.prepare_means();
    };
    for_ranges_with_scalars<A, 5, 2>(*this, own, (rows + task - 1) / task, prepare_with_means,
                                     [&](const LastBackward& self, std::int64_t begin, std::int64_t end) {
                                       in_reverse(begin, end, [&](std::int64_t first, std::int64_t last) {
                                         self.values_of(first * task, smaller(last * task, rows));
                                       });
                                     });
  }

  void run() const {
    if (plan.resident) {
      prepare_params<T>(args, params, padded);
      for_ranges(plan.parallel, shape.batch, [&](std::int64_t begin, std::int64_t end) { resident_images(begin, end); });
    } else {
      in_phases();
    }
    if (!wants_totals(args)) return;
    for_columns(plan.parallel, channels, channels * shape.batch, [&](std::int64_t begin, std::int64_t end) {
      for (int q = 0; q < 2; ++q) {
        sum_table(image_sums + q * shape.batch * padded, padded, shape.batch, totals + q * padded, begin, end);
      }
    });
    store_totals<T>(args, totals, totals + padded);
  }
};

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
