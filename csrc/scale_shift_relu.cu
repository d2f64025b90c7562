// Between convolutions: residual addition, scale and shift, ReLU and its bits, and the way back (octet.cuh). A thread does the eight
// channels of one mask byte, so device memory is the limit: each image once, scale and shift from L1.
#include "octet.cuh"

namespace spat {
namespace {

template <bool PACKETS>
__device__ __forceinline__ Octet octet_of(const Channels& shape, int64_t i) {
  const int64_t row = quotient(i, shape.octets, shape.rows_per_octet), channel = (i - row * shape.octets) * kOctet;
  const int64_t left = shape.channels - channel;
  return {row * shape.channels + channel, channel, PACKETS || left > kOctet ? kOctet : int(left), i};
}

template <bool PACKETS, class T, class Args>
__device__ __forceinline__ void do_octet(const Args& args, const void* first) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.shape.rows * args.shape.octets) return;
  const Octet o = octet_of<PACKETS>(args.shape, i);
  Reads<T> reads;
  read_ahead<PACKETS>(args, o, reads);
  acc_t<T> v[kOctet] = {};
  read<PACKETS, T>(first, o.first, o.size, [&](int j, acc_t<T> value) { v[j] = value; });
  pass<PACKETS, T>(args, o, reads, v);
}

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) scale_shift_relu_kernel(const ScaleShiftRelu s) {
  do_octet<PACKETS, T>(s, s.a);
}

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) scale_shift_relu_grad_kernel(const ScaleShiftReluGrad s) {
  do_octet<PACKETS, T>(s, s.grad);
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
