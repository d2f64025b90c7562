// LayerNorm over the channels, and its backward to the input. The threads of a row keep it in registers, one to four octets each, so
// that device memory is read once: 1 to 32 threads of a warp, or a block where a row does not fit a warp's registers. Weights come
// from L1. The sums of a row are in one order, whatever the batch and the alignment.
#include <type_traits>

#include "octet.cuh"

namespace spat {
namespace {

constexpr int kBlockThreads = kMaxNormed / kOctet;  // of a block that does one row, at most
constexpr int kRowBytes = 128;                      // of a row in the registers of one thread of a warp, at most

// What a thread has of its row: octets `lanes` apart, of which those behind the last channel or row have no elements. A row has a
// block, or 1 << log_lanes threads of one.
template <int K, bool BLOCK, bool PACKETS>
struct Part {
  int lanes;
  int64_t row;
  bool there, first;  // does the row exist, and is this the thread that writes what a row has one of
  Octet octets[K];

  __device__ __forceinline__ Part(const Channels& shape, int log_lanes) {
    lanes = BLOCK ? blockDim.x : 1 << log_lanes;
    const int lane = BLOCK ? threadIdx.x : threadIdx.x & (lanes - 1);
    row = BLOCK ? blockIdx.x : (int64_t(blockIdx.x) * kThreads + threadIdx.x) >> log_lanes;
    there = row < shape.rows;
    first = there && lane == 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t channel = (lane + k * lanes) * kOctet, left = there ? shape.channels - channel : 0;
      octets[k] = {row * shape.channels + channel, channel, left < 0 ? 0 : left > kOctet ? kOctet : int(left), 0};
    }
  }

  // f(k, j, value) for the elements that the thread has of p: images, or vectors of one value a channel.
  template <class T, class F>
  __device__ __forceinline__ void image(const void* p, F f) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (octets[k].size > 0) read<PACKETS, T>(p, octets[k].first, octets[k].size, [&](int j, acc_t<T> v) { f(k, j, v); });
  }
  template <class A, class F>
  __device__ __forceinline__ void vector(const void* p, F f) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (octets[k].size > 0) read<PACKETS, A>(p, octets[k].channel, octets[k].size, [&](int j, A v) { f(k, j, v); });
  }
  template <class T>
  __device__ __forceinline__ void put(void* p, const acc_t<T> (&v)[K][kOctet]) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (octets[k].size > 0) write<PACKETS, T>(p, octets[k].first, octets[k].size, v[k]);
  }
};

// The sums over all threads of a row of N values each, in every one of them. A kernel that calls it again gives another SLOT.
template <bool BLOCK, int SLOT, int N, class A>
__device__ __forceinline__ void add_up(A (&v)[N], int lanes) {
  const auto in_warp = [&](int count) {
    for (int offset = count / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(kAllLanes, v[i], offset);
  };
  in_warp(BLOCK ? kWarp : lanes);
  if constexpr (BLOCK) {
    __shared__ A warps[N][kWarp];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (lane == 0) warps[i][warp] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = lane < lanes / kWarp ? warps[i][lane] : A(0);
    in_warp(kWarp);
  }
}

template <class T, int K, bool BLOCK, bool PACKETS>
__global__ void __launch_bounds__(BLOCK ? kBlockThreads : kThreads) layer_norm_kernel(const LayerNorm s, int log_lanes) {
  using A = acc_t<T>;
  const Part<K, BLOCK, PACKETS> part(s.shape, log_lanes);
  const A inverse = A(s.inverse);
  A t[K][kOctet] = {}, mean[1] = {}, sums[2] = {};  // of deviations from the mean, and of their squares
  part.template image<T>(s.a, [&](int k, int j, A v) { t[k][j] = v; });
  if (s.b) part.template image<T>(s.b, [&](int k, int j, A v) { t[k][j] += v; });
  if (s.total) part.template put<T>(s.total, t);
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kOctet; ++j) mean[0] += t[k][j];
  add_up<BLOCK, 0>(mean, part.lanes);
  mean[0] *= inverse;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      t[k][j] = j < part.octets[k].size ? t[k][j] - mean[0] : A(0);
      sums[0] += t[k][j];
      sums[1] += t[k][j] * t[k][j];
    }
  add_up<BLOCK, 1>(sums, part.lanes);
  const A correction = sums[0] * inverse, rstd = A(1) / std::sqrt(sums[1] * inverse + A(s.eps));
  mean[0] += correction;
  if (part.first && s.mean) static_cast<A*>(s.mean)[part.row] = mean[0];
  if (part.first && s.rstd) static_cast<A*>(s.rstd)[part.row] = rstd;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kOctet; ++j) t[k][j] = (t[k][j] - correction) * rstd;
  if (s.weight) part.template vector<A>(s.weight, [&](int k, int j, A v) { t[k][j] *= v; });
  if (s.bias) part.template vector<A>(s.bias, [&](int k, int j, A v) { t[k][j] += v; });
  part.template put<T>(s.out, t);
}

