// Channel norm forward over rows of channels ([batch, spatial, channels]).
//
//   output = activation(xhat * weight + bias + residual),   statistics per slab (core/channel_args.h)
//
// A thread owns `vector` neighbouring channels of every row_lanes-th row, a block such threads side by side and a run of rows
// (channel_plan.h). Three launches, in evaluation the last alone:
//   moments   each thread takes 16 rows at a time in registers and merges their moments into those of its channels; threads of a
//             block that own the same channels merge theirs pairwise; a table of (run, channel of the slab) goes to the workspace
//   finalise  merges the table of each slab (channel_stats.cuh)
//   apply     each thread keeps the statistics and parameters of its channels in registers and goes down its rows
// Input is read twice. A thread reads its rows before it writes them, so output may be input or residual. Chosen for every shape,
// and for planes of one element, which are rows of channels too.
#pragma once

#include "cuda/channel_entry.h"
#include "cuda/channel_launch.cuh"
#include "cuda/channel_merge.cuh"
#include "cuda/tile.cuh"

namespace normext::cuda {

template <class A>
struct LastForwardParams {
  ChannelForwardArgs args;
  LastPlan plan;
  A eps;
  SlabSink<A> sink;
  A* partials;         // [slabs][3][runs * group_channels]
  bool input_aligned;  // input and residual
  bool output_aligned;
  bool wide;  // weight and bias are float32 while T is a 16-bit type
};

// What a thread owns: channels channel .. channel + V of rows row, row + row_lanes, ... before end, of the image's.
template <int V>
struct RowLane {
  std::int64_t image, run, channel, row, end;
  std::int64_t origin;  // of the image's rows and of `channel`, in elements
  int row_lane;
  bool exists;  // the last tile may be wider than the rows

  __device__ __forceinline__ explicit RowLane(const LastPlan& plan) {
    const std::int64_t rest = blockIdx.x / plan.tiles;
    const std::int64_t tile = blockIdx.x - rest * plan.tiles;
    image = rest / plan.runs;
    run = rest - image * plan.runs;
    row_lane = static_cast<int>(threadIdx.x) / plan.lanes;
    channel = (tile * plan.lanes + static_cast<int>(threadIdx.x) % plan.lanes) * V;
    exists = channel < plan.channels;
    row = run * plan.run_rows + row_lane;
    end = exists ? run * plan.run_rows + plan.count(run) : 0;
    origin = image * plan.rows * plan.channels + channel;
  }
};

// kRows rows of a thread from `row` on; those that do not exist are left as they are. One uniform branch around the whole batch.
template <int kRows, class T, int V>
__device__ __forceinline__ void load_lane(Columns<T, V> (&x)[kRows], const void* p, const LastPlan& plan, const RowLane<V>& lane,
                                          std::int64_t row, bool aligned) {
  const T* from = static_cast<const T*>(p) + opaque_offset(lane.origin + row * plan.channels);
  const std::int64_t step = plan.row_lanes * plan.channels;
  if (V == 1 || aligned) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (row + j * plan.row_lanes < lane.end) x[j].template load<true>(from + j * step);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (row + j * plan.row_lanes < lane.end) x[j].template load<false>(from + j * step);
    }
  }
}
template <int kRows, class T, int V>
__device__ __forceinline__ void store_lane(const Columns<T, V> (&y)[kRows], void* p, const LastPlan& plan, const RowLane<V>& lane,
                                           std::int64_t row, bool aligned) {
  T* to = static_cast<T*>(p) + opaque_offset(lane.origin + row * plan.channels);
  const std::int64_t step = plan.row_lanes * plan.channels;
  if (V == 1 || aligned) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (row + j * plan.row_lanes < lane.end) y[j].template store<true>(to + j * step);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (row + j * plan.row_lanes < lane.end) y[j].template store<false>(to + j * step);
    }
  }
}

// Moments of channel i of the first `rows` rows. Channels are taken one after the other: see forget_derived.
template <class T, int V, class A = Accumulate<T>>
__device__ __forceinline__ Moments<A> column_moments(Tile<T, V, kThreadRows>& x, int i, int rows) {
  x.forget();
  const A n = static_cast<A>(rows > 0 ? rows : 1);
  A values[kThreadRows], squares[kThreadRows];
#pragma unroll
  for (int j = 0; j < kThreadRows; ++j) values[j] = j < rows ? x.slot[j][i] : A(0);
  const A mean = pairwise(values) / n;
  x.forget();
#pragma unroll
  for (int j = 0; j < kThreadRows; ++j) {
    values[j] = j < rows ? x.slot[j][i] - mean : A(0);
    squares[j] = values[j] * values[j];
  }
  return moments(mean, pairwise(values), pairwise(squares), n);
}

