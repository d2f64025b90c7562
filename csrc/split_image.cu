// An image for a half-precision network: what rounding keeps, what it drops, zeros. A thread writes eight channels of one pixel,
// which for three colours padded to eight is the pixel, in one store; the 12 bytes that it reads are its neighbours' next ones.
#include "vec.cuh"

namespace spat {
namespace {

// THREE: three channels in eight, known to the compiler, which leaves each of them one load.
template <class T, bool THREE, bool PACKETS>
__global__ void __launch_bounds__(kThreads) split_image_kernel(const SplitImage s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.shape.rows * s.shape.octets) return;
  const int64_t row = THREE ? i : quotient(i, s.shape.octets, s.shape.rows_per_octet);
  const int64_t first = THREE ? 0 : (i - row * s.shape.octets) * kOctet;
  const int64_t channels = THREE ? 3 : s.x_channels, width = THREE ? kOctet : s.shape.channels;
  const float* x = s.x + row * channels;
  T* out = static_cast<T*>(s.out) + row * width + first;
  Packet<T, kOctet> packet;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    const int64_t k = first + j, c = k < channels ? k : k - channels;
    float v = 0;
    if (c < channels) {
      v = x[c];
      if (s.scale) v *= s.scale[c];
      if (s.shift) v += s.shift[c];
    }
    const T hi = from_acc<T>(v);
    packet.v[j] = k < channels ? hi : from_acc<T>(left_over(v, to_acc(hi)));
    if (!PACKETS && k < width) out[j] = packet.v[j];
  }
  if constexpr (PACKETS) store(out, packet);
}

}  // namespace

int launch_split_image(const SplitImage& args, void* stream) {
  const Channels& shape = args.shape;
  const auto launch = [&](auto t) {
    using T = decltype(t);
    const bool packets = shape.channels % kOctet == 0 && aligned({args.out});
    const bool three = packets && args.x_channels == 3 && shape.channels == kOctet;
    const auto kernel = three     ? split_image_kernel<T, true, true>
                        : packets ? split_image_kernel<T, false, true>
                                  : split_image_kernel<T, false, false>;
    kernel<<<ceil_div(shape.rows * shape.octets, kThreads), kThreads, 0, cudaStream_t(stream)>>>(args);
  };
  if (shape.dtype == DType::bf16) launch(bfloat16{});
  else launch(half{});
  return cudaGetLastError();
}

}  // namespace spat
