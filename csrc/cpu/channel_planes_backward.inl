// Channel norms backward on [batch, channels, spatial] for one instruction set.
//
// Each plane gives sum(dz) and sum(dz*xhat), plane by plane or, where planes are long, segment by segment (short planes:
// channel_short.inl; their groups have means from sums of their own). From these come the
// means of a slab and the parameter gradients; then dx and dz are formed from the input once more, or dx from dz (plan.kept), cut
// anywhere. With fixed statistics they are formed in the first pass, but not where planes are short. plan.partial: sums [2, planes
// * pieces]; plan.merged: the same of whole planes; plan.rows: means [2, slabs] of g and g*xhat; plan.params: sums [2, channels]
// over all images.
#pragma once

#include "cpu/channel_planes.inl"
#include "cpu/tuning.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// Dz: grad_output is dz that was kept, and begins with value kept_first.
template <class T, bool kFused, class Dz = T>
struct PlanesBackward {
  using A = Accumulate<T>;
  using V = Vector<A>;

  const ChannelBackwardArgs& args;
  const cpu::ChannelPlan& plan;
  const std::int64_t kept_first = 0;
  const ChannelShape& shape = args.shape;
  const std::int64_t channels = shape.channels;
  // What has sums of its own: images and planes, or of short planes all that make a segment.
  const std::int64_t parts = plan.images != 0 ? (shape.batch + plan.images - 1) / plan.images : shape.batch;
  const std::int64_t planes = parts * shape.channels;
  const std::int64_t group = shape.group_channels();
  const T* const input = static_cast<const T*>(args.input);
  const Dz* const grad_output = static_cast<const Dz*>(args.grad_output);
  const T* const residual = static_cast<const T*>(args.residual);
  A* const plane_sums = static_cast<A*>(plan.merged);
  A* const means = static_cast<A*>(plan.rows);
  A* const totals = static_cast<A*>(plan.params);
  const Parameter<T> weight = weight_of<T>(args);
  const Parameter<T> bias = bias_of<T>(args);
  const bool second_pass = wants_second_pass(args);
  // What is fetched while sums are taken, or null. Of all that the pass reads and writes: what lies a page ahead, where it gives
  // the values, too, and they come from memory [Zen 4, fixed statistics, forward and backward: 32x256x14x14 float32 835 -> 697 us,
  // 8x64x112x112 bfloat16 1274 -> 1114]; what only sums read is left to the processor [up to a tenth more].
  const bool from_memory = comes_from_memory<T>(shape);
  const T* const dx_ahead = plan.fetch_output ? static_cast<const T*>(args.grad_input) : nullptr;

  // Where dz is kept, or null; from value `first` on.
  struct RoomForDz {
    KeptDz<T>* dz = nullptr;
    std::int64_t first = 0;
  };

  NORMEXT_INLINE UnitAffine<A> affine_of_plane(const PlaneCursor& cursor) const {
    return affine_of_slab<A>(slab_of<T>(args, cursor.slab), both<A>(V{} + weight[cursor.channel]),
                             both<A>(V{} + bias[cursor.channel]));
  }

  template <class Extent>
  NORMEXT_INLINE void read_unit(std::int64_t i, const UnitAffine<A>& affine, Pair<A> (&xhat)[1], Pair<A> (&dz)[1],
                                Extent extent) const {
    xhat[0] = load<T>(input + i, extent);
    dz[0] = load<T>(grad_output + i, extent);
    const T* const extra[1] = {at(residual, i)};
    backward_units<T, kFused>(args.activation, extra, affine, xhat, dz, extent);
  }

