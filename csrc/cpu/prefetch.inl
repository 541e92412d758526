// What a pass over one row fetches meanwhile for the next ones.

#pragma once

#include "cpu/packed.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// Fetches one of kShares shares of the unit of columns at p. Locality as __builtin_prefetch has it: 3 is L1, 2 is L2. What will be
// written is asked for as if to read: on Zen 4 as good as asking for it to write.
template <int kLocality, int kShares = 1, class T>
NORMEXT_INLINE void fetch_unit(const T* p) {
  constexpr int kUnitBytes = kUnit<Accumulate<T>> * static_cast<int>(sizeof(T));
  for (int byte = 0; byte * kShares < kUnitBytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, kLocality);
  }
}

// To be fetched during a pass, unit by unit: one of kShares shares of a row. 0: nothing.
template <class T, int kShares>
struct Prefetch {
  const T* begin;

  NORMEXT_INLINE void fetch(std::int64_t column) const {
    if constexpr (kShares > 0) fetch_unit<3, kShares>(begin + column / kShares);
  }
};
// The same for a whole row, or nothing if null, and to L2.
template <class T>
struct L2Prefetch {
  const T* begin;

  NORMEXT_INLINE void fetch(std::int64_t column) const {
    if (begin != nullptr) fetch_unit<2>(begin + column);
  }
};

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
