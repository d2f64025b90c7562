// What the CPU kernels (the .cpp files) share: explicit vectors, for loops that the compiler does not vectorise by itself. Each
// kernel is compiled once for each level of the x86-64 instruction set (the loader picks, so one wheel serves every machine);
// threads come from the caller, as [begin, end).
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "math.h"

#ifdef SPAT_CLONES  // -DSPAT_CLONES= leaves the clones out
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPAT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPAT_CLONES
#endif

namespace spat {
namespace {

constexpr int kLanes = 16;  // one AVX-512 register of fp32; on smaller machines the compiler splits it

// A vector of kLanes A: arithmetic, comparisons and ?: go lane by lane.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <class A>
using Lanes = typename LanesOf<A>::type;

// All lanes by `op`, in four halvings.
template <class A, class Op>
SPAT_HD A reduce(Lanes<A> v, Op op) {
  v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}
template <class A>
SPAT_HD A sum(Lanes<A> v) {
  return reduce<A>(v, [](Lanes<A> a, Lanes<A> b) SPAT_INLINE { return a + b; });
}

// Elements [first, first + kLanes) of p, `padding` from n on. By memcpy, since vectors filled lane by lane go through scalars.
template <class T>
SPAT_HD Lanes<acc_t<T>> load_lanes(const T* p, int64_t n, int64_t first, acc_t<T> padding) {
  using A = acc_t<T>;
  A chunk[kLanes];
  if (std::is_same_v<T, A> && first + kLanes <= n) {
    memcpy(chunk, p + first, sizeof(chunk));
  } else if (first + kLanes <= n) {
    for (int lane = 0; lane < kLanes; ++lane) chunk[lane] = to_acc(p[first + lane]);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) chunk[lane] = first + lane < n ? to_acc(p[first + lane]) : padding;
  }
  Lanes<A> v;
  memcpy(&v, chunk, sizeof(v));
  return v;
}

template <class T>
SPAT_HD void store_lanes(T* p, int64_t n, int64_t first, Lanes<acc_t<T>> v) {
  acc_t<T> chunk[kLanes];
  memcpy(chunk, &v, sizeof(v));
  if (std::is_same_v<T, acc_t<T>> && first + kLanes <= n) {
    memcpy(p + first, chunk, sizeof(chunk));
  } else if (first + kLanes <= n) {
    for (int lane = 0; lane < kLanes; ++lane) p[first + lane] = from_acc<T>(chunk[lane]);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)  // a variable bound would make it a call of memcpy
      if (first + lane < n) p[first + lane] = from_acc<T>(chunk[lane]);
  }
}

// Ops on images with channels innermost run through blocks of this many elements, pass after pass over arrays in L1 that the
// compiler vectorises for every instruction set (explicit vectors of 16 bits it does not: GCC 12). Twice and half the size are
// slower.
constexpr int kBlock = 256;

// scale or shift for elements that run on from row to row, so that a block may begin at any channel; `absent` changes nothing.
template <class A>
std::vector<A> cyclic(const void* values, int64_t channels, int64_t size, A absent) {
  std::vector<A> table(size, absent);
  if (values)
    for (int64_t i = 0; i < size; i += channels)
      std::copy_n(static_cast<const A*>(values), std::min(channels, size - i), table.begin() + i);
  return table;
}

// Null stays null.
template <class T, class V>
SPAT_HD T* from(V* p, int64_t first) {
  return p ? static_cast<T*>(p) + first : nullptr;
}

// One byte a channel, 0 where the bit is, in both directions. Octets are multiplied as a whole: no two bits meet.
constexpr uint64_t kOnes = 0x0101010101010101u, kDiagonal = 0x8040201008040201u;

SPAT_HD void pack_bits(uint8_t* mask, const uint8_t (&on)[kBlock], int n) {
  for (int j = 0; j < n; j += kOctet) {
    uint64_t octet;
    memcpy(&octet, on + j, sizeof(octet));
    mask[j / kOctet] = uint8_t(octet * kOnes >> 56);
  }
}
SPAT_HD void unpack_bits(uint8_t (&on)[kBlock], const uint8_t* mask, int n) {
  for (int j = 0; j < n; j += kOctet) {
    const uint64_t octet = mask[j / kOctet] * kOnes & kDiagonal;
    memcpy(on + j, &octet, sizeof(octet));
  }
}

// f(sample, first, last) for the stretch of elements that each sample has in [begin, end)
template <class F>
SPAT_HD void for_each_sample(const Images& images, int64_t begin, int64_t end, F&& f) {
  while (begin < end) {
    const int64_t sample = sample_of(images, begin), last = std::min(end, (sample + 1) * images.sample_numel);
    f(sample, begin, last);
    begin = last;
  }
}

SPAT_HD void flag(uint8_t* seen, int64_t sample) {
  if (seen) __atomic_store_n(seen + sample, uint8_t(1), __ATOMIC_RELAXED);  // other threads may set it too
}

SPAT_HD void add(uint64_t* sums, int64_t sample, uint64_t value) {
  __atomic_fetch_add(sums + sample, value, __ATOMIC_RELAXED);  // other threads may do the rest of the sample
}

}  // namespace
}  // namespace spat
