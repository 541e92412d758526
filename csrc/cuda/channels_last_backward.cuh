// Channel norm backward over rows of channels ([batch, spatial, channels]); the steps are those of channel_backward.cuh, and who
// owns what is as in channels_last.cuh.
//
//   sums   each thread adds 16 rows of its channels in sequence, then at most 16 such sums; threads of a block that own the same
//          channels add theirs pairwise
//   apply  each thread keeps the statistics, means and parameters of its channels in registers and goes down its rows
// x, dy and, with an activation, the residual are read twice. A thread reads its rows before it writes them, so grad_input may be
// grad_output. Chosen for every shape, and for planes of one element.
#pragma once

#include "cuda/channel_backward.cuh"
#include "cuda/channels_last.cuh"

namespace normext::cuda {

template <class A>
struct LastBackwardParams {
  ChannelBackwardArgs args;
  LastPlan plan;
  A* partials;          // [2][images * runs][channels]
  const A* means;       // [2][slabs]
  bool input_aligned;   // input, residual and grad_output
  bool output_aligned;  // grad_input and grad_residual
  bool wide;            // weight and bias are float32 while T is a 16-bit type
};

// Rows that a thread has in flight: the grid of the sums, which fixes their order, may be small.
constexpr int kSumsRows = 4, kGradRows = 2;

// The tensors of a few rows.
template <int kRows, class T, int V>
struct GradLanes {
  Columns<T, V> x[kRows], dy[kRows], residual[kRows];

  template <class A>
  __device__ __forceinline__ void load(const LastBackwardParams<A>& params, const RowLane<V>& lane, std::int64_t row, bool fused) {
    load_lane(x, params.args.input, params.plan, lane, row, params.input_aligned);
    load_lane(dy, params.args.grad_output, params.plan, lane, row, params.input_aligned);
    if (fused && params.args.residual != nullptr) {
      load_lane(residual, params.args.residual, params.plan, lane, row, params.input_aligned);
    }
  }
};

// What a thread keeps of its channels.
template <class T, int V, bool kFused>
struct ChannelLanes {
  using A = Accumulate<T>;
  CentredRow<A> stats[V];
  A weight[V], bias[V];

  __device__ __forceinline__ ChannelLanes(const LastBackwardParams<A>& params, const RowLane<V>& lane) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const std::int64_t slab = params.plan.slab(lane.image, lane.channel + i);
      stats[i] = load_stats<A>(params.args.stats, params.plan.images * params.plan.groups, slab);
      weight[i] = load_parameter<T>(params.args.weight, params.wide, lane.channel + i, 1.0f);
      bias[i] = kFused ? load_parameter<T>(params.args.bias, params.wide, lane.channel + i, 0.0f) : A(0);
    }
  }
  template <int kRows>
  __device__ __forceinline__ void gradients(const ChannelBackwardArgs& args, const GradLanes<kRows, T, V>& rows, int j,
                                            A (&xhat)[V], A (&dz)[V]) const {
    slot_gradients<kFused>(
        args, rows.x[j], rows.dy[j], rows.residual[j], [&](int i) { return stats[i]; }, [&](int i) { return weight[i]; },
        [&](int i) { return bias[i]; }, xhat, dz);
  }
};

template <class T, int V, bool kFused>
__global__ void __launch_bounds__(kLastThreads, 1)
    last_sums_kernel(const __grid_constant__ LastBackwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  const LastPlan& plan = params.plan;
  const RowLane<V> lane(plan);

  dependency_wait();
  A total[2 * V] = {};
  if (lane.exists) {
    const ChannelLanes<T, V, kFused> own(params, lane);
    for (std::int64_t chunk = lane.row; chunk < lane.end; chunk += kThreadRows * plan.row_lanes) {
      A sums[2 * V] = {};
      NORMEXT_NO_UNROLL
      for (int k = 0; k < kThreadRows / kSumsRows; ++k) {
        const std::int64_t row = chunk + k * kSumsRows * plan.row_lanes;
        GradLanes<kSumsRows, T, V> rows;
        rows.load(params, lane, row, kFused);
#pragma unroll
        for (int j = 0; j < kSumsRows; ++j) {
          if (row + j * plan.row_lanes >= lane.end) continue;
          A xhat[V], dz[V];
          own.gradients(params.args, rows, j, xhat, dz);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            sums[i] = sums[i] + dz[i];
            sums[V + i] = sums[V + i] + dz[i] * xhat[i];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * V; ++i) total[i] = total[i] + sums[i];
    }
  }
  launch_dependents();

  // As in last_moments_kernel.
  A* table = reinterpret_cast<A*>(dynamic_smem());
  const int threads = static_cast<int>(blockDim.x);
  for (int width = 1; width < plan.row_lanes; width *= 2) {
    const int place = lane.row_lane % (2 * width);
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      if (place == width) table[i * threads + threadIdx.x] = total[i];
    }
    block_barrier();
    if (place != 0) continue;
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) total[i] = total[i] + table[i * threads + threadIdx.x + width * plan.lanes];
  }
  if (lane.row_lane != 0 || !lane.exists) return;
  const std::int64_t entry = lane.image * plan.runs + lane.run;
  A* out = params.partials + entry * plan.channels + lane.channel;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    out[i] = total[i];
    out[plan.images * plan.runs * plan.channels + i] = total[V + i];
  }
}

