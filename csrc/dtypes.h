// The dtypes that kernels read and write, and the one that they compute in: conversions, and the choice of a template by dtype.
//
// Everything is compiled without fused multiply-add (-ffp-contract=off, -fmad=false): the kernels are bound by memory, and
// each expression then rounds as it is written, the same on every backend.
#pragma once
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

// 16-bit floats are their bits; `to_acc` and `from_acc` are the only conversions.

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

}  // namespace spat
