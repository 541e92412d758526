// In which order the emulator runs what a GPU runs at once. A GPU promises no order, so every order must give the same result.
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <utility>

namespace simt {

// NORMEXT_SIMT_ORDER: forward (also when unset), reverse, random:<seed>. The same order and seed schedule the same launch alike.
struct Schedule {
  enum class Order { kForward, kReverse, kRandom };
  Order order = Order::kForward;
  std::uint64_t seed = 0;
};

// False if `text` names no order.
inline bool parse_schedule(const std::string& text, Schedule* schedule) {
  const std::string random = "random:";
  if (text == "forward" || text == "reverse") {
    schedule->order = text == "forward" ? Schedule::Order::kForward : Schedule::Order::kReverse;
    return true;
  }
  if (text.compare(0, random.size(), random) != 0) return false;
  const std::string seed = text.substr(random.size());
  if (seed.empty() || seed.size() > 18 || seed.find_first_not_of("0123456789") != std::string::npos) return false;
  *schedule = {Schedule::Order::kRandom, std::stoull(seed)};
  return true;
}

// splitmix64: small, fast, and any seed will do.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  std::uint64_t below(std::uint64_t n) { return next() % n; }

 private:
  std::uint64_t state_;
};

// Fills index[0..n) with 0..n-1 in the given order.
inline void permute(Schedule::Order order, Random& random, unsigned* index, unsigned n) {
  for (unsigned i = 0; i < n; ++i) index[i] = order == Schedule::Order::kReverse ? n - 1 - i : i;
  if (order != Schedule::Order::kRandom) return;
  for (unsigned i = n; i > 1; --i) std::swap(index[i - 1], index[random.below(i)]);
}

// A permutation of 0..n-1 for n too large for a table: i -> (a*i + c) mod n with a prime to n.
class LargePermutation {
 public:
  LargePermutation(Schedule::Order order, Random& random, std::uint64_t n) : n_(n) {
    if (order == Schedule::Order::kReverse) {
      factor_ = n - 1;
      offset_ = n - 1;
    } else if (order == Schedule::Order::kRandom && n > 1) {
      do {
        factor_ = 1 + random.below(n - 1);
      } while (std::gcd(factor_, n) != 1);
      offset_ = random.below(n);
    }
  }
  std::uint64_t operator[](std::uint64_t i) const { return (factor_ * i + offset_) % n_; }

 private:
  std::uint64_t n_, factor_ = 1, offset_ = 0;
};

}  // namespace simt