  // Sums of segments [begin, end), in the order of memory; with kValues their dx and dz, too, which need no sums then; with kKeep
  // their dz to `room`.
  template <bool kValues, bool kKeep = false>
  __attribute__((noinline)) void sums(std::int64_t begin, std::int64_t end, const RoomForDz& room = {}) const {
    A* partial = static_cast<A*>(plan.partial);
    const std::int64_t table = planes * plan.pieces;
    PlaneCursor cursor(shape, begin / plan.pieces);
    std::int64_t piece = begin % plan.pieces;
    while (begin < end) {
      const int count = static_cast<int>(smaller(kMaxBatch, end - begin));
      V lanes[2][kMaxBatch];
      alignas(V) A out[2][kMaxBatch];
      for (int r = 0; r < count; ++r) {
        const UnitAffine<A> affine = affine_of_plane(cursor);
        const std::int64_t from = piece * plan.piece, first = cursor.plane * shape.spatial + from;
        const std::int64_t page = first + cpu::kPageBytes / static_cast<std::int64_t>(sizeof(T));
        const L2Prefetch<T> next_dx = {kValues ? at(from_memory ? static_cast<const T*>(args.grad_input) : nullptr, page)
                                               : at(dx_ahead, first)};
        const L2Prefetch<T> next_x = {from_memory ? input + page : nullptr}, next_dy = {from_memory ? grad_output + page : nullptr};
        V of_plane[2];
        sum_columns<A>(
            smaller(plan.piece, shape.spatial - from),
            [&](std::int64_t column, auto extent, Sums<A, 2>& s) __attribute__((always_inline)) {
              next_dx.fetch(column);
              if constexpr (kValues) {
                next_x.fetch(column);
                next_dy.fetch(column);
              }
              Pair<A> xhat[1], dz[1];
              read_unit(first + column, affine, xhat, dz, extent);
              if constexpr (kValues) {
                store_gradients<T, true>(args, first + column, affine, dz[0], xhat[0], Pair<A>{}, Pair<A>{}, extent);
              }
              if constexpr (kKeep) store<T>(room.dz + (first - room.first) + column, dz[0], extent);
              const Pair<A> x = keep<T>(xhat[0], extent);
              const Pair<A> g = kFused ? keep<T>(dz[0], extent) : dz[0];
              s.of[0] = s.of[0] + g;
              s.of[1] = {fma(g.a, x.a, s.of[1].a), fma(g.b, x.b, s.of[1].b)};
            },
            of_plane);
        lanes[0][r] = of_plane[0];
        lanes[1][r] = of_plane[1];
        if (++piece < plan.pieces) continue;
        piece = 0;
        cursor.next();
      }
      for (int q = 0; q < 2; ++q) {
        sum_lanes_of_rows(lanes[q], count, out[q]);
        for (int r = 0; r < count; ++r) partial[q * table + begin + r] = out[q][r];
      }
      begin += count;
    }
  }
  void sums_of(std::int64_t begin, std::int64_t end, const RoomForDz& room) const {
    if constexpr (kKeepsDz<kFused>) {
      if (room.dz != nullptr) return sums<false, true>(begin, end, room);
    }
    if (wants_values(args) && !second_pass) sums<true>(begin, end);
    else sums<false>(begin, end);
  }
  // Sums of planes [begin, end) from those of their segments.
  void merge_planes(std::int64_t begin, std::int64_t end) const {
    if (plan.pieces == 1) return;
    const A* partial = static_cast<const A*>(plan.partial);
    for (int q = 0; q < 2; ++q) {
      for (std::int64_t plane = begin; plane < end; ++plane) {
        const A* of_plane = partial + (q * planes + plane) * plan.pieces;
        plane_sums[q * planes + plane] = sum_terms(plan.pieces, [&](std::int64_t s) { return of_plane[s]; });
      }
    }
  }

  void sum_images(std::int64_t begin, std::int64_t end) const {
    for (int q = 0; q < 2; ++q) sum_table(plane_sums + q * planes, channels, parts, totals + q * channels, begin, end);
  }

  // Means of slabs [begin, end).
  void slab_means(std::int64_t begin, std::int64_t end) const {
    const A n = args.given_sums ? static_cast<A>(*args.count) : static_cast<A>(shape.slab_size());
    const A* sums = args.given_sums ? static_cast<const A*>(args.sums) : totals;
    for (int q = 0; q < 2; ++q) {
      A* mean = means + q * shape.slabs();
      if (shape.batch_norm()) {
        channel_means<T>(args, begin, end - begin, sums + q * channels + begin, n, mean + begin);
        continue;
      }
      for (std::int64_t slab = begin; slab < end; ++slab) {
        const std::int64_t first = slab * group;
        mean[slab] = group_mean<T>(args, first % channels, group, plane_sums + q * planes + first, n);
      }
    }
  }

