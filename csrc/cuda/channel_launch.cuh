// What the launchers of the channel norms share.
#pragma once

#include <type_traits>

#include "core/channel_args.h"
#include "cuda/channel_plan.h"
#include "cuda/row_launch.cuh"

namespace normext::cuda {

// f(std::integral_constant<int, V>) for V = vector, one that vector_of() returns.
template <class T, class F>
void visit_vector(int vector, F&& f) {
  visit_widths<widest_vector(sizeof(T)), narrower_vector>(vector, f);
}

// Whether vectors of `vector` elements of `dtype` may be moved at once to or from each of the arrays; null ones do not matter.
template <class... P>
bool all_aligned(int vector, DType dtype, const P*... p) {
  return (is_aligned(p, vector * size_of(dtype)) && ...);
}

template <class... P, class... A>
void launch_channel(void (*kernel)(P...), std::int64_t blocks, int threads, std::size_t smem, void* stream, const A&... args) {
  LaunchShape shape;
  shape.blocks = blocks;
  shape.threads = threads;
  shape.smem = smem;
  shape.dependent = dependent_launch();
  launch(kernel, shape, stream, args...);
}

}  // namespace normext::cuda
