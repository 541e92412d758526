// The intrinsics of AVX-512 that csrc/cpu uses, in terms of AVX2, so that its kernels run on processors without it: `make
// avx512-test` includes this ahead of isa_avx512.cpp and isa.cpp.
//
// An approximate reciprocal is off by all it may be, masked accesses touch no byte that they need not, streaming stores trap where
// they are not aligned. Not checked: the alignment of what the compiler moves by itself.
#pragma once

#define NORMEXT_AVX512_ON_AVX2 1

#include <immintrin.h>

#include <cstdint>

namespace avx512_on_avx2 {

#define NORMEXT_LANES static inline __attribute__((always_inline))
// Lane by lane and not inlined: unions of vectors and arrays would keep the compiler from seeing the rest.
#define NORMEXT_BYTES static __attribute__((noinline, unused))

union Floats {
  __m512 all;
  __m256 half[2];
  float lane[16];
};
union Doubles {
  __m512d all;
  __m256d half[2];
};
union Bits {
  __m512i all;
  __m256i half[2];
  std::uint32_t lane[16];
  std::uint16_t word[32];
  unsigned char byte[64];
};
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef float Singles __attribute__((vector_size(64)));

// What op makes of each half.
template <class Halves, class Op, class... All>
NORMEXT_LANES auto by_halves(Op op, All... x) {
  Halves r;
  for (int h = 0; h < 2; ++h) r.half[h] = op(Halves{x}.half[h]...);
  return r.all;
}
NORMEXT_LANES __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return by_halves<Floats>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
NORMEXT_LANES __m512 fnmadd(__m512 a, __m512 b, __m512 c) {
  return by_halves<Floats>([](__m256 x, __m256 y, __m256 z) { return _mm256_fnmadd_ps(x, y, z); }, a, b, c);
}
NORMEXT_LANES __m512d fmadd(__m512d a, __m512d b, __m512d c) {
  return by_halves<Doubles>([](__m256d x, __m256d y, __m256d z) { return _mm256_fmadd_pd(x, y, z); }, a, b, c);
}
template <int kMask>
NORMEXT_LANES __m512 sqrt(__m512 a) {
  static_assert(kMask == 0xffff);
  return by_halves<Floats>([](__m256 x) { return _mm256_sqrt_ps(x); }, a);
}
template <int kMask>
NORMEXT_LANES __m512d sqrt(__m512d a) {
  static_assert(kMask == 0xff);
  return by_halves<Doubles>([](__m256d x) { return _mm256_sqrt_pd(x); }, a);
}
template <int kMask>
NORMEXT_LANES __m512 min(__m512 a, __m512 b) {
  static_assert(kMask == 0xffff);
  return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_min_ps(x, y); }, a, b);
}
template <int kMask>
NORMEXT_LANES __m512 max(__m512 a, __m512 b) {
  static_assert(kMask == 0xffff);
  return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}
// Off by 0.999 of 2^-14, up or down as the bits of the argument have it; zero, infinity and results that are subnormal are exact.
NORMEXT_BYTES void approximate_reciprocals(float* lane) {
  for (int i = 0; i < 16; ++i) {
    const float exact = 1.0f / lane[i];
    std::uint32_t of_exact, of_lane;
    __builtin_memcpy(&of_exact, &exact, 4);
    __builtin_memcpy(&of_lane, &lane[i], 4);
    const std::uint32_t exponent = of_exact >> 23 & 255;
    const double off = ((of_lane ^ of_lane >> 7 ^ of_lane >> 13) & 1) != 0 ? 0x1p-14 * 0.999 : -0x1p-14 * 0.999;
    lane[i] = exponent == 0 || exponent == 255 ? exact : static_cast<float>((1.0 + off) / static_cast<double>(lane[i]));
  }
}
template <int kMask>
NORMEXT_LANES __m512 rcp14(__m512 a) {
  static_assert(kMask == 0xffff);
  Floats x{a};
  approximate_reciprocals(x.lane);
  return x.all;
}
NORMEXT_LANES __m512 set1(float a) { return reinterpret_cast<__m512>(a - Singles{}); }
NORMEXT_LANES __m512i set1(int a) { return reinterpret_cast<__m512i>(Words{} + static_cast<std::uint32_t>(a)); }
NORMEXT_LANES void stream(__m512i* p, __m512i a) {
  const Bits x{a};
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(*p) != 0) __builtin_trap();
  for (int h = 0; h < 2; ++h) _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + h, x.half[h]);
}

