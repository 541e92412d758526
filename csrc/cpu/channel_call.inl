// The channel norm kernels of one instruction set: from run-time types and layouts to a kernel.
#pragma once

#include "core/dtypes.h"
#include "cpu/channel_kernels.h"
#include "cpu/channel_sums.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

template <template <class, bool, class...> class Planes, template <class, bool, class...> class Last, class Args>
NORMEXT_INLINE void channel_call(const Args& args, const cpu::ChannelPlan& plan, bool fused) {
  visit(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto call = [&](auto is_fused) __attribute__((always_inline)) {
      constexpr bool kFused = decltype(is_fused)::value;
      if (args.shape.layout == ChannelLayout::kPlanes) Planes<T, kFused>{args, plan}.run();
      else Last<T, kFused>{args, plan}.run();
    };
    if constexpr (kKnowsPlain) {
      if (!fused) return call(std::false_type());
    }
    call(std::true_type());
  });
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
