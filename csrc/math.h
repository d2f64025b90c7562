// The arithmetic on images that CPU and GPU share, so that the CPU tests exercise the lines that the GPU runs: attack steps and
// their random numbers, what lies between convolutions, and training images. losses.h has that on logits.
#pragma once
#include <cmath>

#include "dtypes.h"

namespace spat {

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
  const A least = x - eps, most = x + eps, inside = clamp(x_adv + step_size * sign(grad), least, most);
  return clamp((least <= most) | (least > most) ? inside : A(NAN), lo, hi);  // NaN bounds, which clamp ignores, give NaN
}

// A sample's hash is the sum of `hashed` over its elements, modulo 2^64: in any order, so that every backend finds the same.
SPAT_HD uint64_t bits_of(float v) { return bit_cast<uint32_t>(v); }
SPAT_HD uint64_t bits_of(double v) { return bit_cast<uint64_t>(v); }
SPAT_HD uint64_t bits_of(half v) { return v.bits; }
SPAT_HD uint64_t bits_of(bfloat16 v) { return v.bits; }

// The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of an element's bits and its place in the sample.
template <class T>
SPAT_HD uint64_t hashed(T v, int64_t place) {
  uint64_t z = bits_of(v) + uint64_t(place + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
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

// ---- restarts --------------------------------------------------------------------------------------------------------------

// A success outranks a failure, then the larger loss wins; NaN never does.
template <class A>
SPAT_HD bool takes_over(A loss, bool success, A best_loss, bool best_success) {
  return success == best_success ? loss > best_loss : success;
}

}  // namespace spat