  template <bool kFixed, int kUnits, class Extent>
  NORMEXT_INLINE void value_units(std::int64_t i, const UnitAffine<A>& affine, Pair<A> mean_g, Pair<A> mean_gx,
                                  Extent extent) const {
    constexpr bool kInput = kFused || !kFixed;
    const T* extra[kUnits];
    Pair<A> xhat[kUnits] = {}, dz[kUnits];
#pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      extra[u] = at(residual, i + u * kUnit<A>);
      dz[u] = load<T>(grad_output + (i - kept_first) + u * kUnit<A>, extent);
      if constexpr (kInput) xhat[u] = load<T>(input + i + u * kUnit<A>, extent);
    }
    if constexpr (kInput) {
      backward_units<T, kFused, kUnits>(args.activation, extra, affine, xhat, dz, extent);
    }
#pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      store_gradients<T, kFixed>(args, i + u * kUnit<A>, affine, dz[u], xhat[u], mean_g, mean_gx, extent);
    }
  }

  // dx and dz of values [begin, end).
  template <bool kFixed>
  __attribute__((noinline)) void values(std::int64_t begin, std::int64_t end) const {
    const A* of_g = means;
    const A* of_gx = means + shape.slabs();
    PlaneCursor cursor(shape, begin / shape.spatial);
    std::int64_t offset = begin % shape.spatial;
    for (; begin < end; cursor.next(), offset = 0) {
      const std::int64_t stop = smaller(begin + shape.spatial - offset, end);
      const UnitAffine<A> affine = affine_of_plane(cursor);
      const Pair<A> mean_g = both<A>(V{} + (kFixed ? A(0) : of_g[cursor.slab]));
      const Pair<A> mean_gx = both<A>(V{} + (kFixed ? A(0) : of_gx[cursor.slab]));
      std::int64_t done = 0;
      for (; stop - begin - done >= 2 * kUnit<A>; done += 2 * kUnit<A>) {
        value_units<kFixed, 2>(begin + done, affine, mean_g, mean_gx, Whole{});
      }
      for_output_units<A>(done, stop - begin, [&](std::int64_t i, auto extent) __attribute__((always_inline)) {
        value_units<kFixed, 1>(begin + i, affine, mean_g, mean_gx, extent);
      });
      begin = stop;
    }
  }
  void values_of(std::int64_t begin, std::int64_t end, const RoomForDz& room) const {
    if constexpr (kKeepsDz<kFused>) {
      if (room.dz != nullptr) {
        const ChannelBackwardArgs rest = args_after_dz(args, room.dz);
        return PlanesBackward<T, false, KeptDz<T>>{rest, plan, room.first}.template values<false>(begin, end);
      }
    }
    if (values_need_no_sums(args)) values<true>(begin, end);
    else values<false>(begin, end);
  }

  // body(begin, end) over the planes of slabs [begin, end).
  template <class Body>
  NORMEXT_INLINE void for_planes(std::int64_t begin, std::int64_t end, Body body) const {
    if (!shape.batch_norm()) return body(begin * group, end * group);
    for (std::int64_t image = 0; image < shape.batch; ++image) body(image * channels + begin, image * channels + end);
  }

  // Everything for slabs [begin, end), a block at a time, the dz of each in the same room if it has one of its own.
  void resident_slabs(std::int64_t begin, std::int64_t end, KeptDz<T>* kept) const {
    const bool own_room = plan.kept_values != 0;
    const std::int64_t slab_bytes = shape.slab_size() * 2 * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t fit = own_room ? plan.kept_values / shape.slab_size() : kBlockBytes / slab_bytes;
    const std::int64_t block = fit < 1 ? 1 : smaller(fit, cpu::kBlockColumns);
    for (std::int64_t slab = begin; slab < end; slab += block) {
      const std::int64_t last = smaller(slab + block, end);
      const RoomForDz room = {kept, own_room ? slab * shape.slab_size() : 0};
      if (wants_sums(args)) {
        for_planes(slab, last, [&](std::int64_t first, std::int64_t stop) {
          sums_of(first * plan.pieces, stop * plan.pieces, room);
          merge_planes(first, stop);
        });
        if (shape.batch_norm()) sum_images(slab, last);
      }
      if (wants_means(args)) slab_means(slab, last);
      if (!second_pass) continue;
      for_planes(slab, last,
                 [&](std::int64_t first, std::int64_t stop) { values_of(first * shape.spatial, stop * shape.spatial, room); });
    }
  }
  void resident() const {
    KeptDz<T>* const kept = static_cast<KeptDz<T>*>(plan.kept);
    const std::int64_t slabs = shape.slabs(), threads = plan.parallel.threads;
    if (plan.kept_values == 0) {
      return for_ranges(plan.parallel, slabs, [&](std::int64_t begin, std::int64_t end) { resident_slabs(begin, end, kept); });
    }
    for_ranges(plan.parallel, threads, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t t = first; t < last; ++t)
        resident_slabs(slabs * t / threads, slabs * (t + 1) / threads, kept + t * plan.kept_values);
    });
  }

  void in_phases() const {
    const RoomForDz room = {static_cast<KeptDz<T>*>(plan.kept), 0};
    if (wants_sums(args)) {
      for_ranges(plan.parallel, planes * plan.pieces, [&](std::int64_t begin, std::int64_t end) { sums_of(begin, end, room); });
      merge_planes(0, planes);
      if (shape.batch_norm()) {
        for_columns(plan.parallel, channels, planes, [&](std::int64_t begin, std::int64_t end) { sum_images(begin, end); });
      }
    }
    if (wants_means(args)) slab_means(0, shape.slabs());
    if (!second_pass) return;
    const std::int64_t elements = shape.elements();
    for_ranges_again(plan.parallel, (elements + kValuesOfTask - 1) / kValuesOfTask, [&](std::int64_t begin, std::int64_t end) {
      values_of(begin * kValuesOfTask, smaller(end * kValuesOfTask, elements), room);
    });
  }

  // Scalars of the columns of a block, then the means.
  enum { kOfMeanG = kAffineScalars, kOfMeanGx, kScalars };
  using Columns = ShortColumns<A>[kScalars];
  NORMEXT_INLINE void spread_scalars(const ShortBlock<T>& block, Columns& scalars) const {
    const A* stats = static_cast<const A*>(args.stats);
    for (int k = kOfHi; k <= kOfRstd; ++k)
      block.spread_in_order(scalars[k], [&](std::int64_t c) { return stats[k * channels + c]; });
    block.spread_in_order(scalars[kOfWeight], [&](std::int64_t c) { return weight[c]; });
    if constexpr (kFused) block.spread_in_order(scalars[kOfBias], [&](std::int64_t c) { return bias[c]; });
  }
  // Quantity q of a segment of a block.
  NORMEXT_INLINE void store_sums(const ShortBlock<T>& block, std::int64_t segment, int q, const ShortColumns<A>& of_columns) const {
    alignas(V) A sums[kMostShortChannels<A>];
    block.add_positions(of_columns, sums);
    A* out = plane_sums + q * planes + segment * channels + block.first;
    for (std::int64_t c = 0; c < block.channels; ++c) out[c] = sums[c];
  }
  // Sums of a segment of a block.
  __attribute__((noinline)) void short_sums(const ShortBlock<T>& block, std::int64_t segment, const Columns& scalars) const {
    const std::int64_t begin = segment * plan.images, end = smaller(begin + plan.images, shape.batch);
    ShortColumns<A> of_columns[2];
    block.template add_images<2>(begin, end, of_columns,
                                 [&](std::int64_t i, std::int64_t column, auto extent, Sums<A, 2>& s)
                                     __attribute__((always_inline)) {
                                       Pair<A> xhat[1], dz[1];
                                       read_unit(i, affine_of_columns<T, kFused>(scalars, column), xhat, dz, extent);
                                       s.of[0] = s.of[0] + dz[0];
                                       s.of[1] = {fma(dz[0].a, xhat[0].a, s.of[1].a), fma(dz[0].b, xhat[0].b, s.of[1].b)};
                                     });
    for (int q = 0; q < 2; ++q) store_sums(block, segment, q, of_columns[q]);
  }
  // dx and dz of a block.
  template <bool kFixed>
  __attribute__((noinline)) void short_values(const ShortBlock<T>& block, Columns& scalars) const {
    for (int k = 0; !kFixed && k < 2; ++k) {
      block.spread_in_order(scalars[kOfMeanG + k], [&](std::int64_t c) { return means[k * channels + c]; });
    }
    for (std::int64_t image = 0; image < shape.batch; ++image) {
      const std::int64_t first = block.offset(image);
      for_units<A>(0, block.columns(), [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
        Pair<A> mean_g = {}, mean_gx = {};
        if constexpr (!kFixed) {
          mean_g = Packed<A>::read(scalars[kOfMeanG].of + column).unpack();
          mean_gx = Packed<A>::read(scalars[kOfMeanGx].of + column).unpack();
        }
        value_units<kFixed, 1>(first + column, affine_of_columns<T, kFused>(scalars, column), mean_g, mean_gx, extent);
      });
    }
  }
  void short_blocks(std::int64_t begin, std::int64_t end) const {
    const std::int64_t most = ShortBlock<T>::channels_of(shape, 2);
    for (std::int64_t c = begin; c < end; c += most) {
      const ShortBlock<T> block = {shape, c, smaller(most, end - c)};
      Columns scalars;
      spread_scalars(block, scalars);
      if (wants_sums(args)) {
        for (std::int64_t segment = 0; segment < parts; ++segment) short_sums(block, segment, scalars);
        sum_images(c, c + block.channels);
      }
      if (wants_means(args)) slab_means(c, c + block.channels);
      if (!wants_values(args)) continue;
      if (values_need_no_sums(args)) short_values<true>(block, scalars);
      else short_values<false>(block, scalars);
    }
  }

  // Everything for group `g` in the images of a segment.
  __attribute__((noinline)) void short_group(std::int64_t segment, std::int64_t g) const {
    const std::int64_t begin = segment * plan.images, end = smaller(begin + plan.images, shape.batch), first = g * group;
    const std::int64_t most = ShortBlock<T>::channels_of_group_block(shape);
    const int count = static_cast<int>(end - begin);
    CentredRow<A> rows[kMaxBatch];
    for (int r = 0; r < count; ++r) rows[r] = slab_of<T>(args, (begin + r) * shape.groups + g);
    ShortColumns<A> w, b;
    const auto spread = [&](const ShortBlock<T>& block) {
      block.spread(w, [&](std::int64_t c) { return weight[c]; });
      if constexpr (kFused) block.spread(b, [&](std::int64_t c) { return bias[c]; });
    };
    alignas(V) A of_block[2][kMostBlocks<A>][kMaxBatch];
    std::int64_t blocks = 0;
    for (std::int64_t c = 0; c < group; c += most, ++blocks) {
      const ShortBlock<T> block = {shape, first + c, smaller(most, group - c)};
      spread(block);
      V lanes[2][kMaxBatch] = {};
      ShortColumns<A> of_columns[2];
      for_units<A>(0, block.columns(), [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
        const Pair<A> wi = load<T>(w.of + column, extent), bi = kFused ? load<T>(b.of + column, extent) : Pair<A>{};
        Sums<A, 2> s = {};
        for (int r = 0; r < count; ++r) {
          Pair<A> xhat[1], dz[1];
          read_unit(block.offset(begin + r) + column, affine_of_slab<A>(rows[r], wi, bi), xhat, dz, extent);
          const Pair<A> x = keep<T>(xhat[0], extent), d = kFused ? keep<T>(dz[0], extent) : dz[0];
          s.of[0] = s.of[0] + d;
          s.of[1] = {fma(d.a, x.a, s.of[1].a), fma(d.b, x.b, s.of[1].b)};
          const Pair<A> wd = {d.a * wi.a, d.b * wi.b};
          lanes[0][r] = lanes[0][r] + (wd.a + wd.b);
          lanes[1][r] = lanes[1][r] + fma(wd.a, x.a, wd.b * x.b);
        }
        for (int q = 0; q < 2; ++q) store<T>(of_columns[q].of + column, s.of[q], extent);
      });
      for (int q = 0; q < 2; ++q) {
        sum_lanes_of_rows(lanes[q], count, of_block[q][blocks]);
        if (wants_totals(args)) store_sums(block, segment, q, of_columns[q]);
      }
    }
    if (!wants_values(args)) return;
    Pair<A> mean[2][kMaxBatch];
    for (int q = 0; q < 2; ++q) {
      for (int r = 0; r < count; ++r) {
        const A sum = sum_terms(blocks, [&](std::int64_t i) { return of_block[q][i][r]; });
        mean[q][r] = both<A>(V{} + sum / static_cast<A>(shape.slab_size()));
      }
    }
    for (std::int64_t c = 0; c < group; c += most) {
      const ShortBlock<T> block = {shape, first + c, smaller(most, group - c)};
      if (blocks > 1) spread(block);
      for (int r = 0; r < count; ++r) {
        for_output_units<A>(0, block.columns(), [&](std::int64_t column, auto extent) __attribute__((always_inline)) {
          const Pair<A> wi = load<T>(w.of + column, extent), bi = kFused ? load<T>(b.of + column, extent) : Pair<A>{};
          value_units<false, 1>(block.offset(begin + r) + column, affine_of_slab<A>(rows[r], wi, bi), mean[0][r], mean[1][r],
                                extent);
        });
      }
    }
  }

  // Everything but the gradients of the parameters.
  void sums_and_values() const {
    if constexpr (kKnowsShortPlanes<T>) {
      if (plan.images != 0 && !shape.batch_norm()) {
        return for_ranges(plan.parallel, parts * shape.groups, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t task = begin; task < end; ++task) short_group(task / shape.groups, task % shape.groups);
        });
      }
      if (plan.images != 0) {
        return for_ranges(plan.parallel, channels, [&](std::int64_t begin, std::int64_t end) { short_blocks(begin, end); });
      }
    }
    if (plan.resident) resident();
    else in_phases();
  }

  void run() const {
    sums_and_values();
    if (!wants_totals(args)) return;
    if (!shape.batch_norm()) {
      for_columns(plan.parallel, channels, planes, [&](std::int64_t begin, std::int64_t end) { sum_images(begin, end); });
    }
    store_totals<T>(args, totals, totals + channels);
  }
};

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
