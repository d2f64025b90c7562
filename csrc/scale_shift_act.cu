// Between convolutions: residual addition, scale and shift, an activation and its derivative, and the way back. A packet of 16 bytes a
// thread. Arithmetic is exact, so forward an activation costs about 70 instructions an element; backward device memory is the limit.
#include "activations.h"
#include "vec.cuh"

namespace spat {
namespace {

template <class T, int N>
__device__ __forceinline__ void read(const void* p, int64_t first, acc_t<T> (&v)[N]) {
  const Packet<T, N> packet = load<N>(static_cast<const T*>(p) + first);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = to_acc(packet.v[j]);
}
template <class T, int N>
__device__ __forceinline__ void write(void* p, int64_t first, const acc_t<T> (&v)[N]) {
  Packet<T, N> packet;
#pragma unroll
  for (int j = 0; j < N; ++j) packet.v[j] = from_acc<T>(v[j]);
  store(static_cast<T*>(p) + first, packet);
}

// The first of the N elements that this thread does: all in one row.
template <int N>
__device__ __forceinline__ int64_t first_element() {
  return (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) scale_shift_act_kernel(const ScaleShiftAct s) {
  using A = acc_t<T>;
  const int64_t i = first_element<N>(), channels = s.shape.channels;
  if (i >= s.shape.rows * channels) return;
  const int64_t channel = i - quotient(i, channels, s.rows_per_element) * channels;
  A v[N], b[N], scale[N], shift[N], negative[N] = {}, slope[N];
  read<T>(s.a, i, v);
  if (s.b) read<T>(s.b, i, b);
  if (s.scale) read<A>(s.scale, channel, scale);
  if (s.shift) read<A>(s.shift, channel, shift);
  if (s.negative_varies) read<A>(s.negative, channel, negative);
  const A one = s.negative && !s.negative_varies ? *static_cast<const A*>(s.negative) : A(0);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (s.b) v[j] += b[j];
    if (!s.negative_varies) negative[j] = one;
  }
  if (s.total) write<T>(s.total, i, v);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (s.scale) v[j] *= scale[j];
    if (s.shift) v[j] += shift[j];
  }
  visit(s.act, [&](auto act) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Activated<A> y = act(v[j], negative[j]);
      v[j] = y.value, slope[j] = y.slope;
    }
  });
  write<T>(s.out, i, v);
  if (!s.slope) return;
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (s.scale) slope[j] *= scale[j];
  write<T>(s.slope, i, slope);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) scale_shift_act_grad_kernel(const ScaleShiftActGrad s) {
  using A = acc_t<T>;
  const int64_t i = first_element<N>();
  if (i >= s.shape.rows * s.shape.channels) return;
  A g[N], g2[N], slope[N], rest[N];
  read<T>(s.grad, i, g);
  read<T>(s.slope, i, slope);
  if (s.grad2) read<T>(s.grad2, i, g2);
  if (s.residual) read<T>(s.residual, i, rest);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (s.grad2) g[j] += g2[j];
    g[j] *= slope[j];
    if (s.residual) g[j] += rest[j];
  }
  write<T>(s.dx, i, g);
}

}  // namespace

#define SPAT_LAUNCH_ACT(Args, name, ...)                                                                   \
  int launch_##name(const Args& args, void* stream) {                                                      \
    const Channels& shape = args.shape;                                                                    \
    visit(shape.dtype, [&](auto t) {                                                                       \
      using T = decltype(t);                                                                               \
      constexpr int N = kPacket<T>;                                                                        \
      const bool packets = shape.channels % N == 0 && aligned({__VA_ARGS__});                              \
      const auto kernel = packets ? name##_kernel<T, N> : name##_kernel<T, 1>;                             \
      const int64_t threads = shape.rows * shape.channels / (packets ? N : 1);                             \
      kernel<<<ceil_div(threads, kThreads), kThreads, 0, cudaStream_t(stream)>>>(args);                    \
    });                                                                                                    \
    return cudaGetLastError();                                                                             \
  }

SPAT_LAUNCH_ACT(ScaleShiftAct, scale_shift_act, args.a, args.b, args.scale, args.shift,
                args.negative_varies ? args.negative : nullptr, args.total, args.out, args.slope)
SPAT_LAUNCH_ACT(ScaleShiftActGrad, scale_shift_act_grad, args.grad, args.grad2, args.slope, args.residual, args.dx)

}  // namespace spat