template <class T, int V, bool kFused>
__global__ void __launch_bounds__(kLastThreads, 1)
    last_grad_kernel(const __grid_constant__ LastBackwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  const ChannelBackwardArgs& args = params.args;
  const LastPlan& plan = params.plan;
  const RowLane<V> lane(plan);
  if (!lane.exists) return;

  dependency_wait();
  const ChannelLanes<T, V, kFused> own(params, lane);
  A mean_g[V], mean_gx[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const std::int64_t slab = plan.slab(lane.image, lane.channel + i);
    mean_g[i] = params.means != nullptr ? params.means[slab] : A(0);
    mean_gx[i] = params.means != nullptr ? params.means[plan.images * plan.groups + slab] : A(0);
  }
  for (std::int64_t row = lane.row; row < lane.end; row += kGradRows * plan.row_lanes) {
    GradLanes<kGradRows, T, V> rows;
    rows.load(params, lane, row, kFused);
#pragma unroll
    for (int j = 0; j < kGradRows; ++j) {
      A xhat[V], dz[V], dx[V];
      own.gradients(args, rows, j, xhat, dz);
      input_gradients(
          args.fixed_stats, xhat, dz, [&](int i) { return own.stats[i]; }, [&](int i) { return own.weight[i]; },
          [&](int i) { return mean_g[i]; }, [&](int i) { return mean_gx[i]; }, dx);
      rows.dy[j].assign(dz);
      rows.x[j].assign(dx);
    }
    if (args.grad_input != nullptr) store_lane(rows.x, args.grad_input, plan, lane, row, params.output_aligned);
    if (args.grad_residual != nullptr) store_lane(rows.dy, args.grad_residual, plan, lane, row, params.output_aligned);
  }
  launch_dependents();
}

template <class T>
void last_backward_typed(const ChannelBackwardArgs& args, void* workspace, void* stream) {
  using A = Accumulate<T>;
  LastBackwardParams<A> params{};
  params.args = args;
  params.plan = last_plan(args.shape, sizeof(T));
  const LastPlan plan = params.plan;
  params.input_aligned = all_aligned(plan.vector, args.dtype, args.input, args.grad_output, args.residual);
  params.output_aligned = all_aligned(plan.vector, args.dtype, args.grad_input, args.grad_residual);
  params.wide = args.param_dtype != args.dtype;
  visit_vector<T>(plan.vector, [&](auto vector) {
    visit_bool(args.activation != Activation::kNone, [&](auto fused) {
      constexpr int V = decltype(vector)::value;
      constexpr bool kFused = decltype(fused)::value;
      const auto sums = [&](const GradSumsParams<A>&) {
        params.partials = static_cast<A*>(workspace);
        const std::size_t table = plan.row_lanes > 1 ? 2 * V * plan.threads() * sizeof(A) : 0;
        launch_channel(last_sums_kernel<T, V, kFused>, plan.blocks(), plan.threads(), table, stream, params);
      };
      const auto apply = [&](const GradSumsParams<A>& finish) {
        params.means = finish.means;
        params.plan = apply_plan(plan);
        launch_channel(last_grad_kernel<T, V, kFused>, params.plan.blocks(), plan.threads(), 0, stream, params);
      };
      backward_steps<A>(args, workspace, stream, sums, apply);
    });
  });
}

}  // namespace normext::cuda
