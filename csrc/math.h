// The arithmetic that CPU and GPU share, so that the CPU tests exercise the lines that the GPU runs.
//
// Everything is compiled without fused multiply-add (-ffp-contract=off, -fmad=false): the kernels are bound by memory, and
// each expression then rounds as it is written, the same on every backend.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "spat.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SPAT_HD __host__ __device__ __forceinline__
#else
#define SPAT_HD inline __attribute__((always_inline))
#endif
#define SPAT_HOST inline __attribute__((always_inline))
// For lambdas: what is not inlined into a clone of a function (cpu.h) keeps the baseline instruction set.
#define SPAT_INLINE __attribute__((always_inline))

namespace spat {

template <class To, class From>
SPAT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- storage types: 16-bit floats are their bits; `to_acc` and `from_acc` are the only conversions -------------------------

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <class T>
using acc_t = typename Acc<T>::type;

SPAT_HD float to_acc(float v) { return v; }
SPAT_HD double to_acc(double v) { return v; }
SPAT_HD float to_acc(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
SPAT_HD float to_acc(half v) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_cast<__half>(v.bits));
#else
  const uint32_t magnitude = v.bits & 0x7fff, sign = uint32_t(v.bits & 0x8000) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // the exponent's bias goes from 15 to 127
  const uint32_t denormal = bit_cast<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return bit_cast<float>(sign | (magnitude >= 0x7c00 ? special : magnitude >= 0x0400 ? normal : denormal));
#endif
}

template <class T>
SPAT_HD T from_acc(acc_t<T> v) {
  return v;
}
template <>
SPAT_HD bfloat16 from_acc<bfloat16>(float v) {
#ifdef __CUDA_ARCH__
  return {bit_cast<uint16_t>(__float2bfloat16_rn(v))};
#else
  const uint32_t u = bit_cast<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}
template <>
SPAT_HD half from_acc<half>(float v) {
#ifdef __CUDA_ARCH__
  return {bit_cast<uint16_t>(__float2half_rn(v))};
#else
  const uint32_t u = bit_cast<uint32_t>(v), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t rebiased = magnitude - (112u << 23);
  const uint32_t normal = (rebiased + 0x0fffu + ((rebiased >> 13) & 1u)) >> 13;
  // 0.5f has an ulp of 2^-24, the unit of half's denormals: the addition rounds to it
  const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t finite = magnitude >= 0x38800000u ? normal : denormal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite))};
#endif
}

template <class F>
SPAT_HOST void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f16: return f(half{});
    case DType::bf16: return f(bfloat16{});
    case DType::f64: return f(double{});
  }
}

// Image and gradient dtype. fp64 goes with fp64 alone (bindings.cpp checks it).
template <class F>
SPAT_HOST void visit(DType image, DType grad, F&& f) {
  if (image == DType::f64) return f(double{}, double{});
  visit(image, [&](auto t) SPAT_INLINE {
    visit(grad, [&](auto g) SPAT_INLINE {
      if constexpr (sizeof(t) < 8 && sizeof(g) < 8) f(t, g);
    });
  });
}

// ---- L-infinity: steps and random numbers --------------------------------------------------------------------------------

template <class A>
SPAT_HD A at(PerSample values, int64_t sample) {
  return static_cast<const A*>(values.data)[values.varies ? sample : 0];
}

// i / n without an integer division, which is a call with a stack on GPUs: the fp64 product is off by one at most.
SPAT_HD int64_t quotient(int64_t i, int64_t n, double inverse) {
  const int64_t guess = int64_t(double(i) * inverse), first = guess * n;
  return guess - (first > i) + (first + n <= i);
}
SPAT_HD int64_t sample_of(const Images& images, int64_t i) { return quotient(i, images.sample_numel, images.samples_per_element); }

template <class A>
SPAT_HD A clamp(A v, A lo, A hi) {
  v = lo > v ? lo : v;
  return hi < v ? hi : v;
}

template <class A>
SPAT_HD A sign(A g) {
  return A(g > 0) - A(g < 0);  // 0 for ±0 and NaN
}

template <class A>
SPAT_HD A linf_step(A x_adv, A x, A grad, A eps, A step_size, A lo, A hi) {
  return clamp(clamp(x_adv + step_size * sign(grad), x - eps, x + eps), lo, hi);
}

// Philox4x32-10 (Salmon et al., SC 2011): four random words for (key, counter, index).
struct Words {
  uint32_t w[4];
};
SPAT_HD Words philox(uint64_t key, uint64_t counter, uint64_t index) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = uint32_t(counter), c3 = uint32_t(counter >> 32);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The odd multiples of 2^-24 in (-1, 1): symmetric, and exact in fp32.
SPAT_HD float symmetric_unit(uint32_t word) { return float(int32_t(word >> 8) * 2 + 1 - (1 << 24)) * 0x1p-24f; }

template <class A>
SPAT_HD A linf_random_start(A x, float unit, A eps, A lo, A hi) {
  return clamp(x + eps * A(unit), lo, hi);
}

// ---- L2 ------------------------------------------------------------------------------------------------------------------

