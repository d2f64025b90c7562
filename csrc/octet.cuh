// Eight channels of one row, which a thread keeps in registers, and what lies between convolutions done to them: residual addition,
// scale and shift, ReLU and its bits, and the way back. For the passes by themselves and for those behind a convolution.
#pragma once
#include "vec.cuh"

namespace spat {

// Channels [channel, channel + kOctet) of one row, or those of them that exist.
struct Octet {
  int64_t first;  // offset in the images
  int64_t channel;
  int size;
  int64_t byte;  // of the mask
};

// f(j, element j of p) for the elements of an octet.
template <bool PACKETS, class T, class F>
__device__ __forceinline__ void read(const void* p, int64_t first, int size, F f) {
  const T* from = static_cast<const T*>(p) + first;
  Packet<T, kOctet> packet;
  if constexpr (PACKETS) packet = load<kOctet>(from);
#pragma unroll
  for (int j = 0; j < kOctet; ++j)
    if (PACKETS || j < size) f(j, to_acc(PACKETS ? packet.v[j] : from[j]));
}

template <bool PACKETS, class T>
__device__ __forceinline__ void write(void* p, int64_t first, int size, const acc_t<T> (&v)[kOctet]) {
  T* to = static_cast<T*>(p) + first;
  if constexpr (PACKETS) {
    Packet<T, kOctet> packet;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) packet.v[j] = from_acc<T>(v[j]);
    store(to, packet);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j)
      if (j < size) to[j] = from_acc<T>(v[j]);
  }
}

// The bits of an octet in as few registers as they need.
template <class T>
struct alignas(16) OctetBits {
  static constexpr int kCount = sizeof(T) * kOctet / sizeof(uint32_t);
  uint32_t words[kCount];

  __device__ __forceinline__ acc_t<T> operator[](int j) const {
    if constexpr (sizeof(T) == 2)
      return to_acc(T{uint16_t(words[j / 2] >> j % 2 * 16)});
    else if constexpr (sizeof(T) == 4)
      return bit_cast<float>(words[j]);
    else
      return bit_cast<double>(words[2 * j] | uint64_t(words[2 * j + 1]) << 32);
  }
};

// What a pass reads of an octet, apart from what it is done to: first everything, so that the loads are on their way at once. Without
// packets nothing is read ahead.
template <class T>
struct Reads {
  OctetBits<T> first, second;
  unsigned bits;
};

template <bool PACKETS, class T>
__device__ __forceinline__ void read_ahead(OctetBits<T>& words, const void* p, const Octet& o) {
  if constexpr (PACKETS) words = *reinterpret_cast<const OctetBits<T>*>(static_cast<const T*>(p) + o.first);
}
template <bool PACKETS, class T>
__device__ __forceinline__ acc_t<T> value(const OctetBits<T>& words, const void* p, const Octet& o, int j) {
  if constexpr (PACKETS) return words[j];
  return j < o.size ? to_acc(static_cast<const T*>(p)[o.first + j]) : acc_t<T>(0);
}

template <bool PACKETS, class T>
__device__ __forceinline__ void read_ahead(const ScaleShiftRelu& s, const Octet& o, Reads<T>& reads) {
  if (s.b) read_ahead<PACKETS>(reads.first, s.b, o);
}
template <bool PACKETS, class T>
__device__ __forceinline__ void read_ahead(const ScaleShiftReluGrad& s, const Octet& o, Reads<T>& reads) {
  reads.bits = s.mask ? s.mask[o.byte] : 0xffu;
  if (s.grad2) read_ahead<PACKETS>(reads.first, s.grad2, o);
  if (s.residual) read_ahead<PACKETS>(reads.second, s.residual, o);
}

// Forward, from the values v of `a`, 0 where there is no channel.
template <bool PACKETS, class T>
__device__ __forceinline__ void pass(const ScaleShiftRelu& s, const Octet& o, const Reads<T>& reads, acc_t<T> (&v)[kOctet]) {
  using A = acc_t<T>;
  if (s.b)
#pragma unroll
    for (int j = 0; j < kOctet; ++j) v[j] += value<PACKETS>(reads.first, s.b, o, j);
  if (s.total) write<PACKETS, T>(s.total, o.first, o.size, v);
  if (s.scale) read<PACKETS, A>(s.scale, o.channel, o.size, [&](int j, A scale) { v[j] *= scale; });
  if (s.shift) read<PACKETS, A>(s.shift, o.channel, o.size, [&](int j, A shift) { v[j] += shift; });
  if (s.relu) {
    unsigned bits = 0;  // none where there is no channel, v being 0
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const bool off = stopped(v[j]);
      bits |= unsigned(!off) << j;
      v[j] = off ? A(0) : v[j];
    }
    if (s.mask) s.mask[o.byte] = uint8_t(bits);
  }
  write<PACKETS, T>(s.out, o.first, o.size, v);
}

// Backward, from the values g of `grad`.
template <bool PACKETS, class T>
__device__ __forceinline__ void pass(const ScaleShiftReluGrad& s, const Octet& o, const Reads<T>& reads, acc_t<T> (&g)[kOctet]) {
  using A = acc_t<T>;
  if (s.grad2)
#pragma unroll
    for (int j = 0; j < kOctet; ++j) g[j] += value<PACKETS>(reads.first, s.grad2, o, j);
  if (s.scale) read<PACKETS, A>(s.scale, o.channel, o.size, [&](int j, A scale) { g[j] *= scale; });
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    const bool passes = reads.bits >> j & 1;
    g[j] = passes ? g[j] : A(0);
    if (s.residual) {
      const A rest = value<PACKETS>(reads.second, s.residual, o, j);
      g[j] = passes ? g[j] + rest : rest;
    }
  }
  write<PACKETS, T>(s.dx, o.first, o.size, g);
}

}  // namespace spat
