// The scalars of the channels, as the channels-last kernels read them: statistics of each channel (plan.rows), weight and bias
// (plan.params), in the order of T (packed.h).
#pragma once

#include "cpu/channel_sums.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// Some channels: from a whole number of units on, whole groups.
struct Columns {
  std::int64_t begin, end;
};
static_assert(cpu::kColumnStep % kUnit<float> == 0 && cpu::kColumnStep % kUnit<double> == 0);

// Per-channel values from natural order to that of T. The last unit is made whole with zeros.
template <class T>
NORMEXT_INLINE void reorder(Accumulate<T>* array, Columns columns) {
  using A = Accumulate<T>;
  for (std::int64_t c = columns.end; c % kUnit<A> != 0; ++c) array[c] = 0;
  if constexpr (Packed<T>::kEvenOdd) {
    for (std::int64_t c = columns.begin; c < columns.end; c += kUnit<A>) {
      Packed<A>::pack(load<T>(array + c, Whole{})).write(array + c);
    }
  }
}

// Scalars of one unit of channels.
template <class A>
struct ChannelRows {
  CentredRow<Vector<A>> a, b;

  NORMEXT_INLINE ChannelRows(const A* rows, std::int64_t padded, std::int64_t channel) {
    const Pair<A> hi = Packed<A>::read(rows + channel).unpack(), lo = Packed<A>::read(rows + padded + channel).unpack(),
                  rstd = Packed<A>::read(rows + 2 * padded + channel).unpack();
    a = {hi.a, lo.a, rstd.a};
    b = {hi.b, lo.b, rstd.b};
  }
};

// Weight and bias of all channels, as plan.params holds them.
template <class T, class Args>
NORMEXT_INLINE void prepare_params(const Args& args, Accumulate<T>* params, std::int64_t padded) {
  using A = Accumulate<T>;
  visit_parameters<T>(args, [&](auto type) {
    using P = decltype(type);
    const auto* weight = static_cast<const P*>(args.weight);
    const auto* bias = static_cast<const P*>(args.bias);
    for_units<A>(0, args.shape.channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      Packed<A>::pack(weight_unit<T>(weight, c, extent)).write(params + c);
      Packed<A>::pack(bias == nullptr ? Pair<A>{} : load<T>(bias + c, extent)).write(params + padded + c);
    });
  });
}
// Statistics of some channels of an image, as plan.rows holds them.
template <class T, class Args>
NORMEXT_INLINE void prepare_rows(const Args& args, std::int64_t image, Accumulate<T>* rows, std::int64_t padded, Columns columns) {
  using A = Accumulate<T>;
  const std::int64_t group = args.shape.group_channels(), slabs = args.shape.slabs(), first = image * args.shape.groups;
  for (int k = 0; k < 3; ++k) {
    const A* stats = static_cast<const A*>(args.stats) + k * slabs + first;
    A* row = rows + k * padded;
    if (group == 1) {
      for_units<A>(columns.begin, columns.end, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
        Packed<A>::pack(load<T>(stats + c, extent)).write(row + c);
      });
      continue;
    }
    for (std::int64_t g = columns.begin / group; g < columns.end / group; ++g) fill(row + g * group, group, stats[g]);
    reorder<T>(row, columns);
  }
}

// Scalars of the channels of one image that a thread keeps for itself, on its stack (double, backward: 112 KB): those that another
// core has written come line by line [Zen 4, two threads, without and with, us: BatchNorm float32 1x1024x14x14 78, 65; 8x512x7x7
// 38, 34.5; GroupNorm 1x960x16x16 77, 69; 2 % where the host runs both threads close together].
constexpr std::int64_t kMostOwnChannels = 2048;
template <class A, int kArrays>
struct OwnScalars {
  alignas(NORMEXT_VECTOR_BYTES) A values[kArrays * kMostOwnChannels];
};
NORMEXT_INLINE bool wants_own_scalars(const cpu::ChannelPlan& plan, std::int64_t batch) {
  return plan.parallel.threads > 1 && batch == 1 && plan.padded <= kMostOwnChannels;
}
// body(call, begin, end) over [0, tasks): this call, whose scalars are prepared, or if `own` the same with the calling thread's
// arrays `rows`, of kRows * padded values, and `params`, of kParams * padded, which prepare(call) fills.
template <class A, int kRows, int kParams, class Call, class Prepare, class Body>
NORMEXT_INLINE void for_ranges_with_scalars(const Call& call, bool own, std::int64_t tasks, const Prepare& prepare,
                                            const Body& body) {
  for_ranges(call.plan.parallel, tasks, [&](std::int64_t begin, std::int64_t end) {
    if (!own) return body(call, begin, end);
    OwnScalars<A, kRows + kParams> scalars;
    cpu::ChannelPlan plan = call.plan;
    plan.rows = scalars.values;
    plan.params = scalars.values + kRows * plan.padded;
    const Call self{call.args, plan};
    prepare(self);
    body(self, begin, end);
  });
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
