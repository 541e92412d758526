// How storage types become vectors of Accumulate<T>, for one instruction set. Intrinsics appear for fp16, rounding to bfloat16 and
// partial accesses.
//
// Memory is moved in units of two vectors. bfloat16 is taken apart into even and odd columns, which costs a shift and a mask for
// two vectors and no shuffle; whatever is combined with such a row (float32 parameters, output, gradient) is put in the same order.
#pragma once

#include <cstdint>
#include <utility>

#include "core/types.h"
#include "cpu/row_kernels.h"
#include "cpu/vector.h"

namespace normext {
inline namespace NORMEXT_ISA {

template <class A>
struct Pair {
  Vector<A> a, b;
};

// ---- packed units: what kUnit consecutive columns of T look like in memory. They are read and written a vector at a time: GCC 12
// moves larger copies through the stack.

template <class T>
struct Packed {  // float and double
  static constexpr bool kEvenOdd = false;
  Vector<T> low, high;
  NORMEXT_INLINE static Packed pack(Pair<T> x) { return {x.a, x.b}; }
  NORMEXT_INLINE Pair<T> unpack() const { return {low, high}; }
  NORMEXT_INLINE static Packed read(const T* p) { return {load_as<T, Vector<T>>(p), load_as<T, Vector<T>>(p + kLanes<T>)}; }
  NORMEXT_INLINE void write(T* p) const {
    store_as<T>(p, low);
    store_as<T>(p + kLanes<T>, high);
  }
};

template <>
struct Packed<BFloat16> {
  static constexpr bool kEvenOdd = true;
  FloatBits data;
#if NORMEXT_VECTOR_BYTES == 64
  // By avx512_bf16's conversion, never ahead of the question whether the processor has it; by name, since the file is compiled
  // without it. The tests have another for processors with AVX2 alone.
  NORMEXT_INLINE static FloatBits rounded_by_instruction(Pair<float> x) {
    typedef std::uint16_t Words __attribute__((vector_size(64)));
    Words words;  // those of x.a, then those of x.b
#ifdef NORMEXT_AVX512_ON_AVX2
    avx512_on_avx2::narrow(words, x.a, x.b);
#else
    asm volatile("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(x.a), "v"(x.b));
#endif
    return reinterpret_cast<FloatBits>(__builtin_shufflevector(words, words, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  }
#endif
  // Rounded to nearest even, in the upper half of each lane; NaN becomes the quiet NaN torch uses.
  NORMEXT_INLINE static FloatBits rounded(Floats x) {
#if NORMEXT_VECTOR_BYTES == 64
    // Half a step is added, less one where the result would be even already: four instructions, NaN included.
    const __m512i bits = reinterpret_cast<__m512i>(x);
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
    const __m512i even = _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), number, bits, _mm512_set1_epi32(0x7fff));
    return reinterpret_cast<FloatBits>(_mm512_mask_add_epi32(even, odd, bits, _mm512_set1_epi32(0x8000)));
#else
    const FloatBits bits = reinterpret_cast<FloatBits>(x);
    const FloatBits nearest = bits + 0x7fffu + (bits >> 16 & 1u);
    return x == x ? nearest : FloatBits{} + 0x7fc00000u;
#endif
  }
  NORMEXT_INLINE static Packed pack(Pair<float> x) {
#if NORMEXT_VECTOR_BYTES == 64
    // The instruction takes subnormal numbers for zero and keeps NaN's sign and payload, so it rounds units without either [Zen 4:
    // 0.85 ns less per unit; LayerNorm 256x768 25.6 -> 22.7 us, evaluation of 8x64x56x56 106 -> 81]. Where torch flushes subnormal
    // numbers none are seen, and those that were only read become zero.
    if (cpu::has_bfloat16_instruction) {
      constexpr int kSubnormalOrNaN = 0x20 | 0x01 | 0x80;
      const __mmask16 a = _mm512_fpclass_ps_mask(x.a, kSubnormalOrNaN), b = _mm512_fpclass_ps_mask(x.b, kSubnormalOrNaN);
      if (__builtin_expect(_kortestz_mask16_u8(a, b), 1)) return {rounded_by_instruction(x)};
    }
#endif
    return {(rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000u)};
  }
  NORMEXT_INLINE Pair<float> unpack() const {
    return {reinterpret_cast<Floats>(data << 16), reinterpret_cast<Floats>(data & 0xffff0000u)};
  }
  NORMEXT_INLINE static Packed read(const BFloat16* p) { return {load_as<std::uint16_t, FloatBits>(p)}; }
  NORMEXT_INLINE void write(BFloat16* p) const { store_as<std::uint16_t>(p, data); }
};

// fp16 of one vector, in its low half.
typedef std::uint16_t HalfBits __attribute__((vector_size(NORMEXT_VECTOR_BYTES / 2)));
#if NORMEXT_VECTOR_BYTES == 64
// With a mask of ones: GCC warns of an uninitialised variable in its own unmasked forms.
NORMEXT_INLINE Floats widen_half(HalfBits h) {
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
}
NORMEXT_INLINE HalfBits narrow_half(Floats x) {
  return reinterpret_cast<HalfBits>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif NORMEXT_VECTOR_BYTES == 32
NORMEXT_INLINE Floats widen_half(HalfBits h) { return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h))); }
NORMEXT_INLINE HalfBits narrow_half(Floats x) {
  return reinterpret_cast<HalfBits>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
typedef __fp16 HalfFloats __attribute__((vector_size(NORMEXT_VECTOR_BYTES / 2)));
NORMEXT_INLINE Floats widen_half(HalfBits h) { return __builtin_convertvector(reinterpret_cast<HalfFloats>(h), Floats); }
NORMEXT_INLINE HalfBits narrow_half(Floats x) { return reinterpret_cast<HalfBits>(__builtin_convertvector(x, HalfFloats)); }
#else
// The integer arithmetic of core/math.h, lane by lane.
NORMEXT_INLINE Floats widen_half(HalfBits h) {
  const FloatBits bits = __builtin_convertvector(h, FloatBits);
  const FloatBits magnitude = bits & 0x7fffu;
  const FloatBits finite = reinterpret_cast<FloatBits>(reinterpret_cast<Floats>(magnitude << 13) * 0x1p112f);
  const FloatBits value = magnitude >= 0x7c00u ? (magnitude << 13 | 0x7f800000u) : finite;
  return reinterpret_cast<Floats>(value | (bits & 0x8000u) << 16);
}
NORMEXT_INLINE HalfBits narrow_half(Floats x) {
  const FloatBits bits = reinterpret_cast<FloatBits>(x);
  const FloatBits magnitude = bits & 0x7fffffffu;
  const FloatBits normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  const FloatBits subnormal = reinterpret_cast<FloatBits>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  FloatBits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? FloatBits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? FloatBits{} + 0x7e00u : half;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000u), HalfBits);
}
#endif