// ---- masks ----

NORMEXT_LANES __mmask16 mask_of(__m256 low, __m256 high) {
  return static_cast<__mmask16>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}
NORMEXT_LANES __m256i lanes_of(unsigned mask) {  // all ones where the bit is set
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
}
NORMEXT_LANES __m512 maskz_fmadd(__mmask16 mask, __m512 a, __m512 b, __m512 c) {
  Bits r;
  r.all = reinterpret_cast<__m512i>(fmadd(a, b, c));
  for (int h = 0; h < 2; ++h) r.half[h] = _mm256_and_si256(r.half[h], lanes_of(mask >> 8 * h & 255u));
  return reinterpret_cast<__m512>(r.all);
}
template <int kRelation>
NORMEXT_LANES __mmask16 cmp_mask(__m512 a, __m512 b) {
  const Floats x{a}, y{b};
  return mask_of(_mm256_cmp_ps(x.half[0], y.half[0], kRelation), _mm256_cmp_ps(x.half[1], y.half[1], kRelation));
}
NORMEXT_LANES __mmask16 mask_test(__mmask16 mask, __m512i a, __m512i b) {
  const Bits x{a}, y{b};
  __m256 none[2];
  for (int h = 0; h < 2; ++h) {
    none[h] = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(x.half[h], y.half[h]), _mm256_setzero_si256()));
  }
  return static_cast<__mmask16>(mask & ~mask_of(none[0], none[1]));
}
NORMEXT_LANES __m512i mask_add(__m512i absent, __mmask16 mask, __m512i a, __m512i b) {
  const Bits z{absent}, x{a}, y{b};
  Bits r;
  for (int h = 0; h < 2; ++h) {
    r.half[h] = _mm256_blendv_epi8(z.half[h], _mm256_add_epi32(x.half[h], y.half[h]), lanes_of(mask >> 8 * h & 255u));
  }
  return r.all;
}
NORMEXT_BYTES __mmask16 classes(const std::uint32_t* lane, int wanted) {
  constexpr int kQuietNaN = 0x01, kSubnormal = 0x20, kSignalingNaN = 0x80;
  if ((wanted & ~(kQuietNaN | kSubnormal | kSignalingNaN)) != 0) __builtin_trap();
  const bool flushed = (_mm_getcsr() & 0x40) != 0;
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t exponent = lane[i] >> 23 & 255, fraction = lane[i] & 0x7fffff;
    int found = 0;
    if (exponent == 255 && fraction != 0) found = (fraction & 0x400000) != 0 ? kQuietNaN : kSignalingNaN;
    if (exponent == 0 && fraction != 0 && !flushed) found = kSubnormal;
    mask |= static_cast<unsigned>((found & wanted) != 0) << i;
  }
  return static_cast<__mmask16>(mask);
}
NORMEXT_LANES __mmask16 fpclass(__m512 a, int wanted) {
  Bits x;
  x.all = reinterpret_cast<__m512i>(a);
  return classes(x.lane, wanted);
}
NORMEXT_LANES unsigned char kortestz(__mmask16 a, __mmask16 b) { return (a | b) == 0; }

// ---- float16, memory ----

