// The small kernels of the channel norms: channel_stats.cuh and channel_running.cuh.
#include "cuda/channel_norm.h"
#include "cuda/channel_running.cuh"
#include "cuda/channel_stats.cuh"

namespace normext::cuda {
namespace {

template <class F>
void visit_stats(DType dtype, F&& f) {
  if (dtype == DType::kFloat64) return f(TypeTag<double>{});
  f(TypeTag<float>{});
}

}  // namespace

void launch_finalise(const FinaliseParams<float>& params, void* stream) { launch_finalise_typed(params, stream); }
void launch_finalise(const FinaliseParams<double>& params, void* stream) { launch_finalise_typed(params, stream); }
void launch_grad_sums(const GradSumsParams<float>& params, void* stream) { launch_grad_sums_typed(params, stream); }
void launch_grad_sums(const GradSumsParams<double>& params, void* stream) { launch_grad_sums_typed(params, stream); }

void merge_moments(const ChannelMergeArgs& args, int, void* stream) {
  visit_stats(args.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    launch_channel(merge_moments_kernel<A, double>, ceil_div(args.channels, kRunningThreads), kRunningThreads, 0, stream, args,
                   static_cast<A>(args.eps));
  });
}
void update_running(const RunningArgs& args, int, void* stream) {
  visit_stats(args.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    launch_channel(update_running_kernel<A>, ceil_div(args.channels, kRunningThreads), kRunningThreads, 0, stream, args,
                   static_cast<A>(args.update.momentum));
  });
}

}  // namespace normext::cuda
