// Training images: each block writes one stretch of a sample, so that one thread draws the crop for all, and each thread one packet.
// The bytes behind a warp's packets are neighbours too, whichever way the crop is mirrored.
#include "vec.cuh"

namespace spat {
namespace {

// INNER: the channels innermost in `out`, 0: any number
template <class T, int INNER, bool PACKETS>
__global__ void __launch_bounds__(kThreads)
    crop_flip_kernel(const CropFlip s, double per_line, double per_height, double per_inner) {
  using A = acc_t<T>;
  constexpr int N = kPacket<T>;
  __shared__ Crop crop;
  if (threadIdx.x == 0) crop = crop_of(s, blockIdx.x);
  __syncthreads();
  const int64_t row = s.rows[blockIdx.x];
  const bool known = row >= 0 && row < s.count;
  const uint8_t* image = s.images + (known ? row : 0) * s.sample_numel;
  T* out = static_cast<T*>(s.out) + blockIdx.x * s.sample_numel;
  const int inner = INNER ? INNER : s.inner, line_numel = s.width * inner;
  const int64_t first = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N, stride = int64_t(gridDim.y) * blockDim.x * N;

#pragma unroll 1  // more would divide for the count of turns
  for (int64_t i = first; i < s.sample_numel; i += stride) {
    const int line = int(quotient(i, line_numel, per_line)), k = int(i - int64_t(line) * line_numel);
    int plane = int(quotient(line, s.height, per_height)), h = line - plane * s.height;
    int w = INNER ? k / inner : int(quotient(k, inner, per_inner)), c = k - w * inner;
    Packet<T, N> packet;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (PACKETS || i + j < s.sample_numel) {
        const int y = h + crop.y, x = (crop.flip ? s.width - 1 - w : w) + crop.x;
        const bool inside = known && y >= 0 && y < s.height && x >= 0 && x < s.width;
        const A v = over_255<A>(inside ? image[(y * s.width + x) * s.channels + plane * inner + c] : 0);
        packet.v[j] = from_acc<T>(known ? v : A(NAN));
        if (!PACKETS) out[i + j] = packet.v[j];
      }
      if (++c < inner) continue;
      c = 0;
      if (++w < s.width) continue;
      w = 0;
      if (++h < s.height) continue;
      h = 0, ++plane;
    }
    if constexpr (PACKETS) store(out + i, packet);
  }
}

}  // namespace

int launch_crop_flip(const CropFlip& args, void* stream) {
  visit(args.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t packets = ceil_div(args.sample_numel, kPacket<T>);
    const int64_t threads = std::min<int64_t>(kThreads, ceil_div(packets, kWarp) * kWarp);
    const dim3 grid(args.samples, std::min<int64_t>(ceil_div(packets, threads), 65535));  // grid.y goes no further
    const auto launch = [&](auto kernel) {
      kernel<<<grid, threads, 0, cudaStream_t(stream)>>>(args, 1. / (double(args.width) * args.inner), 1. / args.height,
                                                         1. / args.inner);
    };
    if (aligned({args.out}, args.sample_numel * sizeof(T))) {
      launch(args.inner == 1   ? crop_flip_kernel<T, 1, true>
             : args.inner == 3 ? crop_flip_kernel<T, 3, true>
                               : crop_flip_kernel<T, 0, true>);
    } else {
      launch(args.inner == 1   ? crop_flip_kernel<T, 1, false>
             : args.inner == 3 ? crop_flip_kernel<T, 3, false>
                               : crop_flip_kernel<T, 0, false>);
    }
  });
  return cudaGetLastError();
}

}  // namespace spat
