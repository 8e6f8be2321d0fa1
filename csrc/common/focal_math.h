// The focal loss of one element and its gradient, once for CPU kernels, CUDA kernels and tests.
//
// Hard targets. With z = x for background and z = -x for the positive class, p = sigmoid(z), and the cross-entropy
// smoothed by h = label_smoothing / 2:
//
//   loss      = a p^gamma (softplus(z) - h z)
//   d loss/dz = a p^gamma (gamma (1 - p) (softplus(z) - h z) + p - h)
//
// a is alpha (times the class weight) for the positive class and 1 - alpha for background. No factor subtracts nearly
// equal numbers, so both keep their digits over the whole range. In base 2: t = z log2(e), e = 2^min(t, 31), d = 1 + e,
// p = e/d, 1 - p = 1/d, softplus(z) = ln2 log2(d), and above t = 31 p = 1, 1 - p = 0, softplus(z) = z to float
// precision.
//
// Soft targets t in [0, 1] (torchvision's formula), with p = sigmoid(x), q = 1 - p, m = p (1 - t) + q t:
//
//   loss      = a_t m^gamma ce,   ce = (1 - t) softplus(x) + t softplus(-x),   a_t = alpha t + (1 - alpha) (1 - t)
//   d loss/dx = a_t (gamma m^(gamma-1) p q (1 - 2t) ce + m^gamma (p (1 - t) - q t))
#pragma once

#include "fast_math.h"

