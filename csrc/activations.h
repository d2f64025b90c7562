// Activation functions and their derivatives (ops/scale_shift_act.py), shared by CPU and GPU. Plain arithmetic in fp32, so that all
// backends find the same bits and compilers vectorise it. At +-inf derivatives are their limits.
#pragma once
#include "losses.h"
#include "math.h"

namespace spat {

template <class A>
struct Activated {
  A value, slope;
};

// Where exponentials are 0 a factor of v need not grow: inf * 0 would be NaN. NaN stays.
template <class A>
SPAT_HD A capped(A v, A most) {
  return clamp(v, -most, most);
}

// e^v - 1 for v <= 0, with e = e^v.
SPAT_HD float expm1_nonpositive(float v, float e) { return v > -0.34f ? v * (1.f + v * exp_rest(v)) : e - 1.f; }
SPAT_HD double expm1_nonpositive(double v, double) { return expm1(v); }

// Phi(-x), the normal distribution, for x in [0, 15], with e = e^(-x^2/2): that times a quotient of polynomials, fitted to 7e-9. All
// coefficients are positive, so nothing cancels: at most 4e-7 off, relatively, apart from the error of e.
SPAT_HD float normal_tail(float x, float e) {
  const float top = 0.5f + x * (0.439284386f + x * (0.183969845f + x * (0.0408813655f + x * 0.00415326482f)));
  const float high = 0.471410563f + x * (0.102480503f + x * 0.0104105794f);
  return e * (top / (1.f + x * (1.67645378f + x * (1.20555122f + x * high))));
}
SPAT_HD double normal_tail(double x, double) { return 0.5 * erfc(x * 0.7071067811865476); }

// 1 / (1 + e^-v) by q = e^-|v|, and its derivative.
template <class A>
SPAT_HD Activated<A> sigmoid(A v) {
  const A q = exp_nonpositive(-magnitude(v)), share = 1 / (1 + q);
  return {v < 0 ? q * share : share, q * share * share};
}

struct Gelu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A c = capped(v, A(15)), e = exp_nonpositive(c * c * A(-0.5)), tail = normal_tail(magnitude(c), e);
    const A cdf = v < 0 ? tail : 1 - tail;
    return {v * cdf, cdf + c * e * A(0.3989422804014327)};
  }
};

// v/2 (1 + tanh u) = v sigmoid(2u), u = sqrt(2/pi) (v + 0.044715 v^3).
struct GeluTanh {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A c = capped(v, A(15)), square = c * c;
    const Activated<A> s = sigmoid(c * (A(1.5957691216057308) + square * A(0.07135481627260025)));
    return {v * s.value, s.value + c * (A(1.5957691216057308) + square * A(0.21406444881780074)) * s.slope};
  }
};

struct Silu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const Activated<A> s = sigmoid(v);
    return {v * s.value, s.value + capped(v, A(1000)) * s.slope};
  }
};

struct Sigmoid {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    return sigmoid(v);
  }
};

struct HardSwish {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    return {v * (clamp(v + 3, A(0), A(6)) / 6), v <= -3 ? A(0) : v >= 3 ? A(1) : v / 3 + A(0.5)};
  }
};

struct HardSigmoid {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    return {clamp(v + 3, A(0), A(6)) / 6, (v > -3) & (v < 3) ? A(1. / 6) : A(0)};
  }
};

struct Relu6 {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    return {clamp(v, A(0), A(6)), A((v > 0) & (v < 6))};
  }
};

struct LeakyRelu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A negative) const {
    return {v > 0 ? v : v * negative, v > 0 ? A(1) : negative};
  }
};

// By q = e^(-2|v|). Near 0, 1 - q is expm1, so that nothing cancels.
struct Tanh {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A x = -2 * magnitude(v), q = exp_nonpositive(x), share = 1 / (1 + q), size = -expm1_nonpositive(x, q) * share;
    return {v < 0 ? -size : v > 0 ? size : v, 4 * q * share * share};
  }
};

// v tanh(softplus(v)) = v n / (n + d), in powers of q = e^-|v|.
struct Mish {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A q = exp_nonpositive(-magnitude(v)), n = v < 0 ? q * (q + 2) : 1 + 2 * q, d = v < 0 ? A(2) : 2 * q * q;
    const A share = 1 / (n + d), t = n * share;
    return {v * t, t + capped(v, A(1000)) * (4 * (v < 0 ? q : q * q) * (1 + q) * share * share)};
  }
};

struct Elu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A below = v > 0 ? A(0) : v, e = exp_nonpositive(below);
    return {v > 0 ? v : expm1_nonpositive(below, e), e};
  }
};

// Above 20 it is v, as torch has it.
struct Softplus {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A q = exp_nonpositive(-magnitude(v)), s = (v < 0 ? q : A(1)) / (1 + q);
    return {v > 20 ? v : (v > 0 ? v : A(0)) + log1p_unit(q), v > 20 ? A(1) : s};
  }
};

template <class F>
SPAT_HD void visit(Activation act, F&& f) {
  switch (act) {
    case Activation::gelu: return f(Gelu{});
    case Activation::gelu_tanh: return f(GeluTanh{});
    case Activation::silu: return f(Silu{});
    case Activation::sigmoid: return f(Sigmoid{});
    case Activation::hardswish: return f(HardSwish{});
    case Activation::hardsigmoid: return f(HardSigmoid{});
    case Activation::relu6: return f(Relu6{});
    case Activation::leaky_relu: return f(LeakyRelu{});
    case Activation::tanh: return f(Tanh{});
    case Activation::mish: return f(Mish{});
    case Activation::elu: return f(Elu{});
    case Activation::softplus: return f(Softplus{});
  }
}

}  // namespace spat
