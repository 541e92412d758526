// Problems for the channel norms, their calls on CUDA, and their long double reference, for test_channel_simt.cpp. No torch.
#pragma once

#include <cstdlib>

#include "cuda/channel_norm.h"
#include "row_case.h"

namespace normext::test {

struct Problem {
  ChannelShape shape;
  DType dtype = DType::kFloat32, params = DType::kFloat32;
  Activation activation = Activation::kNone;
  bool residual = false, weight = true, bias = true;
  double mean = 0.0;
  int shift = 0;  // of every tensor, in elements
  double eps = 1e-5;

  DType stats() const { return statistics_dtype(dtype); }
  std::int64_t at(std::int64_t n, std::int64_t c, std::int64_t s) const {
    return shape.layout == ChannelLayout::kPlanes ? (n * shape.channels + c) * shape.spatial + s
                                                  : (n * shape.spatial + s) * shape.channels + c;
  }
  std::string name() const {
    return std::to_string(shape.batch) + "x" + std::to_string(shape.channels) + "x" + std::to_string(shape.spatial) + " groups " +
           std::to_string(shape.groups) + (shape.layout == ChannelLayout::kPlanes ? " planes" : " last") + " types " +
           std::to_string(int(dtype)) + std::to_string(int(params)) + " activation " + std::to_string(int(activation)) +
           (residual ? " residual" : "") + (weight ? " w" : "") + (bias ? " b" : "") + " mean " + std::to_string(mean) + " shift " +
           std::to_string(shift);
  }
  std::int64_t slab(std::int64_t n, std::int64_t c) const {
    return shape.batch_norm() ? c : n * shape.groups + c / shape.group_channels();
  }
  template <class F>
  void each(F f) const {  // f(element, channel, slab)
    for (std::int64_t n = 0; n < shape.batch; ++n)
      for (std::int64_t c = 0; c < shape.channels; ++c)
        for (std::int64_t s = 0; s < shape.spatial; ++s) f(at(n, c, s), c, slab(n, c));
  }
};

// Exactly as much as is asked for, so that AddressSanitizer sees an overrun.
struct Workspace {
  explicit Workspace(std::size_t bytes) : bytes(bytes) {
    data = std::malloc(bytes > 0 ? bytes : 1);
    std::memset(data, 0xff, bytes);
  }
  ~Workspace() { std::free(data); }
  Workspace(const Workspace&) = delete;
  void operator=(const Workspace&) = delete;
  void* data;
  std::size_t bytes;
};

struct Tensors {
  Tensor x, residual, weight, bias, y, stats, moments, dy, dx, dr, dw, db, sums;
  explicit Tensors(const Problem& p)
      : x(p.dtype, 1, p.shape.elements(), 0, p.shift),
        residual(p.dtype, 1, p.shape.elements(), 0, p.shift),
        weight(p.params, 1, p.shape.channels, 0, p.shift),
        bias(p.params, 1, p.shape.channels, 0, p.shift),
        y(p.dtype, 1, p.shape.elements(), 0, p.shift),
        stats(p.stats(), kChannelStats, p.shape.slabs()),
        moments(p.stats(), kChannelMoments, p.shape.slabs()),
        dy(p.dtype, 1, p.shape.elements(), 0, p.shift),
        dx(p.dtype, 1, p.shape.elements(), 0, p.shift),
        dr(p.dtype, 1, p.shape.elements(), 0, p.shift),
        dw(p.params, 1, p.shape.channels, 0, p.shift),
        db(p.params, 1, p.shape.channels),
        sums(p.stats(), 2, p.shape.channels) {
    x.random(1, p.mean), residual.random(2), weight.random(3), bias.random(4), dy.random(5);
  }
  bool intact() const {
    bool all = true;
    for (const Tensor* t : {&x, &residual, &weight, &bias, &y, &stats, &moments, &dy, &dx, &dr, &dw, &db, &sums})
      all &= t->intact();
    return all;
  }
};

inline ChannelForwardArgs forward_args(const Problem& p, Tensors& t) {
  ChannelForwardArgs a;
  a.shape = p.shape, a.dtype = p.dtype, a.param_dtype = p.params;
  a.input = t.x.data(), a.residual = p.residual ? t.residual.data() : nullptr, a.output = t.y.data();
  a.weight = p.weight ? t.weight.data() : nullptr, a.bias = p.bias ? t.bias.data() : nullptr;
  a.stats = t.stats.data(), a.moments = t.moments.data();
  a.eps = p.eps, a.activation = p.activation;
  return a;
}
inline void forward(const ChannelForwardArgs& a) {
  const Workspace workspace(cuda::channel_forward_workspace(a, 0));
  cuda::channel_forward(a, workspace.data, 0, nullptr);
}
inline ChannelBackwardArgs backward_args(const Problem& p, Tensors& t) {
  ChannelBackwardArgs a;
  a.shape = p.shape, a.dtype = p.dtype, a.param_dtype = p.params;
  a.grad_output = t.dy.data(), a.input = t.x.data(), a.residual = p.residual ? t.residual.data() : nullptr;
  a.weight = p.weight ? t.weight.data() : nullptr, a.bias = p.bias ? t.bias.data() : nullptr;
  a.stats = t.stats.data();
  a.grad_input = t.dx.data(), a.grad_residual = t.dr.data(), a.grad_weight = t.dw.data(), a.grad_bias = t.db.data();
  a.activation = p.activation;
  return a;
}
inline void backward(const ChannelBackwardArgs& a) {
  const Workspace workspace(cuda::channel_backward_workspace(a, 0));
  cuda::channel_backward(a, workspace.data, 0, nullptr);
}

// ---- reference ----

using Real = long double;

inline Real activated(Activation a, Real z) {
  switch (a) {
    case Activation::kRelu:
      return z > 0 ? z : 0;
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
    case Activation::kGelu:
      return z * 0.5L * std::erfc(-z * std::sqrt(0.5L));
    case Activation::kLeakyRelu:
      return z > 0 ? z : z * Real(kLeakyReluSlope);
    case Activation::kNone:
      break;
  }
  return z;
}
inline Real slope(Activation a, Real z) {
  switch (a) {
    case Activation::kRelu:
      return z > 0 ? 1 : 0;
    case Activation::kSilu: {
      const Real s = 1 / (1 + std::exp(-z));
      return s * (1 + z * (1 - s));
    }
    case Activation::kGelu:
      return 0.5L * std::erfc(-z * std::sqrt(0.5L)) + z * 0.3989422804014326779L * std::exp(-z * z / 2);
    case Activation::kLeakyRelu:
      return z > 0 ? 1 : Real(kLeakyReluSlope);
    case Activation::kNone:
      break;
  }
  return 1;
}

struct Slabs {
  std::vector<Real> mean, square, rstd;
  Slabs(const Problem& p, const Tensor& x) : mean(p.shape.slabs()), square(mean), rstd(mean) {
    const Real n = p.shape.slab_size();
    p.each([&](std::int64_t i, std::int64_t, std::int64_t slab) { mean[slab] += x.at(0, i) / n; });
    p.each([&](std::int64_t i, std::int64_t, std::int64_t slab) {
      square[slab] += (x.at(0, i) - mean[slab]) * (x.at(0, i) - mean[slab]);
    });
    for (std::size_t s = 0; s < mean.size(); ++s) rstd[s] = 1 / std::sqrt(square[s] / n + Real(p.eps));
  }
};

struct Element {
  Real xhat, w, z, bound;  // bound: of the error of z, in units of eps
  Element(const Problem& p, const Tensors& t, const Slabs& slabs, std::int64_t i, std::int64_t c, std::int64_t slab) {
    xhat = (t.x.at(0, i) - slabs.mean[slab]) * slabs.rstd[slab];
    w = p.weight ? t.weight.at(0, c) : 1;
    const Real b = p.bias ? t.bias.at(0, c) : 0, r = p.residual ? t.residual.at(0, i) : 0;
    z = xhat * w + b + r;
    bound = std::fabs(w) * std::max(Real(1), std::fabs(xhat)) + std::fabs(b) + std::fabs(r);
  }
};

inline void worse(Real& worst, Real error, Real bound) {
  const Real e = error / (bound + 1e-300L);
  if (!(e <= worst)) worst = e;
}

inline void check_output(const Problem& p, const Tensors& t) {
  const Slabs slabs(p, t.x);
  Real worst = 0;
  const bool active = p.activation != Activation::kNone;
  p.each([&](std::int64_t i, std::int64_t c, std::int64_t slab) {
    const Element e(p, t, slabs, i, c, slab);
    const Real want = activated(p.activation, e.z);
    // The slope of an activation is at most 1.13, and its own rounding about 2 eps of what goes in.
    worse(worst, std::fabs(t.y.at(0, i) - want) - half_ulp(p.dtype, want), epsilon_of(p.dtype) * e.bound * (active ? 1.7L : 1));
  });
  expect(worst <= 4, p.name() + ": forward error " + std::to_string(double(worst)));
}

inline void check_stats(const Problem& p, const Tensors& t) {
  const Slabs slabs(p, t.x);
  const Real n = p.shape.slab_size();
  Real worst = 0;
  for (std::int64_t s = 0; s < p.shape.slabs(); ++s) {
    const Real unit = epsilon_of(p.dtype), deviation = std::sqrt(slabs.square[s] / n + Real(p.eps));
    const Real m2 = unit * (slabs.square[s] + n * Real(p.eps));
    worse(worst, std::fabs(t.stats.at(0, s) + Real(t.stats.at(1, s)) - slabs.mean[s]), unit * deviation);
    worse(worst, std::fabs(t.stats.at(2, s) - slabs.rstd[s]), unit * slabs.rstd[s]);
    if (n > 1) worse(worst, std::fabs(t.stats.at(3, s) - slabs.square[s] / (n - 1)), m2 / (n - 1));
    worse(worst, std::fabs(t.moments.at(0, s) + Real(t.moments.at(1, s)) - slabs.mean[s]), unit * deviation);
    worse(worst, std::fabs(t.moments.at(2, s) - slabs.square[s]), m2);
  }
  expect(worst <= 4, p.name() + ": error of statistics " + std::to_string(double(worst)));
}

// With `fixed`, statistics that do not depend on x.
inline void check_gradients(const Problem& p, const Tensors& t, const ChannelBackwardArgs& a) {
  const Slabs slabs(p, t.x);
  const std::int64_t count = p.shape.slabs(), channels = p.shape.channels;
  std::vector<Real> mean_g(count), mean_gx(count), abs_g(count), abs_gx(count), dw(channels), db(channels), dw_terms(channels),
      db_terms(channels);
  const Real n = p.shape.slab_size(), unit = epsilon_of(p.dtype);
  const auto dz_of = [&](const Element& e, std::int64_t i) { return t.dy.at(0, i) * slope(p.activation, e.z); };
  const auto size_of_dz = [&](const Element& e, std::int64_t i) {
    return p.activation == Activation::kNone ? std::fabs(Real(t.dy.at(0, i))) : std::fabs(Real(t.dy.at(0, i))) * (1 + e.bound);
  };
  p.each([&](std::int64_t i, std::int64_t c, std::int64_t slab) {
    const Element e(p, t, slabs, i, c, slab);
    const Real dz = dz_of(e, i), size = size_of_dz(e, i), larger = std::max(std::fabs(e.xhat), Real(1));
    mean_g[slab] += dz * e.w / n, mean_gx[slab] += dz * e.w * e.xhat / n;
    abs_g[slab] += std::fabs(size * e.w) / n, abs_gx[slab] += std::fabs(size * e.w) * larger / n;
    dw[c] += dz * e.xhat, db[c] += dz, dw_terms[c] += size * larger, db_terms[c] += size;
  });
  Real worst = 0, worst_residual = 0, worst_params = 0;
  p.each([&](std::int64_t i, std::int64_t c, std::int64_t slab) {
    const Element e(p, t, slabs, i, c, slab);
    const Real dz = dz_of(e, i), g = dz * e.w;
    const Real want = slabs.rstd[slab] * (a.fixed_stats ? g : g - mean_g[slab] - e.xhat * mean_gx[slab]);
    const Real means = abs_g[slab] + std::max(std::fabs(e.xhat), Real(1)) * abs_gx[slab];
    const Real bound = slabs.rstd[slab] * (size_of_dz(e, i) * std::fabs(e.w) + (a.fixed_stats ? 0 : means));
    if (a.grad_input != nullptr) worse(worst, std::fabs(t.dx.at(0, i) - want) - half_ulp(p.dtype, want), unit * bound);
    if (a.grad_residual != nullptr)
      worse(worst_residual, std::fabs(t.dr.at(0, i) - dz) - half_ulp(p.dtype, dz), unit * size_of_dz(e, i));
  });
  for (std::int64_t c = 0; c < channels; ++c) {
    if (a.grad_weight != nullptr)
      worse(worst_params, std::fabs(t.dw.at(0, c) - dw[c]) - half_ulp(p.params, dw[c]), unit * dw_terms[c]);
    if (a.grad_bias != nullptr)
      worse(worst_params, std::fabs(t.db.at(0, c) - db[c]) - half_ulp(p.params, db[c]), unit * db_terms[c]);
    if (a.sums != nullptr && !a.given_sums) {
      worse(worst_params, std::fabs(t.sums.at(0, c) - db[c]), unit * db_terms[c]);
      worse(worst_params, std::fabs(t.sums.at(1, c) - dw[c]), unit * dw_terms[c]);
    }
  }
  expect(worst <= 4, p.name() + ": dx error " + std::to_string(double(worst)));
  expect(worst_residual <= 4, p.name() + ": residual gradient error " + std::to_string(double(worst_residual)));
  expect(worst_params <= 4, p.name() + ": parameter gradient error " + std::to_string(double(worst_params)));
}

}  // namespace normext::test
