// What the channel norm kernels of both layouts share: sums over segments, the merge of moments, parameters, activations.
//
// Segments of a slab are the rows of a table whose columns are slabs (or channels), so merging runs on vectors of columns.
#pragma once

#include "cpu/channel_kernels.h"
#include "cpu/row_passes.inl"
#include "cpu/tuning.h"
#include "norms/channel_norm.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

constexpr std::int64_t kBlockBytes =
    512 * 1024;                              // of columns of planes that are handled together; halves of it take as long on Zen 3
constexpr std::int64_t kColumnsOfTask = 64;  // that one thread merges at least
constexpr std::int64_t kMergeSerial = 1 << 15;  // values; fewer are not worth waking threads for
constexpr std::int64_t kValuesOfTask = 4096;    // of a pass over all values that one thread takes at least
constexpr std::int64_t kTasksOfStep = 4;        // that a pass in reverse takes in order

// Whether calls without an activation and a residual have kernels of their own: not on the baseline, which nobody runs for its
// speed (0.4 MB less).
constexpr bool kKnowsPlain = NORMEXT_HAS_FMA != 0;

template <class T>
NORMEXT_INLINE bool comes_from_memory(const ChannelShape& shape) {
  return shape.elements() * static_cast<std::int64_t>(sizeof(T)) > cpu::kBeyondL2Bytes;
}

template <class A>
NORMEXT_INLINE Pair<A> both(Vector<A> x) {
  return {x, x};
}

// n times the same value.
template <class A>
NORMEXT_INLINE void fill(A* out, std::int64_t n, A value) {
  const Vector<A> values = Vector<A>{} + value;
  std::int64_t i = 0;
  for (; n - i >= kLanes<A>; i += kLanes<A>) store_bytes(out + i, values);
  for (; i < n; ++i) out[i] = value;
}

// Sum of term(0) .. term(count - 1), count > 0, which are asked for in that order: 16 in sequence, then pairwise.
template <class Term>
NORMEXT_INLINE auto sum_terms(std::int64_t count, Term term) {
  using X = decltype(term(0));
  if (count == 1) return term(0);
  X level[40];  // level[i]: the sum of 16 << i terms, where bit i of `sums` is set
  std::int64_t sums = 0;
  for (std::int64_t i = 0; i < count; ++sums) {
    const std::int64_t end = smaller(i + cpu::kTermsPerSum, count);
    X sum = term(i++);
    for (; i < end; ++i) sum = sum + term(i);
    int l = 0;
    for (; (sums >> l & 1) != 0; ++l) sum = level[l] + sum;
    level[l] = sum;
  }
  int l = __builtin_ctzll(static_cast<unsigned long long>(sums));
  X total = level[l];
  while (sums >> ++l != 0) {
    if ((sums >> l & 1) != 0) total = level[l] + total;
  }
  return total;
}

template <class T>
NORMEXT_INLINE Accumulate<T> value_of(T x) {
  if constexpr (sizeof(T) == 8) return x;
  else return to_float(x);
}

// Weight or bias: of type T, or float next to 16-bit T.
template <class T>
struct Parameter {
  const void* data;
  bool wide;
  Accumulate<T> absent;

  NORMEXT_INLINE Accumulate<T> operator[](std::int64_t channel) const {
    if (data == nullptr) return absent;
    if constexpr (sizeof(T) == 2) {
      if (wide) return static_cast<const float*>(data)[channel];
    }
    return value_of(static_cast<const T*>(data)[channel]);
  }
};
template <class T, class Args>
NORMEXT_INLINE Parameter<T> weight_of(const Args& args) {
  return {args.weight, args.param_dtype != args.dtype, 1};
}
template <class T, class Args>
NORMEXT_INLINE Parameter<T> bias_of(const Args& args) {
  return {args.bias, args.param_dtype != args.dtype, 0};
}
// body(P) where weight and bias are of type P.
template <class T, class Args, class Body>
NORMEXT_INLINE void visit_parameters(const Args& args, Body body) {
  if constexpr (sizeof(T) == 2) {
    if (args.param_dtype != args.dtype) return body(float{});
  }
  body(T{});
}