template <>
struct Packed<Half> {
  static constexpr bool kEvenOdd = false;
  HalfBits low, high;
  NORMEXT_INLINE static Packed pack(Pair<float> x) { return {narrow_half(x.a), narrow_half(x.b)}; }
  NORMEXT_INLINE Pair<float> unpack() const { return {widen_half(low), widen_half(high)}; }
  NORMEXT_INLINE static Packed read(const Half* p) {
    return {load_as<std::uint16_t, HalfBits>(p), load_as<std::uint16_t, HalfBits>(p + kLanes<float>)};
  }
  NORMEXT_INLINE void write(Half* p) const {
    store_as<std::uint16_t>(p, low);
    store_as<std::uint16_t>(p + kLanes<float>, high);
  }
};

// An intermediate value beside values of T: in the accumulate type, and in the order that T is taken apart in. So there are whole
// units only: the first lanes of a unit need not be its first columns.
template <class T>
struct Kept {
  Accumulate<T> value;
};
template <class T>
struct Packed<Kept<T>> {
  static constexpr bool kEvenOdd = Packed<T>::kEvenOdd;
  Packed<Accumulate<T>> data;
  NORMEXT_INLINE static Packed pack(Pair<Accumulate<T>> x) { return {Packed<Accumulate<T>>::pack(x)}; }
  NORMEXT_INLINE Pair<Accumulate<T>> unpack() const { return data.unpack(); }
  NORMEXT_INLINE static Packed read(const Kept<T>* p) {
    return {Packed<Accumulate<T>>::read(reinterpret_cast<const Accumulate<T>*>(p))};
  }
  NORMEXT_INLINE void write(Kept<T>* p) const { data.write(reinterpret_cast<Accumulate<T>*>(p)); }
};

