// Problems for the row norms of the CPU and their long double reference, for test_cpu_kernels.cpp. No torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/dtypes.h"
#include "core/math.h"
#include "cpu/isa.h"

namespace normext::test {

inline int failures = 0;
inline void expect(bool holds, const std::string& what) {
  if (!holds && ++failures <= 40) std::printf("  FAILED %s\n", what.c_str());
}

// ---- storage ----

inline double value_of(DType dtype, const void* p, std::int64_t i) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(p)[i];
  if (dtype == DType::kFloat16) return to_float(static_cast<const Half*>(p)[i]);
  if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}
inline void put(DType dtype, void* p, std::int64_t i, double value) {
  const float f = static_cast<float>(value);
  if (dtype == DType::kFloat64) static_cast<double*>(p)[i] = value;
  else if (dtype == DType::kFloat16) static_cast<Half*>(p)[i] = FromFloat<Half>::convert(f);
  else if (dtype == DType::kBFloat16) static_cast<BFloat16*>(p)[i] = FromFloat<BFloat16>::convert(f);
  else static_cast<float*>(p)[i] = f;
}

// `rows` rows of `cols` elements, `pitch` apart, starting at any element offset; everything else is a canary.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t gap = 0, int shift = 0)
      : dtype(dtype), rows(rows), cols(cols), pitch(cols + gap), size_(size_of(dtype)), start_(kGuard + shift * size_) {
    bytes_.assign(start_ + static_cast<std::size_t>(rows * pitch) * size_ + kGuard, kCanary);
  }
  void* data() { return bytes_.data() + start_; }
  const void* data() const { return bytes_.data() + start_; }
  RowLayout layout() const { return strided_rows(rows, pitch); }
  std::size_t size() const { return static_cast<std::size_t>(rows * cols) * size_; }  // bytes, without gaps
  double at(std::int64_t row, std::int64_t col) const { return value_of(dtype, data(), row * pitch + col); }
  void set(std::int64_t row, std::int64_t col, double v) { put(dtype, data(), row * pitch + col, v); }
  void fill(const std::function<double(std::int64_t, std::int64_t)>& f) {
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < cols; ++c) set(r, c, f(r, c));
  }
  void random(std::uint32_t seed, double mean = 0.0) {
    std::mt19937 bits(seed);
    std::normal_distribution<double> normal(mean, 1.0);
    fill([&](std::int64_t, std::int64_t) { return normal(bits); });
  }
  bool same_rows(const Tensor& o) const {
    for (std::int64_t r = 0; r < rows; ++r)
      if (std::memcmp(bytes_.data() + start_ + r * pitch * size_, o.bytes_.data() + o.start_ + r * o.pitch * size_, cols * size_) !=
          0)
        return false;
    return true;
  }
  bool intact() const {
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      const std::int64_t at = (static_cast<std::int64_t>(i) - static_cast<std::int64_t>(start_)) / static_cast<std::int64_t>(size_);
      const bool inside = i >= start_ && at < rows * pitch && at % pitch < cols;
      if (!inside && bytes_[i] != kCanary) return false;
    }
    return true;
  }
  DType dtype;
  std::int64_t rows, cols, pitch;

 private:
  static constexpr std::size_t kGuard = 256;
  static constexpr unsigned char kCanary = 0xa5;
  std::size_t size_, start_;
  std::vector<unsigned char> bytes_;
};

// ---- calls ----

inline int threads = 1;
inline void run_on_threads(std::int64_t tasks, void (*body)(void*, std::int64_t, std::int64_t), void* ctx) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back(body, ctx, tasks * t / threads, tasks * (t + 1) / threads);
  for (std::thread& thread : pool) thread.join();
}
inline cpu::Parallel parallel() {
  cpu::Parallel p;
  p.threads = threads;
  if (threads > 1) p.run = run_on_threads;
  return p;
}