template <class T, int V>
__global__ void __launch_bounds__(kLastThreads, 1)
    last_moments_kernel(const __grid_constant__ LastForwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  const LastPlan& plan = params.plan;
  const RowLane<V> lane(plan);

  dependency_wait();
  Counted<A> own[V];
  for (std::int64_t row = lane.row; row < lane.end; row += kThreadRows * plan.row_lanes) {
    Tile<T, V, kThreadRows> x;
    load_lane(x.slot, params.args.input, plan, lane, row, params.input_aligned);
    const int left = (static_cast<int>(lane.end - row) + plan.row_lanes - 1) / plan.row_lanes;
    const int rows = left < kThreadRows ? left : kThreadRows;
#pragma unroll
    for (int i = 0; i < V; ++i) own[i] = merge(own[i], {column_moments(x, i, rows), static_cast<A>(rows)});
  }
  launch_dependents();

  // The upper half of each pair of row lanes hands over to the lower half: every thread at most once, so one table serves all
  // steps.
  A* table = reinterpret_cast<A*>(dynamic_smem());
  const int threads = static_cast<int>(blockDim.x);
  for (int width = 1; width < plan.row_lanes; width *= 2) {
    const int place = lane.row_lane % (2 * width);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (place == width) put_moments(table + 4 * i * threads, threads, threadIdx.x, own[i].moments);
      if (place == width) table[(4 * i + 3) * threads + threadIdx.x] = own[i].n;
    }
    block_barrier();
    const A* other = table + threadIdx.x + width * plan.lanes;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (place != 0) continue;
      const A* theirs = other + 4 * i * threads;
      own[i] = merge(own[i], {{theirs[0], theirs[threads], theirs[2 * threads]}, theirs[3 * threads]});
    }
  }
  if (lane.row_lane != 0 || !lane.exists) return;
  const std::int64_t entries = plan.runs * plan.group_channels;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const std::int64_t slab = plan.slab(lane.image, lane.channel + i);
    const std::int64_t entry = lane.run * plan.group_channels + (lane.channel + i) % plan.group_channels;
    put_moments(params.partials + slab * 3 * entries, entries, entry, own[i].moments);
  }
}

// The statistics of the slabs of a thread's channels: found before, or running.
template <class T, int V, class A = Accumulate<T>>
__device__ __forceinline__ void lane_stats(const LastForwardParams<A>& params, const RowLane<V>& lane, CentredRow<A> (&stats)[V]) {
  const ChannelForwardArgs& args = params.args;
  const SlabSink<A>& sink = params.sink;
  if (args.running_mean == nullptr) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      stats[i] = load_stats<A>(args.stats, sink.slabs, params.plan.slab(lane.image, lane.channel + i));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) stats[i] = running_stats<T>(args, params.wide, lane.channel + i, params.eps);
  if (sink.stats == nullptr || lane.run != 0 || lane.row_lane != 0) return;
#pragma unroll
  for (int i = 0; i < V; ++i) put_stats(sink.stats, sink.slabs, lane.channel + i, stats[i], A(0));
}

template <class T, int V, bool kFused>
__global__ void __launch_bounds__(kLastThreads, 1)
    last_apply_kernel(const __grid_constant__ LastForwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  constexpr int kRows = 4;
  const ChannelForwardArgs& args = params.args;
  const LastPlan& plan = params.plan;
  const RowLane<V> lane(plan);
  if (!lane.exists) return;

  dependency_wait();
  CentredRow<A> stats[V];
  A weight[V], bias[V];
  lane_stats<T>(params, lane, stats);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    weight[i] = load_parameter<T>(args.weight, params.wide, lane.channel + i, 1.0f);
    bias[i] = load_parameter<T>(args.bias, params.wide, lane.channel + i, 0.0f);
  }
  for (std::int64_t row = lane.row; row < lane.end; row += kRows * plan.row_lanes) {
    Columns<T, V> x[kRows], residual[kRows];
    load_lane(x, args.input, plan, lane, row, params.input_aligned);
    if (kFused && args.residual != nullptr) load_lane(residual, args.residual, plan, lane, row, params.input_aligned);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      A z[V];
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = ChannelNorm::affine<A>(x[j][i], stats[i], weight[i], bias[i]);
      if constexpr (kFused) {
        if (args.residual != nullptr) {
#pragma unroll
          for (int i = 0; i < V; ++i) z[i] = z[i] + residual[j][i];
        }
        activate_all(args.activation, z);
      }
      x[j].assign(z);
    }
    store_lane(x, args.output, plan, lane, row, params.output_aligned);
  }
  launch_dependents();
}

template <class T>
void last_forward_typed(const ChannelForwardArgs& args, void* workspace, void* stream) {
  using A = Accumulate<T>;
  LastForwardParams<A> params{};
  params.args = args;
  params.plan = last_plan(args.shape, sizeof(T));
  const LastPlan plan = params.plan;
  params.eps = static_cast<A>(args.eps);
  params.sink = SlabSink<A>(args);
  params.partials = static_cast<A*>(workspace);
  params.input_aligned = all_aligned(plan.vector, args.dtype, args.input, args.residual);
  params.output_aligned = all_aligned(plan.vector, args.dtype, args.output);
  params.wide = args.param_dtype != args.dtype;
  visit_vector<T>(plan.vector, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    if (args.takes_statistics()) {
      const std::size_t table = plan.row_lanes > 1 ? 4 * V * plan.threads() * sizeof(A) : 0;
      launch_channel(last_moments_kernel<T, V>, plan.blocks(), plan.threads(), table, stream, params);
      FinaliseParams<A> finalise{};
      finalise.partials = params.partials;
      finalise.sink = params.sink;
      finalise.slab_size = args.shape.slab_size();
      finalise.runs = plan.runs;
      finalise.run_rows = plan.run_rows;
      finalise.rows = plan.rows;
      finalise.group_channels = plan.group_channels;
      finalise.eps = params.eps;
      launch_finalise(finalise, stream);
    }
    if (args.output == nullptr) return;
    params.plan = apply_plan(plan);
    visit_bool(args.residual != nullptr || args.activation != Activation::kNone, [&](auto fused) {
      launch_channel(last_apply_kernel<T, V, decltype(fused)::value>, params.plan.blocks(), plan.threads(), 0, stream, params);
    });
  });
}

}  // namespace normext::cuda
