// Between convolutions: residual addition, scale and shift, ReLU and its bits, and the way back. A thread does the eight channels
// of one mask byte and keeps them in registers, so device memory is the limit: each image once, scale and shift from L1.
#include "vec.cuh"

namespace spat {
namespace {

// Channels [channel, channel + kOctet) of one row, or those of them that exist.
struct Octet {
  int64_t first;  // offset in the images
  int64_t channel;
  int size;
};

template <bool PACKETS>
__device__ __forceinline__ Octet octet_of(const Channels& shape, int64_t i) {
  const int64_t row = quotient(i, shape.octets, shape.rows_per_octet), channel = (i - row * shape.octets) * kOctet;
  const int64_t left = shape.channels - channel;
  return {row * shape.channels + channel, channel, PACKETS || left > kOctet ? kOctet : int(left)};
}

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

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) scale_shift_relu_kernel(const ScaleShiftRelu s) {
  using A = acc_t<T>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.shape.rows * s.shape.octets) return;
  const Octet o = octet_of<PACKETS>(s.shape, i);
  A v[kOctet] = {};
  read<PACKETS, T>(s.a, o.first, o.size, [&](int j, A a) { v[j] = a; });
  if (s.b) read<PACKETS, T>(s.b, o.first, o.size, [&](int j, A b) { v[j] += b; });
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
    if (s.mask) s.mask[i] = uint8_t(bits);
  }
  write<PACKETS, T>(s.out, o.first, o.size, v);
}

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) scale_shift_relu_grad_kernel(const ScaleShiftReluGrad s) {
  using A = acc_t<T>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.shape.rows * s.shape.octets) return;
  const Octet o = octet_of<PACKETS>(s.shape, i);
  const unsigned bits = s.mask ? s.mask[i] : 0xffu;
  A g[kOctet] = {};
  read<PACKETS, T>(s.grad, o.first, o.size, [&](int j, A grad) { g[j] = grad; });
  if (s.grad2) read<PACKETS, T>(s.grad2, o.first, o.size, [&](int j, A grad2) { g[j] += grad2; });
  if (s.scale) read<PACKETS, A>(s.scale, o.channel, o.size, [&](int j, A scale) { g[j] *= scale; });
#pragma unroll
  for (int j = 0; j < kOctet; ++j) g[j] = bits >> j & 1 ? g[j] : A(0);
  if (s.residual)
    read<PACKETS, T>(s.residual, o.first, o.size, [&](int j, A rest) { g[j] = bits >> j & 1 ? g[j] + rest : rest; });
  write<PACKETS, T>(s.dx, o.first, o.size, g);
}

}  // namespace

#define SPAT_LAUNCH_CHANNELS(Args, name, ...)                                                            \
  int launch_##name(const Args& args, void* stream) {                                                    \
    const Channels& shape = args.shape;                                                                  \
    const bool packets = shape.channels % kOctet == 0 && aligned({__VA_ARGS__});                         \
    visit(shape.dtype, [&](auto t) {                                                                     \
      using T = decltype(t);                                                                             \
      const auto kernel = packets ? name##_kernel<T, true> : name##_kernel<T, false>;                    \
      kernel<<<ceil_div(shape.rows * shape.octets, kThreads), kThreads, 0, cudaStream_t(stream)>>>(args); \
    });                                                                                                  \
    return cudaGetLastError();                                                                           \
  }

SPAT_LAUNCH_CHANNELS(ScaleShiftRelu, scale_shift_relu, args.a, args.b, args.scale, args.shift, args.total, args.out)
SPAT_LAUNCH_CHANNELS(ScaleShiftReluGrad, scale_shift_relu_grad, args.grad, args.grad2, args.scale, args.residual, args.dx)

}  // namespace spat
