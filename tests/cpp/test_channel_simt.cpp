// The CUDA kernels of the channel norms in the emulator, against a long double reference: every layout, type and subset of results,
// the same bits in every order of blocks, warps and lanes.
#include <cuda_runtime.h>

#include "channel_simt_case.h"
#include "cuda/channel_plan.h"

namespace {

using namespace normext;
using namespace normext::test;

void run(const Problem& p) {
  Tensors t(p);
  forward(forward_args(p, t));
  check_output(p, t);
  check_stats(p, t);
  const ChannelBackwardArgs a = backward_args(p, t);
  backward(a);
  check_gradients(p, t, a);
  expect(t.intact(), p.name() + ": wrote outside its results");
}

const std::vector<ChannelLayout> kLayouts = {ChannelLayout::kPlanes, ChannelLayout::kChannelsLast};
struct Pair {
  DType data, params;
};
const std::vector<Pair> kPairs = {{DType::kFloat32, DType::kFloat32},   {DType::kFloat64, DType::kFloat64},
                                  {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32},
                                  {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32}};
// batch, channels, spatial, groups
const std::vector<ChannelShape> kShapes = {{1, 1, 1, 1},    {2, 3, 1, 0},    {1, 4, 1, 2},    {5, 70, 1, 0},   {3, 12, 7, 4},
                                           {2, 6, 49, 3},   {4, 10, 49, 0},  {2, 16, 64, 4},  {3, 1, 1000, 0}, {2, 32, 196, 0},
                                           {2, 264, 24, 8}, {1, 3, 1025, 1}, {2, 2, 3000, 2}, {1, 8, 2048, 2}, {2, 5, 2600, 0},
                                           {1, 2, 9000, 1}, {40, 4, 130, 0}, {33, 520, 1, 0}, {300, 8, 3, 2},  {2, 4, 4100, 0}};

void test_shapes() {
  for (const ChannelLayout layout : kLayouts) {
    for (ChannelShape shape : kShapes) {
      shape.layout = layout;
      for (const Pair pair : kPairs) {
        // Two values of one slab have xhat of +-1 whatever they are, which makes gradients vanish.
        Problem p{shape, pair.data, pair.params};
        if (shape.slab_size() < 3) p.eps = 1.0;
        run(p);
        if (layout != ChannelLayout::kPlanes) continue;
        cuda::forced_resident_blocks() = 0;
        run(p);
        cuda::forced_resident_blocks().reset();
      }
    }
  }
}

void test_fused() {
  for (const ChannelLayout layout : kLayouts) {
    for (const Pair pair : kPairs) {
      for (const Activation activation :
           {Activation::kNone, Activation::kRelu, Activation::kSilu, Activation::kGelu, Activation::kLeakyRelu}) {
        for (const bool residual : {false, true}) {
          Problem p{{3, 12, 50, 4, layout}, pair.data, pair.params, activation, residual};
          run(p);
          p.shape.groups = 0;
          p.weight = p.bias = false;
          p.shift = 1;
          run(p);
        }
      }
    }
  }
}

void test_misaligned() {
  for (const ChannelLayout layout : kLayouts) {
    for (const Pair pair : kPairs) {
      for (const std::int64_t groups : {0, 2}) {
        Problem p{{2, 16, 1200, groups, layout}, pair.data, pair.params, Activation::kSilu, true};
        Tensors aligned(p);
        forward(forward_args(p, aligned));
        backward(backward_args(p, aligned));
        p.shift = 3;
        run(p);
        Tensors moved(p);
        forward(forward_args(p, moved));
        backward(backward_args(p, moved));
        expect(moved.y.same_rows(aligned.y) && moved.stats.same_rows(aligned.stats) && moved.dx.same_rows(aligned.dx) &&
                   moved.dr.same_rows(aligned.dr) && moved.dw.same_rows(aligned.dw) && moved.db.same_rows(aligned.db),
               p.name() + ": other bits than aligned");
      }
    }
  }
}

void test_large_mean() {
  for (const ChannelLayout layout : kLayouts) {
    for (const double mean : {1e3, 1e5, -1e6}) {
      for (const ChannelShape& shape : {ChannelShape{2, 8, 1500, 2, layout}, {4, 6, 2000, 0, layout}, {64, 40, 1, 0, layout}}) {
        run({shape, DType::kFloat32, DType::kFloat32, Activation::kNone, false, true, true, mean});
      }
    }
  }
}

// A constant input gives the bias exactly.
void test_constant() {
  for (const ChannelLayout layout : kLayouts) {
    for (const double value : {0.0, 0.1, 1e5 + 0.3, -7e8, 1e30}) {
      for (const ChannelShape& shape : {ChannelShape{2, 6, 1801, 2, layout}, {3, 6, 777, 0, layout}, {100, 3, 1, 0, layout}}) {
        const Problem p{shape};
        Tensors t(p);
        t.x.fill([&](std::int64_t, std::int64_t) { return value; });
        forward(forward_args(p, t));
        std::int64_t wrong = 0;
        p.each([&](std::int64_t i, std::int64_t c, std::int64_t) { wrong += t.y.at(0, i) != t.bias.at(0, c); });
        expect(wrong == 0,
               p.name() + ": constant " + std::to_string(value) + " misses the bias " + std::to_string(wrong) + " times");
      }
    }
  }
}

void test_orders() {
  for (const ChannelLayout layout : kLayouts) {
    for (const ChannelShape& shape : {ChannelShape{2, 8, 1030, 2, layout}, {3, 20, 300, 0, layout}, {2, 6, 49, 6, layout}}) {
      const Problem p{shape, DType::kBFloat16, DType::kFloat32, Activation::kSilu, true};
      Tensors first(p);
      forward(forward_args(p, first));
      backward(backward_args(p, first));
      for (const char* order : {"reverse", "random:0", "random:1", "random:77"}) {
        setenv("NORMEXT_SIMT_ORDER", order, 1);
        Tensors t(p);
        forward(forward_args(p, t));
        backward(backward_args(p, t));
        expect(t.y.same_rows(first.y) && t.stats.same_rows(first.stats) && t.moments.same_rows(first.moments) &&
                   t.dx.same_rows(first.dx) && t.dr.same_rows(first.dr) && t.dw.same_rows(first.dw) && t.db.same_rows(first.db),
               p.name() + ": other bits in order " + order);
      }
      unsetenv("NORMEXT_SIMT_ORDER");
    }
  }
}

// A slab in the shared memory of a block or cluster gives the bits of the two launches.
void test_resident() {
  for (const ChannelShape& shape : {ChannelShape{2, 8, 3000, 2, ChannelLayout::kPlanes},
                                    {9, 3, 4097, 0, ChannelLayout::kPlanes},
                                    {3, 10, 49, 10, ChannelLayout::kPlanes},
                                    {2, 3, 9001, 1, ChannelLayout::kPlanes}}) {
    for (const Pair pair : kPairs) {
      const Problem p{shape, pair.data, pair.params, Activation::kSilu, true, true, true, 10.0};
      cuda::forced_resident_blocks() = 0;
      Tensors robust(p);
      forward(forward_args(p, robust));
      for (const char* order : {"forward", "reverse", "random:5"}) {
        setenv("NORMEXT_SIMT_ORDER", order, 1);
        for (int blocks = 1; blocks <= 16; blocks *= 2) {
          cuda::forced_resident_blocks() = blocks;
          Tensors t(p);
          forward(forward_args(p, t));
          expect(t.y.same_rows(robust.y) && t.stats.same_rows(robust.stats) && t.moments.same_rows(robust.moments) && t.intact(),
                 p.name() + ": other bits with " + std::to_string(blocks) + " blocks, " + order);
        }
      }
      unsetenv("NORMEXT_SIMT_ORDER");
      cuda::forced_resident_blocks().reset();
    }
  }
}

// Statistics alone, statistics given, and every subset of gradients.
void test_subsets() {
  for (const ChannelLayout layout : kLayouts) {
    // One segment and several; groups of few sums, whose means the kernel of dx finds, and of many.
    for (const ChannelShape& shape : {ChannelShape{2, 12, 370, 0, layout},
                                      {2, 12, 370, 3, layout},
                                      {2, 3, 9000, 0, layout},
                                      {2, 4, 9000, 2, layout},
                                      {1, 300, 20, 1, layout}}) {
      const Problem p{shape, DType::kFloat32, DType::kFloat32, Activation::kGelu, true};
      Tensors all(p), t(p);
      forward(forward_args(p, all));
      ChannelForwardArgs f = forward_args(p, t);
      f.output = nullptr;
      forward(f);
      expect(t.stats.same_rows(all.stats) && t.moments.same_rows(all.moments), p.name() + ": statistics alone");
      f = forward_args(p, t);
      f.given_stats = true, f.moments = nullptr;
      forward(f);
      expect(t.y.same_rows(all.y), p.name() + ": given statistics");
      Tensors none(p);
      f = forward_args(p, none);
      f.moments = nullptr;
      forward(f);
      expect(none.y.same_rows(all.y) && none.stats.same_rows(all.stats), p.name() + ": without moments");

      backward(backward_args(p, all));
      for (int wanted = 0; wanted < 16; ++wanted) {
        Tensors some(p);
        forward(forward_args(p, some));
        ChannelBackwardArgs b = backward_args(p, some);
        if (!(wanted & 1)) b.grad_input = nullptr;
        if (!(wanted & 2)) b.grad_residual = nullptr;
        if (!(wanted & 4)) b.grad_weight = nullptr;
        if (!(wanted & 8)) b.grad_bias = nullptr;
        backward(b);
        expect((!(wanted & 1) || some.dx.same_rows(all.dx)) && (!(wanted & 2) || some.dr.same_rows(all.dr)) &&
                   (!(wanted & 4) || some.dw.same_rows(all.dw)) && (!(wanted & 8) || some.db.same_rows(all.db)) && some.intact(),
               p.name() + ": subset " + std::to_string(wanted));
      }
      Tensors fixed(p);
      forward(forward_args(p, fixed));
      ChannelBackwardArgs b = backward_args(p, fixed);
      b.fixed_stats = true;
      backward(b);
      check_gradients(p, fixed, b);
    }
  }
}

// SyncBatchNorm: two ranks give what one gives that has all images.
void test_sync() {
  for (const ChannelLayout layout : kLayouts) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      const Problem whole{{5, 7, 90, 0, layout}, dtype, dtype, Activation::kSilu, false, true, true, 3.0};
      const Problem parts[2] = {{{2, 7, 90, 0, layout}, dtype, dtype, Activation::kSilu, false, true, true, 3.0},
                                {{3, 7, 90, 0, layout}, dtype, dtype, Activation::kSilu, false, true, true, 3.0}};
      Tensors all(whole), part[2] = {Tensors(parts[0]), Tensors(parts[1])};
      const std::int64_t channels = 7, counted = whole.stats() == DType::kFloat64 ? 1 : 2;
      Tensor gathered(whole.stats(), 2, 3 * channels + counted, 0, 1), stats(whole.stats(), kChannelStats, channels);
      std::int64_t first = 0;
      double count = 0;
      for (int r = 0; r < 2; ++r) {
        part[r].x.fill([&](std::int64_t, std::int64_t i) { return all.x.at(0, first + i); });
        part[r].dy.fill([&](std::int64_t, std::int64_t i) { return all.dy.at(0, first + i); });
        first += parts[r].shape.elements();
        ChannelForwardArgs f = forward_args(parts[r], part[r]);
        f.output = f.stats = nullptr;
        forward(f);
        const std::int64_t values = parts[r].shape.slab_size();
        for (std::int64_t i = 0; i < 3 * channels; ++i) gathered.set(r, i, part[r].moments.at(i / channels, i % channels));
        const std::size_t row = (3 * channels + counted) * size_of(whole.stats());
        std::memcpy(static_cast<char*>(gathered.data()) + (r + 1) * row - 8, &values, 8);
      }
      ChannelMergeArgs merge{whole.stats(), 2, channels, gathered.data(), stats.data(), &count, whole.eps};
      cuda::merge_moments(merge, 0, nullptr);
      expect(count == double(whole.shape.slab_size()), "count of all ranks");
      std::vector<Real> sums(2 * channels);
      first = 0;
      for (int r = 0; r < 2; ++r) {
        ChannelForwardArgs f = forward_args(parts[r], part[r]);
        f.given_stats = true, f.stats = stats.data(), f.moments = nullptr;
        forward(f);
        for (std::int64_t i = 0; i < parts[r].shape.elements(); ++i) all.y.set(0, first + i, part[r].y.at(0, i));
        ChannelBackwardArgs b = backward_args(parts[r], part[r]);
        b.stats = stats.data(), b.sums = part[r].sums.data(), b.grad_input = b.grad_residual = nullptr;
        backward(b);
        for (std::int64_t i = 0; i < 2 * channels; ++i) sums[i] += part[r].sums.at(i / channels, i % channels);
        first += parts[r].shape.elements();
      }
      first = 0;
      for (int r = 0; r < 2; ++r) {
        part[r].sums.fill([&](std::int64_t k, std::int64_t c) { return sums[k * channels + c]; });
        ChannelBackwardArgs b = backward_args(parts[r], part[r]);
        b.stats = stats.data(), b.sums = part[r].sums.data(), b.given_sums = true, b.count = &count;
        b.grad_weight = b.grad_bias = nullptr;
        backward(b);
        for (std::int64_t i = 0; i < parts[r].shape.elements(); ++i) all.dx.set(0, first + i, part[r].dx.at(0, i));
        first += parts[r].shape.elements();
        expect(part[r].intact(), whole.name() + ": rank wrote outside its results");
      }
      check_output(whole, all);
      ChannelBackwardArgs b = backward_args(whole, all);
      b.grad_residual = b.grad_weight = b.grad_bias = nullptr;
      check_gradients(whole, all, b);
      b = backward_args(whole, all);
      b.stats = stats.data(), b.sums = all.sums.data();
      backward(b);
      check_gradients(whole, all, b);
    }
  }
}