template <int kMask>
NORMEXT_LANES __m512 cvtph(__m256i h) {
  static_assert(kMask == 0xffff);
  Floats r;
  r.half[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
  r.half[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
  return r.all;
}
template <int kMask, int kRounding>
NORMEXT_LANES __m256i cvtps(__m512 a) {
  static_assert(kMask == 0xffff && (kRounding & 7) == _MM_FROUND_TO_NEAREST_INT);
  const Floats x{a};
  return _mm256_set_m128i(_mm256_cvtps_ph(x.half[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.half[0], _MM_FROUND_TO_NEAREST_INT));
}
NORMEXT_LANES __m512i loadu(const void* p) {
  Bits r;
  __builtin_memcpy(r.byte, p, 64);
  return r.all;
}
NORMEXT_LANES void storeu(void* p, __m512i a) {
  const Bits x{a};
  __builtin_memcpy(p, x.byte, 64);
}
NORMEXT_BYTES void copy_bytes(unsigned char* to, const unsigned char* from, __mmask64 mask, bool fill) {
  for (int i = 0; i < 64; ++i) {
    if ((mask >> i & 1) != 0) *static_cast<volatile unsigned char*>(to + i) = *static_cast<const volatile unsigned char*>(from + i);
    else if (fill) to[i] = 0;
  }
}
NORMEXT_LANES __m512i maskz_loadu(__mmask64 mask, const void* p) {
  Bits r;
  copy_bytes(r.byte, static_cast<const unsigned char*>(p), mask, true);
  return r.all;
}
NORMEXT_LANES void mask_storeu(void* p, __mmask64 mask, __m512i a) {
  const Bits x{a};
  copy_bytes(static_cast<unsigned char*>(p), x.byte, mask, false);
}

// ---- avx512_bf16 ----

// The words of `low`, then those of `high`, to nearest even: subnormal numbers are zero, NaN is quiet and keeps sign and payload.
NORMEXT_BYTES void narrow_bits(std::uint16_t* word, const std::uint32_t* low, const std::uint32_t* high) {
  for (int i = 0; i < 32; ++i) {
    const std::uint32_t bits = i < 16 ? low[i] : high[i - 16];
    const std::uint32_t exponent = bits >> 23 & 255, fraction = bits & 0x7fffff;
    std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if (exponent == 0) rounded = bits >> 16 & 0x8000;
    if (exponent == 255) rounded = bits >> 16 | (fraction != 0 ? 0x40 : 0);
    word[i] = static_cast<std::uint16_t>(rounded);
  }
}
template <class W>
NORMEXT_LANES void narrow(W& words, __m512 low, __m512 high) {
  Bits x, y, r;
  x.all = reinterpret_cast<__m512i>(low);
  y.all = reinterpret_cast<__m512i>(high);
  narrow_bits(r.word, x.lane, y.lane);
  words = reinterpret_cast<W>(r.all);
}

#undef NORMEXT_LANES
#undef NORMEXT_BYTES

}  // namespace avx512_on_avx2

// What isa.cpp asks the processor: it has every avx512*.
#define __builtin_cpu_supports(name) (("" name)[3] == '5' || __builtin_cpu_supports(name))

// Macros of immintrin.h are undefined first: those with an immediate operand are some where nothing is optimised.
#undef _mm512_cmp_ps_mask
#undef _mm512_fpclass_ps_mask
#undef _mm512_maskz_cvtps_ph
#define _mm512_fmadd_ps avx512_on_avx2::fmadd
#define _mm512_fnmadd_ps avx512_on_avx2::fnmadd
#define _mm512_fmadd_pd avx512_on_avx2::fmadd
#define _mm512_maskz_sqrt_ps(mask, a) avx512_on_avx2::sqrt<mask>(a)
#define _mm512_maskz_sqrt_pd(mask, a) avx512_on_avx2::sqrt<mask>(a)
#define _mm512_maskz_rcp14_ps(mask, a) avx512_on_avx2::rcp14<mask>(a)
#define _mm512_maskz_min_ps(mask, a, b) avx512_on_avx2::min<mask>(a, b)
#define _mm512_maskz_max_ps(mask, a, b) avx512_on_avx2::max<mask>(a, b)
#define _mm512_maskz_fmadd_ps avx512_on_avx2::maskz_fmadd
#define _mm512_set1_ps avx512_on_avx2::set1
#define _mm512_set1_epi32 avx512_on_avx2::set1
#define _mm512_stream_si512 avx512_on_avx2::stream
#define _mm512_cmp_ps_mask(a, b, relation) avx512_on_avx2::cmp_mask<relation>(a, b)
#define _mm512_mask_test_epi32_mask avx512_on_avx2::mask_test
#define _mm512_mask_add_epi32 avx512_on_avx2::mask_add
#define _mm512_fpclass_ps_mask avx512_on_avx2::fpclass
#define _kortestz_mask16_u8 avx512_on_avx2::kortestz
#define _mm512_maskz_cvtph_ps(mask, a) avx512_on_avx2::cvtph<mask>(a)
#define _mm512_maskz_cvtps_ph(mask, a, rounding) avx512_on_avx2::cvtps<mask, rounding>(a)
#define _mm512_loadu_si512 avx512_on_avx2::loadu
#define _mm512_storeu_si512 avx512_on_avx2::storeu
#define _mm512_maskz_loadu_epi8 avx512_on_avx2::maskz_loadu
#define _mm512_mask_storeu_epi8 avx512_on_avx2::mask_storeu
