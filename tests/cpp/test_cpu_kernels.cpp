// The CPU kernels of LayerNorm and RMSNorm, without torch: every instruction set of this machine, every dtype, against long double.
//
// Each instruction set runs in a process of its own, because a process chooses one. All rows lie between canaries, at any offset.
#include <sys/wait.h>
#include <unistd.h>

#include <limits>
#include <stdexcept>

#include "cpu/row_kernels.h"
#include "row_case.h"

using namespace normext;
using namespace normext::test;

namespace {

constexpr RowNorm kNorms[] = {RowNorm::kLayerNorm, RowNorm::kRmsNorm};

bool allowed(RowNorm norm, const Types& t) { return norm == RowNorm::kRmsNorm || t.data == t.out; }

void widths() {
  const std::int64_t cols[] = {1,  2,  3,   5,   7,   8,   15,  16,  17,  31,   32,   33,  63,
                               64, 65, 111, 127, 128, 129, 256, 500, 769, 1152, 2049, 4095};
  int i = 0;
  for (RowNorm norm : kNorms)
    for (const Types& types : kTypes)
      for (std::int64_t n : cols) {
        if (!allowed(norm, types)) continue;
        Case c{norm, types, n < 100 ? 19 : 5, n};
        c.shift = ++i % 7, c.gap = i % 3, c.mean = i % 2 == 0 ? 0 : (types.data == DType::kFloat16 ? 10 : 1000);
        if (types.data != types.out) c.rounding = Rounding::kLlama;
        Forward f(c);
        cpu::row_forward(norm, f.args(c), parallel());
        check_forward(c, f);
        if (n == 1) continue;
        Backward g(c);
        g.run(c, f);
        check_backward(c, f, g);
      }
}

void long_rows() {
  for (RowNorm norm : kNorms)
    for (const Types& types : kTypes)
      for (std::int64_t n : {4096, 4097, 12289, 270001}) {
        if (!allowed(norm, types) || (n > 20000 && types.data != types.params)) continue;
        Case c{norm, types, 3, n};
        c.mean = 3, c.shift = 1, c.residual = n == 12289;
        Forward f(c);
        cpu::row_forward(norm, f.args(c), parallel());
        check_forward(c, f);
        c.residual = false;
        cpu::row_forward(norm, f.args(c), parallel());
        Backward g(c);
        g.run(c, f);
        check_backward(c, f, g);
      }
}

void options() {
  for (RowNorm norm : kNorms)
    for (const Types& types : kTypes)
      for (int option = 0; option < 32; ++option) {
        if (!allowed(norm, types)) continue;
        Case c{norm, types, 6, 75};
        c.with_weight = option & 1, c.with_bias = option & 2, c.residual = option & 4;
        c.rounding = option & 8 ? Rounding::kLlama : Rounding::kTorch;
        c.offset = option & 16 && norm == RowNorm::kRmsNorm ? 1.0 : 0.0;
        if (types.data != types.out && !c.with_weight) continue;
        Forward f(c);
        cpu::row_forward(norm, f.args(c), parallel());
        check_forward(c, f);
        c.residual = false;
        cpu::row_forward(norm, f.args(c), parallel());
        c.residual = option & 4;
        Backward g(c);
        g.run(c, f);
        check_backward(c, f, g);
      }
}

// Fused equals the sum, rounded once, followed by the norm: all bits. So does the form that overwrites its inputs.
void fused_residual() {
  for (RowNorm norm : kNorms)
    for (const Types& types : kTypes)
      for (std::int64_t n : {1, 40, 768, 4099, 9000})
        for (double alpha : {1.0, 0.5, -1.7}) {
          if (types.data != types.out) continue;
          Case c{norm, types, 4, n};
          c.residual = true, c.alpha = alpha, c.shift = 3;
          Forward fused(c), plain(c), in_place(c);
          cpu::row_forward(norm, fused.args(c), parallel());
          const bool exact = alpha != -1.7 || std::strcmp(cpu::isa_name(), "scalar") != 0;  // no fma there
          for (std::int64_t r = 0; r < c.rows; ++r)
            for (std::int64_t i = 0; i < n; ++i) {
              const double x = plain.x.at(r, i), s = plain.residual.at(r, i);
              const double sum = types.data == DType::kFloat64
                                     ? std::fma(alpha, s, x)
                                     : std::fma(static_cast<float>(alpha), static_cast<float>(s), static_cast<float>(x));
              plain.x.set(r, i, exact ? sum : fused.sum.at(r, i));
            }
          expect(plain.x.same_rows(fused.sum), c.name() + ": stored sum");
          Case norm_only = c;
          norm_only.residual = false;
          cpu::row_forward(norm, plain.args(norm_only), parallel());
          expect(plain.y.same_rows(fused.y), c.name() + ": fused differs from sum, then norm");
          expect(plain.stats.same_rows(fused.stats) || norm == RowNorm::kRmsNorm, c.name() + ": statistics differ");
          RowForwardArgs a = in_place.args(c);
          a.residual_out = in_place.residual.data(), a.residual_out_layout = a.residual_layout;
          a.output = in_place.x.data(), a.output_layout = a.input_layout;
          cpu::row_forward(norm, a, parallel());
          expect(in_place.x.same_rows(fused.y) && in_place.residual.same_rows(fused.sum) && in_place.intact(),
                 c.name() + ": in place");
        }
}

void constant_rows() {
  for (const Types& types : kTypes)
    for (std::int64_t n : {1, 3, 75, 768, 1000, 4095, 5000, 65537})
      for (double value : {0.0, 0.1, -3.3, 1e4, 3e-5}) {
        if (types.data != types.out) continue;
        Case c{RowNorm::kLayerNorm, types, 2, n};
        Forward f(c);
        f.x.fill([&](std::int64_t, std::int64_t) { return value; });
        cpu::row_forward(c.norm, f.args(c), parallel());
        Tensor want(types.data, 2, n);
        want.fill([&](std::int64_t, std::int64_t i) { return f.bias.at(0, i); });
        expect(f.y.same_rows(want), c.name() + ": constant row " + std::to_string(value) + " is not the bias");
      }
}

// Rows of mean +- 1 with zero sum: every step is exact, so mean, rstd and output are.
void exact_data() {
  for (const Types& types : kTypes)
    for (std::int64_t n : {2, 64, 98, 1024, 4096, 8192}) {
      if (types.data != types.out) continue;
      Case c{RowNorm::kLayerNorm, types, 3, n};
      c.eps = 0, c.with_weight = c.with_bias = false;
      Forward f(c);
      const double mean = 16;
      f.x.fill([&](std::int64_t r, std::int64_t i) { return mean + ((i + r) % 2 == 0 ? 1 : -1); });
      cpu::row_forward(c.norm, f.args(c), parallel());
      for (std::int64_t r = 0; r < c.rows; ++r) {
        bool same = f.stats.at(0, r) == mean && f.stats.at(1, r) == 0 && f.stats.at(2, r) == 1;
        for (std::int64_t i = 0; i < n; ++i) same = same && f.y.at(r, i) == f.x.at(r, i) - mean;
        expect(same, c.name() + ": exact data");
      }
    }
}

// Bits depend neither on threads, nor on what else is in the batch, nor on where rows lie, nor on which gradients are wanted.
void invariance() {
  const std::int64_t shapes[][2] = {{1, 70000},  {2, 20000}, {5, 9000},  {33, 5000}, {70, 3000},
                                    {100, 1000}, {300, 300}, {2048, 64}, {8192, 24}};
  for (RowNorm norm : kNorms)
    for (int t : {0, 2, 3})
      for (const auto& shape : shapes) {
        Case c{norm, kTypes[t], shape[0], shape[1]};
        threads = 1;
        Forward one(c);
        cpu::row_forward(norm, one.args(c), parallel());
        Backward g(c);
        g.run(c, one);
        for (int count : {2, 3, 8}) {
          threads = count;
          Forward many(c);
          cpu::row_forward(norm, many.args(c), parallel());
          expect(many.y.same_rows(one.y) && many.stats.same_rows(one.stats), c.name() + ": forward depends on threads");
          Backward h(c);
          h.run(c, one);
          const bool bias = norm == RowNorm::kRmsNorm || h.db.same_rows(g.db);
          expect(h.dx.same_rows(g.dx) && h.dw.same_rows(g.dw) && bias, c.name() + ": backward depends on threads");
        }
        threads = 1;
        Case moved = c;
        moved.shift = 5, moved.gap = 3;
        Forward elsewhere(moved);
        cpu::row_forward(norm, elsewhere.args(moved), parallel());
        expect(elsewhere.y.same_rows(one.y), c.name() + ": bits depend on the address");
        RowForwardArgs last = one.args(c);
        Tensor y(c.types.out, 1, c.cols);
        last.input = static_cast<const char*>(last.input) + (c.rows - 1) * c.cols * size_of(c.types.data);
        last.rows = 1, last.output = y.data(), last.stats = nullptr;
        cpu::row_forward(norm, last, parallel());
        bool same = true;
        for (std::int64_t i = 0; i < c.cols; ++i) same = same && y.at(0, i) == one.y.at(c.rows - 1, i);
        expect(same, c.name() + ": a row depends on its batch");
        for (int wanted = 1; wanted < 7; ++wanted) {
          Backward h(c);
          h.run(c, one, wanted);
          expect(!(wanted & 1) || h.dx.same_rows(g.dx), c.name() + ": dx depends on what else is wanted");
          expect(!(wanted & 2) || h.dw.same_rows(g.dw), c.name() + ": dweight depends on what else is wanted");
          expect(!(wanted & 4) || norm == RowNorm::kRmsNorm || h.db.same_rows(g.db),
                 c.name() + ": dbias depends on what else is wanted");
        }
      }
}

// One call of the kernels that a plan describes, against the call that row_forward() makes: the same bits, nothing else written.
void check_plan(const Case& c, const cpu::ForwardPlan& plan, const Forward& expected) {
  const auto kernel = cpu::kernels().row[static_cast<int>(c.norm)].forward;
  const std::string what = c.name() + ": schedule " + std::to_string(int(plan.schedule)) + (plan.stream ? ", streamed" : "");
  Forward f(c);
  kernel(f.args(c), plan);
  expect(f.y.same_rows(expected.y) && f.stats.same_rows(expected.stats), what);
  expect((!c.residual || f.sum.same_rows(expected.sum)) && f.intact(), what + ": sum, or written beyond");
  // Aligned, every row if the width allows, for only then something goes past the caches.
  const std::size_t bytes = f.y.size();
  std::vector<unsigned char> room(bytes + 192, 0xa5);
  unsigned char* start = room.data() + 128 - reinterpret_cast<std::uintptr_t>(room.data()) % 64;
  RowForwardArgs args = f.args(c);
  args.output = start, args.output_layout = strided_rows(c.rows, c.cols);
  kernel(args, plan);
  Tensor y(c.types.out, c.rows, c.cols);
  std::memcpy(y.data(), start, bytes);
  const auto kept = [](unsigned char byte) { return byte == 0xa5; };
  expect(y.same_rows(expected.y), what + ", aligned");
  expect(std::all_of(room.data(), start, kept) && std::all_of(start + bytes, room.data() + room.size(), kept),
         what + ": written beyond aligned rows");
  if (c.types.data != c.types.out || plan.stream) return;
  args = f.args(c);
  args.output = f.x.data(), args.output_layout = f.x.layout();
  if (c.residual) args.residual_out = f.residual.data(), args.residual_out_layout = f.residual.layout();
  kernel(args, plan);
  expect(f.x.same_rows(expected.y) && (!c.residual || f.residual.same_rows(expected.sum)) && f.intact(), what + ", in place");
}

// However a thread goes through its rows, and whether or not the output goes past the caches.
void schedules() {
  for (RowNorm norm : kNorms)
    for (const Types& types : kTypes)
      for (std::int64_t n : {1, 15, 100, 768, 4096, 5000})
        for (std::int64_t rows : {1, 2, 5})
          for (int option = 0; option < 4; ++option) {
            if (!allowed(norm, types) || (n > 2000 && rows == 2)) continue;
            Case c{norm, types, rows, n};
            c.residual = option & 1, c.mean = 2;
            if (option & 2) c.shift = 3, c.gap = 5;
            Forward expected(c);
            cpu::row_forward(norm, expected.args(c), parallel());
            for (auto schedule : {cpu::RowSchedule::kBatches, cpu::RowSchedule::kMemoryBatches, cpu::RowSchedule::kPipeline})
              for (bool stream : {false, true}) {
                cpu::ForwardPlan plan;
                plan.parallel = parallel(), plan.schedule = schedule, plan.stream = stream;
                check_plan(c, plan, expected);
              }
          }
}

// No accumulator takes more than 16 terms: constant gradients show longer chains.
void many_rows() {
  for (std::int64_t rows : {2048, 65536})
    for (int kind = 0; kind < 3; ++kind) {
      Case c{RowNorm::kLayerNorm, kTypes[0], rows, 9};
      Forward f(c);
      cpu::row_forward(c.norm, f.args(c), parallel());
      Backward g(c);
      g.dy.fill([&](std::int64_t, std::int64_t i) { return kind == 0 ? 0.1 : kind == 1 ? 1.0 / (rows * 9) : 0.3 + 0.01 * i; });
      g.run(c, f);
      check_backward(c, f, g);
    }
}

// Rows whose leading dimensions do not collapse, and special values.
void layouts_and_special_values() {
  Case c{RowNorm::kRmsNorm, kTypes[2], 24, 37};
  Forward f(c), g(c);
  cpu::row_forward(c.norm, f.args(c), parallel());
  RowForwardArgs a = g.args(c);
  const std::int64_t sizes[] = {2, 3, 4}, strides[] = {4 * 37, 8 * 37, 37};  // [b, h, s] inside [h, b, s]
  expect(collapse_rows(sizes, strides, 3, &a.input_layout), "layout");
  cpu::row_forward(c.norm, a, parallel());
  bool same = true;
  for (int b = 0; b < 2; ++b)
    for (int h = 0; h < 3; ++h)
      for (int s = 0; s < 4; ++s)
        for (int i = 0; i < 37; ++i) same = same && g.y.at((b * 3 + h) * 4 + s, i) == f.y.at((h * 2 + b) * 4 + s, i);
  expect(same, c.name() + ": three leading dimensions");

  for (const Types& types : kTypes) {
    Case special{RowNorm::kRmsNorm, types, 3, 70};
    Forward v(special);
    v.x.set(1, 69, std::numeric_limits<double>::quiet_NaN());
    v.x.fill([&](std::int64_t r, std::int64_t i) { return r == 1 ? v.x.at(r, i) : (r == 2 ? 0.0 : 1e-7 * (i % 2)); });
    v.weight.fill([](std::int64_t, std::int64_t) { return 1.0; });
    cpu::row_forward(special.norm, v.args(special), parallel());
    for (std::int64_t i = 0; i < 70; ++i) {
      expect(std::isnan(v.y.at(1, i)), special.name() + ": NaN is lost");
      expect(v.y.at(2, i) == 0, special.name() + ": zero row");
      expect((v.y.at(0, i) != 0) == (v.x.at(0, i) != 0), special.name() + ": a small value is flushed");
    }
  }
}

// Rows that do not collapse, of tensors on both sides of 2^31 rows: first, last and others against their indices.
void row_offsets() {
  for (std::int64_t outer : {1, 5, 70000})
    for (std::int64_t middle : {3, 46341, 500000000}) {
      const std::int64_t inner = 7, sizes[] = {outer, middle, inner}, strides[] = {11, 1000003, std::int64_t{1} << 33};
      const std::int64_t rows = outer * middle * inner;
      RowLayout layout;
      expect(collapse_rows(sizes, strides, 3, &layout) && layout.dims == (outer > 1 ? 3 : 2), "leading dimensions");
      expect(layout.small == (rows < (std::int64_t{1} << 31)), "which division");
      for (std::int64_t row : {std::int64_t{0}, std::int64_t{6}, inner, rows / 2, rows / 3 * 2, rows - inner, rows - 1}) {
        const std::int64_t i = row / inner / middle, j = row / inner % middle, k = row % inner;
        expect(layout.offset(row) == i * strides[0] + j * strides[1] + k * strides[2], "offset of row " + std::to_string(row));
      }
    }
}

void empty() {
  for (RowNorm norm : kNorms) {
    Case none{norm, kTypes[0], 0, 12};
    Forward f(none);
    cpu::row_forward(norm, f.args(none), parallel());
    Backward g(none);
    g.run(none, f);
    for (int i = 0; i < 12; ++i)
      expect(g.dw.at(0, i) == 0 && (norm == RowNorm::kRmsNorm || g.db.at(0, i) == 0), "gradient of no rows is zero");
    Case thin{norm, kTypes[0], 4, 0};
    Forward h(thin);
    cpu::row_forward(norm, h.args(thin), parallel());
    Backward k(thin);
    k.run(thin, h);
    expect(h.intact() && k.dx.intact(), "no columns");
  }
}

void threaded() {
  threads = 3;
  long_rows();
  fused_residual();
  threads = 2;
  schedules();
  threads = 1;
}

struct Test {
  const char* name;
  void (*run)();
};
constexpr Test kTests[] = {{"widths", widths},
                           {"long_rows", long_rows},
                           {"options", options},
                           {"fused_residual", fused_residual},
                           {"constant_rows", constant_rows},
                           {"exact_data", exact_data},
                           {"invariance", invariance},
                           {"schedules", schedules},
                           {"many_rows", many_rows},
                           {"layouts_and_special_values", layouts_and_special_values},
                           {"row_offsets", row_offsets},
                           {"empty", empty},
                           {"threaded", threaded}};

int run_child(const std::string& isa, int (*body)()) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    setenv("NORMEXT_CPU_ISA", isa.c_str(), 1);
    const int result = body();
    std::fflush(stdout);
    _exit(result);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

int run_tests() {
  int failed = 0;
  for (const Test& test : kTests) {
    failures = 0;
    test.run();
    if (failures == 0) std::printf("%s %s: ok\n", cpu::isa_name(), test.name);
    else std::printf("%s %s: %d failures\n", cpu::isa_name(), test.name, failures);
    failed += failures != 0;
  }
  return failed != 0;
}

int expect_refusal() {
  try {
    cpu::isa_name();
  } catch (const std::runtime_error& error) {
    return std::string(error.what()).find("scalar") == std::string::npos;
  }
  return 1;
}

}  // namespace

int main() {
  int failed = 0;
  for (const std::string& isa : cpu::available_isas()) failed += run_child(isa, run_tests);
  const int refused = run_child("no such instruction set", expect_refusal);
  if (refused == 0) std::printf("unknown instruction set: ok\n");
  return failed + refused != 0;
}
