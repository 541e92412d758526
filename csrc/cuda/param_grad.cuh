// Sums the partial parameter gradients of all row runs, pairwise in index order, and casts them to the parameter type.
// A block takes 32 columns; its slices of threads, 16 or as many as there are partials, take contiguous runs of them, so every
// access is coalesced.
#pragma once

#include "cuda/collectives.cuh"
#include "cuda/row_launch.cuh"

namespace normext::cuda {

constexpr int kGradColumns = 32;
constexpr int kGradSlices = 16;  // at most
constexpr int kGradLevels = 28;  // partials up to 2^28

// Adds values pairwise in index order as they arrive. push() a power of two of them, at most 2^kLevels; sum() is then their sum.
template <class A, int kLevels>
struct PairwiseSum {
  A level[kLevels + 1];
  unsigned count = 0;

  __device__ __forceinline__ void push(A value) {
    bool carry = true;
#pragma unroll
    for (int l = 0; l <= kLevels; ++l) {
      if (carry) {
        if (count >> l & 1u) {
          value = level[l] + value;
        } else {
          level[l] = value;
          carry = false;
        }
      }
    }
    ++count;
  }
  __device__ __forceinline__ A sum() const {
    A total = A(0);
#pragma unroll
    for (int l = 0; l <= kLevels; ++l) {
      if (count >> l & 1u) total = level[l];
    }
    return total;
  }
};

constexpr int kGradBatch = 8;  // partials that a thread loads at once: the loads take long, the sums do not

// Threads of a block whose column_sum() is of `count` terms.
inline int column_threads(std::int64_t count) {
  return kGradColumns * static_cast<int>(power_of_two_at_least(count < kGradSlices ? count : kGradSlices));
}

// term(0) + ... + term(count - 1) pairwise in index order, for each of the 32 columns of a block of column_threads(), with as many
// values in shared memory; count <= 2^kLevels. The threads of the first slice get it.
template <int kLevels, class A, class Term>
__device__ __forceinline__ A column_sum(std::int64_t count, Term term) {
  const int slice = static_cast<int>(threadIdx.x) / kGradColumns;
  const int slices = static_cast<int>(blockDim.x) / kGradColumns;
  const std::int64_t run = power_of_two_at_least(count) / slices;
  PairwiseSum<A, kLevels - 7> sum;  // of a 16th of the terms, 8 at a time
  for (std::int64_t first = slice * run; first < (slice + 1) * run; first += kGradBatch) {
    A value[kGradBatch];
#pragma unroll
    for (int i = 0; i < kGradBatch; ++i) value[i] = i < run && first + i < count ? term(first + i) : A(0);
#pragma unroll
    for (int width = 1; width < kGradBatch; width *= 2) {
      if (width >= run) break;
#pragma unroll
      for (int i = 0; i < kGradBatch; i += 2 * width) value[i] = value[i] + value[i + width];
    }
    sum.push(value[0]);
  }
  A* table = reinterpret_cast<A*>(dynamic_smem());
  table[threadIdx.x] = sum.sum();
  for (int width = 1; width < slices; width *= 2) {
    block_barrier();
    if (slice % (2 * width) == 0) table[threadIdx.x] = table[threadIdx.x] + table[threadIdx.x + width * kGradColumns];
  }
  return table[threadIdx.x];
}

template <class A>
struct ParamGradParams {
  const A* partial[2];  // [runs][cols]; dweight, dbias
  void* out[2];         // [cols]; a null one is skipped
  std::int64_t runs, cols;
};

template <class P, class A>
__global__ void __launch_bounds__(kGradColumns* kGradSlices) param_grad_kernel(const __grid_constant__ ParamGradParams<A> params) {
  const std::int64_t blocks = ceil_div(params.cols, kGradColumns);
  const int which = blockIdx.x < blocks ? 0 : 1;
  const A* partial = params.partial[which];
  P* out = static_cast<P*>(params.out[which]);
  const std::int64_t column = (blockIdx.x - which * blocks) * kGradColumns + threadIdx.x % kGradColumns;
  const bool exists = column < params.cols && out != nullptr;

  dependency_wait();
  const A sum =
      column_sum<kGradLevels, A>(params.runs, [&](std::int64_t p) { return exists ? partial[p * params.cols + column] : A(0); });
  launch_dependents();
  if (threadIdx.x < kGradColumns && exists) out[column] = from_accumulate<P>(sum);
}

template <class P, class A>
void launch_param_grad(const ParamGradParams<A>& params, void* stream) {
  LaunchShape shape;
  shape.blocks = 2 * ceil_div(params.cols, kGradColumns);
  shape.threads = column_threads(params.runs);
  shape.smem = shape.threads * sizeof(A);
  shape.dependent = dependent_launch();
  launch(param_grad_kernel<P, A>, shape, stream, params);
}

}  // namespace normext::cuda