// Evaluation finds its statistics by itself and leaves them where they are wanted; training updates running statistics with the
// bits of an update by itself.
void test_running_in_forward() {
  for (const ChannelLayout layout : kLayouts) {
    for (const Pair pair : kPairs) {
      for (const ChannelShape& shape : {ChannelShape{3, 12, 50, 0, layout},
                                        {2, 264, 24, 0, layout},
                                        {1, 2, 9000, 0, layout},
                                        {9, 1, 50, 0, layout},
                                        {70, 30, 1, 0, layout}}) {
        const Problem p{shape, pair.data, pair.params, Activation::kRelu, true};
        Tensors t(p), given(p);
        const std::int64_t channels = shape.channels;
        Tensor mean(pair.params, 1, channels), variance(pair.params, 1, channels);
        mean.random(7), variance.fill([&](std::int64_t, std::int64_t c) { return 0.5 + double(c % 9); });
        ChannelForwardArgs f = forward_args(p, t);
        f.moments = nullptr, f.running_mean = mean.data(), f.running_var = variance.data();
        forward(f);
        bool close = t.intact();
        for (std::int64_t c = 0; c < channels; ++c) {
          const Real rstd = 1 / std::sqrt(Real(variance.at(0, c)) + Real(p.eps));
          close &= t.stats.at(0, c) == mean.at(0, c) && t.stats.at(1, c) == 0 && t.stats.at(3, c) == 0;
          close &= std::fabs(t.stats.at(2, c) - rstd) <= epsilon_of(p.stats()) * rstd;
        }
        expect(close, p.name() + ": statistics of evaluation");
        ChannelForwardArgs g = forward_args(p, given);
        g.moments = nullptr, g.given_stats = true, g.stats = t.stats.data();
        forward(g);
        expect(given.y.same_rows(t.y), p.name() + ": evaluation");
        Tensors unsaved(p);
        f.output = unsaved.y.data(), f.stats = nullptr;
        forward(f);
        expect(unsaved.y.same_rows(t.y) && unsaved.intact(), p.name() + ": evaluation without saved statistics");

        for (const int blocks : {0, 1}) {
          cuda::forced_resident_blocks() = blocks;
          Tensors trained(p);
          Tensor new_mean = mean, new_variance = variance, old_mean = mean, old_variance = variance;
          const std::int64_t batches = 3;
          ChannelForwardArgs train = forward_args(p, trained);
          train.moments = nullptr;
          train.update = {pair.params, new_mean.data(), new_variance.data(), blocks == 0 ? nullptr : &batches, 0.3};
          forward(train);
          RunningUpdate alone = train.update;
          alone.mean = old_mean.data(), alone.var = old_variance.data();
          cuda::update_running({p.stats(), 1, channels, trained.stats.data(), alone}, 0, nullptr);
          expect(new_mean.same_rows(old_mean) && new_variance.same_rows(old_variance) && !new_mean.same_rows(mean),
                 p.name() + ": running statistics of a forward");
        }
        cuda::forced_resident_blocks().reset();
      }
    }
  }
}

