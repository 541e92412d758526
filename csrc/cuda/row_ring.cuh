// Row backward: x and dy on their way from memory, in shared memory. Copies cost no registers, so that rows enough are in flight
// (64 KB for 512 threads) while a row is reduced. A thread copies the columns it owns and reads nothing else: no barrier. It asks
// for the next copy into a place after it has read that place into registers.
#pragma once

#include "core/row_args.h"
#include "cuda/intrinsics.cuh"
#include "cuda/tile.cuh"
#include "cuda/tuning.h"

namespace normext::cuda {

// Goes through the rows of a run that a team takes: group `team` of 16 rows, then every teams-th.
struct TeamRow {
  std::int64_t run;  // its first row
  int count;         // rows of the run; 0 if the team takes none
  int skip;          // rows of the other teams between two groups
  int within;        // the row, counted from the run's first

  __device__ __forceinline__ TeamRow(std::int64_t first, int rows, int team, int teams)
      : run(first), count(rows), skip((teams - 1) * kGroupRows), within(team * kGroupRows) {}
  __device__ __forceinline__ bool exists() const { return within < count; }
  // The run's first for a row that does not exist.
  __device__ __forceinline__ std::int64_t row() const { return run + (exists() ? within : 0); }
  // To the next row; whether that is the one behind this.
  __device__ __forceinline__ bool next() {
    ++within;
    if (skip == 0 || within % kGroupRows != 0) return true;
    within += skip;
    return false;
  }
};

// The columns of one tensor that a thread owns.
template <class T, int V, int kSlots>
struct RingSlots {
  static constexpr int kBytes = V * sizeof(T);
  unsigned char* place;  // of slot 0
  int step;              // bytes from slot to slot

  template <class Copies>
  __device__ __forceinline__ void copy(Copies& copies, const T* row, const LaneColumns<V>& columns) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (columns.owns(s)) copies.template copy<kBytes>(place + s * step, row + columns.first + columns.offset(s));
    }
  }
  __device__ __forceinline__ void put(const Tile<T, V, kSlots>& tile, const LaneColumns<V>& columns) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (columns.owns(s)) tile.slot[s].template store<true>(reinterpret_cast<T*>(place + s * step));
    }
  }
  __device__ __forceinline__ void take(Tile<T, V, kSlots>& tile, const LaneColumns<V>& columns) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (columns.owns(s)) tile.slot[s].template load<true>(reinterpret_cast<const T*>(place + s * step));
    }
  }
};

template <class T, int V, int kSlots>
class RowRing {
 public:
  static constexpr int kRows = kRingBytes / static_cast<int>(2 * kSlots * V * sizeof(T));  // on their way at most
  static_assert(kRows > 0 && (kRows & (kRows - 1)) == 0);

  __device__ __forceinline__ RowRing(const RowBackwardArgs& args, const TeamRow& first, const LaneColumns<V>& columns,
                                     bool input_aligned, bool grad_output_aligned, bool only_input)
      : args_(args),
        next_row_(first),
        columns_(columns),
        input_(args.input_layout.offset(first.row())),
        grad_output_(args.grad_output_layout.offset(first.row())),
        aligned_(V == 1 || (input_aligned && (only_input || grad_output_aligned))),
        only_input_(only_input) {
    NORMEXT_NO_UNROLL
    for (int n = 0; n < kRows; ++n) request();
  }

  // The next row. The row kRows behind it then takes its place.
  __device__ __forceinline__ void take(Tile<T, V, kSlots>& x, Tile<T, V, kSlots>& dy, const LaneColumns<V>& columns) {
    copies_.template wait<kRows - 1>();
    slots(next_, 0).take(x, columns);
    if (!only_input_) slots(next_, 1).take(dy, columns);
    request();
  }

 private:
  const RowBackwardArgs& args_;
  TeamRow next_row_;
  const LaneColumns<V>& columns_;
  std::int64_t input_, grad_output_;  // offsets of next_row_
  bool aligned_, only_input_;
  unsigned next_ = 0;  // requests made; the next one has the place of the row to be taken next
  // Where a copy would be of two bytes, which there are none of, a row passes through registers: loaded at one request, stored at
  // the next.
  static constexpr bool kThroughRegisters = V * sizeof(T) < 4;
  Tile<T, V, kSlots> x_, dy_;
  bool loaded_ = false;
  AsyncCopies<kRows * 2 * kSlots> copies_;

  // Of request n, and of n - kRows.
  __device__ __forceinline__ RingSlots<T, V, kSlots> slots(unsigned n, unsigned tensor) const {
    constexpr int kBytes = V * sizeof(T);
    const int step = static_cast<int>(blockDim.x) * kBytes;
    const int slot = static_cast<int>(n % kRows * 2 + tensor) * kSlots;
    return {dynamic_smem() + slot * step + static_cast<int>(threadIdx.x) * kBytes, step};
  }

  // The offset of next_row_; of the row before it, where it follows that.
  __device__ __forceinline__ std::int64_t next_offset(const RowLayout& layout, std::int64_t before, bool follows) const {
    return layout.dims == 1 && follows ? before + layout.stride[0] : layout.offset(next_row_.row());
  }

  __device__ __forceinline__ void load() {
    x_.load(static_cast<const T*>(args_.input) + input_, columns_, false);
    if (!only_input_) dy_.load(static_cast<const T*>(args_.grad_output) + grad_output_, columns_, false);
  }
  __device__ __forceinline__ void put(unsigned n) const {
    slots(n, 0).put(x_, columns_);
    if (!only_input_) slots(n, 1).put(dy_, columns_);
  }

  __device__ __forceinline__ void request() {
    const bool exists = next_row_.exists();
    if constexpr (kThroughRegisters) {
      if (loaded_) put(next_ - 1);
      loaded_ = exists;
      if (exists) load();
    } else if (exists) {
      if (aligned_) {
        slots(next_, 0).copy(copies_, static_cast<const T*>(args_.input) + input_, columns_);
        if (!only_input_) slots(next_, 1).copy(copies_, static_cast<const T*>(args_.grad_output) + grad_output_, columns_);
      } else {
        load();
        put(next_);
      }
    }
    copies_.commit();
    ++next_;
    const bool follows = next_row_.next();
    input_ = next_offset(args_.input_layout, input_, follows);
    grad_output_ = next_offset(args_.grad_output_layout, grad_output_, follows);
  }
};

}  // namespace normext::cuda
