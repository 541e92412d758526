// What channel_norm.cpp asks of the channel norm kernels of one instruction set. No inline functions here, as in row_kernels.h.
#pragma once

#include <cstdint>

#include "core/channel_args.h"
#include "cpu/isa.h"

namespace normext::cpu {

// Planes that count as short; for batch norm in at least so many images and channels; values of a group of them at most
// (channel_short.inl).
constexpr std::int64_t kLeastShort = 2;
constexpr std::int64_t kMostShort = 36;
constexpr std::int64_t kMostShortOfStatistics = 63;
constexpr std::int64_t kLeastShortImages = 4;
constexpr std::int64_t kLeastShortChannels = 32;
constexpr std::int64_t kMostShortGroup = 32768;

constexpr std::int64_t kBlockColumns = 64;  // slabs of planes that are handled together, at most
constexpr int kForwardRows = 4;             // arrays over channels in ChannelPlan::rows of an image of a forward on channels-last
constexpr std::int64_t kColumnStep = 32;    // channels: a whole number of units of every instruction set

// How a call is divided. All that shapes a sum (piece, pieces, images) follows from the shape, the dtype and the instruction set;
// `resident` and the number of threads decide only who does the work, and when.
//
// The kernels see fewer kinds of shape than callers have: batch norm in channels-last is one image of batch * spatial rows whose
// groups have one channel; planes of one value are channels-last; channels-last of one channel is planes.
struct ChannelPlan {
  Parallel parallel;
  std::int64_t piece = 0;   // planes: values of a line that make a segment; channels-last: rows of an image that make a run
  std::int64_t pieces = 1;  // of a line, or of an image
  std::int64_t images = 0;  // of a segment that is a channel in several of them (channel_short.inl); others: 0
  std::int64_t padded = 0;  // stride of arrays over columns
  // A unit of work (a column of lines, a block of columns of an image) fits L2: everything is done for it before the next is begun.
  // Otherwise threads share each pass over the whole input.
  bool resident = false;
  // Channels-last: of a block; whole groups, and but for the last block a multiple of kColumnStep.
  std::int64_t columns = 0;
  bool fetch_output = false;  // the output, or dx, is fetched to L2 while sums are taken; planes only
  // Backward: where the pass that sums leaves dz for the one that forms dx, or null. Like a tensor of the input's shape; but in 16
  // bits room of kept_values in the accumulate type, on planes for each thread and a block of slabs.
  void* kept = nullptr;
  std::int64_t kept_values = 0;
  // Workspace, in the accumulate type. What each layout keeps there is said where it is used.
  void* partial = nullptr;
  void* merged = nullptr;
  void* rows = nullptr;
  void* params = nullptr;
};

struct ChannelKernels {
  void (*forward)(const ChannelForwardArgs& args, const ChannelPlan& plan);
  void (*backward)(const ChannelBackwardArgs& args, const ChannelPlan& plan);
  void (*fixed_stats)(const ChannelForwardArgs& args);  // stats from running_mean and running_var
  void (*update_running)(const RunningArgs& args);
};

}  // namespace normext::cpu