// One unit of weights, those of channels from `channel` on; 1 where there are none.
template <class Like, class P, class Extent>
NORMEXT_INLINE Pair<Accumulate<Like>> weight_unit(const P* weight, std::int64_t channel, Extent extent) {
  using A = Accumulate<Like>;
  return weight == nullptr ? both<A>(Vector<A>{} + A(1)) : load<Like>(weight + channel, extent);
}

template <class T, class Args>
NORMEXT_INLINE CentredRow<Accumulate<T>> slab_of(const Args& args, std::int64_t slab) {
  const Accumulate<T>* stats = static_cast<const Accumulate<T>*>(args.stats);
  const std::int64_t slabs = args.shape.slabs();
  return {stats[slab], stats[slabs + slab], stats[2 * slabs + slab]};
}

// Array p of a tensor that may be absent.
template <class T>
NORMEXT_INLINE T* at(T* data, std::int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}

template <class A, int kCount>
NORMEXT_INLINE void activate_all(Activation activation, Pair<A> (&z)[kCount]) {
  switch_activation(activation, [&](auto which) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) z[i] = {activate(which.value, z[i].a), activate(which.value, z[i].b)};
  });
}
// dy becomes dz.
template <class A, int kCount>
NORMEXT_INLINE void activation_gradients(Activation activation, const Pair<A> (&z)[kCount], Pair<A> (&dy)[kCount]) {
  switch_activation(activation, [&](auto which) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      dy[i] = {activation_gradient(which.value, z[i].a, dy[i].a), activation_gradient(which.value, z[i].b, dy[i].b)};
    }
  });
}

// Moments of all segments of some columns: three tables [count, stride], each `table` values after the one before. Segments have
// `piece` values, every pieces-th has `last`.
template <class A>
struct Segments {
  const A* mean;
  std::int64_t table, stride, count, piece, pieces, last;

  template <class Extent>
  NORMEXT_INLINE void read(std::int64_t segment, std::int64_t column, Extent extent, Moments<Vector<A>>& a,
                           Moments<Vector<A>>& b) const {
    const A* p = mean + segment * stride + column;
    const Pair<A> m = load<A>(p, extent), c = load<A>(p + table, extent), q = load<A>(p + 2 * table, extent);
    a = {m.a, c.a, q.a};
    b = {m.b, c.b, q.b};
  }
  // The sums of a merge, for one unit of columns: n_s*u_s; n_s*w_s and the shares of M2.
  template <class Extent>
  NORMEXT_INLINE Pair<A> sum_means(std::int64_t column, Extent extent, Pair<A> pivot) const {
    std::int64_t left = pieces;
    return sum_terms(count, [&](std::int64_t s) __attribute__((always_inline)) {
      Moments<Vector<A>> a, b;
      read(s, column, extent, a, b);
      const A n = size(left);
      return Pair<A>{n * relative_mean(a, pivot.a), n * relative_mean(b, pivot.b)};
    });
  }
  struct AboutCentre {
    Pair<A> offsets, squares;
    NORMEXT_INLINE AboutCentre operator+(const AboutCentre& other) const {
      return {offsets + other.offsets, squares + other.squares};
    }
  };
  template <class Extent>
  NORMEXT_INLINE AboutCentre sum_about(std::int64_t column, Extent extent, const Centre<Vector<A>> (&centre)[2]) const {
    std::int64_t left = pieces;
    return sum_terms(count, [&](std::int64_t s) __attribute__((always_inline)) {
      Moments<Vector<A>> a, b;
      read(s, column, extent, a, b);
      const Vector<A> n = Vector<A>{} + size(left);
      return AboutCentre{{n * relative_mean(a, centre[0]), n * relative_mean(b, centre[1])},
                         {centred_square(a, n, centre[0]), centred_square(b, n, centre[1])}};
    });
  }