namespace retinanet_ext {

// How p^gamma is computed: gamma = 2 by a product, any other by 2^(gamma log2 p).
enum class Gamma { kTwo, kAny };

// sigmoid(z), 1 - sigmoid(z), softplus(z) and (1 - sigmoid(z)) softplus(z) of one hard-target element.
template <typename T>
struct HardTerms {
  T p;
  T softplus;
  T q;
  T log2_p;
};

// `e` = 2^min(t, kMaxExponent), `r` = 1/(1 + e): separate, because a CUDA thread shares one reciprocal among four.
template <typename T>
RNX_HD T hard_exponential(T z) {
  const T t = z * MathConstants<T>::kLog2E;
  // A NaN fails the comparison and takes the bound, so that it cannot spread to neighbours that share a reciprocal;
  // it comes back by softplus(z) in hard_terms.
  return exp2_fast(t < MathConstants<T>::kMaxExponent ? t : MathConstants<T>::kMaxExponent);
}

template <typename T, Gamma kGamma>
RNX_HD HardTerms<T> hard_terms(T z, T e, T r) {
  using C = MathConstants<T>;
  const T t = z * C::kLog2E;
  const bool in_range = t < C::kMaxExponent;
  const T log2_d = log2_1p(e, T(1) + e, r);
  HardTerms<T> terms;
  terms.p = e * r;
  terms.softplus = in_range ? C::kLn2 * log2_d : z;
  terms.q = in_range ? r : T(0);
  if (kGamma == Gamma::kAny) {
    const T bounded = t > C::kMinExponent ? t : C::kMinExponent;
    terms.log2_p = in_range ? bounded - log2_d : T(0);
  } else {
    terms.log2_p = T(0);
  }
  return terms;
}

// 2^(gamma log2 p): 1 for gamma = 0 whatever p is, 0 where p vanishes.
template <typename T, Gamma kGamma>
RNX_HD T modulation(const HardTerms<T>& terms, T gamma) {
  return kGamma == Gamma::kTwo ? terms.p * terms.p : exp2_fast(gamma * terms.log2_p);
}

// Without label smoothing (h = 0). The smoothed forms are functions of their own: a term h z would turn an infinite
// logit, which detectors use as a mask, into NaN.
template <typename T, Gamma kGamma>
RNX_HD T hard_loss(T z, T e, T r, T gamma) {
  const HardTerms<T> terms = hard_terms<T, kGamma>(z, e, r);
  return modulation<T, kGamma>(terms, gamma) * terms.softplus;
}

// d loss/dz, to be multiplied by a, and by -1 for the positive class (z = -x).
template <typename T, Gamma kGamma>
RNX_HD T hard_gradient(T z, T e, T r, T gamma) {
  const HardTerms<T> terms = hard_terms<T, kGamma>(z, e, r);
  return modulation<T, kGamma>(terms, gamma) * (gamma * (terms.q * terms.softplus) + terms.p);
}

template <typename T, Gamma kGamma>
RNX_HD T hard_loss(T z, T gamma) {
  const T e = hard_exponential(z);
  return hard_loss<T, kGamma>(z, e, reciprocal(T(1) + e), gamma);
}

template <typename T, Gamma kGamma>
RNX_HD T hard_gradient(T z, T gamma) {
  const T e = hard_exponential(z);
  return hard_gradient<T, kGamma>(z, e, reciprocal(T(1) + e), gamma);
}

// With label smoothing h in (0, 1/2].
template <typename T>
RNX_HD T smoothed_loss(T z, T gamma, T h) {
  const T e = hard_exponential(z);
  const HardTerms<T> terms = hard_terms<T, Gamma::kAny>(z, e, reciprocal(T(1) + e));
  return modulation<T, Gamma::kAny>(terms, gamma) * (terms.softplus - h * z);
}

template <typename T>
RNX_HD T smoothed_gradient(T z, T gamma, T h) {
  const T e = hard_exponential(z);
  const HardTerms<T> terms = hard_terms<T, Gamma::kAny>(z, e, reciprocal(T(1) + e));
  const T cross_entropy = terms.softplus - h * z;
  const T power = modulation<T, Gamma::kAny>(terms, gamma);
  // For z above the bound q is 0 and stands for e^-z, which outruns z. p^gamma comes first: for z near the lowest float
  // gamma times the cross-entropy overflows, and p^gamma is 0.
  return (power * (gamma * terms.q)) * cross_entropy + power * (terms.p - h);
}

// sigmoid(x), sigmoid(-x), softplus(x), softplus(-x) of one soft-target element, all to full precision.
template <typename T>
struct SoftTerms {
  T p;
  T q;
  T softplus;
  T softplus_negative;
};

template <typename T>
RNX_HD SoftTerms<T> soft_terms(T x) {
  using C = MathConstants<T>;
  const T magnitude = x < T(0) ? -x : x;
  const T t = -magnitude * C::kLog2E;
  const T e = exp2_fast(t);
  const T d = T(1) + e;
  const T r = reciprocal(d);
  const T log_d = C::kLn2 * log2_1p(e, d, r);
  const bool negative = x < T(0);
  SoftTerms<T> terms;
  terms.p = negative ? e * r : r;
  terms.q = negative ? r : e * r;
  terms.softplus = (negative ? T(0) : magnitude) + log_d;
  terms.softplus_negative = (negative ? magnitude : T(0)) + log_d;
  return terms;
}

// m^gamma for m in [0, 1]; 1 for gamma = 0 whatever m is, 0 for m = 0 otherwise. NaN stays NaN.
template <typename T, Gamma kGamma>
RNX_HD T soft_modulation(T m, T gamma) {
  if (kGamma == Gamma::kTwo) return m * m;
  if (gamma == T(0)) return m == m ? T(1) : m;
  const T power = exp2_fast(gamma * log2_fast(m));
  return m == T(0) ? T(0) : (m == m ? power : m);
}

// `alpha_positive`, `alpha_negative`: alpha and 1 - alpha, or 1 and 1 where balancing is off.
template <typename T, Gamma kGamma>
RNX_HD T soft_loss(T x, T target, T gamma, T alpha_positive, T alpha_negative) {
  const SoftTerms<T> s = soft_terms(x);
  const T rest = T(1) - target;
  const T m = s.p * rest + s.q * target;
  const T cross_entropy = rest * s.softplus + target * s.softplus_negative;
  const T a = alpha_positive * target + alpha_negative * rest;
  return a * soft_modulation<T, kGamma>(m, gamma) * cross_entropy;
}

template <typename T, Gamma kGamma>
RNX_HD T soft_gradient(T x, T target, T gamma, T alpha_positive, T alpha_negative) {
  const SoftTerms<T> s = soft_terms(x);
  const T rest = T(1) - target;
  const T m = s.p * rest + s.q * target;
  const T cross_entropy = rest * s.softplus + target * s.softplus_negative;
  const T a = alpha_positive * target + alpha_negative * rest;
  // gamma m^(gamma-1) p q = gamma m^gamma (p q / m): finite also for gamma < 1, and 0 where m has underflowed.
  const T slope = kGamma == Gamma::kTwo ? T(2) * m * (s.p * s.q)
                                        : gamma * soft_modulation<T, kGamma>(m, gamma) *
                                              (m > T(0) ? s.p * s.q / m : T(0));
  return a * (slope * (rest - target) * cross_entropy +
              soft_modulation<T, kGamma>(m, gamma) * (s.p * rest - s.q * target));
}

}  // namespace retinanet_ext
