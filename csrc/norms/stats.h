// Statistics of a row, group or channel: moments of a segment, and the one merge of all segments.
//
//   segment:  m = sum(x)/n or near;  d = x - m;  c = sum(d)/n;  q = sum(d*d) - n*c*c
//   merge:    pivot = m_0;  U = sum(n_s * ((m_s - pivot) + c_s))/N;  hi = fl(pivot + U);  lo = U - (hi - pivot)
//             w_s = ((m_s - hi) + c_s) - lo;  W = sum(n_s*w_s)/N;  M2 = sum(q_s + n_s*w_s^2)
//             mean = hi + (lo + W);  rstd = 1/sqrt(M2/N + eps)    (M2 is about hi + lo: N*W^2 too much, of no account)
//
// c removes the error of m, lo the rounding of hi, and W the error of U, so none grows with the mean (corrected two-pass of Chan,
// Golub and LeVeque, 1983, per segment) nor with the distance of the first segment from the others, of up to sqrt(N/n_0) deviations
// [a batch of 1024 planes of 8x8 of which the first is unlike the rest: 24 of the contract's 4 without W, 2.5 with it]. Division by
// n, never multiplication by 1/n: constant rows then give the bias exactly.
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

// m may be any number near the mean: c is what it misses. Where that was only hoped for: whether q is finite, and n*c*c, with which
// the error of q grows, at most q/slack. Else d are to be taken once more, from recentred().
template <class A>
NORMEXT_INLINE auto near_mean(Moments<A> s, A n, int slack) {
  const A left = s.m2 - static_cast<float>(slack) * (n * s.correction * s.correction);
  return (left >= A{}) & (left - left == A{});
}
// The mean; 0 if the sum of d overflowed, as it may where the sum of x does not.
template <class A>
NORMEXT_INLINE A recentred(Moments<A> s) {
  const A mean = s.mean + s.correction;
  return mean - mean == A{} ? mean : A{};
}
// The same moments with m = fl(mean): a merge subtracts one segment's m from those of all.
template <class A>
NORMEXT_INLINE Moments<A> at_mean(Moments<A> s) {
  const A mean = s.mean + s.correction, of_correction = mean - s.mean;
  return {mean, (s.mean - (mean - of_correction)) + (s.correction - of_correction), s.m2};
}

// u_s: where the segment's mean lies relative to the pivot.
template <class A>
NORMEXT_INLINE A relative_mean(Moments<A> s, A pivot) {
  return (s.mean - pivot) + s.correction;
}

// hi and lo, from pivot and U.
template <class A>
struct Centre {
  A hi, lo;
};
template <class A>
NORMEXT_INLINE Centre<A> centre_at(A pivot, A merged) {
  const A hi = pivot + merged;
  return {hi, merged - (hi - pivot)};
}
// w_s.
template <class A>
NORMEXT_INLINE A relative_mean(Moments<A> s, Centre<A> centre) {
  return ((s.mean - centre.hi) + s.correction) - centre.lo;
}
// The segment's share of M2.
template <class A>
NORMEXT_INLINE A centred_square(Moments<A> s, A n, Centre<A> centre) {
  const A w = relative_mean(s, centre);
  return fma(n * w, w, s.m2);
}

// What a centred norm keeps of a row: the mean as hi + lo, and rstd.
template <class A>
struct CentredRow {
  A hi, lo, rstd;
};

// From the moments of all values.
template <class A>
NORMEXT_INLINE CentredRow<A> finish_centred(A mean, A correction, A m2, A n, A eps) {
  const Centre<A> centre = centre_at(mean, correction);
  return {centre.hi, centre.lo, reciprocal_sqrt(m2 / n + eps)};
}
// From a merge, where `rest` is W. It is left out if it overflowed: rstd is 0 then, and the row gives the bias.
template <class A>
NORMEXT_INLINE CentredRow<A> finish_centred(Centre<A> centre, A rest, A m2, A n, A eps) {
  const auto finite = rest - rest == A{};
  return {centre.hi, finite ? centre.lo + rest : centre.lo, reciprocal_sqrt(m2 / n + eps)};
}

// What RMSNorm keeps of a row.
template <class A>
struct ScaledRow {
  A rstd;
};

}  // namespace NORMEXT_ISA
}  // namespace normext