 private:
  NORMEXT_INLINE A size(std::int64_t& left) const {
    if (--left != 0) return static_cast<A>(piece);
    left = pieces;
    return static_cast<A>(last);
  }
};

// Where the statistics of slabs go. Either may be null.
template <class A>
struct SlabSink {
  A* stats;
  A* moments;
  std::int64_t slabs;
  A n, eps;  // values of a slab

  template <class Args>
  NORMEXT_INLINE explicit SlabSink(const Args& args)
      : stats(static_cast<A*>(args.stats)),
        moments(static_cast<A*>(args.moments)),
        slabs(args.shape.slabs()),
        n(static_cast<A>(args.shape.slab_size())),
        eps(static_cast<A>(args.eps)) {}

  template <class Extent>
  NORMEXT_INLINE void write(std::int64_t slab, Extent extent, const Centre<Vector<A>> (&centre)[2], Pair<A> rest,
                            Pair<A> m2) const {
    const Vector<A> count = Vector<A>{} + n, epsilon = Vector<A>{} + eps;
    const CentredRow<Vector<A>> a = finish_centred(centre[0], rest.a, m2.a, count, epsilon);
    const CentredRow<Vector<A>> b = finish_centred(centre[1], rest.b, m2.b, count, epsilon);
    if (stats != nullptr) {
      A variance[kUnit<A>];
      Packed<A>::pack(m2).write(variance);
      for (int i = 0; i < kUnit<A>; ++i) variance[i] = ChannelNorm::unbiased_variance(variance[i], n);
      store<A>(stats + slab, {a.hi, b.hi}, extent);
      store<A>(stats + slabs + slab, {a.lo, b.lo}, extent);
      store<A>(stats + 2 * slabs + slab, {a.rstd, b.rstd}, extent);
      store<A>(stats + 3 * slabs + slab, Packed<A>::read(variance).unpack(), extent);
    }
    if (moments != nullptr) {
      store<A>(moments + slab, {a.hi, b.hi}, extent);
      store<A>(moments + slabs + slab, {a.lo, b.lo}, extent);
      store<A>(moments + 2 * slabs + slab, m2, extent);
    }
  }
  NORMEXT_INLINE void write(std::int64_t slab, Centre<A> centre, A rest, A m2) const {
    const CentredRow<A> row = finish_centred(centre, rest, m2, n, eps);
    const A values[kChannelStats] = {row.hi, row.lo, row.rstd, ChannelNorm::unbiased_variance(m2, n)};
    for (int k = 0; stats != nullptr && k < kChannelStats; ++k) stats[k * slabs + slab] = values[k];
    const A shared[kChannelMoments] = {row.hi, row.lo, m2};
    for (int k = 0; moments != nullptr && k < kChannelMoments; ++k) moments[k * slabs + slab] = shared[k];
  }
};

// Merges columns [begin, end), each a slab of its own; column c is slab first + c.
template <class A>
__attribute__((noinline)) void merge_columns(const Segments<A>& segments, const SlabSink<A>& sink, std::int64_t first,
                                             std::int64_t begin, std::int64_t end) {
  for_units<A>(begin, end, [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
    const Pair<A> pivot = load<A>(segments.mean + column, extent);
    const Pair<A> sum = segments.sum_means(column, extent, pivot);
    const Centre<Vector<A>> centre[2] = {centre_at(pivot.a, sum.a / sink.n), centre_at(pivot.b, sum.b / sink.n)};
    const auto about = segments.sum_about(column, extent, centre);
    sink.write(first + column, extent, centre, {about.offsets.a / sink.n, about.offsets.b / sink.n}, about.squares);
  });
}

// out[c] = sum of table[s, c] over `count` rows s, columns [begin, end).
template <class A>
__attribute__((noinline)) void sum_table(const A* table, std::int64_t stride, std::int64_t count, A* out, std::int64_t begin,
                                         std::int64_t end) {
  for_units<A>(begin, end, [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
    const Pair<A> sum = sum_terms(
        count, [&](std::int64_t s) __attribute__((always_inline)) { return load<A>(table + s * stride + column, extent); });
    store<A>(out + column, sum, extent);
  });
}