struct Types {
  DType data, params, out;  // out: output, or grad_output
};
inline const std::vector<Types> kTypes = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32},    {DType::kFloat64, DType::kFloat64, DType::kFloat64},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32, DType::kBFloat16},
    {DType::kFloat16, DType::kFloat16, DType::kFloat16},    {DType::kFloat16, DType::kFloat32, DType::kFloat16},
    {DType::kBFloat16, DType::kFloat32, DType::kFloat32},   {DType::kFloat16, DType::kFloat32, DType::kFloat32},
};
inline DType statistics_dtype(DType d) { return d == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// One problem, forward and backward, with its reference.
struct Case {
  RowNorm norm;
  Types types;
  std::int64_t rows, cols;
  bool with_weight = true, with_bias = true, residual = false;
  double eps = 1e-5, alpha = 1.0, offset = 0.0, mean = 0.0;
  Rounding rounding = Rounding::kTorch;
  int shift = 0;
  std::int64_t gap = 0;

  bool centred() const { return norm == RowNorm::kLayerNorm; }
  std::string name() const {
    return std::string(cpu::isa_name()) + (centred() ? " layer_norm " : " rms_norm ") + std::to_string(rows) + "x" +
           std::to_string(cols) + " types " + std::to_string(int(types.data)) + std::to_string(int(types.params)) +
           std::to_string(int(types.out)) + (with_weight ? " w" : "") + (with_bias ? " b" : "") + (residual ? " residual" : "") +
           " mean " + std::to_string(mean) + " threads " + std::to_string(threads);
  }
};

struct Forward {
  Tensor x, residual, sum, y, weight, bias, stats;
  explicit Forward(const Case& c)
      : x(c.types.data, c.rows, c.cols, c.gap, c.shift),
        residual(c.types.data, c.rows, c.cols, 0, 1),
        sum(c.types.data, c.rows, c.cols, 0, c.shift),
        y(c.types.out, c.rows, c.cols, c.gap, c.shift + 1),
        weight(c.types.params, 1, c.cols, 0, 1),
        bias(c.types.params, 1, c.cols),
        stats(statistics_dtype(c.types.data), 3, c.rows) {
    x.random(1, c.mean);
    residual.random(2);
    weight.random(3);
    bias.random(4);
  }
  RowForwardArgs args(const Case& c) {
    RowForwardArgs a;
    a.dtype = c.types.data, a.param_dtype = c.types.params, a.output_dtype = c.types.out;
    a.rows = c.rows, a.cols = c.cols;
    a.input = x.data(), a.input_layout = x.layout();
    if (c.residual) {
      a.residual = residual.data(), a.residual_layout = residual.layout();
      a.residual_out = sum.data(), a.residual_out_layout = sum.layout();
    }
    a.output = y.data(), a.output_layout = y.layout();
    a.weight = c.with_weight ? weight.data() : nullptr;
    a.bias = c.with_bias && c.centred() ? bias.data() : nullptr;
    a.stats = stats.data();
    a.eps = c.eps, a.alpha = c.alpha, a.weight_offset = c.offset, a.rounding = c.rounding;
    return a;
  }
  bool intact() const { return x.intact() && residual.intact() && sum.intact() && y.intact() && stats.intact(); }
};

// Half a unit in the last place of a 16-bit type at `v`; 0 for float and double, whose rounding is inside the bound.
inline long double half_ulp(DType dtype, long double v) {
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64) return 0;
  const bool half = dtype == DType::kFloat16;
  const int exponent = std::max(v == 0 ? -200 : std::ilogb(std::fabs(v)), half ? -14 : -126);
  return std::ldexp(0.5L, exponent - (half ? 10 : 7));
}
inline long double epsilon_of(DType dtype) { return dtype == DType::kFloat64 ? 0x1p-52L : 0x1p-23L; }

struct Row64 {
  long double mean, rstd;
};
inline Row64 statistics(const Case& c, const Tensor& x, std::int64_t r) {
  long double mean = 0, square = 0;
  for (std::int64_t i = 0; i < c.cols; ++i) mean += x.at(r, i);
  mean = c.centred() ? mean / c.cols : 0;
  for (std::int64_t i = 0; i < c.cols; ++i) square += (x.at(r, i) - mean) * (x.at(r, i) - mean);
  return {mean, 1 / std::sqrt(square / c.cols + static_cast<long double>(c.eps))};
}

inline void check_forward(const Case& c, const Forward& f) {
  const Tensor& x = c.residual ? f.sum : f.x;
  long double worst = 0;
  for (std::int64_t r = 0; r < c.rows; ++r) {
    const Row64 s = statistics(c, x, r);
    for (std::int64_t i = 0; i < c.cols; ++i) {
      const long double xhat = (x.at(r, i) - s.mean) * s.rstd;
      const long double w = c.with_weight ? c.offset + f.weight.at(0, i) : 1, b = c.with_bias && c.centred() ? f.bias.at(0, i) : 0;
      const long double want = xhat * w + b;
      long double slack = half_ulp(c.types.out, want);
      if (c.rounding == Rounding::kLlama) slack += std::fabs(w) * half_ulp(c.types.data, xhat) * 1.01L;
      const long double bound = std::fabs(w) * std::max(1.0L, std::fabs(xhat)) + std::fabs(b);
      const long double error = (std::fabs(f.y.at(r, i) - want) - slack) / (epsilon_of(c.types.data) * bound + 1e-300L);
      if (!(error <= worst)) worst = error;
    }
  }
  expect(worst <= 4, c.name() + ": forward error " + std::to_string(double(worst)));
  expect(f.intact(), c.name() + ": wrote outside its rows");
}

