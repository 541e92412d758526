// Statistics of a row, group or channel: moments of a segment, and the one merge of all segments.
//
//   segment:  m near sum(x)/n;  d = x - m;  c = sum(d)/n;  q = sum(d*d) - n*c*c
//   merge:    pivot = m_0;  u_s = (m_s - pivot) + c_s;  U = sum(n_s*u_s)/N;  M2 = sum(q_s + n_s*(u_s - U)^2)
//             mean = hi + lo with hi = fl(pivot + U), lo = U - (hi - pivot);  rstd = 1/sqrt(M2/N + eps)
//
// c removes the error of m, and lo the rounding of hi, so the error does not grow with the mean (corrected two-pass of Chan, Golub
// and LeVeque, 1983, per segment). Division by n, never multiplication by 1/n: constant rows then give the bias exactly.
#pragma once

#include "core/math.h"

namespace normext {
inline namespace NORMEXT_ISA {

// LayerNorm: centred moments of n values.
template <class A>
struct Moments {
  A mean;        // m
  A correction;  // c
  A m2;          // q
};

template <class A>
NORMEXT_INLINE Moments<A> moments(A mean, A sum_d, A sum_d2, A n) {
  const A c = sum_d / n;
  const A square = n * c * c;
  // A square that overflows is left out: infinity minus infinity would turn a constant row of 1e30 into NaN. Infinite sum_d2 stays
  // infinite, rstd is then 0 and the row gives the bias.
  const auto finite = square - square == A{};
  return {mean, c, finite ? sum_d2 - square : sum_d2};
}

// Whether m was near enough to the mean, where that was only hoped for: q is finite, and n*c*c, with which its error grows, is at
// most q. Else d is to be taken once more, from m + c.
template <class A>
NORMEXT_INLINE auto near_mean(Moments<A> s, A n) {
  const A slack = s.m2 - n * s.correction * s.correction;
  return (slack >= A{}) & (slack - slack == A{});
}

// The same with m where the mean is, for one who takes m of one segment as the pivot of all.
template <class A>
NORMEXT_INLINE Moments<A> at_mean(Moments<A> s) {
  const A mean = s.mean + s.correction;
  return {mean, s.correction - (mean - s.mean), s.m2};
}

// u_s: where the segment's mean lies relative to the pivot.
template <class A>
NORMEXT_INLINE A relative_mean(Moments<A> s, A pivot) {
  return (s.mean - pivot) + s.correction;
}

// The segment's share of M2, given U.
template <class A>
NORMEXT_INLINE A centred_square(Moments<A> s, A n, A pivot, A merged) {
  const A delta = relative_mean(s, pivot) - merged;
  return fma(n * delta, delta, s.m2);
}

// What a centred norm keeps of a row: the mean as hi + lo, and rstd.
template <class A>
struct CentredRow {
  A hi, lo, rstd;
};

template <class A>
NORMEXT_INLINE CentredRow<A> finish_centred(A pivot, A merged, A m2, A n, A eps) {
  const A hi = pivot + merged;
  return {hi, merged - (hi - pivot), reciprocal_sqrt(m2 / n + eps)};
}

// What RMSNorm keeps of a row.
template <class A>
struct ScaledRow {
  A rstd;
};

}  // namespace NORMEXT_ISA
}  // namespace normext