// Sum of values x[0] .. x[n - 1] as term(i, extent) gives them, a unit at a time.
template <class A, class Term>
NORMEXT_INLINE A sum_values(std::int64_t n, Term term) {
  return sum_terms(segments_of(n), [&](std::int64_t segment) {
    Vector<A> lanes[1];
    sum_columns<A>(
        segment_cols(segment, n),
        [&](std::int64_t column, auto extent, Sums<A, 1>& sums)
            __attribute__((always_inline)) { sums.of[0] = sums.of[0] + term(segment * kSegment + column, extent); },
        lanes);
    return sum_lanes<A>(lanes[0]);
  });
}

// Means over a slab of g or g*xhat, from sums of dz or dz*xhat: w*sum / n for `count` channels from `first` on, each of which is a
// slab; or those of one slab together. n values make a slab.
template <class T, class Args>
__attribute__((noinline)) void channel_means(const Args& args, std::int64_t first, std::int64_t count, const Accumulate<T>* sums,
                                             Accumulate<T> n, Accumulate<T>* means) {
  using A = Accumulate<T>;
  visit_parameters<T>(args, [&](auto type) {
    const auto* weight = static_cast<const decltype(type)*>(args.weight);
    for_units<A>(0, count, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      const Pair<A> w = weight_unit<T>(weight, first + c, extent), sum = load<T>(sums + c, extent);
      store<T>(means + c, Pair<A>{w.a * sum.a / n, w.b * sum.b / n}, extent);
    });
  });
}
template <class T, class Args>
__attribute__((noinline)) Accumulate<T> group_mean(const Args& args, std::int64_t first, std::int64_t count,
                                                   const Accumulate<T>* sums, Accumulate<T> n) {
  using A = Accumulate<T>;
  A sum = 0;
  visit_parameters<T>(args, [&](auto type) {
    const auto* weight = static_cast<const decltype(type)*>(args.weight);
    sum = sum_values<A>(count, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
      const Pair<A> w = weight_unit<T>(weight, first + c, extent), s = load<T>(sums + c, extent);
      return Pair<A>{w.a * s.a, w.b * s.b};
    });
  });
  return sum / n;
}

// body(begin, end) over [0, columns), shared out where `values` are many.
template <class Body>
NORMEXT_INLINE void for_columns(const cpu::Parallel& parallel, std::int64_t columns, std::int64_t values, const Body& body) {
  const cpu::Parallel serial;
  for_ranges(values < kMergeSerial ? serial : parallel, (columns + kColumnsOfTask - 1) / kColumnsOfTask,
             [&](std::int64_t begin, std::int64_t end) { body(begin * kColumnsOfTask, smaller(end * kColumnsOfTask, columns)); });
}

// unit(i, extent) for units that cover output values [begin, n). The caller has written [0, begin), and the last unit may begin
// there rather than be partial: some values are computed twice, which is why outputs may not overlap inputs.
template <class A, class Unit>
NORMEXT_INLINE void for_output_units(std::int64_t begin, std::int64_t n, Unit unit) {
  for (; n - begin >= kUnit<A>; begin += kUnit<A>) unit(begin, Whole{});
  if (begin == n) return;
  if (n >= kUnit<A>) unit(n - kUnit<A>, Whole{});
  else unit(begin, Partial{static_cast<int>(n - begin)});
}

// body(first, last) over [begin, end), the last tasks first: a second pass over values begins where the first one of the thread
// ended, since that part is still in L2.
template <class Body>
NORMEXT_INLINE void in_reverse(std::int64_t begin, std::int64_t end, const Body& body) {
  for (std::int64_t stop = end; stop > begin; stop -= kTasksOfStep) {
    body(stop - begin > kTasksOfStep ? stop - kTasksOfStep : begin, stop);
  }
}
template <class Body>
NORMEXT_INLINE void for_ranges_again(const cpu::Parallel& parallel, std::int64_t tasks, const Body& body) {
  for_ranges(parallel, tasks, [&](std::int64_t begin, std::int64_t end) { in_reverse(begin, end, body); });
}

