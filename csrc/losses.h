// The losses that attacks maximise, and their gradients, for one row of logits: shared by CPU and GPU like math.h.
#pragma once
#include <cmath>

#include "dtypes.h"

namespace spat {

// e^x for x <= 0 (in softmax, x = z - max): at most 1 ulp off, denormal results included, and plain arithmetic, so compilers
// vectorise it. 1 + r + r^2 q(r) with q fitted on |r| <= ln(2)/2.
template <class F, class U>  // float and uint32_t, or vectors of them (cpu.h)
SPAT_HD F exp_polynomial(F x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const F shifted = x * 1.44269504f + magic;
  const F n = shifted - magic;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const F q = 0.5f + r * (0.166665763f + r * (0.0416664667f + r * (0.00836317986f + r * 0.00139334088f)));
  const F scale = bit_cast<F>((bit_cast<U>(shifted) << 23) + (191u << 23));  // 2^(n + 64): normal for every n in use
  const F e = (1.f + (r + r * r * q)) * scale * 0x1p-64f, zero = {};
  return x < -104.f ? zero : e;
}
SPAT_HD float exp_nonpositive(float x) { return exp_polynomial<float, uint32_t>(x); }
SPAT_HD double exp_nonpositive(double x) { return exp(x); }

// log(1 + v) for v in [0, 1]: v q(v), with q fitted at Chebyshev's points. At most 2e-7 off, relatively.
SPAT_HD float log1p_unit(float v) {
  const float high = -0.136747703f + v * (0.0783616677f + v * (-0.0295885075f + v * 0.00525345793f));
  return v * (1.f + v * (-0.499995023f + v * (0.333192706f + v * (-0.248443693f + v * (0.191114306f + v * high)))));
}
SPAT_HD double log1p_unit(double v) { return log1p(v); }

template <class A>
SPAT_HD A larger(A a, A b) {
  return a > b ? a : b;
}
template <class A>
SPAT_HD A lowest();
template <>
SPAT_HD float lowest() {
  return -3.402823466e38f;
}
template <>
SPAT_HD double lowest() {
  return -1.7976931348623157e308;
}

// Label-smoothed cross-entropy of one row: y^LS is 1 - alpha on y and alpha/(K-1) on every other class (Eq. 4.1-4.2).
// `top` is the largest logit of the classes k != y and `sum` sums their e = e^(z - top), so z_y cannot make them vanish.
// p_k = e * factor / divisor, and p_y - (1 - alpha) = alpha - sum * factor / divisor: nothing cancels when p_y is near 1.
// `normalize` (alpha = 0) divides by 1 - p_y: the softmax over k != y, and -1 at y; 0 where those logits are all -inf.
template <class A>
struct LsceRow {
  A top, sum, z_y, max, others, total, factor, divisor;
  SPAT_HD LsceRow(A top, A sum, A z_y, bool normalize) : top(top), sum(sum), z_y(z_y), max(larger(z_y, top)) {
    factor = exp_nonpositive(top - max);
    others = sum * factor;
    total = others + exp_nonpositive(z_y - max);
    divisor = total;
    if (normalize) factor = 1, divisor = (sum == 0 ? A(1) : sum) + (total - total);  // NaN where z_y is NaN or inf
  }

