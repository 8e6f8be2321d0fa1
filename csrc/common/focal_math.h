// The focal loss of one element and its gradient, once for CPU kernels, CUDA kernels and tests.
//
// Everything is made of u = e^-|z| in [0, 1], which neither overflows nor cancels:
//
//   sigmoid(z)  = (z > 0 ? 1 : u) / (1 + u)      softplus(z) = max(z, 0) + ln(1 + u)
//   sigmoid(-z) = (z > 0 ? u : 1) / (1 + u)      ln sigmoid(z) = min(z, 0) - ln(1 + u)
//
// Hard targets. With z = x for background and z = -x for the positive class, p = sigmoid(z), and the cross-entropy
// smoothed by h = label_smoothing / 2:
//
//   loss      = a p^gamma (softplus(z) - h z)
//   d loss/dz = a p^gamma (gamma (1 - p) (softplus(z) - h z) + p - h)
//
// a is alpha (times the class weight) for the positive class and 1 - alpha for background. No factor subtracts nearly
// equal numbers, so both keep their digits over the whole range.
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

// sigmoid(z), sigmoid(-z), softplus(z); log2 sigmoid(z) where gamma needs it.
template <typename T>
struct HardTerms {
  T p;
  T q;
  T softplus;
  T log2_p;
};

// e^-|z|: one special-function instruction on the device. NaN for NaN there, 0 for float on the host.
template <typename T>
RNX_HD T decay(T z) {
  return exp2_decay(std::fabs(z) * MathConstants<T>::kLog2E);
}

// Which form of the functions holds. NaN must come through by softplus or by u: on the host it is above, where softplus
// has z itself; on the device u brings it, and this comparison takes fewer registers. (Kernels that are emulated on the
// host have the host's.)
template <typename T>
RNX_HD bool is_above(T z) {
#if defined(__CUDA_ARCH__)
  return z > T(0);
#else
  return !(z < T(0));
#endif
}

template <typename T, Gamma kGamma>
RNX_HD HardTerms<T> hard_terms(T z) {
  using C = MathConstants<T>;
  const bool above = is_above(z);
  const T u = decay(z);
  const T r = reciprocal(T(1) + u);
  const T tail = u * r;
  const T log_1p = log1p_unit(u);
  HardTerms<T> terms;
  terms.p = above ? r : tail;
  terms.q = above ? tail : r;
  // Not `above ? z + log_1p : log_1p`, which a compiler may turn into a branch.
  terms.softplus = (above ? z : T(0)) + log_1p;
  if (kGamma == Gamma::kAny) {
    const T log2_p = ((above ? T(0) : z) - log_1p) * C::kLog2E;
    terms.log2_p = log2_p > C::kMinExponent ? log2_p : C::kMinExponent;
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

// Loss before a, and d loss/dz, to be multiplied by a, and by -1 for the positive class (z = -x).
template <typename T>
struct LossAndGradient {
  T loss;
  T gradient;
};

// Without label smoothing (h = 0). The smoothed form is a function of its own: a term h z would turn an infinite
// logit, which detectors use as a mask, into NaN.
template <typename T, Gamma kGamma>
RNX_HD LossAndGradient<T> hard_element(T z, T gamma) {
  const HardTerms<T> terms = hard_terms<T, kGamma>(z);
  const T power = modulation<T, kGamma>(terms, gamma);
  return {power * terms.softplus, power * (gamma * (terms.q * terms.softplus) + terms.p)};
}

// With label smoothing h in (0, 1/2].
template <typename T>
RNX_HD LossAndGradient<T> smoothed_element(T z, T gamma, T h) {
  const HardTerms<T> terms = hard_terms<T, Gamma::kAny>(z);
  const T cross_entropy = terms.softplus - h * z;
  const T power = modulation<T, Gamma::kAny>(terms, gamma);
  // p^gamma comes first: for z near the lowest float gamma times the cross-entropy overflows, and p^gamma is 0.
  return {power * cross_entropy, (power * (gamma * terms.q)) * cross_entropy + power * (terms.p - h)};
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
  const bool above = is_above(x);
  const T u = decay(x);
  const T r = reciprocal(T(1) + u);
  const T tail = u * r;
  const T log_1p = log1p_unit(u);
  SoftTerms<T> terms;
  terms.p = above ? r : tail;
  terms.q = above ? tail : r;
  terms.softplus = (above ? x : T(0)) + log_1p;
  terms.softplus_negative = (above ? T(0) : -x) + log_1p;
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

// Loss and d loss/dx. `alpha_positive`, `alpha_negative`: alpha and 1 - alpha, or 1 and 1 where balancing is off.
template <typename T, Gamma kGamma>
RNX_HD LossAndGradient<T> soft_element(T x, T target, T gamma, T alpha_positive, T alpha_negative) {
  const SoftTerms<T> s = soft_terms(x);
  const T rest = T(1) - target;
  const T m = s.p * rest + s.q * target;
  const T cross_entropy = rest * s.softplus + target * s.softplus_negative;
  const T a = alpha_positive * target + alpha_negative * rest;
  const T power = soft_modulation<T, kGamma>(m, gamma);
  // gamma m^(gamma-1) p q = gamma m^gamma (p q / m): finite also for gamma < 1, and 0 where m has underflowed.
  const T slope =
      kGamma == Gamma::kTwo ? T(2) * m * (s.p * s.q) : gamma * power * (m > T(0) ? s.p * s.q / m : T(0));
  return {a * power * cross_entropy,
          a * (slope * (rest - target) * cross_entropy + power * (s.p * rest - s.q * target))};
}

}  // namespace retinanet_ext