// ---- order of columns in a pair: that of the row's storage type, Like

template <class V, int... I>
NORMEXT_INLINE void deinterleave(V& a, V& b, std::integer_sequence<int, I...>) {
  const V even = __builtin_shufflevector(a, b, (2 * I)...);
  b = __builtin_shufflevector(a, b, (2 * I + 1)...);
  a = even;
}
template <class V, int... I>
NORMEXT_INLINE void interleave(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const V first = __builtin_shufflevector(a, b, (I / 2 + I % 2 * n)...);
  b = __builtin_shufflevector(a, b, (n / 2 + I / 2 + I % 2 * n)...);
  a = first;
}

// How much of a unit exists: all of it, or the first `count` columns.
struct Whole {};
struct Partial {
  int count;
};

template <class Like>
NORMEXT_INLINE Pair<Accumulate<Like>> keep(Pair<Accumulate<Like>> x, Whole) {
  return x;
}
template <class A, int... I>
NORMEXT_INLINE Mask<A> column_numbers(int first, int step, std::integer_sequence<int, I...>) {
  return Mask<A>{(first + step * I)...};
}
// Columns that do not exist become zero.
template <class Like>
NORMEXT_INLINE Pair<Accumulate<Like>> keep(Pair<Accumulate<Like>> x, Partial part) {
  using A = Accumulate<Like>;
  constexpr bool kEvenOdd = Packed<Like>::kEvenOdd;
  constexpr std::make_integer_sequence<int, kLanes<A>> lanes;
  const Mask<A> a = column_numbers<A>(0, kEvenOdd ? 2 : 1, lanes);
  const Mask<A> b = column_numbers<A>(kEvenOdd ? 1 : kLanes<A>, kEvenOdd ? 2 : 1, lanes);
  return {a < part.count ? x.a : Vector<A>{}, b < part.count ? x.b : Vector<A>{}};
}

// Copies `count` elements between a row and a buffer of one unit, touching nothing else of the row.
#if NORMEXT_VECTOR_BYTES == 64
template <class T>
NORMEXT_INLINE __mmask64 byte_mask(int count, int chunk) {
  const int bytes = count * static_cast<int>(sizeof(T)) - chunk * 64;
  return bytes <= 0 ? 0 : (bytes >= 64 ? ~0ull : (1ull << bytes) - 1);
}
template <class T>
NORMEXT_INLINE void load_elements(T* buffer, const T* row, int count) {
  for (int chunk = 0; chunk < static_cast<int>(sizeof(Packed<T>)) / 64; ++chunk) {
    const void* from = reinterpret_cast<const char*>(row) + chunk * 64;
    _mm512_storeu_si512(reinterpret_cast<char*>(buffer) + chunk * 64, _mm512_maskz_loadu_epi8(byte_mask<T>(count, chunk), from));
  }
}
template <class T>
NORMEXT_INLINE void store_elements(T* row, const T* buffer, int count) {
  for (int chunk = 0; chunk < static_cast<int>(sizeof(Packed<T>)) / 64; ++chunk) {
    void* to = reinterpret_cast<char*>(row) + chunk * 64;
    _mm512_mask_storeu_epi8(to, byte_mask<T>(count, chunk), _mm512_loadu_si512(reinterpret_cast<const char*>(buffer) + chunk * 64));
  }
}
#else
template <int kCount, class T>
NORMEXT_INLINE void copy_elements(T* to, const T* from, int count) {
  int done = 0;
  if (count & kCount) {
    __builtin_memcpy(to, from, kCount * sizeof(T));
    done = kCount;
  }
  if constexpr (kCount > 1) copy_elements<kCount / 2>(to + done, from + done, count);
}
#if NORMEXT_VECTOR_BYTES < 32
template <class T>
NORMEXT_INLINE void load_elements(T* buffer, const T* row, int count) {
  __builtin_memset(buffer, 0, sizeof(Packed<T>));
  copy_elements<kUnit<Accumulate<T>> / 2>(buffer, row, count);
}
#endif
template <class T>
NORMEXT_INLINE void store_elements(T* row, const T* buffer, int count) {
  copy_elements<kUnit<Accumulate<T>> / 2>(row, buffer, count);
}
#endif

