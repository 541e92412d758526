// What the launchers share: the device as tuning.h sees it, and which accesses are legal.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "core/dtypes.h"
#include "core/views.h"
#include "cuda/launch.cuh"
#include "cuda/tuning.h"

namespace normext::cuda {

inline Device describe(int device) {
  const DeviceLimits& limits = device_limits(device);
  return {limits.sm_count, limits.max_cluster, limits.smem_per_block};
}

// NORMEXT_PDL=1: kernels may start before the preceding kernel of the stream ends (programmatic dependent launch, sm_90+). All
// reads come after the wait for it, those of parameters too: a cast under autocast or our own copy may have just written them.
inline bool dependent_launch() {
  static const bool wanted = [] {
    const char* value = std::getenv("NORMEXT_PDL");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return wanted;
}

// From a run-time bool to a compile-time one: f(auto b), decltype(b)::value.
template <class F>
void visit_bool(bool value, F&& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// f(std::integral_constant<int, V>) for V = vector, which is kWidest, narrower(kWidest) or so on down to 1.
template <int kWidest, int (*narrower)(int), class F>
void visit_widths(int vector, F&& f) {
  if constexpr (kWidest > 1) {
    if (vector != kWidest) return visit_widths<narrower(kWidest), narrower>(vector, f);
  }
  f(std::integral_constant<int, kWidest>{});
}
// Of rows: powers of two, of at most 16 bytes of elements.
constexpr int half_vector(int vector) { return vector / 2; }
template <class T, class F>
void visit_row_vector(int vector, F&& f) {
  visit_widths<16 / static_cast<int>(sizeof(T)), half_vector>(vector, f);
}

inline bool is_aligned(const void* p, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

// Whether every row starts at a multiple of `bytes`.
inline bool rows_aligned(const void* p, const RowLayout& layout, std::size_t element_size, std::size_t bytes) {
  if (!is_aligned(p, bytes)) return false;
  for (int d = 0; d < layout.dims; ++d) {
    if (layout.extent[d] > 1 && layout.stride[d] * static_cast<std::int64_t>(element_size) % static_cast<std::int64_t>(bytes)) {
      return false;
    }
  }
  return true;
}

// The widest access used for `vector` elements of `element_size` bytes.
inline std::size_t access_bytes(int vector, std::size_t element_size) {
  const std::size_t bytes = vector * element_size;
  return bytes < 16 ? bytes : 16;
}

}  // namespace normext::cuda