// What one pass over a sample gathers, in fp64: squares of fp32 gradients as small as 1e-40 neither vanish nor overflow.
template <class D>  // double, or a vector of doubles
struct L2Sums {
  D gg = {}, gd = {}, dd = {};  // <g, g>, <g, d>, <d, d> with d = x_adv - x
  SPAT_HD void push(D g, D d) { gg += g * g, gd += g * d, dd += d * d; }
};

// The normalised step v = x_adv + along * g, then the projection x + shrink * (v - x) onto the ball. Written so that inside the
// ball, where shrink is 1, a zero gradient leaves x_adv as it is to the bit.
struct L2Move {
  double along, shrink;
  SPAT_HD L2Move(const L2Sums<double>& s, double eps, double step_size) {
    along = s.gg > 0 ? step_size / sqrt(s.gg) : 0.;
    const double square = s.dd + 2 * along * s.gd + along * along * s.gg;
    const double norm = sqrt(square > 0 ? square : 0.);
    shrink = norm > eps ? eps / norm : 1.;
  }
  template <class D>
  SPAT_HD D apply(D x, D x_adv, D g) const {
    return shrink * (x_adv + along * g) + (1 - shrink) * x;
  }
};

template <class A>
SPAT_HD bool finite(A v) {
  return v - v == 0;
}

// ---- rows of logits ------------------------------------------------------------------------------------------------------

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

// ---- between convolutions --------------------------------------------------------------------------------------------------

constexpr int kOctet = 8;  // channels that share a byte of a mask

// What a ReLU stops: ±0 and less, so not NaN, as torch.relu. For A, or a vector of A.
template <class V>
SPAT_HD auto stopped(V v) {
  return v <= V{};
}

// What rounding v to `hi` left; 0 where `hi` is not finite.
SPAT_HD float left_over(float v, float hi) { return hi - hi == 0 ? v - hi : 0.f; }

// Sums of many terms are sums of sums of this many: less rounding.
constexpr int kTerms = 16;

// |v|, and the larger of two, NaN if either is. For A, or a vector of A.
template <class V>
SPAT_HD V magnitude(V v) {
  return v < V{} ? -v : v;
}
template <class V>
SPAT_HD V larger_or_nan(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

template <class A>
SPAT_HD A smallest_normal();
template <>
SPAT_HD float smallest_normal() {
  return 0x1p-126f;
}
template <>
SPAT_HD double smallest_normal() {
  return 0x1p-1022;
}

// What the pooled features' gradient is divided by on its way to the pixels. `scaled`: by its largest magnitude, and `factor` is
// what that left out, the pixels' share too.
template <class A>
struct PooledDivisor {
  A divisor, factor;
  SPAT_HD PooledDivisor(A largest, A pixels, bool scaled) {
    const A usable = largest < smallest_normal<A>() ? smallest_normal<A>() : largest;  // NaN stays
    divisor = scaled ? usable : pixels;
    factor = usable / pixels;
  }
};

// ---- training images -------------------------------------------------------------------------------------------------------

// u / 255, rounded once, without a division: 1 / 255 is 2^-8 + 2^-16 + ..., and u times its first digits is exact.
template <class A>
SPAT_HD A over_255(uint8_t u);
template <>
SPAT_HD float over_255(uint8_t u) {
  return float(u) * 0x1.0101p-8f + float(u) * 0x1.010102p-32f;
}
template <>
SPAT_HD double over_255(uint8_t u) {
  return double(u) * 0x1.0101010101p-8 + double(u) * 0x1.010101010101p-56;
}

// Pixel (h, w) of the crop is (h + y, w + x) of the image, which is 0 outside; `flip` then mirrors the crop.
struct Crop {
  int32_t y, x;
  bool flip;
};
SPAT_HD Crop crop_of(const CropFlip& s, int64_t sample) {
  if (s.pad == 0 && !s.flip) return {0, 0, false};
  const Words r = philox(uint64_t(s.seed[0]), uint64_t(s.seed[1]), uint64_t(s.ids[sample]));
  const uint64_t places = 2 * uint64_t(s.pad) + 1;
  return {int32_t(r.w[0] * places >> 32) - s.pad, int32_t(r.w[1] * places >> 32) - s.pad, s.flip && r.w[2] >> 31};
}

// ---- rows of logits: the other losses ----------------------------------------------------------------------------------------

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
  A slope; // of the loss by z_other; 0 where kappa clips
  SPAT_HD MarginRow(A z_other, A z_y, A kappa, bool targeted) {
    const A sign = targeted ? A(-1) : A(1), margin = sign * (z_other - z_y);
    loss = margin > kappa ? kappa : margin;
    slope = margin > kappa ? A(0) : sign;
  }
  SPAT_HD A grad(int64_t k, int64_t other, int64_t label, A scale) const {
    return k == other ? scale * slope : k == label ? -scale * slope : A(0);
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

// Restarts: a success outranks a failure, then the larger loss wins; NaN never does.
template <class A>
SPAT_HD bool takes_over(A loss, bool success, A best_loss, bool best_success) {
  return success == best_success ? loss > best_loss : success;
}

}  // namespace spat
