// An image for a half-precision network: what rounding keeps, what it drops, zeros. A thread writes eight channels of one pixel,
// which for three colours padded to eight is the pixel, in one store; the 12 bytes that it reads are its neighbours' next ones.
#include "vec.cuh"

namespace spat {
namespace {

constexpr int kOctet = 8;

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) split_image_kernel(const SplitImage s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.shape.rows * s.shape.octets) return;
  const int64_t row = quotient(i, s.shape.octets, s.shape.rows_per_octet), first = (i - row * s.shape.octets) * kOctet;
  const float* x = s.x + row * s.x_channels;
  T* out = static_cast<T*>(s.out) + row * s.shape.channels + first;
  Packet<T, kOctet> packet;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    const int64_t k = first + j, c = k < s.x_channels ? k : k - s.x_channels;
    float v = 0;
    if (c < s.x_channels) {
      v = x[c];
      if (s.scale) v *= s.scale[c];
      if (s.shift) v += s.shift[c];
    }
    const T hi = from_acc<T>(v);
    packet.v[j] = k < s.x_channels ? hi : from_acc<T>(left_over(v, to_acc(hi)));
    if (!PACKETS && k < s.shape.channels) out[j] = packet.v[j];
  }
  if constexpr (PACKETS) store(out, packet);
}

}  // namespace

int launch_split_image(const SplitImage& args, void* stream) {
  const Channels& shape = args.shape;
  const bool packets = shape.channels % kOctet == 0 && aligned({args.out});
  const auto launch = [&](auto kernel) {
    kernel<<<ceil_div(shape.rows * shape.octets, kThreads), kThreads, 0, cudaStream_t(stream)>>>(args);
  };
  if (shape.dtype == DType::bf16) launch(packets ? split_image_kernel<bfloat16, true> : split_image_kernel<bfloat16, false>);
  else launch(packets ? split_image_kernel<half, true> : split_image_kernel<half, false>);
  return cudaGetLastError();
}

}  // namespace spat
