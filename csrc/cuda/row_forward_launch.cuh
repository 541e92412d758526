// From RowForwardArgs to a launch of row_forward_kernel or row_wide_kernel.
#pragma once

#include "cuda/row_forward.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_wide.cuh"

namespace normext::cuda {

struct RowForwardPlan {
  RowTree tree;
  RowMapping mapping;
};

inline RowForwardPlan row_forward_plan(const RowForwardArgs& args, int device) {
  const int element_size = static_cast<int>(size_of(args.dtype));
  const RowTree tree = row_tree(Direction::kForward, args.cols, element_size);
  const auto& forced = row_overrides().forward;
  return {tree, forced ? *forced : forward_mapping(tree, args.rows, element_size, describe(device))};
}

template <class Norm>
std::size_t row_forward_workspace(const RowForwardArgs& args, int device) {
  const RowForwardPlan plan = row_forward_plan(args, device);
  if (plan.mapping.tier != RowTier::kSplit) return 0;
  constexpr int kValues = SegmentStats<Norm, float>::kValues;
  return static_cast<std::size_t>(args.rows) * kValues * plan.tree.segments * accumulate_size_of(args.dtype);
}

template <class A>
RowForwardParams<A> row_forward_params(const RowForwardArgs& args, const RowForwardPlan& plan, void* workspace) {
  const std::size_t size = size_of(args.dtype);
  const std::size_t access = access_bytes(plan.tree.vector, size);
  const std::size_t output_size = size_of(args.output_dtype);
  const std::size_t param_access = access_bytes(plan.tree.vector, size_of(args.param_dtype));
  const bool residual = args.residual != nullptr;
  RowForwardParams<A> params{};
  params.args = args;
  params.tree = plan.tree;
  params.mapping = plan.mapping;
  params.by = RowDivisors(plan.tree, plan.mapping);
  params.cols = static_cast<A>(args.cols);
  params.eps = static_cast<A>(args.eps);
  params.alpha = static_cast<A>(args.alpha);
  params.weight_offset = static_cast<A>(args.weight_offset);
  params.partials = workspace;
  params.input_aligned = rows_aligned(args.input, args.input_layout, size, access) &&
                         (!residual || rows_aligned(args.residual, args.residual_layout, size, access));
  params.output_aligned = rows_aligned(args.output, args.output_layout, output_size, access_bytes(plan.tree.vector, output_size)) &&
                          (!residual || rows_aligned(args.residual_out, args.residual_out_layout, size, access));
  params.param_aligned = is_aligned(args.weight, param_access) && is_aligned(args.bias, param_access);
  params.float_params = args.param_dtype != args.dtype;
  params.float_output = args.output_dtype == DType::kFloat32 && args.dtype != DType::kFloat32;
  params.statistics = params.apply = true;
  return params;
}

template <class Norm, class T, class P, int V, int kSlots, bool kResidual>
void launch_registers(const RowForwardParams<Accumulate<T>>& params, void* stream) {
  const RowMapping& m = params.mapping;
  LaunchShape shape;
  shape.blocks = ceil_div(params.args.rows, std::int64_t{m.repeats} * m.rows_at_once) * m.blocks_per_row;
  shape.threads = static_cast<int>(block_threads(params.tree, m));
  shape.smem = forward_shared_bytes(params.tree, m, SegmentStats<Norm, float>::kValues, sizeof(T), sizeof(Accumulate<T>));
  shape.cluster = m.blocks_per_row;
  shape.dependent = dependent_launch();
  launch(row_forward_kernel<Norm, T, P, V, kSlots, kResidual>, shape, stream, params);
}

template <class Norm, class T, int V, int kSlots>
void launch_wide(RowForwardParams<Accumulate<T>> params, void* stream) {
  const RowMapping& m = params.mapping;
  LaunchShape shape;
  shape.blocks = params.args.rows * m.blocks_per_row;
  shape.threads = m.warps * 32;
  shape.smem = forward_shared_bytes(params.tree, m, SegmentStats<Norm, float>::kValues, sizeof(T), sizeof(Accumulate<T>));
  shape.dependent = dependent_launch();
  const auto kernel = row_wide_kernel<Norm, T, V, kSlots>;
  if (m.tier == RowTier::kShared) return launch(kernel, shape, stream, params);
  params.apply = false;
  launch(kernel, shape, stream, params);
  params.apply = true;
  params.statistics = false;
  launch(kernel, shape, stream, params);
}

// Slots of 8, 16 or 32 columns per lane for the widest vectors; 32 for the others, of which slots that do not exist stay idle.
template <class Norm, class T, class P, int V, bool kResidual>
void launch_slots(const RowForwardParams<Accumulate<T>>& params, void* stream) {
  constexpr int kFull = 32 / V;
  if (params.mapping.tier != RowTier::kRegisters) return launch_wide<Norm, T, V, kFull>(params, stream);
  if constexpr (V * sizeof(T) == 16 && sizeof(T) < 8) {
    if (params.tree.slots <= kFull / 4) return launch_registers<Norm, T, P, V, kFull / 4, kResidual>(params, stream);
    if (params.tree.slots <= kFull / 2) return launch_registers<Norm, T, P, V, kFull / 2, kResidual>(params, stream);
  }
  launch_registers<Norm, T, P, V, kFull, kResidual>(params, stream);
}

template <class Norm, class T, class P, int V>
void launch_with_param_type(const RowForwardParams<Accumulate<T>>& params, void* stream) {
  visit_bool(params.args.residual != nullptr,
             [&](auto residual) { launch_slots<Norm, T, P, V, decltype(residual)::value>(params, stream); });
}

// Of 16-bit types, kernels with the widest accesses load parameters early, and are compiled for each type of these.
template <class Norm, class T, int V>
void launch_vector(const RowForwardParams<Accumulate<T>>& params, void* stream) {
  if constexpr (V * sizeof(T) < 16 || sizeof(T) > 2) {
    launch_with_param_type<Norm, T, EitherParam<T>, V>(params, stream);
  } else if (params.float_params) {
    launch_with_param_type<Norm, T, float, V>(params, stream);
  } else {
    launch_with_param_type<Norm, T, T, V>(params, stream);
  }
}

template <class Norm>
void row_forward(const RowForwardArgs& args, void* workspace, int device, void* stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const RowForwardPlan plan = row_forward_plan(args, device);
  visit(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto params = row_forward_params<Accumulate<T>>(args, plan, workspace);
    visit_row_vector<T>(plan.tree.vector, [&](auto vector) { launch_vector<Norm, T, decltype(vector)::value>(params, stream); });
  });
}

}  // namespace normext::cuda