template <class T, int K, bool BLOCK, bool PACKETS>
__global__ void __launch_bounds__(BLOCK ? kBlockThreads : kThreads) layer_norm_grad_kernel(const LayerNormGrad s, int log_lanes) {
  using A = acc_t<T>;
  const Part<K, BLOCK, PACKETS> part(s.shape, log_lanes);
  const A inverse = A(s.inverse);
  const A mean = part.there ? static_cast<const A*>(s.mean)[part.row] : A(0);
  const A rstd = part.there ? static_cast<const A*>(s.rstd)[part.row] : A(0);
  A g[K][kOctet] = {}, xhat[K][kOctet] = {}, sums[2] = {};
  part.template image<T>(s.grad, [&](int k, int j, A v) { g[k][j] = v; });
  part.template image<T>(s.t, [&](int k, int j, A v) { xhat[k][j] = (v - mean) * rstd; });
  if (s.grad2) part.template image<T>(s.grad2, [&](int k, int j, A v) { g[k][j] += v; });
  if (s.weight) part.template vector<A>(s.weight, [&](int k, int j, A v) { g[k][j] *= v; });
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      sums[0] += g[k][j];
      sums[1] += g[k][j] * xhat[k][j];
    }
  add_up<BLOCK, 0>(sums, part.lanes);
  const A mean_g = sums[0] * inverse, mean_gx = sums[1] * inverse;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kOctet; ++j) g[k][j] = rstd * (g[k][j] - mean_g - xhat[k][j] * mean_gx);
  if (s.residual) part.template image<T>(s.residual, [&](int k, int j, A v) { g[k][j] += v; });
  part.template put<T>(s.dx, g);
}

// Of the fewest threads that hold a row of `octets` in K octets each. A power of two of them keeps shuffles within a row.
inline int log_lanes_of(int64_t octets, int k) {
  int log_lanes = 0;
  while (k << log_lanes < octets) ++log_lanes;
  return log_lanes;
}

// f(octets of a thread, whether a row has a block to itself), both constants
template <class A, class F>
void visit_parts(int64_t octets, F&& f) {
  constexpr int most = kRowBytes / sizeof(A) / kOctet;
  if (octets <= kWarp) return f(std::integral_constant<int, 1>{}, std::false_type{});
  if (octets <= 2 * kWarp) return f(std::integral_constant<int, 2>{}, std::false_type{});
  if (octets <= most * kWarp) return f(std::integral_constant<int, most>{}, std::false_type{});
  f(std::integral_constant<int, 1>{}, std::true_type{});
}

}  // namespace

#define SPAT_LAUNCH_ROWS(Args, name, ...)                                                                                     \
  int launch_##name(const Args& args, void* stream) {                                                                         \
    const Channels& shape = args.shape;                                                                                       \
    const bool packets = shape.channels % kOctet == 0 && aligned({__VA_ARGS__});                                              \
    visit(shape.dtype, [&](auto t) {                                                                                          \
      using T = decltype(t);                                                                                                  \
      visit_parts<acc_t<T>>(shape.octets, [&](auto k, auto block) {                                                           \
        const auto kernel = packets ? name##_kernel<T, k, block, true> : name##_kernel<T, k, block, false>;                   \
        const int threads = block ? ceil_div(shape.octets, kWarp) * kWarp : kThreads;                                         \
        const int log_lanes = block ? 0 : log_lanes_of(shape.octets, k);                                                      \
        const int64_t blocks = block ? shape.rows : ceil_div(shape.rows, kThreads >> log_lanes);                              \
        kernel<<<blocks, threads, 0, cudaStream_t(stream)>>>(args, log_lanes);                                                \
      });                                                                                                                     \
    });                                                                                                                       \
    return cudaGetLastError();                                                                                                \
  }

SPAT_LAUNCH_ROWS(LayerNorm, layer_norm, args.a, args.b, args.weight, args.bias, args.total, args.out)
SPAT_LAUNCH_ROWS(LayerNormGrad, layer_norm_grad, args.grad, args.grad2, args.t, args.weight, args.residual, args.dx)

}  // namespace spat
