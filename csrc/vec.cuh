// Sixteen-byte packets, warp and block reductions, and launches: what every kernel file shares.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>

#include "math.h"

namespace spat {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// N consecutive elements, moved by accesses of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Packet {
  T v[N];
};
template <int N, class T>
__device__ __forceinline__ Packet<T, N> load(const T* p) {
  return *reinterpret_cast<const Packet<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Packet<T, N>& packet) {
  if constexpr (sizeof(T) == 2 && N == 8) {  // nvcc 13.0 stores a packet that was not loaded as one in four pieces
    const auto word = [&](int i) { return packet.v[i].bits | uint32_t(packet.v[i + 1].bits) << 16; };
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word(0)), "r"(word(2)),
                 "r"(word(4)), "r"(word(6))
                 : "memory");
  } else {
    *reinterpret_cast<Packet<T, N>*>(p) = packet;
  }
}

// Elements a packet: 16 bytes of the smaller type, so that no access is narrower.
template <class... T>
constexpr int kPacket = 16 / std::min({int(sizeof(T))...});

inline bool aligned(std::initializer_list<const void*> pointers, int64_t period_bytes = 0) {
  uintptr_t bits = uintptr_t(period_bytes);
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T v, Combine combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = combine(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace spat