// Kernels are not launched without need: on small inputs each takes as long as the work.
void test_launches() {
  const auto count = [](auto call) {
    const int before = simt::launches();
    call();
    return simt::launches() - before;
  };
  for (const std::int64_t groups : {0, 4}) {
    for (const ChannelLayout layout : kLayouts) {
      const bool planes = layout == ChannelLayout::kPlanes;
      const Problem p{{3, 12, 50, groups, layout}};
      Tensors t(p);
      ChannelForwardArgs f = forward_args(p, t);
      Tensor mean(p.params, 1, 12), variance(p.params, 1, 12);
      if (groups == 0) f.update.mean = mean.data(), f.update.var = variance.data();
      expect(count([&] { forward(f); }) == (planes ? 1 : 3), p.name() + ": launches of a forward");
      cuda::forced_resident_blocks() = 0;
      expect(count([&] { forward(f); }) == (planes ? 2 : 3), p.name() + ": launches of a forward, not resident");
      cuda::forced_resident_blocks().reset();
      const int expected = planes ? (groups == 0 ? 2 : 3) : (groups == 0 ? 3 : 4);
      expect(count([&] { backward(backward_args(p, t)); }) == expected, p.name() + ": launches of a backward");
      const Problem many{{1, 300, 20, groups == 0 ? 0 : 1, layout}};
      Tensors u(many);
      forward(forward_args(many, u));
      expect(count([&] { backward(backward_args(many, u)); }) == (groups == 0 ? expected : 4), many.name() + ": launches");
      if (groups > 0) continue;
      f.running_mean = mean.data(), f.running_var = variance.data(), f.moments = nullptr, f.update = {};
      expect(count([&] { forward(f); }) == 1, p.name() + ": launches of an evaluation");
    }
  }
}

