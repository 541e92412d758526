// Entry points of the channel norms on the CPU: how a call is divided, the workspace, and the merge of statistics of several ranks.
// As for row norms, thread counts decide only who does the work; everything that shapes a sum is computed from the shape.

#include "norms/channel_norm.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/dtypes.h"
#include "cpu/channel_kernels.h"
#include "cpu/isa.h"
#include "cpu/row_kernels.h"
#include "cpu/tuning.h"

namespace normext::cpu {
namespace {

constexpr std::int64_t kAlignment = 64;  // of the workspace: a cache line
// Rows of a run in channels-last: as many as fit L2 with the next run, since rows are read twice, but enough that merging costs
// little and a sample is small, and no more than the 16 terms of an accumulator that takes 8 rows at a time. An image of 512 rows
// and more has about 8 runs or more, so that it can be shared. [1280 channels of 8x8: runs of 16 rows took up to a fifth longer.
// Zen 4, 64 and 256 KB: BatchNorm float32 8x512x28x28 681 -> 610 us, 32x256x14x14 345 -> 306, bfloat16 8x2048x7x7 162 -> 127; with
// gradients up to a tenth less]
constexpr std::int64_t kRunBytes = 256 * 1024;
constexpr std::int64_t kLeastRun = 64;  // whatever fits, or equal pieces of less
constexpr std::int64_t kMostRun = 128;
constexpr std::int64_t kRunsOfImage = 8;
constexpr std::int64_t kRowGroup = 8;
// Bytes of work, counted as in threads_for(), that sharing a call in channels-last must gain beyond those of any call: scalars of
// all channels pass from core to core. Measured: even at 50000 values of 64 channels; of 1280, 63000 are better left to one thread
// in a forward and shared in a backward.
constexpr std::int64_t kSharingBytes = 240 * 1024;
constexpr std::int64_t kSharingBytesOfChannel = 200;

// Groups of short planes: input and gradient of a segment, and tasks of a call, each a group in a segment.
constexpr std::int64_t kShortSegmentBytes = 256 * 1024;
constexpr std::int64_t kLeastShortTasks = 16;
// Of small slabs whose dz is kept together.
constexpr std::int64_t kKeptValues = 16 * 1024;
// Of room for dz of a tensor in 16 bits [Zen 3, two threads, GroupNorm of channels-last, bfloat16, forward and backward,
// times as fast as without, with SiLU and GELU: 2.6 MB 1.16 and 1.28, 5.2 MB 1.10 to 1.26, 10.5 MB 1.04 and 0.86].
constexpr std::int64_t kMostKeptBytes = 6 << 20;

std::int64_t over(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }
std::int64_t padded(std::int64_t n) { return over(n, kMaxUnit) * kMaxUnit; }

// The same values seen as one of the shapes that kernels know (channel_kernels.h).
ChannelShape seen_by_kernels(ChannelShape shape) {
  if (shape.batch_norm() && shape.channels == 1) {  // one line of values, whatever their places
    shape.spatial *= shape.batch;
    shape.batch = 1;
    shape.layout = ChannelLayout::kPlanes;
    return shape;
  }
  shape = canonical(shape);
  if (shape.layout == ChannelLayout::kChannelsLast && shape.batch_norm()) {
    shape.spatial *= shape.batch;
    shape.batch = 1;
    shape.groups = shape.channels;
  }
  return shape;
}

ChannelForwardArgs seen_by_kernels(ChannelForwardArgs args) {
  args.shape = seen_by_kernels(args.shape);
  args.given_stats = !args.takes_statistics();
  return args;
}

// Length of equal pieces of at most `most` values of n; whole multiples of `unit`.
std::int64_t piece_of(std::int64_t n, std::int64_t most, std::int64_t unit) { return over(over(n, over(n, most)), unit) * unit; }

// Whether planes are short, of at most `most` values, for kernels that know.
bool has_short_planes(const ChannelShape& shape, DType dtype, std::int64_t most) {
  return kernels().fused_multiply_add && dtype != DType::kFloat64 && shape.layout == ChannelLayout::kPlanes &&
         shape.spatial >= kLeastShort && shape.spatial <= most;
}
// Images of a segment of batch norm where planes are short: in equal numbers of no more than an accumulator takes; 0 where they are
// not. [Zen 4, two threads, without and with, us: BatchNorm 128x512x4x4 float32 574 -> 195, bfloat16 510 -> 163, evaluation 216 ->
// 94, with gradients 1657 -> 939; 8x1280x7x7 bfloat16 118 -> 90, with residual and ReLU float32 160 -> 111, but evaluation 49 -> 64
// and backward as long as before; 8x256x14x14 a tenth more.]
std::int64_t short_images(const ChannelShape& shape, DType dtype, std::int64_t most) {
  const bool many = shape.batch_norm() && shape.batch >= kLeastShortImages && shape.channels >= kLeastShortChannels;
  return many && has_short_planes(shape, dtype, most) ? piece_of(shape.batch, kTermsPerSum, 1) : 0;
}
// The same of groups in a backward: fewer images where they would not stay in L2, or would make too few tasks. Batches of one
// image, too, since dx may not depend on the batch. Larger groups go plane by plane (one of 2048 channels of 5x5 does).
std::int64_t short_images_of_groups(const ChannelBackwardArgs& args) {
  const ChannelShape& shape = args.shape;
  const std::int64_t values = shape.group_channels() * shape.spatial;
  if (shape.batch_norm() || args.fixed_stats || args.given_sums || shape.group_channels() == 1 || values > kMostShortGroup)
    return 0;
  if (!has_short_planes(shape, args.dtype, kMostShort)) return 0;
  const std::int64_t fit = kShortSegmentBytes / (2 * values * static_cast<std::int64_t>(size_of(args.dtype)));
  const std::int64_t most = std::min({kTermsPerSum, fit, shape.batch * shape.groups / kLeastShortTasks});
  return piece_of(shape.batch, std::max(most, std::int64_t{1}), 1);
}

// Several runs are up to a quarter longer or shorter if that leaves fewer rows to the busiest of two and of four threads [Zen 4,
// two threads: GroupNorm float32 1x640x32x32 90.6 -> 85.0 us; BatchNorm float32 8x2048x7x7 164 -> 149, with gradients 508 -> 458;
// eight shapes of the grid in both dtypes 3 %].
std::int64_t run_rows(const ChannelShape& shape, DType dtype) {
  const std::int64_t rows = shape.spatial, row_bytes = shape.channels * static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t fit = std::clamp(kRunBytes / row_bytes, kLeastRun, kMostRun);
  const std::int64_t usual = piece_of(rows, std::clamp(rows / kRunsOfImage, kLeastRun, fit), kRowGroup);
  if (usual >= rows) return usual;
  const auto busiest = [&](std::int64_t run) {
    const std::int64_t runs = over(rows, run);
    return (over(runs, 2) + over(runs, 4)) * run;
  };
  std::int64_t best = usual;
  for (std::int64_t run = over(3 * usual, 4 * kRowGroup) * kRowGroup; run <= std::min(5 * usual / 4, kMostRun); run += kRowGroup) {
    if (busiest(run) < busiest(best)) best = run;
  }
  return best;
}

// Lays arrays of `counts` values out one after the other, each on a cache line; returns the bytes up to the last. Without a base
// only these.
template <std::size_t kArrays>
std::size_t lay_out(void* base, std::size_t value_bytes, const std::int64_t (&counts)[kArrays], void** const (&places)[kArrays]) {
  const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(base) + kAlignment - 1) / kAlignment * kAlignment;
  std::size_t offset = 0;
  for (std::size_t i = 0; i < kArrays; ++i) {
    if (base != nullptr) *places[i] = reinterpret_cast<void*>(start + offset);
    offset += static_cast<std::size_t>(over(counts[i] * static_cast<std::int64_t>(value_bytes), kAlignment) * kAlignment);
  }
  return offset + kAlignment;
}

// What stays in L2 until it is read again.
std::int64_t resident_bytes() { return std::min(l2_bytes(), kMostResidentBytes); }

// Whether units of work, `count` of at most `bytes` each, are handled one after the other: such a unit fits L2, and threads that
// share them out are busy to the end, three quarters of them at least.
bool handled_whole(std::int64_t count, std::int64_t bytes, std::int64_t threads) {
  return bytes <= resident_bytes() && 4 * count >= 3 * over(count, threads) * threads;
}

// The columns of an image that are handled as a unit: all, blocks of them if the image may be cut, or 0 if no unit fits. Threads
// share images, not their columns: what made the input, and what reads the output, will have shared rows, and lines that are in the
// other core's cache come slowly [Zen 4, columns shared by two threads: BatchNorm 8x512x7x7 77 -> 199 us, GroupNorm 1x1280x8x8 28
// -> 72].
std::int64_t columns_of_unit(const ChannelShape& shape, std::int64_t value_bytes, int read, bool may_cut, std::int64_t threads) {
  const std::int64_t group = shape.group_channels(), column_bytes = shape.spatial * value_bytes * read;
  std::int64_t columns = shape.channels;
  if (may_cut && is_amd() && group > 1) {
    const std::int64_t step = std::lcm(kColumnStep, group);
    if (columns * column_bytes <= resident_bytes()) {
      if (value_bytes > 2 && columns >= 2 * kNarrowColumns)
        columns = std::min(columns, std::max(kNarrowColumns / step, std::int64_t{1}) * step);
    } else if (shape.batch * columns * column_bytes <= kMostBlockedBytes) {
      columns = resident_bytes() / column_bytes / step * step;
      if (columns * value_bytes < kLeastBlockBytes) return 0;
    }
  }
  return handled_whole(shape.batch, columns * column_bytes, threads) ? columns : 0;
}

// Threads for a call that reads and writes `tensors` tensors of a shape, of which `read` are read twice. `plain`: its last pass
// writes something, without an activation. may_cut: an image of channels-last may be taken in blocks of columns.
void share(ChannelPlan& plan, const Parallel& parallel, const ChannelShape& shape, DType dtype, int tensors, int read, bool plain,
           bool may_cut) {
  std::int64_t bytes = shape.elements() * tensors * static_cast<std::int64_t>(accumulate_size_of(dtype));
  if (shape.layout == ChannelLayout::kChannelsLast) bytes -= kSharingBytes + kSharingBytesOfChannel * shape.channels;
  plan.parallel = threads_for(parallel, bytes);
  const std::int64_t threads = plan.parallel.threads, value_bytes = static_cast<std::int64_t>(size_of(dtype));
  if (shape.layout == ChannelLayout::kPlanes) {
    plan.resident = handled_whole(shape.slabs(), shape.slab_size() * value_bytes * read, threads);
    plan.fetch_output = is_amd() && plan.resident && plain && shape.slab_size() * value_bytes <= kFetchOutputBytes;
  } else {
    plan.columns = columns_of_unit(shape, value_bytes, read, may_cut, threads);
    plan.resident = plan.columns != 0;
  }
}

std::size_t forward_plan(const ChannelForwardArgs& args, void* workspace, ChannelPlan& plan) {
  const ChannelShape& shape = args.shape;
  std::int64_t moments, rows = 0, params = 0;
  plan.images = short_images(shape, args.dtype, args.given_stats ? kMostShort : kMostShortOfStatistics);
  if (plan.images != 0) {
    plan.piece = plan.images * shape.spatial;
    plan.pieces = over(shape.batch, plan.images);
    plan.padded = padded(shape.channels);
    moments = kChannelMoments * plan.pieces * plan.padded;
  } else if (shape.layout == ChannelLayout::kPlanes) {
    const std::int64_t line = shape.batch_norm() ? shape.spatial : shape.group_channels() * shape.spatial;
    plan.piece = piece_of(line, kSegment, kMaxUnit);
    plan.pieces = over(line, plan.piece);
    plan.padded = padded(shape.slabs());
    moments = kChannelMoments * (shape.batch_norm() ? shape.batch : 1) * plan.pieces * plan.padded;
  } else {
    plan.piece = run_rows(shape, args.dtype);
    plan.pieces = over(shape.spatial, plan.piece);
    plan.padded = padded(shape.channels);
    moments = kChannelMoments * shape.batch * plan.pieces * plan.padded;
    rows = kForwardRows * shape.batch * plan.padded;
    params = 2 * plan.padded;
  }
  return lay_out(workspace, accumulate_size_of(args.dtype), {args.given_stats ? 0 : moments, rows, params},
                 {&plan.partial, &plan.rows, &plan.params});
}

// Whether, and where, dz is kept for the pass that forms dx, which then needs neither residual nor activation: if the activation
// takes long, in the gradient of the residual, or in place of dx. In 16 bits, where neither is exact, in room for slabs that are
// handled whole, or in channels-last for a tensor of which the caches hold much. Units end where planes and rows do, so that none
// is written twice. [Zen 3, one thread, GroupNorm of 1x640x32x32, contiguous, backward alone, with SiLU and GELU, us: float32 1297
// -> 730 and 1953 -> 1100, bfloat16 1440 -> 840 and 1926 -> 1108. With ReLU and a residual, float32, forward and backward:
// contiguous up to a fifth faster or slower, channels-last up to a fifth slower.]
void keep_dz(const ChannelBackwardArgs& args, ChannelPlan& plan) {
  const ChannelShape& shape = args.shape;
  const bool two_passes = args.grad_input != nullptr && !args.fixed_stats && !args.given_sums && plan.images == 0;
  const bool slow = args.activation == Activation::kSilu || args.activation == Activation::kGelu;
  if (!two_passes || !slow || !kernels().fused_multiply_add) return;
  const bool planes = shape.layout == ChannelLayout::kPlanes, wide = args.dtype == accumulate_dtype_of(args.dtype);
  const bool whole = (planes ? shape.spatial : shape.channels) % kMaxUnit == 0;
  if (wide) {
    if (args.grad_residual != nullptr) plan.kept = args.grad_residual;
    else if (whole || !planes) plan.kept = args.grad_input;
  } else if (whole && args.grad_residual == nullptr) {
    if (planes && plan.resident && !shape.batch_norm()) {
      const std::int64_t most = std::min(kBlockColumns, over(shape.slabs(), plan.parallel.threads));
      plan.kept_values = std::clamp(kKeptValues / shape.slab_size(), std::int64_t{1}, most) * shape.slab_size();
    }
    if (!planes && shape.elements() * static_cast<std::int64_t>(accumulate_size_of(args.dtype)) <= kMostKeptBytes)
      plan.kept_values = shape.elements();
  }
}

std::size_t backward_plan(const ChannelBackwardArgs& args, void* workspace, const Parallel& parallel, ChannelPlan& plan) {
  const ChannelShape& shape = args.shape;
  const bool plain = args.grad_input != nullptr && args.activation == Activation::kNone;
  share(plan, parallel, shape, args.dtype, 3, 2, plain, false);
  std::int64_t columns, rows, params;
  plan.images = shape.batch_norm() ? short_images(shape, args.dtype, kMostShort) : short_images_of_groups(args);
  if (plan.images != 0) {
    columns = over(shape.batch, plan.images) * shape.channels;
    rows = shape.batch_norm() ? 2 * shape.channels : 0;
    params = 2 * shape.channels;
  } else if (shape.layout == ChannelLayout::kPlanes) {
    plan.piece = piece_of(shape.spatial, kSegment, kMaxUnit);
    plan.pieces = over(shape.spatial, plan.piece);
    columns = shape.batch * shape.channels;
    rows = 2 * shape.slabs();
    params = 2 * shape.channels;
  } else {
    plan.piece = run_rows(shape, args.dtype);
    plan.pieces = over(shape.spatial, plan.piece);
    plan.padded = padded(shape.channels);
    columns = shape.batch * plan.padded;
    rows = 5 * shape.batch * plan.padded;
    params = 4 * plan.padded;
  }
  keep_dz(args, plan);
  const std::int64_t rooms = shape.layout == ChannelLayout::kPlanes ? plan.parallel.threads : 1;
  void* room = nullptr;
  const std::size_t bytes =
      lay_out(workspace, accumulate_size_of(args.dtype),
              {2 * columns * plan.pieces, plan.pieces == 1 ? 0 : 2 * columns, rows, params, rooms * plan.kept_values},
              {&plan.partial, &plan.merged, &plan.rows, &plan.params, &room});
  if (plan.pieces == 1) plan.merged = plan.partial;
  if (plan.kept_values != 0) plan.kept = room;
  return bytes;
}

// ---- statistics, in the accumulate type A

template <class A>
ChannelNorm::Slab<A> merge_ranks(const Moments<A>* of_rank, const A* n, std::size_t ranks, A total, A eps, std::vector<A>& terms,
                                 A& m2) {
  const auto sum = [&](auto term) {
    for (std::size_t r = 0; r < ranks; ++r) terms[r] = term(r);
    std::size_t left = ranks;
    for (; left > 1; left = left / 2 + left % 2) {
      for (std::size_t i = 0; i < left / 2; ++i) terms[i] = terms[2 * i] + terms[2 * i + 1];
      if (left % 2 != 0) terms[left / 2] = terms[left - 1];
    }
    return terms[0];
  };
  const A pivot = of_rank[0].mean;
  const Centre<A> centre = centre_at(pivot, sum([&](std::size_t r) { return n[r] * relative_mean(of_rank[r], pivot); }) / total);
  const A rest = sum([&](std::size_t r) { return n[r] * relative_mean(of_rank[r], centre); }) / total;
  m2 = sum([&](std::size_t r) { return centred_square(of_rank[r], n[r], centre); });
  return finish_centred(centre, rest, m2, total, eps);
}

template <class A>
void store_slab(A* stats, std::int64_t channels, std::int64_t c, ChannelNorm::Slab<A> slab, A variance) {
  const A values[kChannelStats] = {slab.hi, slab.lo, slab.rstd, variance};
  for (int k = 0; k < kChannelStats; ++k) stats[k * channels + c] = values[k];
}

template <class A>
void merge_moments_as(const ChannelMergeArgs& args) {
  const std::int64_t row = kChannelMoments * args.channels + static_cast<std::int64_t>(sizeof(std::int64_t) / sizeof(A));
  const A* gathered = static_cast<const A*>(args.gathered);
  std::vector<const A*> present;
  std::vector<A> n, terms(static_cast<std::size_t>(args.ranks));
  double total = 0.0;
  for (std::int64_t rank = 0; rank < args.ranks; ++rank) {
    std::int64_t count;
    std::memcpy(&count, gathered + rank * row + kChannelMoments * args.channels, sizeof(count));
    if (count == 0) continue;  // a rank without values has no moments
    present.push_back(gathered + rank * row);
    n.push_back(static_cast<A>(count));
    total += static_cast<double>(count);
  }
  *args.count = total;
  if (present.empty()) {
    for (std::int64_t c = 0; c < args.channels; ++c) store_slab(static_cast<A*>(args.stats), args.channels, c, {}, A(kNoValues));
    return;
  }
  std::vector<Moments<A>> of_rank(present.size());
  for (std::int64_t c = 0; c < args.channels; ++c) {
    for (std::size_t r = 0; r < present.size(); ++r) {
      of_rank[r] = {present[r][c], present[r][args.channels + c], present[r][2 * args.channels + c]};
    }
    A m2;
    const auto slab = merge_ranks(of_rank.data(), n.data(), n.size(), static_cast<A>(total), static_cast<A>(args.eps), terms, m2);
    store_slab(static_cast<A*>(args.stats), args.channels, c, slab, ChannelNorm::unbiased_variance(m2, static_cast<A>(total)));
  }
}

}  // namespace

