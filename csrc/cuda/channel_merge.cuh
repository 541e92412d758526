// Moments that know how many values they are of, and their merge: that of norms/stats.h, two at a time, in an order that the shape
// fixes. Where the larger of two is the pivot, U is less than the deviation of their values, and its error needs no third sum. What
// becomes of a slab's statistics, and where they come from in evaluation. Also arrays of a type known at run time.
#pragma once

#include "core/channel_args.h"
#include "cuda/channel_entry.h"
#include "cuda/collectives.cuh"
#include "norms/channel_norm.h"

namespace normext::cuda {

template <class A>
struct Counted {
  Moments<A> moments{};
  A n = A(0);
};

// The merged moments are moments again: hi, lo and M2 as mean, correction and m2.
template <class A>
__device__ __forceinline__ Counted<A> merge(const Counted<A>& a, const Counted<A>& b) {
  const A n = a.n + b.n;
  const A pivot = a.n >= b.n ? a.moments.mean : b.moments.mean;
  const A merged = (a.n * relative_mean(a.moments, pivot) + b.n * relative_mean(b.moments, pivot)) / (n > A(0) ? n : A(1));
  const Centre<A> centre = centre_at(pivot, merged);
  const A m2 = centred_square(a.moments, a.n, centre) + centred_square(b.moments, b.n, centre);
  // Moments of no values have no place for a pivot.
  if (b.n == A(0)) return a;
  if (a.n == A(0)) return b;
  return {{centre.hi, centre.lo, m2}, n};
}

// Merges moments as they arrive; no accumulator takes more than 16 in sequence (the last one from 65536 on).
template <class A>
struct MergeSequence {
  Counted<A> level[4];
  unsigned count = 0;

  __device__ __forceinline__ void push(const Counted<A>& next) {
    level[0] = merge(level[0], next);
    if (++count % 16 == 0) fold(0);
    if (count % 256 == 0) fold(1);
    if (count % 4096 == 0) fold(2);
  }
  __device__ __forceinline__ Counted<A> all() const { return merge(merge(level[3], level[2]), merge(level[1], level[0])); }

 private:
  __device__ __forceinline__ void fold(int l) {
    level[l + 1] = merge(level[l + 1], level[l]);
    level[l] = {};
  }
};

constexpr int kImageLevels = 30;  // up to 2^30 images, or runs of images, in a sum

// By value: a reference to either would put both into local memory.
template <class A>
__device__ __forceinline__ Counted<A> select(bool first, const Counted<A>& a, const Counted<A>& b) {
  return {{first ? a.moments.mean : b.moments.mean, first ? a.moments.correction : b.moments.correction,
           first ? a.moments.m2 : b.moments.m2},
          first ? a.n : b.n};
}

// Merges one per lane, neighbours first; every lane of the warp must call it and gets the result.
template <class A>
__device__ __forceinline__ Counted<A> merge_lanes(Counted<A> own) {
  NORMEXT_NO_UNROLL
  for (int mask = 1; mask <= 16; mask *= 2) {
    const Counted<A> other = {
        {shuffle_xor(own.moments.mean, mask), shuffle_xor(own.moments.correction, mask), shuffle_xor(own.moments.m2, mask)},
        shuffle_xor(own.n, mask)};
    const bool lower = (lane_id() & static_cast<unsigned>(mask)) == 0;
    own = merge(select(lower, own, other), select(lower, other, own));
  }
  return own;
}

// A table of moments: all means, then all corrections, then all m2.
template <class A>
__device__ __forceinline__ void put_moments(A* table, std::int64_t entries, std::int64_t e, const Moments<A>& m) {
  table[e] = m.mean;
  table[entries + e] = m.correction;
  table[2 * entries + e] = m.m2;
}

// Merges such a table; count(e) says of how many values entry e is. Lane l takes entries l, l + 32, ... in turn. By one whole warp.
template <class A, class Count>
__device__ __forceinline__ Counted<A> merge_table(const A* table, std::int64_t entries, Count count) {
  MergeSequence<A> sequence;
  NORMEXT_NO_UNROLL
  for (std::int64_t e = lane_id(); e < entries; e += kWarpSize) {
    sequence.push({{table[e], table[entries + e], table[2 * entries + e]}, static_cast<A>(count(e))});
  }
  return merge_lanes(sequence.all());
}

// Element i of an array of a type known at run time, double if A is, one of the others if not; `absent` where there is no array.
template <class A>
__device__ __forceinline__ A load_any(DType dtype, const void* p, std::int64_t i, float absent) {
  if (p == nullptr) {
    return absent;
  } else if constexpr (sizeof(A) == 8) {
    return static_cast<const double*>(p)[i];
  } else if (dtype == DType::kFloat16) {
    return to_accumulate(static_cast<const Half*>(p)[i]);
  } else if (dtype == DType::kBFloat16) {
    return to_accumulate(static_cast<const BFloat16*>(p)[i]);
  } else {
    return static_cast<const float*>(p)[i];
  }
}
template <class A>
__device__ __forceinline__ void store_any(DType dtype, void* p, std::int64_t i, A value) {
  if constexpr (sizeof(A) == 8) {
    static_cast<double*>(p)[i] = value;
  } else if (dtype == DType::kFloat16) {
    static_cast<Half*>(p)[i] = from_accumulate<Half>(value);
  } else if (dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(p)[i] = from_accumulate<BFloat16>(value);
  } else {
    static_cast<float*>(p)[i] = value;
  }
}

// The running statistics of a channel take those of a batch.
template <class A>
__device__ __forceinline__ void update_running_stats(const RunningUpdate& update, A momentum, std::int64_t channel, A mean,
                                                     A unbiased) {
  const A rate = update.batches != nullptr ? A(1) / static_cast<A>(*update.batches) : momentum;
  const auto take = [&](void* running, A found) {
    const A old = load_any<A>(update.dtype, running, channel, 0.0f);
    store_any(update.dtype, running, channel, ChannelNorm::running<A>(old, found, rate));
  };
  take(update.mean, mean);
  take(update.var, unbiased);
}

template <class A>
__device__ __forceinline__ void put_stats(A* stats, std::int64_t slabs, std::int64_t slab, const CentredRow<A>& row, A unbiased) {
  stats[slab] = row.hi;
  stats[slabs + slab] = row.lo;
  stats[2 * slabs + slab] = row.rstd;
  stats[3 * slabs + slab] = unbiased;
}

// A slab's statistics, from its merged moments.
template <class A>
struct SlabStats {
  CentredRow<A> row;
  A m2, unbiased;

