// Planes of a few values. Plane by plane, most of the time would go into scalars and sums across lanes; so scalars are spread over
// the columns of memory (channel, position) of a block of channels, once for several images, and sums are taken over columns in
// vectors. In a batch norm a segment is a channel in several images: columns are summed over these, then the positions of each
// channel. A group lies in one piece: its own sums go along the columns, those of its channels over images as in a batch norm.
#pragma once

#include "cpu/channel_unit.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// Not for the baseline and float64, which nobody runs for their speed: a megabyte less. ChannelPlan::images says so, too.
template <class T>
constexpr bool kKnowsShortPlanes = NORMEXT_HAS_FMA != 0 && sizeof(T) < 8;
template <bool kFused>
constexpr int kSharedImages = kFused ? 1 : 4;  // that are written in one pass over the scalars
// Of a block of channels: five arrays of scalars fit L1.
template <class A>
constexpr std::int64_t kShortColumns = 4096 / sizeof(A);
// Likewise, of channels; sums are written in whole batches.
template <class A>
constexpr std::int64_t kMostShortChannels = kShortColumns<A> / cpu::kLeastShort + kMaxBatch;

// Blocks of a group: as many units make one as an accumulator takes, in whole planes.
template <class A>
constexpr std::int64_t kMostBlocks = cpu::kMostShortGroup / (cpu::kTermsPerSum * kUnit<A> - cpu::kMostShort) + 1;
// One value per column of a block.
template <class A>
struct ShortColumns {
  alignas(NORMEXT_VECTOR_BYTES) A of[kShortColumns<A>];
};

// Of columns that have all of it each, in the order of T (packed.h): the scalars come in this order.
enum ColumnScalar { kOfHi, kOfLo, kOfRstd, kOfWeight, kOfBias, kAffineScalars };
template <class T, bool kHasBias>
NORMEXT_INLINE UnitAffine<Accumulate<T>> affine_of_columns(const ShortColumns<Accumulate<T>>* scalars, std::int64_t column) {
  Pair<Accumulate<T>> s[kAffineScalars] = {};
#pragma GCC unroll 5
  for (int k = 0; k < (kHasBias ? kAffineScalars : kOfBias); ++k)
    s[k] = Packed<Accumulate<T>>::read(scalars[k].of + column).unpack();
  return {{{s[kOfHi].a, s[kOfLo].a, s[kOfRstd].a}, {s[kOfHi].b, s[kOfLo].b, s[kOfRstd].b}}, s[kOfWeight], s[kOfBias]};
}

// Some channels of every image.
template <class T>
struct ShortBlock {
  using A = Accumulate<T>;
  using V = Vector<A>;

  const ChannelShape& shape;
  std::int64_t first, channels;  // of the block

  // Channels of a block that is read again, in `tensors` tensors, and fits L2; but a unit of columns at least.
  NORMEXT_INLINE static std::int64_t channels_of(const ChannelShape& shape, int tensors) {
    const std::int64_t bytes = shape.batch * shape.spatial * tensors * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t fit = kBlockBytes / bytes, least = (kUnit<A> + shape.spatial - 1) / shape.spatial;
    return smaller(fit < least ? least : fit, most_channels(shape));
  }
  NORMEXT_INLINE static std::int64_t most_channels(const ChannelShape& shape) { return kShortColumns<A> / shape.spatial; }
  // Channels of a block of a group, which has no more units than an accumulator takes.
  NORMEXT_INLINE static std::int64_t channels_of_group_block(const ChannelShape& shape) {
    return smaller(most_channels(shape), cpu::kTermsPerSum * kUnit<A> / shape.spatial);
  }
  NORMEXT_INLINE std::int64_t columns() const { return channels * shape.spatial; }
  NORMEXT_INLINE std::int64_t image_stride() const { return shape.channels * shape.spatial; }
  // Offset of the block in an image.
  NORMEXT_INLINE std::int64_t offset(std::int64_t image) const { return image * image_stride() + first * shape.spatial; }

  // value(channel), of the shape's channels, for every column.
  template <class Value>
  NORMEXT_INLINE void spread(ShortColumns<A>& out, Value value) const {
    A* p = out.of;
    for (std::int64_t c = 0; c < channels; ++c, p += shape.spatial) {
      const A x = value(first + c);
      for (std::int64_t s = 0; s < shape.spatial; ++s) p[s] = x;
    }
  }
  // The same in the order of T (packed.h), for units from `column` 0 on.
  template <class Value>
  NORMEXT_INLINE void spread_in_order(ShortColumns<A>& out, Value value) const {
    spread(out, value);
    if constexpr (Packed<T>::kEvenOdd) {
      for (std::int64_t c = 0; c < columns(); c += kUnit<A>) Packed<A>::pack(load<T>(out.of + c, Whole{})).write(out.of + c);
    }
  }
  // sums[c] = sum over the columns of channel c of the block. `sums` is written in whole vectors.
  __attribute__((noinline)) void add_positions(const ShortColumns<A>& from, A* sums) const {
    for (std::int64_t c = 0; c < channels; c += kMaxBatch) {
      const int count = static_cast<int>(smaller(kMaxBatch, channels - c));
      V of_channel[kMaxBatch];
      for (int r = 0; r < count; ++r) {
        V lanes[1];
        sum_columns<A>(
            shape.spatial,
            [&](std::int64_t column, auto extent, Sums<A, 1>& s)
                __attribute__((always_inline)) { s.of[0] = s.of[0] + load<A>(from.of + (c + r) * shape.spatial + column, extent); },
            lanes);
        of_channel[r] = lanes[0];
      }
      sum_lanes_of_rows(of_channel, count, sums + c);
    }
  }
  // Sums over images [begin, end) of kSums quantities of every column: add(offset, column, extent, sums), the offset being that of
  // the column in its tensor.
  template <int kSums, class Add>
  NORMEXT_INLINE void add_images(std::int64_t begin, std::int64_t end, ShortColumns<A> (&out)[kSums], Add add) const {
    for_units<A>(0, columns(), [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
      Sums<A, kSums> sums = {};
      for (std::int64_t image = begin; image < end; ++image) add(offset(image) + column, column, extent, sums);
      for (int q = 0; q < kSums; ++q) store<T>(out[q].of + column, sums.of[q], extent);
    });
  }
};
NORMEXT_INLINE bool groups_of_short_planes(const ChannelShape& shape) {
  return !shape.batch_norm() && shape.group_channels() > 1 && shape.spatial <= cpu::kMostShort;
}
// body(block, slab, first, begin, end) for values [begin, end) of groups of short planes, a part of a group at a time: the channels
// of the block have values from `first` on.
template <class T, class Body>
NORMEXT_INLINE void for_parts_of_groups(const ChannelShape& shape, std::int64_t begin, std::int64_t end, Body body) {
  const std::int64_t group = shape.group_channels();
  while (begin < end) {
    const std::int64_t plane = begin / shape.spatial, first = plane * shape.spatial;
    const ShortBlock<T> block = {shape, plane % shape.channels,
                                 smaller(ShortBlock<T>::most_channels(shape), group - plane % group)};
    const std::int64_t stop = smaller(end, first + block.columns());
    body(block, plane / group, first, begin, stop);
    begin = stop;
  }
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
