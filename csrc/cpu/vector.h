// SIMD vocabulary of one instruction set: vectors of float and double, their arithmetic, memory as bytes. Storage types: packed.h.
//
// Each isa_*.cpp first defines NORMEXT_ISA, NORMEXT_VECTOR_BYTES and NORMEXT_HAS_FMA. Arithmetic is written with GNU vector types;
// intrinsics appear only for what they cannot express: fused multiply-add, square root, reciprocal, streaming stores; and for
// minimum and maximum, of which GCC 12 makes a comparison and a blend.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/math.h"

#if NORMEXT_VECTOR_BYTES > 16
#include <immintrin.h>
#elif NORMEXT_HAS_FMA
#include <arm_neon.h>
#endif

namespace normext {
inline namespace NORMEXT_ISA {

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(NORMEXT_VECTOR_BYTES)));
  typedef std::uint32_t bits __attribute__((vector_size(NORMEXT_VECTOR_BYTES)));
  typedef std::int32_t mask __attribute__((vector_size(NORMEXT_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(NORMEXT_VECTOR_BYTES)));
  typedef std::int64_t mask __attribute__((vector_size(NORMEXT_VECTOR_BYTES)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
using Mask = typename VectorOf<A>::mask;
using Floats = Vector<float>;
using FloatBits = VectorOf<float>::bits;

template <class A>
constexpr int kLanes = NORMEXT_VECTOR_BYTES / sizeof(A);
template <class A>
constexpr int kUnit = 2 * kLanes<A>;  // columns of one access

// Fused multiply-add and square root of all lanes. As loops over lanes GCC 12 vectorises them in most contexts but not in all, and
// where it does not a kernel takes four times as long.
// The reciprocal of a float may be off by an ulp, and wants a between 2^-125 and 2^126.
#if NORMEXT_VECTOR_BYTES == 64
NORMEXT_INLINE __m512 fma_lanes(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
NORMEXT_INLINE __m512d fma_lanes(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
NORMEXT_INLINE __m512 sqrt_lanes(__m512 a) { return _mm512_maskz_sqrt_ps(0xffff, a); }
NORMEXT_INLINE __m512d sqrt_lanes(__m512d a) { return _mm512_maskz_sqrt_pd(0xff, a); }
NORMEXT_INLINE __m512 reciprocal_lanes(__m512 a) {  // a Newton step: a division takes 16 cycles
  const __m512 r = _mm512_maskz_rcp14_ps(0xffff, a);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0f)), r);
}
NORMEXT_INLINE __m512d reciprocal_lanes(__m512d a) { return 1.0 / a; }
NORMEXT_INLINE __m512 quotient_lanes(__m512 a, __m512 b) {
  const __mmask16 normal = _mm512_cmp_ps_mask(b, _mm512_set1_ps(0x1p126f), _CMP_LT_OQ);
  const __m512 r = _mm512_maskz_rcp14_ps(0xffff, b);
  return a * _mm512_maskz_fmadd_ps(normal, r, _mm512_fnmadd_ps(b, r, _mm512_set1_ps(1.0f)), r);
}
NORMEXT_INLINE __m512 minimum_lanes(__m512 a, __m512 b) { return _mm512_maskz_min_ps(0xffff, a, b); }
NORMEXT_INLINE __m512 maximum_lanes(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xffff, a, b); }
#elif NORMEXT_VECTOR_BYTES == 32
NORMEXT_INLINE __m256 fma_lanes(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
NORMEXT_INLINE __m256d fma_lanes(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
NORMEXT_INLINE __m256 sqrt_lanes(__m256 a) { return _mm256_sqrt_ps(a); }
NORMEXT_INLINE __m256d sqrt_lanes(__m256d a) { return _mm256_sqrt_pd(a); }
NORMEXT_INLINE __m256 minimum_lanes(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
NORMEXT_INLINE __m256 maximum_lanes(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
#elif NORMEXT_HAS_FMA
NORMEXT_INLINE float32x4_t fma_lanes(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
NORMEXT_INLINE float64x2_t fma_lanes(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
NORMEXT_INLINE float32x4_t sqrt_lanes(float32x4_t a) { return vsqrtq_f32(a); }
NORMEXT_INLINE float64x2_t sqrt_lanes(float64x2_t a) { return vsqrtq_f64(a); }
#else
template <class V>
NORMEXT_INLINE V fma_lanes(V a, V b, V c) {
  return a * b + c;
}
template <class V>
NORMEXT_INLINE V sqrt_lanes(V a) {
  for (std::size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) a[i] = Math<std::decay_t<decltype(a[0])>>::sqrt(a[i]);
  return a;
}
#endif

template <class V>
NORMEXT_INLINE V reciprocal_lanes(V a) {
  return 1.0f / a;
}
template <class V>
NORMEXT_INLINE V minimum_lanes(V a, V b) {
  return a < b ? a : b;
}
template <class V>
NORMEXT_INLINE V maximum_lanes(V a, V b) {
  return a > b ? a : b;
}
template <class V>
NORMEXT_INLINE V quotient_lanes(V a, V b) {
  if constexpr (std::is_same_v<V, Floats>) return a / minimum_lanes(b, V{} + __builtin_inff());
  else return a / b;
}

template <class V>
struct VectorMath {
  NORMEXT_INLINE static V fma(V a, V b, V c) { return fma_lanes(a, b, c); }
  NORMEXT_INLINE static V exact_product_fma(V a, V b, V c) {
    if constexpr (NORMEXT_HAS_FMA == 0 && std::is_same_v<V, Floats>) {
      for (int i = 0; i < kLanes<float>; ++i) a[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
      return a;
    } else {
      return fma_lanes(a, b, c);
    }
  }
  NORMEXT_INLINE static V reciprocal(V a) { return reciprocal_lanes(a); }
  NORMEXT_INLINE static V quotient(V a, V b) { return quotient_lanes(a, b); }
  NORMEXT_INLINE static V sqrt(V a) { return sqrt_lanes(a); }
  NORMEXT_INLINE static V minimum(V a, V b) { return minimum_lanes(a, b); }
  NORMEXT_INLINE static V maximum(V a, V b) { return maximum_lanes(a, b); }
};
template <>
struct Math<Vector<float>> : VectorMath<Vector<float>> {
  using Scalar = float;
  static constexpr bool kDouble = false;
  NORMEXT_INLINE static FloatBits to_bits(Floats a) { return reinterpret_cast<FloatBits>(a); }
  NORMEXT_INLINE static Floats from_bits(FloatBits bits) { return reinterpret_cast<Floats>(bits); }
  NORMEXT_INLINE static Floats absolute(Floats a) { return from_bits(to_bits(a) & 0x7fffffffu); }
};
template <>
struct Math<Vector<double>> : VectorMath<Vector<double>> {
  using Scalar = double;
  static constexpr bool kDouble = true;
  NORMEXT_INLINE static Vector<double> exp(Vector<double> a) {
    for (int i = 0; i < kLanes<double>; ++i) a[i] = ::exp(a[i]);
    return a;
  }
  NORMEXT_INLINE static Vector<double> erfc(Vector<double> a) {
    for (int i = 0; i < kLanes<double>; ++i) a[i] = ::erfc(a[i]);
    return a;
  }
};

template <class X>
NORMEXT_INLINE X load_bytes(const void* p) {
  X x;
  __builtin_memcpy(&x, p, sizeof(X));
  return x;
}
template <class X>
NORMEXT_INLINE void store_bytes(void* p, X x) {
  __builtin_memcpy(p, &x, sizeof(X));
}

// The same where memory holds values of type E, however aligned, and nothing reads or writes it as another type but byte by byte.
// A compiler that knows so need not load pointers and sizes again after every store [GroupNorm's gradients, channels-last,
// float32: a fifth fewer instructions].
template <class E, class X>
NORMEXT_INLINE X load_as(const void* p) {
  typedef E Elements __attribute__((vector_size(sizeof(X)), aligned(1)));
  return reinterpret_cast<X>(*static_cast<const Elements*>(p));
}
template <class E, class X>
NORMEXT_INLINE void store_as(void* p, X x) {
  typedef E Elements __attribute__((vector_size(sizeof(X)), aligned(1)));
  *static_cast<Elements*>(p) = reinterpret_cast<Elements>(x);
}

// Past the caches, where the instruction set can; p is aligned to sizeof(X). Other threads see it after stream_fence().
template <class X>
NORMEXT_INLINE void stream_bytes(void* p, X x) {
#if NORMEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(X) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#endif
#if NORMEXT_VECTOR_BYTES >= 32
  if constexpr (sizeof(X) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
  if constexpr (sizeof(X) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(x));
#endif
  store_bytes(p, x);
}
NORMEXT_INLINE void stream_fence() {
#if NORMEXT_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

}  // namespace NORMEXT_ISA
}  // namespace normext