std::size_t channel_forward_workspace(const ChannelForwardArgs& args) {
  ChannelPlan plan;
  return forward_plan(seen_by_kernels(args), nullptr, plan);
}

void channel_forward(const ChannelForwardArgs& args, void* workspace, const Parallel& parallel) {
  if (args.running_mean != nullptr) kernels().channel.fixed_stats(args);
  const ChannelForwardArgs seen = seen_by_kernels(args);
  ChannelPlan plan;
  forward_plan(seen, workspace, plan);
  const bool plain = args.output != nullptr && args.activation == Activation::kNone;
  share(plan, parallel, seen.shape, args.dtype, 2, 1, plain, plain && args.residual == nullptr && !args.planes_output);
  kernels().channel.forward(seen, plan);
  if (args.update.mean != nullptr)
    update_running({accumulate_dtype_of(args.dtype), 1, args.shape.channels, args.stats, args.update});
}

std::size_t channel_backward_workspace(const ChannelBackwardArgs& args, const Parallel& parallel) {
  ChannelBackwardArgs seen = args;
  seen.shape = seen_by_kernels(args.shape);
  ChannelPlan plan;
  return backward_plan(seen, nullptr, parallel, plan);
}

void channel_backward(const ChannelBackwardArgs& args, void* workspace, const Parallel& parallel) {
  ChannelBackwardArgs seen = args;
  seen.shape = seen_by_kernels(args.shape);
  ChannelPlan plan;
  backward_plan(seen, workspace, parallel, plan);
  kernels().channel.backward(seen, plan);
}

void merge_moments(const ChannelMergeArgs& args) {
  if (args.dtype == DType::kFloat64) merge_moments_as<double>(args);
  else merge_moments_as<float>(args);
}

void update_running(const RunningArgs& args) { kernels().channel.update_running(args); }

}  // namespace normext::cpu