void test_running() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const DType running : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
      if ((running == DType::kFloat64) != (dtype == DType::kFloat64)) continue;
      const std::int64_t channels = 300, images = 5;
      Tensor stats(dtype, kChannelStats, images * channels), mean(running, 1, channels), variance(running, 1, channels);
      stats.random(1), mean.random(2), variance.random(3);
      variance.fill([&](std::int64_t, std::int64_t c) { return 0.5 + double(c); });
      const Tensor old_mean = mean, old_variance = variance;
      for (const std::int64_t batches : {0, 4}) {
        mean = old_mean, variance = old_variance;
        const RunningUpdate update{running, mean.data(), variance.data(), batches ? &batches : nullptr, 0.1};
        cuda::update_running({dtype, images, channels, stats.data(), update}, 0, nullptr);
        const Real rate = batches ? 0.25L : 0.1L;
        bool close = mean.intact() && variance.intact();
        for (std::int64_t c = 0; c < channels; ++c) {
          Real m = 0, v = 0;
          for (std::int64_t i = 0; i < images; ++i) {
            m += (Real(stats.at(0, i * channels + c)) + stats.at(1, i * channels + c)) / images;
            v += Real(stats.at(3, i * channels + c)) / images;
          }
          const Real want_m = (1 - rate) * old_mean.at(0, c) + rate * m, want_v = (1 - rate) * old_variance.at(0, c) + rate * v;
          close &= std::fabs(mean.at(0, c) - want_m) <= 1e-6L * (3 + std::fabs(want_m)) + 1.01L * half_ulp(running, want_m);
          close &= std::fabs(variance.at(0, c) - want_v) <= 1e-6L * (3 + std::fabs(want_v)) + 1.01L * half_ulp(running, want_v);
        }
        expect(close, "running statistics " + std::to_string(int(dtype)) + std::to_string(int(running)));
      }
    }
  }
}

}  // namespace

int main() {
  test_shapes();
  test_fused();
  test_misaligned();
  test_large_mean();
  test_constant();
  test_orders();
  test_resident();
  test_subsets();
  test_sync();
  test_running_in_forward();
  test_launches();
  test_running();
  std::printf("%d failures\n", failures);
  return failures > 0;
}
