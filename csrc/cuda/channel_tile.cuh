// kPlanes: which elements a warp owns. A segment of a slab is cut into pieces of `piece` elements, and lane l owns vectors l, l +
// 32, ... of a piece: by place in the slab, never by address, so that a misaligned tensor is read and written by the same lanes.
#pragma once

#include "cuda/channel_plan.h"
#include "cuda/tile.cuh"

namespace normext::cuda {

// The warps of a block that share a segment.
struct Team {
  int index, warp;  // of the team in the block, of this warp in the team
  std::int64_t slab, segment;
  bool active;

  __device__ __forceinline__ explicit Team(const PlanesPlan& plan) {
    const int block_warp = warp_id();
    index = block_warp / plan.warps;
    warp = block_warp % plan.warps;
    const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * plan.teams + index;
    slab = plan.segments == 1 ? unit : unit / plan.segments;
    segment = unit - slab * plan.segments;
    active = slab < plan.slabs;
  }
};

// A lane's vectors of V elements in one piece.
template <int V>
struct PlanePiece {
  const PlanesPlan& plan;
  std::int64_t first_plane;  // of the slab, where the piece begins
  std::int64_t origin;       // of the piece in the tensor
  int edge;  // planes of kPiece elements and more: elements of the piece before the next plane; else: of first_plane before the
             // piece
  int left;  // elements of the piece, less those before this lane's first vector

  // `elements` elements of the slab from `begin` on, or fewer where it ends.
  __device__ __forceinline__ PlanePiece(const PlanesPlan& plan_, std::int64_t slab, std::int64_t begin, int elements)
      : plan(plan_) {
    first_plane = plan.small ? plan.fast.divide(static_cast<std::uint32_t>(begin)) : begin / plan.spatial;
    const std::int64_t within = begin - first_plane * plan.spatial;
    origin = slab * plan.slab_step * plan.spatial + first_plane * plan.pitch + within;
    const std::int64_t to_next = plan.spatial - within;
    edge = static_cast<int>(plan.spatial < kPiece ? within : (to_next < kPiece ? to_next : kPiece));
    const std::int64_t count = plan.slab_size - begin;
    left = (count < elements ? static_cast<int>(count) : elements) - static_cast<int>(lane_id()) * V;
  }
  // Piece p of the team's segment.
  __device__ __forceinline__ PlanePiece(const PlanesPlan& plan_, const Team& team, std::int64_t p, int elements)
      : PlanePiece(plan_, team.slab, team.segment * plan_.segment + p * elements, elements) {}

  __device__ __forceinline__ bool owns(int s) const { return s * 32 * V < left; }
  __device__ __forceinline__ LaneColumns<V> columns() const { return {static_cast<int>(lane_id()) * V, left}; }

  struct Place {
    std::int64_t plane;   // of the slab
    std::int64_t offset;  // in the tensor
  };
  __device__ __forceinline__ Place place(int s) const {
    const int at = (s * 32 + static_cast<int>(lane_id())) * V;
    const std::int64_t gap = plan.pitch - plan.spatial;
    if (plan.spatial >= kPiece) {
      const bool next = at >= edge;
      return {first_plane + next, origin + at + (next ? gap : 0)};
    }
    const int further = static_cast<int>(plan.fast.divide(static_cast<std::uint32_t>(edge + at)));
    return {first_plane + further, origin + at + further * gap};
  }

  // One uniform branch around the whole batch: all accesses are issued before the first is used.
  template <class T, int kSlots>
  __device__ __forceinline__ void load(Tile<T, V, kSlots>& tile, const void* p, bool aligned) const {
    if (V == 1 || aligned) {
      load_batch<true>(tile, static_cast<const T*>(p));
    } else {
      load_batch<false>(tile, static_cast<const T*>(p));
    }
  }
  template <class T, int kSlots>
  __device__ __forceinline__ void store(const Tile<T, V, kSlots>& tile, void* p, bool aligned) const {
    if (V == 1 || aligned) {
      store_batch<true>(tile, static_cast<T*>(p));
    } else {
      store_batch<false>(tile, static_cast<T*>(p));
    }
  }

 private:
  template <bool kAligned, class T, int kSlots>
  __device__ __forceinline__ void load_batch(Tile<T, V, kSlots>& tile, const T* p) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (owns(s)) tile.slot[s].template load<kAligned>(p + opaque_offset(place(s).offset));
    }
  }
  template <bool kAligned, class T, int kSlots>
  __device__ __forceinline__ void store_batch(const Tile<T, V, kSlots>& tile, T* p) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (owns(s)) tile.slot[s].template store<kAligned>(p + opaque_offset(place(s).offset));
    }
  }
};

template <int kElements, int V>
constexpr int kSlotsOf = kElements / (kWarpSize * V);

}  // namespace normext::cuda
