// Adversarial distributions (ops/adt.py): normal noise, a pixel's sample, and the gradients that go through it. Plain arithmetic in
// fp32, so that all backends find the same bits and compilers vectorise it.
#pragma once
#include "losses.h"
#include "math.h"

namespace spat {

// The quantile of the standard normal distribution at (1 + u) / 2: u times a quotient of polynomials in -log(1 - u^2), fitted
// for the words of Philox, which reach 5.4. All coefficients are positive, so nothing cancels: at most 1e-6 off, relatively.
SPAT_HD float normal(uint32_t word) {
  const float u = symmetric_unit(word);
  const uint32_t v = bit_cast<uint32_t>((1.f - u) * (1.f + u));
  const float mantissa = bit_cast<float>((v & 0x7fffffu) | 0x3f800000u);
  const float w = float(127 - int32_t(v >> 23)) * 0.693147182f - log1p_unit(mantissa - 1.f);
  const float top = 0.102273889f + w * (0.0136757540f + w * (0.00114193687f + w * 1.04918448e-5f));
  const float bottom = 0.0330215730f + w * (0.00317485281f + w * 0.000122292346f);
  return u * (1.25331450f + w * (0.498157412f + w * top)) / (1.f + w * (0.135679796f + w * bottom));
}

// tanh(mu + sigma r) with sigma = softplus(rho), and the derivatives of both functions.
template <class A>
struct Perturbation {
  A sigma, sigma_slope, tanh, tanh_slope;
  SPAT_HD Perturbation(A mu, A rho, A r) {
    const A e = exp_nonpositive(-magnitude(rho));
    sigma = (rho > 0 ? rho : A(0)) + log1p_unit(e);
    sigma_slope = (rho > 0 ? A(1) : e) / (1 + e);
    const A a = mu + sigma * r, q = exp_nonpositive(-2 * magnitude(a)), sum = 1 + q;
    tanh = (a < 0 ? q - 1 : 1 - q) / sum;
    tanh_slope = 4 * q / (sum * sum);
  }
};

template <class A>
SPAT_HD A adt_sample(const Perturbation<A>& p, A x, A eps, A lo, A hi) {
  return clamp(x + eps * p.tanh, lo, hi);
}

// The gradients of a loss, which is `grad` at the sample, and of `entropy` times the pixel's entropy.
template <class A>
struct AdtGradients {
  bool usable;
  A mu, rho;
  SPAT_HD AdtGradients(const Perturbation<A>& p, A x, A grad, A r, A eps, A factor, A entropy, A lo, A hi) {
    const A tiny = A(1e-8), moved = x + eps * p.tanh, along = grad * factor * eps;
    usable = magnitude(along) <= A(0x1p120f);  // not of NaN; and what follows stays finite
    const A through = usable & (lo <= moved) & (moved <= hi) ? along * p.tanh_slope : A(0);
    mu = through - entropy * (2 * p.tanh * p.tanh_slope / (p.tanh_slope + tiny));
    rho = (mu * r + entropy / (p.sigma + tiny)) * p.sigma_slope;
  }
};

// Adam without averages.
template <class A>
SPAT_HD A adt_step(A value, A grad, A lr) {
  return value + lr * (grad / (magnitude(grad) + A(1e-8)));
}

}  // namespace spat
