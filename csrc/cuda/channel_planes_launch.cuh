// From ChannelForwardArgs over planes to launches of the kernels in channel_planes.cuh and channel_resident.cuh.
#pragma once

#include "cuda/channel_planes.cuh"
#include "cuda/channel_resident.cuh"

namespace normext::cuda {

// Not resident: statistics that are given, of evaluation, or wanted alone.
inline ResidentPlan planes_resident(const ChannelForwardArgs& args, const PlanesPlan& plan, int device) {
  if (!args.takes_statistics() || args.output == nullptr) return {};
  return resident_plan(plan, static_cast<int>(size_of(args.dtype)), static_cast<int>(accumulate_size_of(args.dtype)),
                       describe(device));
}

inline std::size_t planes_workspace(const ChannelForwardArgs& args, int device) {
  const PlanesPlan plan = planes_plan(args.shape, static_cast<int>(size_of(args.dtype)));
  if (!args.takes_statistics() || planes_resident(args, plan, device).blocks > 0) return 0;
  return static_cast<std::size_t>(plan.slabs * 3 * plan.segments) * accumulate_size_of(args.dtype);
}

template <class T, int V>
void launch_resident(const PlanesForwardParams<Accumulate<T>>& params, void* stream) {
  const ResidentPlan& m = params.resident;
  LaunchShape shape;
  shape.blocks = ceil_div(params.plan.slabs, m.teams) * m.blocks;
  shape.threads = m.warps * m.teams * 32;
  shape.smem = static_cast<std::size_t>(m.teams * m.team_bytes(params.plan, sizeof(T), sizeof(Accumulate<T>)));
  shape.cluster = m.blocks;
  shape.dependent = dependent_launch();
  launch(planes_resident_kernel<T, V>, shape, stream, params);
}

template <class T, int V>
void launch_planes(const PlanesForwardParams<Accumulate<T>>& params, void* stream) {
  using A = Accumulate<T>;
  const ChannelForwardArgs& args = params.args;
  const PlanesPlan& plan = params.plan;
  const int threads = plan.warps * plan.teams * 32;
  const bool resident = params.resident.blocks > 0;
  if (!resident && args.takes_statistics()) {
    const std::size_t table = plan.teams * 3 * plan.pieces(kPiece) * sizeof(A);
    launch_channel(planes_moments_kernel<T, V>, plan.blocks(), threads, table, stream, params);
  }
  if (args.output == nullptr) return;
  if (resident) return launch_resident<T, V>(params, stream);
  visit_bool(args.residual != nullptr || args.activation != Activation::kNone, [&](auto fused) {
    launch_channel(planes_apply_kernel<T, V, decltype(fused)::value>, plan.blocks(), threads, plan.teams * 3 * sizeof(A), stream,
                   params);
  });
}

template <class T>
void planes_forward_typed(const ChannelForwardArgs& args, void* workspace, int device, void* stream) {
  using A = Accumulate<T>;
  PlanesForwardParams<A> params{};
  params.args = args;
  params.plan = planes_plan(args.shape, sizeof(T));
  params.resident = planes_resident(args, params.plan, device);
  params.eps = static_cast<A>(args.eps);
  params.sink = SlabSink<A>(args);
  params.partials = static_cast<A*>(workspace);
  params.input_aligned = all_aligned(params.plan.vector, args.dtype, args.input, args.residual);
  params.output_aligned = all_aligned(params.plan.vector, args.dtype, args.output);
  params.wide = args.param_dtype != args.dtype;
  visit_vector<T>(params.plan.vector, [&](auto vector) { launch_planes<T, decltype(vector)::value>(params, stream); });
  if (args.output != nullptr || !args.takes_statistics()) return;
  FinaliseParams<A> finalise{};
  finalise.partials = params.partials;
  finalise.sink = params.sink;
  finalise.slab_size = finalise.rows = params.plan.slab_size;
  finalise.runs = params.plan.segments;
  finalise.run_rows = params.plan.segment;
  finalise.eps = params.eps;
  launch_finalise(finalise, stream);
}

}  // namespace normext::cuda