struct Backward {
  Tensor dy, extra, dx, dw, db;
  std::vector<unsigned char> workspace;
  explicit Backward(const Case& c)
      : dy(c.types.out, c.rows, c.cols, c.gap, c.shift),
        extra(c.types.data, c.rows, c.cols, 0, 1),
        dx(c.types.data, c.rows, c.cols),
        dw(c.types.params, 1, c.cols, 0, 1),
        db(c.types.params, 1, c.cols) {
    dy.random(5);
    extra.random(6);
  }
  void run(const Case& c, Forward& f, int wanted = 7) {
    RowBackwardArgs a;
    a.dtype = c.types.data, a.param_dtype = c.types.params, a.grad_output_dtype = c.types.out;
    a.rows = c.rows, a.cols = c.cols;
    a.grad_output = dy.data(), a.grad_output_layout = dy.layout();
    if (c.residual) a.grad_residual_out = extra.data(), a.grad_residual_out_layout = extra.layout();
    a.input = f.x.data(), a.input_layout = f.x.layout();
    a.weight = c.with_weight ? f.weight.data() : nullptr;
    a.stats = f.stats.data();
    if (wanted & 1) a.grad_input = dx.data();
    if (wanted & 2) a.grad_weight = dw.data();
    if ((wanted & 4) && c.centred()) a.grad_bias = db.data();
    a.weight_offset = c.offset, a.rounding = c.rounding;
    workspace.assign(cpu::row_backward_workspace(c.norm, a) + 1, 0xff);  // NaN; one byte off any alignment
    cpu::row_backward(c.norm, a, workspace.data() + 1, parallel());
    expect(dx.intact() && dw.intact() && db.intact(), c.name() + ": backward wrote outside its results");
  }
};

inline void check_backward(const Case& c, const Forward& f, const Backward& g) {
  std::vector<long double> dw(c.cols), db(c.cols), dw_terms(c.cols), db_terms(c.cols), xhat(c.cols), gw(c.cols), slack(c.cols);
  long double worst = 0, worst_params = 0;
  const long double unit = epsilon_of(c.types.data);
  for (std::int64_t r = 0; r < c.rows; ++r) {
    const Row64 s = statistics(c, f.x, r);
    long double mean_g = 0, mean_gx = 0, abs_g = 0, abs_gx = 0;
    for (std::int64_t i = 0; i < c.cols; ++i) {
      const long double dy = g.dy.at(r, i);
      xhat[i] = (f.x.at(r, i) - s.mean) * s.rstd;
      gw[i] = dy * (c.with_weight ? c.offset + f.weight.at(0, i) : 1);
      mean_g += gw[i] / c.cols, mean_gx += gw[i] * xhat[i] / c.cols;
      abs_g += std::fabs(gw[i]) / c.cols, abs_gx += std::fabs(gw[i] * xhat[i]) / c.cols;
      dw[i] += dy * xhat[i], db[i] += dy;
      if (c.rounding == Rounding::kLlama) slack[i] += std::fabs(dy) * half_ulp(c.types.data, xhat[i]) * 1.01L;
      // A sum of few terms may have only terms that are small against the rounding of xhat.
      dw_terms[i] += std::fabs(dy) * std::max(std::fabs(xhat[i]), c.rows < 1000 ? 1.0L : 0.0L), db_terms[i] += std::fabs(dy);
    }
    if (!c.centred()) mean_g = abs_g = 0;
    for (std::int64_t i = 0; i < c.cols; ++i) {
      const long double extra = c.residual ? g.extra.at(r, i) : 0;
      const long double want = s.rstd * (gw[i] - mean_g - xhat[i] * mean_gx) + extra;
      const long double bound = s.rstd * (std::fabs(gw[i]) + abs_g + std::fabs(xhat[i]) * abs_gx) + std::fabs(extra);
      const long double error = (std::fabs(g.dx.at(r, i) - want) - half_ulp(c.types.data, want)) / (unit * bound + 1e-300L);
      if (!(error <= worst)) worst = error;
    }
  }
  for (std::int64_t i = 0; i < c.cols; ++i) {
    const long double w =
        (std::fabs(g.dw.at(0, i) - dw[i]) - slack[i] - half_ulp(c.types.params, dw[i])) / (unit * dw_terms[i] + 1e-300L);
    if (!(w <= worst_params)) worst_params = w;
    if (!c.centred()) continue;
    const long double b = (std::fabs(g.db.at(0, i) - db[i]) - half_ulp(c.types.params, db[i])) / (unit * db_terms[i] + 1e-300L);
    if (!(b <= worst_params)) worst_params = b;
  }
  expect(worst <= 4, c.name() + ": dx error " + std::to_string(double(worst)));
  expect(worst_params <= 4, c.name() + ": parameter gradient error " + std::to_string(double(worst_params)));
}

}  // namespace normext::test