  __device__ __forceinline__ SlabStats(const Moments<A>& m, A n, A eps)
      : row(finish_centred(m.mean, m.correction, m.m2, n, eps)), m2(m.m2), unbiased(ChannelNorm::unbiased_variance(m.m2, n)) {}

  // By one thread. A slab of batch norm is a channel.
  __device__ __forceinline__ void save(const SlabSink<A>& sink, std::int64_t slab) const {
    if (sink.stats != nullptr) put_stats(sink.stats, sink.slabs, slab, row, unbiased);
    if (sink.moments != nullptr) put_moments(sink.moments, sink.slabs, slab, Moments<A>{row.hi, row.lo, m2});
    if (sink.update.mean != nullptr) update_running_stats(sink.update, sink.momentum, slab, row.hi + row.lo, unbiased);
  }
};

template <class A>
__device__ __forceinline__ CentredRow<A> load_stats(const void* stats, std::int64_t slabs, std::int64_t slab) {
  const A* p = static_cast<const A*>(stats);
  return {p[slab], p[slabs + slab], p[2 * slabs + slab]};
}

// Element i of an array of T, or of float32 where that is the type of the parameters of a 16-bit norm.
template <class T>
__device__ __forceinline__ Accumulate<T> load_parameter(const void* p, bool wide, std::int64_t i, float absent) {
  if (p == nullptr) return absent;
  if (sizeof(T) == 2 && wide) return static_cast<const float*>(p)[i];
  return to_accumulate(static_cast<const T*>(p)[i]);
}

// The statistics of a channel in evaluation.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ CentredRow<A> running_stats(const ChannelForwardArgs& args, bool wide, std::int64_t channel, A eps) {
  return ChannelNorm::from_running<A>(load_parameter<T>(args.running_mean, wide, channel, 0.0f),
                                      load_parameter<T>(args.running_var, wide, channel, 1.0f), eps);
}

// y = activation(z), one branch for all values.
template <class A, int N>
__device__ __forceinline__ void activate_all(Activation activation, A (&z)[N]) {
  switch_activation(activation, [&](auto which) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = activate<A>(which.value, z[i]);
  });
}

// dz from dy, in place, the same way.
template <class A, int N>
__device__ __forceinline__ void activation_gradients(Activation activation, const A (&z)[N], A (&dz)[N]) {
  switch_activation(activation, [&](auto which) {
#pragma unroll
    for (int i = 0; i < N; ++i) dz[i] = activation_gradient<A>(which.value, z[i], dz[i]);
  });
}

}  // namespace normext::cuda