  SPAT_HD A label_grad(A alpha, A scale) const { return scale * (alpha - sum * factor / divisor); }
  template <class V>  // A, or a vector of A; e = exp_nonpositive(z - top)
  SPAT_HD V other_grad(V e, A off_target, A scale) const {
    return scale * (e * factor / divisor - off_target);
  }
  // `gaps` = sum over k != y of z_y - z_k, read only where alpha > 0 (a logit of -inf would make 0 * inf of it)
  SPAT_HD A loss(A gaps, A alpha, A off_target) const {
    const A ce = z_y == max ? A(log1p(others)) : (max - z_y) + A(log(total));
    return alpha > 0 ? ce + off_target * gaps : ce;
  }
};

template <class A>
SPAT_HD A kl_term(A q, A log_p) {
  return q > 0 ? q * (A(log(q)) - log_p) : A(0);  // lim q log q = 0
}

// The order of logits by value, equal ones by index: argmax, and the sorted logits of DLR.
template <class A>
struct Ranked {
  A z;
  int64_t k;
};
template <class A>
SPAT_HD bool before(Ranked<A> a, Ranked<A> b) {
  return a.z > b.z || (a.z == b.z && a.k < b.k);
}

template <class A>
struct MarginRow {
  A loss;  // min(+-(z_other - z_y), kappa)
  A slope; // scale times that of the loss by z_other; 0 where kappa clips
  SPAT_HD MarginRow(A z_other, A z_y, A kappa, bool targeted, A scale) {
    const A sign = targeted ? A(-1) : A(1), margin = sign * (z_other - z_y);
    loss = margin > kappa ? kappa : margin;
    slope = margin > kappa ? A(0) : sign * scale;
  }
  SPAT_HD A grad(int64_t k, int64_t other, int64_t label) const {
    return k == other ? slope : k == label ? -slope : A(0);
  }
};

// The probability margin of one row (arXiv 2411.15210): p_m - p_y, m the likeliest class but y. Of y and m, w is the likelier and
// l the other one. e_k = e^(z_k - top) with `top` the largest logit of the classes k != w, and `sum` sums these e: all that the
// gradient consists of is positive but for signs, so nothing cancels, and no z_w is so large that it vanishes (ops/pma.py).
template <class A>
struct PmaRow {
  Ranked<A> w, l;
  A sign;  // of p_w - p_l in the loss
  A loss, at_w, at_l;
  A per_e;  // the gradient at other classes is per_e * e_k
  SPAT_HD PmaRow(Ranked<A> label, Ranked<A> other, bool targeted) {
    const bool wrong = other.z > label.z;
    w = wrong ? other : label, l = wrong ? label : other;
    sign = wrong != targeted ? A(1) : A(-1);
  }
  // Whether the softmax is defined: no NaN, no +inf, and not all -inf.
  SPAT_HD bool weigh(A top, A sum, A scale, bool normalize) {
    const A e_l = exp_nonpositive(l.z - top), beside = exp_nonpositive(top - w.z);
    const A lead = -A(expm1(l.z - w.z)), total = 1 + beside * sum;  // (p_w - p_l) / p_w and 1 / p_w
    const A divisor = e_l + sum;                                    // 0 where those logits are all -inf: no direction
    const A factor = normalize ? A(divisor > 0) : beside * divisor / (total * total);
    loss = sign * lead / total;
    at_w = sign * scale * factor;
    per_e = -at_w * lead / (divisor > 0 ? divisor : A(1));
    at_l = -at_w * (e_l * (lead + total) / (divisor > 0 ? divisor : A(1)));
    return sum - sum == 0 && w.z - w.z == 0;
  }
};

// Difference of logits ratio (arXiv 2003.01690, Eq. 6; Eq. 7 with a target). `rank` holds the four largest logits.
// L = (z_up - z_label) / D; D = z_1 - z_3, with a target z_1 - (z_3 + z_4)/2; 1e-12 keeps equal logits from dividing by 0.
template <class A>
struct DlrRow {
  A up_slope, ratio;  // dL by z_up, and -dL by z_1
  A loss;
  int64_t label, up, first, third, fourth;  // fourth = -1 in the untargeted form
  SPAT_HD DlrRow(const Ranked<A> (&rank)[4], Ranked<A> label_, Ranked<A> up_, bool targeted) : label(label_.k), up(up_.k) {
    first = rank[0].k, third = rank[2].k, fourth = targeted ? rank[3].k : -1;
    const A d = (targeted ? rank[0].z - (rank[2].z + rank[3].z) / 2 : rank[0].z - rank[2].z) + A(1e-12);
    const bool defined = d - d == 0;  // else too few classes are possible (-inf rules them out): the margin is left
    up_slope = defined ? 1 / d : A(1);
    loss = (up_.z - label_.z) / (defined ? d : A(1));
    ratio = defined && loss - loss == 0 ? loss / d : A(0);
  }
  SPAT_HD A grad(int64_t k, A scale) const {
    A g = 0;
    if (k == up) g += up_slope;
    if (k == label) g -= up_slope;
    if (k == first) g -= ratio;
    if (k == third) g += fourth < 0 ? ratio : ratio / 2;
    if (k == fourth) g += ratio / 2;
    return scale * g;
  }
};

}  // namespace spat
