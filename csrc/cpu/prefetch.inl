// What a pass over one row fetches meanwhile for the next ones.

#pragma once

#include "cpu/vector.h"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

// To be fetched during a pass, unit by unit: one of kShares shares of a row. 0: nothing.
template <class T, int kShares>
struct Ahead {
  static constexpr int kUnitBytes = kUnit<Accumulate<T>> * static_cast<int>(sizeof(T));
  const T* begin;

  NORMEXT_INLINE void fetch(std::int64_t column) const {
    if constexpr (kShares > 0) {
      for (int byte = 0; byte * kShares < kUnitBytes; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(begin + column / kShares) + byte);
      }
    }
  }
};
// The same for a whole row, or nothing if null, and to L2. Of a row that will be written the lines are asked for as if to read: on
// Zen 4 as good as asking for them to write.
template <class O>
struct L2Ahead {
  static constexpr int kUnitBytes = kUnit<Accumulate<O>> * static_cast<int>(sizeof(O));
  const O* begin;

  NORMEXT_INLINE void fetch(std::int64_t column) const {
    if (begin == nullptr) return;
    for (int byte = 0; byte < kUnitBytes; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(begin + column) + byte, 0, 2);
    }
  }
};

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
