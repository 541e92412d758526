// Transposition of matrices, [batch, rows, cols] to [batch, cols, rows], which is what a change between channels-last and
// contiguous is. Tiles are turned in vector registers; their rows are vectors of words of 4 or 8 bytes. Two rows of 16-bit elements
// are woven into one of words first, so that whole vectors are stored.
#pragma once

#include "cpu/row_sums.inl"

namespace normext {
inline namespace NORMEXT_ISA {
namespace {

constexpr std::int64_t kTransposedBlock = 128;  // rows and columns of what one task takes, or half of them and more

template <class Element>
struct WordsOf {  // of 4 or 8 bytes
  typedef Element type __attribute__((vector_size(NORMEXT_VECTOR_BYTES)));
};
template <>
struct WordsOf<std::uint16_t> : WordsOf<std::uint32_t> {};

// Lanes that differ in bit kHalf change places between two vectors whose indices do.
template <int kHalf, class V, int... I>
NORMEXT_INLINE void exchange(V& x, V& y, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const V low = __builtin_shufflevector(x, y, ((I & kHalf) != 0 ? n + (I ^ kHalf) : I)...);
  y = __builtin_shufflevector(x, y, ((I & kHalf) != 0 ? n + I : (I ^ kHalf))...);
  x = low;
}
template <int kHalf, class V, int kLanes>
NORMEXT_INLINE void turn(V (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kHalf) == 0) exchange<kHalf>(v[i], v[i + kHalf], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (kHalf > 1) turn<kHalf / 2>(v);
}

template <class Element>
struct Transposition {
  using V = typename WordsOf<Element>::type;
  static constexpr int kCols = sizeof(V) / sizeof(V{}[0]);  // of a tile
  static constexpr int kRows = sizeof(V) / sizeof(Element);
  static_assert(kRows <= cpu::kLeastTransposed && kCols <= cpu::kLeastTransposed);

  const Element* from;
  Element* to;
  std::int64_t rows, cols;

  NORMEXT_INLINE V word_row(const Element* x) const {
    if constexpr (sizeof(Element) == 2) {
      typedef Element Half __attribute__((vector_size(NORMEXT_VECTOR_BYTES / 2)));
      return __builtin_convertvector(load_bytes<Half>(x), V) | __builtin_convertvector(load_bytes<Half>(x + cols), V) << 16;
    } else {
      return load_bytes<V>(x);
    }
  }
  NORMEXT_INLINE void tile(std::int64_t row, std::int64_t col) const {
    V v[kCols];
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i) v[i] = word_row(from + (row + i * (kRows / kCols)) * cols + col);
    turn<kCols / 2>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i) store_bytes(to + (col + i) * rows + row, v[i]);
  }
  // The last tiles overlap those before.
  void block(std::int64_t row, std::int64_t last_row, std::int64_t col, std::int64_t last_col) const {
    for (std::int64_t c = col; c < last_col; c += kCols) {
      for (std::int64_t r = row; r < last_row; r += kRows) tile(smaller(r, last_row - kRows), smaller(c, last_col - kCols));
    }
  }
};

template <class Element>
void transpose_elements(const void* from, void* to, std::int64_t batch, std::int64_t rows, std::int64_t cols,
                        const cpu::Parallel& parallel) {
  const std::int64_t row_blocks = (rows + kTransposedBlock - 1) / kTransposedBlock;
  const std::int64_t col_blocks = (cols + kTransposedBlock - 1) / kTransposedBlock;
  for_ranges(parallel, batch * row_blocks * col_blocks, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) {
      const std::int64_t c = begin % col_blocks, r = begin / col_blocks % row_blocks, matrix = begin / col_blocks / row_blocks;
      const Transposition<Element> t = {static_cast<const Element*>(from) + matrix * rows * cols,
                                        static_cast<Element*>(to) + matrix * rows * cols, rows, cols};
      t.block(r * rows / row_blocks, (r + 1) * rows / row_blocks, c * cols / col_blocks, (c + 1) * cols / col_blocks);
    }
  });
}

}  // namespace
}  // namespace NORMEXT_ISA
}  // namespace normext
