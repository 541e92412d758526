// Channel norm backward over planes ([batch, channels, spatial], spatial > 1); the steps are those of channel_backward.cuh.
//
//   sums   a team of warps per segment of a slab (batch norm) or of a plane (group norm, whose sums are per channel of an image):
//          each adds pieces of 512 elements, which meet in shared memory, and a warp adds those pairwise in index order
//   apply  a team per segment of a slab
// x, dy and, with an activation, the residual are read twice, the second time from L2 where they fit. A lane reads all elements of
// a piece before it writes any, so grad_input may be grad_output. Chosen for every shape.
#pragma once

#include "cuda/channel_backward.cuh"
#include "cuda/channel_tile.cuh"
#include "cuda/param_grad.cuh"

namespace normext::cuda {

template <class A>
struct PlanesBackwardParams {
  ChannelBackwardArgs args;
  PlanesPlan plan;
  std::int64_t stats_slabs, slabs_each;  // slabs of the statistics; of the plan to one of those
  A* partials;                           // of the sums, which are written there
  GradSumsParams<A> finish;              // what becomes of them; means are null where apply finds them
  bool input_aligned;                    // input, residual and grad_output
  bool output_aligned;                   // grad_input and grad_residual
  bool wide;                             // weight and bias are float32 while T is a 16-bit type
};

// The tensors of one piece.
template <class T, int V>
struct GradTiles {
  static constexpr int kSlots = kSlotsOf<kApplyPiece, V>;
  Tile<T, V, kSlots> x, dy, residual;

  template <class A>
  __device__ __forceinline__ void load(const PlanePiece<V>& piece, const PlanesBackwardParams<A>& params, bool fused) {
    piece.load(x, params.args.input, params.input_aligned);
    piece.load(dy, params.args.grad_output, params.input_aligned);
    if (fused && params.args.residual != nullptr) piece.load(residual, params.args.residual, params.input_aligned);
  }
};

// Element sums of dz and of dz * xhat of a piece; every lane gets them.
template <bool kFused, class T, int V, class A = Accumulate<T>>
__device__ __forceinline__ void piece_sums(const PlanePiece<V>& piece, const PlanesBackwardParams<A>& params,
                                           const CentredRow<A>& row, A weight, A bias, A& sum, A& product) {
  constexpr int kSlots = GradTiles<T, V>::kSlots;
  GradTiles<T, V> tiles;
  tiles.load(piece, params, kFused);
  // Pairwise as they come: two arrays of slots would not fit beside the tiles of float64.
  constexpr int kLevels = 4;
  static_assert(kSlots <= 1 << kLevels);
  PairwiseSum<A, kLevels> sums, products;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    A slot_sum = A(0), slot_product = A(0);
    if (piece.owns(s)) {
      A xhat[V], dz[V];
      slot_gradients<kFused>(
          params.args, tiles.x.slot[s], tiles.dy.slot[s], tiles.residual.slot[s], [&](int) { return row; },
          [&](int) { return weight; }, [&](int) { return bias; }, xhat, dz);
#pragma unroll
      for (int i = 0; i < V; ++i) xhat[i] = dz[i] * xhat[i];
      slot_sum = pairwise(dz);
      slot_product = pairwise(xhat);
    }
    sums.push(slot_sum);
    products.push(slot_product);
  }
  sum = lanes_sum(sums.sum(), kWarpSize);
  product = lanes_sum(products.sum(), kWarpSize);
}

template <class T, int V, bool kFused>
__global__ void __launch_bounds__(kTeamWarps * 32, 1)
    planes_sums_kernel(const __grid_constant__ PlanesBackwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  const PlanesPlan& plan = params.plan;
  const Team team(plan);
  const std::int64_t pieces = team.active ? ceil_div(plan.count(team.segment), kApplyPiece) : 0;
  const std::int64_t room = ceil_div(plan.segments > 1 ? plan.segment : plan.slab_size, kApplyPiece);
  A* table = reinterpret_cast<A*>(dynamic_smem()) + team.index * 2 * room;
  const std::int64_t image = team.slab / plan.channels;
  const std::int64_t channel = team.slab - image * plan.channels;

  dependency_wait();
  CentredRow<A> row{};
  if (team.active) row = load_stats<A>(params.args.stats, params.stats_slabs, team.slab / params.slabs_each);
  A weight = A(1), bias = A(0);
  if (kFused && team.active) {
    weight = load_parameter<T>(params.args.weight, params.wide, channel, 1.0f);
    bias = load_parameter<T>(params.args.bias, params.wide, channel, 0.0f);
  }
  for (std::int64_t p = team.warp; p < pieces; p += plan.warps) {
    const PlanePiece<V> piece(plan, team, p, kApplyPiece);
    A sum, product;
    piece_sums<kFused, T>(piece, params, row, weight, bias, sum, product);
    if (lane_id() == 0) {
      table[p] = sum;
      table[room + p] = product;
    }
  }
  block_barrier();
  launch_dependents();
  if (team.warp != 0 || !team.active) return;
  for (int which = 0; which < 2; ++which) {
    const A sum = warp_pairwise<kSplitLevels, A>(pieces, [&](std::int64_t p) { return table[which * room + p]; });
    const std::int64_t place = params.finish.place(which, image * plan.segments + team.segment, channel);
    if (lane_id() == 0) params.partials[place] = sum;
  }
}

