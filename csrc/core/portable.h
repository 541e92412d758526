// Compiler differences, in one place: the only file that asks which compiler is at work.
#pragma once

#if defined(__CUDACC__)
#define NORMEXT_HOST_DEVICE __host__ __device__
#else
#define NORMEXT_HOST_DEVICE
#endif

// Policies and helpers are always inlined: no copy of them may be shared between
// translation units that are compiled for different instruction sets.
#define NORMEXT_INLINE NORMEXT_HOST_DEVICE inline __attribute__((always_inline))

// Before a loop: as written, not unrolled. nvcc's pass for the host knows neither pragma.
#if defined(__CUDA_ARCH__) || defined(__clang__)
#define NORMEXT_NO_UNROLL _Pragma("unroll 1")
#elif defined(__CUDACC__)
#define NORMEXT_NO_UNROLL
#else
#define NORMEXT_NO_UNROLL _Pragma("GCC unroll 1")
#endif

// 1/a for a between 2^-125 and 2^126. On a GPU, the steps of a division without its tests for other numbers: a branch per value.
NORMEXT_INLINE float reciprocal_of_normal(float a) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return fmaf(r, fmaf(-a, r, 1.0f), r);
#else
  return 1.0f / a;
#endif
}

// a/b for b from 1 on; a * 0 for b of 2^126 and more, or NaN.
NORMEXT_INLINE float quotient_by_normal(float a, float b) { return a * (b < 0x1p126f ? reciprocal_of_normal(b) : 0.0f); }

// Of a number a and any b: NaN where b is.
NORMEXT_INLINE float minimum_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a < b ? a : b;
#endif
}
NORMEXT_INLINE float maximum_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a > b ? a : b;
#endif
}

// Code that is compiled once per instruction set lives in `normext::<NORMEXT_ISA>`.
// CPU translation units define it (scalar, avx2, avx512, neon); everything else is `generic`.
#if !defined(NORMEXT_ISA)
#define NORMEXT_ISA generic
#endif