// Planes in the order of memory, their channels and slabs: divisions cost as much as a plane of 7x7.
struct PlaneCursor {
  std::int64_t channels, group;  // planes of an image; of a slab, 0: a slab is a channel
  std::int64_t plane, channel, slab, in_slab;

  NORMEXT_INLINE PlaneCursor(const ChannelShape& shape, std::int64_t first)
      : channels(shape.channels), group(shape.batch_norm() ? 0 : shape.group_channels()), plane(first), channel(first % channels) {
    slab = group == 0 ? channel : first / group;
    in_slab = group == 0 ? 0 : first % group;
  }
  NORMEXT_INLINE void next() {
    ++plane;
    if (++channel == channels) channel = 0;
    if (group == 0) {
      slab = channel;
    } else if (++in_slab == group) {
      in_slab = 0;
      ++slab;
    }
  }
};

// Parameter gradients and sums of a backward call, from sum(dz) and sum(dz*xhat) per channel.
template <class T>
NORMEXT_INLINE void store_totals(const ChannelBackwardArgs& args, const Accumulate<T>* dz, const Accumulate<T>* dzx) {
  using A = Accumulate<T>;
  const std::int64_t channels = args.shape.channels;
  visit_parameters<T>(args, [&](auto type) {
    using P = decltype(type);
    const auto store_as = [&](void* gradient, const A* values) {
      for_units<A>(0, gradient == nullptr ? 0 : channels, [&](std::int64_t c, auto extent) __attribute__((always_inline)) {
        store<P>(static_cast<P*>(gradient) + c, load<P>(values + c, extent), extent);
      });
    };
    store_as(args.grad_weight, dzx);
    store_as(args.grad_bias, dz);
  });
  if (args.sums == nullptr || args.given_sums) return;
  __builtin_memcpy(args.sums, dz, static_cast<std::size_t>(channels) * sizeof(A));
  __builtin_memcpy(static_cast<A*>(args.sums) + channels, dzx, static_cast<std::size_t>(channels) * sizeof(A));
}
// What a backward call needs.
NORMEXT_INLINE bool wants_totals(const ChannelBackwardArgs& args) {
  return args.grad_weight != nullptr || args.grad_bias != nullptr || (args.sums != nullptr && !args.given_sums);
}
NORMEXT_INLINE bool wants_means(const ChannelBackwardArgs& args) { return args.grad_input != nullptr && !args.fixed_stats; }
NORMEXT_INLINE bool wants_sums(const ChannelBackwardArgs& args) {
  return wants_totals(args) || (wants_means(args) && !args.given_sums);
}
NORMEXT_INLINE bool wants_values(const ChannelBackwardArgs& args) {
  return args.grad_input != nullptr || args.grad_residual != nullptr;
}
// Whether dx and dz follow without the sums: then the pass that sums, if there is one, gives them, too.
NORMEXT_INLINE bool values_need_no_sums(const ChannelBackwardArgs& args) { return args.fixed_stats || args.grad_input == nullptr; }
NORMEXT_INLINE bool wants_second_pass(const ChannelBackwardArgs& args) {
  return wants_values(args) && !(wants_sums(args) && values_need_no_sums(args));
}

// Whether a second pass may find dz as the first computed it (ChannelPlan::kept): the kernels without an activation go on from
// there.
template <bool kFused>
constexpr bool kKeepsDz = kFused && kKnowsPlain;
template <class T>
using KeptDz = std::conditional_t<sizeof(T) == 2, Kept<T>, T>;
NORMEXT_INLINE ChannelBackwardArgs args_after_dz(ChannelBackwardArgs args, const void* dz) {
  args.grad_output = dz;
  args.residual = nullptr;
  args.grad_residual = nullptr;
  args.activation = Activation::kNone;
  return args;
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