// Of the team's slab: the means of g and of g * xhat. All threads of the block must call it.
template <class A>
struct SlabMeans {
  A g, gx;
};
template <class A>
__device__ __forceinline__ SlabMeans<A> team_means(const PlanesBackwardParams<A>& params, const Team& team) {
  const GradSumsParams<A>& finish = params.finish;
  const std::int64_t slabs = params.plan.slabs;
  if (params.args.grad_input == nullptr || params.args.fixed_stats) return {A(0), A(0)};
  if (finish.means != nullptr) {
    if (!team.active) return {A(0), A(0)};
    return {finish.means[team.slab], finish.means[slabs + team.slab]};
  }
  A* shared = reinterpret_cast<A*>(dynamic_smem()) + team.index * 2;
  if (team.active) {
    for (int which = team.warp; which < 2; which += params.plan.warps) {
      const A mean = finish.shape.batch_norm() ? channel_mean(finish, which, team.slab, team.segment == 0)
                                               : group_mean(finish, which, team.slab);
      if (lane_id() == 0) shared[which] = mean;
    }
  }
  block_barrier();
  return {shared[0], shared[1]};
}

template <class T, int V, bool kFused>
__global__ void __launch_bounds__(kTeamWarps * 32, 1)
    planes_grad_kernel(const __grid_constant__ PlanesBackwardParams<Accumulate<T>> params) {
  using A = Accumulate<T>;
  const ChannelBackwardArgs& args = params.args;
  const PlanesPlan& plan = params.plan;
  const Team team(plan);

  dependency_wait();
  const SlabMeans<A> mean = team_means(params, team);
  if (!team.active) return;
  const CentredRow<A> row = load_stats<A>(args.stats, plan.slabs, team.slab);
  const std::int64_t first_channel = team.slab * plan.slab_step % plan.channels;
  const std::int64_t pieces = ceil_div(plan.count(team.segment), kApplyPiece);
  for (std::int64_t p = team.warp; p < pieces; p += plan.warps) {
    const PlanePiece<V> piece(plan, team, p, kApplyPiece);
    GradTiles<T, V> tiles;
    tiles.load(piece, params, kFused);
#pragma unroll
    for (int s = 0; s < tiles.kSlots; ++s) {
      if (!piece.owns(s)) continue;
      const std::int64_t channel = first_channel + piece.place(s).plane * plan.channel_step;
      const A weight = load_parameter<T>(args.weight, params.wide, channel, 1.0f);
      const A bias = kFused ? load_parameter<T>(args.bias, params.wide, channel, 0.0f) : A(0);
      A xhat[V], dz[V], dx[V];
      slot_gradients<kFused>(
          args, tiles.x.slot[s], tiles.dy.slot[s], tiles.residual.slot[s], [&](int) { return row; }, [&](int) { return weight; },
          [&](int) { return bias; }, xhat, dz);
      input_gradients(
          args.fixed_stats, xhat, dz, [&](int) { return row; }, [&](int) { return weight; }, [&](int) { return mean.g; },
          [&](int) { return mean.gx; }, dx);
      tiles.dy.slot[s].assign(dz);
      tiles.x.slot[s].assign(dx);
    }
    if (args.grad_input != nullptr) piece.store(tiles.x, args.grad_input, params.output_aligned);
    if (args.grad_residual != nullptr) piece.store(tiles.dy, args.grad_residual, params.output_aligned);
  }
  launch_dependents();
}

template <class T>
void planes_backward_typed(const ChannelBackwardArgs& args, void* workspace, void* stream) {
  using A = Accumulate<T>;
  PlanesBackwardParams<A> params{};
  params.args = args;
  params.plan = planes_plan(args.shape, sizeof(T), true);
  params.stats_slabs = args.shape.slabs();
  params.slabs_each = args.shape.group_channels();
  params.input_aligned = all_aligned(params.plan.vector, args.dtype, args.input, args.grad_output, args.residual);
  params.output_aligned = all_aligned(params.plan.vector, args.dtype, args.grad_input, args.grad_residual);
  params.wide = args.param_dtype != args.dtype;
  visit_vector<T>(params.plan.vector, [&](auto vector) {
    visit_bool(args.activation != Activation::kNone, [&](auto fused) {
      constexpr int V = decltype(vector)::value;
      constexpr bool kFused = decltype(fused)::value;
      const auto sums = [&](const GradSumsParams<A>& finish) {
        const PlanesPlan& plan = params.plan;
        params.finish = finish;
        params.partials = static_cast<A*>(workspace);
        const std::size_t table = plan.teams * 2 * plan.pieces(kApplyPiece) * sizeof(A);
        launch_channel(planes_sums_kernel<T, V, kFused>, plan.blocks(), plan.warps * plan.teams * 32, table, stream, params);
      };
      const auto apply = [&](const GradSumsParams<A>& finish) {
        params.plan = planes_plan(args.shape, sizeof(T));
        params.finish = finish;
        const PlanesPlan& plan = params.plan;
        launch_channel(planes_grad_kernel<T, V, kFused>, plan.blocks(), plan.warps * plan.teams * 32, plan.teams * 2 * sizeof(A),
                       stream, params);
      };
      backward_steps<A>(args, workspace, stream, sums, apply);
    });
  });
}

}  // namespace normext::cuda
