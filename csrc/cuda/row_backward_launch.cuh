// From RowBackwardArgs to launches of row_backward_kernel and param_grad_kernel.
#pragma once

#include "cuda/param_grad.cuh"
#include "cuda/row_backward.cuh"
#include "cuda/row_launch.cuh"

namespace normext::cuda {

struct RowBackwardPlan {
  RowTree tree;
  RowMapping mapping;
  std::int64_t runs;
};

inline RowBackwardPlan row_backward_plan(const RowBackwardArgs& args, int device) {
  const int element_size = static_cast<int>(size_of(args.dtype));
  const RowTree tree = row_tree(Direction::kBackward, args.cols, element_size);
  const auto& forced = row_overrides().backward;
  return {tree, forced ? *forced : backward_mapping(tree, args.rows, element_size, describe(device)), row_runs(args.rows)};
}

// Workspace, in values of the accumulate type: the sums of each segment (kSplit), then the partials of dweight and of dbias.
struct BackwardWorkspace {
  std::int64_t row_sums, weight, bias;

  BackwardWorkspace(const RowBackwardArgs& args, const RowBackwardPlan& plan)
      : row_sums(plan.mapping.tier == RowTier::kSplit && args.grad_input != nullptr ? args.rows * 2 * plan.tree.segments : 0),
        weight(args.grad_weight != nullptr ? plan.runs * args.cols : 0),
        bias(args.grad_bias != nullptr ? plan.runs * args.cols : 0) {}
};

template <class Norm>
std::size_t row_backward_workspace(const RowBackwardArgs& args, int device) {
  const BackwardWorkspace sizes(args, row_backward_plan(args, device));
  return static_cast<std::size_t>(sizes.row_sums + sizes.weight + sizes.bias) * accumulate_size_of(args.dtype);
}

template <class A>
RowBackwardParams<A> row_backward_params(const RowBackwardArgs& args, const RowBackwardPlan& plan, void* workspace) {
  const std::size_t size = size_of(args.dtype);
  const std::size_t grad_size = size_of(args.grad_output_dtype);
  const int vector = plan.tree.vector;
  const std::size_t access = access_bytes(vector, size);
  const BackwardWorkspace sizes(args, plan);
  RowBackwardParams<A> params{};
  params.args = args;
  params.tree = plan.tree;
  params.mapping = plan.mapping;
  params.by = RowDivisors(plan.tree, plan.mapping);
  params.cols = static_cast<A>(args.cols);
  params.runs = plan.runs;
  params.weight_offset = static_cast<A>(args.weight_offset);
  params.row_sums = static_cast<A*>(workspace);
  params.weight_partial = sizes.weight > 0 ? params.row_sums + sizes.row_sums : nullptr;
  params.bias_partial = sizes.bias > 0 ? params.row_sums + sizes.row_sums + sizes.weight : nullptr;
  params.input_aligned = rows_aligned(args.input, args.input_layout, size, access);
  params.grad_output_aligned = rows_aligned(args.grad_output, args.grad_output_layout, grad_size, access_bytes(vector, grad_size));
  params.grad_residual_aligned = rows_aligned(args.grad_residual_out, args.grad_residual_out_layout, size, access);
  params.grad_input_aligned = is_aligned(args.grad_input, access);
  params.weight_aligned = is_aligned(args.weight, access_bytes(vector, size_of(args.param_dtype)));
  params.float_grad = args.grad_output_dtype == DType::kFloat32 && args.dtype != DType::kFloat32;
  params.float_params = args.param_dtype == DType::kFloat32 && args.dtype != DType::kFloat32;
  return params;
}

template <class Norm, class T, int V>
void launch_backward(RowBackwardParams<Accumulate<T>> params, void* stream) {
  const RowMapping& m = params.mapping;
  const bool split = m.tier == RowTier::kSplit;
  LaunchShape shape;
  shape.blocks = params.runs * m.blocks_per_row;
  shape.threads = static_cast<int>(block_threads(params.tree, m));
  shape.smem = backward_shared_bytes(params.tree, m, sizeof(Accumulate<T>));
  shape.cluster = split ? 1 : m.blocks_per_row;
  shape.dependent = dependent_launch();
  const auto kernel = row_backward_kernel<Norm, T, V>;
  if (split && params.args.grad_input != nullptr) {
    params.phase = BackwardPhase::kSums;
    launch(kernel, shape, stream, params);
  }
  params.phase = split ? BackwardPhase::kApply : BackwardPhase::kWhole;
  launch(kernel, shape, stream, params);
}

template <class Norm>
void row_backward(const RowBackwardArgs& args, void* workspace, int device, void* stream) {
  if (args.cols == 0) return;
  visit(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulate<T>;
    const auto params = row_backward_params<A>(args, row_backward_plan(args, device), workspace);
    if (args.rows > 0) {
      visit_row_vector<T>(params.tree.vector,
                          [&](auto vector) { launch_backward<Norm, T, decltype(vector)::value>(params, stream); });
    }
    if (args.grad_weight == nullptr && args.grad_bias == nullptr) return;
    const ParamGradParams<A> grads{
        {params.weight_partial, params.bias_partial}, {args.grad_weight, args.grad_bias}, params.runs, args.cols};
    if constexpr (sizeof(T) == 2) {
      if (params.float_params) return launch_param_grad<float>(grads, stream);
    }
    launch_param_grad<T>(grads, stream);
  });
}

}  // namespace normext::cuda
