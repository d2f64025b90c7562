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

template <class A>
struct Power {
  A value, minus_1;
};

// 2^y and 2^y - 1 for y in [-127.4, 0]: at most 2e-7 off, relatively, and 0 from -126.5 on. 2^n (1 + f p(f)) with p fitted on
// |f| <= 1/2; the constant rounds to the integer n, and leaves n + 127 in the low bits.
SPAT_HD Power<float> power_of_2(float y) {
  const float magic = 12582912.f + 127.f, shifted = y + magic, f = y - (shifted - magic);
  const float high = 0.00961823761f + f * (0.00133907353f + f * 0.000154034948f);
  const float p = f * (0.693147182f + f * (0.240226492f + f * (0.0555035733f + f * high)));
  const float scale = bit_cast<float>(bit_cast<uint32_t>(shifted) << 23), rest = scale * p;
  return {scale + rest, (scale - 1.f) + rest};
}
SPAT_HD Power<double> power_of_2(double y) { return {exp2(y), expm1(y * 0.6931471805599453)}; }

// |v| for functions that are constant or linear from `most` on, where a power of 2 is 0. There inf * 0 would be NaN. NaN stays.
template <class A>
SPAT_HD A size_of(A v, float most, double most_in_fp64) {
  const A size = std::fabs(v), end = sizeof(A) == 8 ? A(most_in_fp64) : A(most);
  return size > end ? end : size;
}

// e^-|v|
template <class A>
SPAT_HD A decayed(A v) {
  return power_of_2(size_of(v, 88.1f, 800.) * A(-1.4426950408889634)).value;
}

// Phi(-x), the normal distribution, for x in [0, 13.3], with e = e^(-x^2/2): that times a quotient of polynomials. All coefficients
// are positive, so nothing cancels: at most 4e-7 off, relatively, apart from the error of e.
SPAT_HD float normal_tail(float x, float e) {
  const float top = 49.6175079f + x * (43.2354584f + x * (17.9920673f + x * (3.96785927f + x * 0.398947954f)));
  return e * (top / (99.2350159f + x * (165.649033f + x * (118.535027f + x * (46.0830231f + x * (9.94668102f + x))))));
}
SPAT_HD double normal_tail(double x, double) { return 0.5 * erfc(x * 0.7071067811865476); }

struct Gelu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A x = size_of(v, 13.28f, 40.), e = power_of_2(x * x * A(-0.7213475204444817)).value, tail = normal_tail(x, e);
    const A cdf = v < 0 ? tail : 1 - tail;
    return {v * cdf, cdf + std::copysign(x, v) * (e * A(0.3989422804014327))};
  }
};

// v s and its derivative for the sigmoid s of a function w of v, by q = e^-|w|. x = |v|, and w_slope is the derivative of w.
template <class A>
SPAT_HD Activated<A> gated(A v, A x, A q, A w_slope) {
  const A share = 1 / (1 + q), small = q * share, s = v < 0 ? small : share;
  return {v * s, s + std::copysign(x, v) * w_slope * (small * share)};
}

// v/2 (1 + tanh u) = v sigmoid(2u), u = sqrt(2/pi) (v + 0.044715 v^3).
struct GeluTanh {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A x = size_of(v, 10.04f, 25.), square = x * x;
    const A q = power_of_2(x * (A(-2.302208198144325) + square * A(-0.1029432395800235))).value;
    return gated(v, x, q, A(1.5957691216057308) + square * A(0.21406444881780074));
  }
};

struct Silu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    return gated(v, size_of(v, 88.1f, 800.), decayed(v), A(1));
  }
};

struct Sigmoid {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A q = decayed(v), share = 1 / (1 + q), small = q * share;
    return {v < 0 ? small : share, small * share};
  }
};

struct HardSwish {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A inside = v * A(1. / 3) + A(0.5);
    return {v * (clamp(v + 3, A(0), A(6)) * A(1. / 6)), v <= -3 ? A(0) : v >= 3 ? A(1) : inside};
  }
};

struct HardSigmoid {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    return {clamp(v + 3, A(0), A(6)) * A(1. / 6), (v > -3) & (v < 3) ? A(1. / 6) : A(0)};
  }
};

struct Relu6 {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    return {clamp(v, A(0), A(6)), (v > 0) & (v < 6) ? A(1) : A(0)};
  }
};

struct LeakyRelu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A negative) const {
    return {v > 0 ? v : v * negative, v > 0 ? A(1) : negative};
  }
};

// (1 - q) / (1 + q) with q = e^(-2|v|).
struct Tanh {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const Power<A> q = power_of_2(size_of(v, 44.05f, 400.) * A(-2.8853900817779268));
    const A share = 1 / (1 + q.value);
    return {std::copysign(-q.minus_1 * share, v), 4 * q.value * share * share};
  }
};

// v tanh(softplus(v)) = v n / (n + d), in powers of q = e^-|v|.
struct Mish {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A q = decayed(v), n = v < 0 ? q * (q + 2) : 1 + 2 * q, d = v < 0 ? A(2) : 2 * q * q;
    const A share = 1 / (n + d), t = n * share, rest = 4 * (v < 0 ? q : q * q) * (1 + q) * share * share;
    return {v * t, t + std::copysign(size_of(v, 88.1f, 800.), v) * rest};
  }
};

struct Elu {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const Power<A> e = power_of_2(size_of(v < 0 ? v : A(0), 88.1f, 800.) * A(-1.4426950408889634));
    return {v < 0 ? e.minus_1 : v, e.value};
  }
};

// Above 20 it is v, as torch has it.
struct Softplus {
  template <class A>
  SPAT_HD Activated<A> operator()(A v, A) const {
    const A q = decayed(v), s = (v < 0 ? q : A(1)) / (1 + q);
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