#if NORMEXT_VECTOR_BYTES == 32
// The first `count` elements, those that fit, and zeros; nothing else is read. Of 16-bit elements the vector is a unit, so that
// there are 1 to 15. A vector put together in memory would have to wait for each of its parts.
template <class T>
NORMEXT_INLINE __m256i masked_load(const T* p, int count) {
  if constexpr (sizeof(T) == 8) {
    const __m256i lanes = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_maskload_epi64(reinterpret_cast<const long long*>(p), _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lanes));
  } else {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i words = _mm256_set1_epi32(count * static_cast<int>(sizeof(T)) / 4);
    const __m256i whole = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), _mm256_cmpgt_epi32(words, lanes));
    if (sizeof(T) == 4 || count % 2 == 0) return whole;
    const __m256i last = _mm256_set1_epi32(load_bytes<std::uint16_t>(p + count - 1));  // half a word
    return _mm256_or_si256(whole, _mm256_and_si256(_mm256_cmpeq_epi32(words, lanes), last));
  }
}
#endif
template <class T>
NORMEXT_INLINE Packed<T> load_packed(const T* p, Whole) {
  return Packed<T>::read(p);
}
template <class T>
NORMEXT_INLINE Packed<T> load_packed(const T* p, Partial part) {
#if NORMEXT_VECTOR_BYTES == 32
  constexpr int kElements = 32 / static_cast<int>(sizeof(T));
  __m256i data[sizeof(Packed<T>) / 32];
  for (int v = 0; v * kElements < kUnit<Accumulate<T>>; ++v) data[v] = masked_load(p + v * kElements, part.count - v * kElements);
  return load_bytes<Packed<T>>(data);
#else
  T buffer[kUnit<Accumulate<T>>];
  load_elements(buffer, p, part.count);
  return Packed<T>::read(buffer);
#endif
}
template <class T>
NORMEXT_INLINE void store_packed(T* p, Packed<T> x, Whole) {
  x.write(p);
}
template <class T>
NORMEXT_INLINE void store_packed(T* p, Packed<T> x, Partial part) {
  T buffer[kUnit<Accumulate<T>>];
  x.write(buffer);
  store_elements(p, buffer, part.count);
}

template <class T>
NORMEXT_INLINE Packed<Kept<T>> load_packed(const Kept<T>*, Partial) {
  __builtin_trap();
}
template <class T>
NORMEXT_INLINE void store_packed(Kept<T>*, Packed<Kept<T>>, Partial) {
  __builtin_trap();
}

// A whole unit; p is aligned to a vector.
template <class T>
NORMEXT_INLINE void stream_packed(T* p, Packed<T> x) {
  if constexpr (Packed<T>::kEvenOdd) {
    stream_bytes(p, x.data);
  } else {
    stream_bytes(p, x.low);
    stream_bytes(p + kLanes<Accumulate<T>>, x.high);
  }
}

// Columns of T next to columns of Like; columns that do not exist are read as zero.
template <class Like, class T, class Extent>
NORMEXT_INLINE Pair<Accumulate<Like>> load(const T* p, Extent extent) {
  Pair<Accumulate<Like>> x = load_packed(p, extent).unpack();
  if constexpr (Packed<Like>::kEvenOdd && !Packed<T>::kEvenOdd) {
    deinterleave(x.a, x.b, std::make_integer_sequence<int, kLanes<Accumulate<Like>>>());
  }
  return x;
}
template <class Like, class T>
NORMEXT_INLINE Packed<T> pack(Pair<Accumulate<Like>> x) {
  if constexpr (Packed<Like>::kEvenOdd && !Packed<T>::kEvenOdd) {
    interleave(x.a, x.b, std::make_integer_sequence<int, kLanes<Accumulate<Like>>>());
  }
  return Packed<T>::pack(x);
}
template <class Like, class T, class Extent>
NORMEXT_INLINE void store(T* p, Pair<Accumulate<Like>> x, Extent extent) {
  store_packed(p, pack<Like, T>(x), extent);
}

}  // namespace NORMEXT_ISA
}  // namespace normext
