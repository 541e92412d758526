// Running statistics for one instruction set: what evaluation takes from them, and how training updates them. All is per channel,
// in the order of the running type R.
#pragma once

#include "core/dtypes.h"
#include "cpu/channel_sums.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

template <class R>
void fixed_stats_as(const ChannelForwardArgs& args) {
  using A = Accumulate<R>;
  using V = Vector<A>;
  const V eps = V{} + static_cast<A>(args.eps);
  const std::int64_t channels = args.shape.channels;
  for_units<A>(0, channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
    const Pair<A> mean = load<R>(static_cast<const R*>(args.running_mean) + c, extent);
    const Pair<A> variance = load<R>(static_cast<const R*>(args.running_var) + c, extent);
    const CentredRow<V> a = ChannelNorm::from_running(mean.a, variance.a, eps);
    const CentredRow<V> b = ChannelNorm::from_running(mean.b, variance.b, eps);
    A* stats = static_cast<A*>(args.stats) + c;
    store<R>(stats, {a.hi, b.hi}, extent);
    store<R>(stats + channels, {a.lo, b.lo}, extent);
    store<R>(stats + 2 * channels, {a.rstd, b.rstd}, extent);
    store<R>(stats + 3 * channels, Pair<A>{}, extent);
  });
}

// Takes the mean over images of each statistic.
template <class R>
void update_running_as(const RunningArgs& args) {
  using A = Accumulate<R>;
  using V = Vector<A>;
  const RunningUpdate& to = args.update;
  const V momentum = V{} + (to.batches == nullptr ? static_cast<A>(to.momentum) : A(1) / static_cast<A>(*to.batches));
  const V images = V{} + static_cast<A>(args.images);
  const std::int64_t slabs = args.images * args.channels;
  const auto update = [&](void* running, std::int64_t c, auto extent, Pair<A> variance, auto term) __attribute__((always_inline)) {
    const Pair<A> sum = sum_terms(args.images, term);
    R* place = static_cast<R*>(running) + c;
    const Pair<A> old = load<R>(place, extent);
    const auto updated = [&](V old, V sum, V variance) __attribute__((always_inline)) {
      return variance == V{} + static_cast<A>(kNoValues) ? old : ChannelNorm::running(old, sum / images, momentum);
    };
    store<R>(place, {updated(old.a, sum.a, variance.a), updated(old.b, sum.b, variance.b)}, extent);
  };
  for_units<A>(0, args.channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
    const A* stats = static_cast<const A*>(args.stats) + c;
    const Pair<A> variance = load<R>(stats + 3 * slabs, extent);
    update(to.mean, c, extent, variance, [&](std::int64_t i) __attribute__((always_inline)) {
      return load<R>(stats + i * args.channels, extent) + load<R>(stats + slabs + i * args.channels, extent);
    });
    update(to.var, c, extent, variance,
           [&](std::int64_t i) __attribute__((always_inline)) { return load<R>(stats + 3 * slabs + i * args.channels, extent); });
  });
}

}  // namespace

void fixed_stats(const ChannelForwardArgs& args) {
  visit(args.param_dtype, [&](auto tag) { fixed_stats_as<typename decltype(tag)::type>(args); });
}

void update_running(const RunningArgs& args) {
  visit(args.update.dtype, [&](auto tag) { update_running_as<typename decltype(tag)::type>(args); });
}

}  // namespace NORMEXT_ISA
}  // namespace normext
