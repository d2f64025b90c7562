// Average pooling and the last linear layer, and the way back. One block a sample, whose channels stay in shared memory. Images are
// read or written once, the weights come from L2. Both ways begin with a weighted sum of rows: of pixels, or of classes.
#include "vec.cuh"

namespace spat {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kClasses = 4;  // of a warp at once: more loads on their way, fewer reads of shared memory

// A value for every channel of a sample, and before `add_up` has added them up, for every group of threads: 8 * kThreads at most.
template <class A>
struct alignas(16) Features {
  A v[kMaxPooled];
};

// sums[c] = sum over rows of weight(row) * rows[row, c], for the whole block. Threads that lie side by side take the N columns of
// one packet each; where a row has fewer packets than the block has threads, groups of threads share the rows.
template <int N, class T, class F>
__device__ __forceinline__ void add_up(const T* rows, int64_t count, int channels, F weight, Features<acc_t<T>>& sums) {
  using A = acc_t<T>;
  const int packets = channels / N, groups = packets < kThreads ? kThreads / packets : 1;
  for (int i = threadIdx.x; i < groups * packets; i += kThreads) {
    const int group = i / packets, first = (i - group * packets) * N;
    A total[N] = {};
    for (int64_t row = group; row < count;) {
      const int64_t end = row + kTerms * groups < count ? row + kTerms * groups : count;
      A v[N] = {};
#pragma unroll 4
      for (; row < end; row += groups) {
        const A w = weight(row);
        const Packet<T, N> p = load<N>(rows + row * channels + first);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] += w * to_acc(p.v[j]);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) total[j] += v[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sums.v[group * channels + first + j] = total[j];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    A total = sums.v[c];
    for (int group = 1; group < groups; ++group) total += sums.v[group * channels + c];
    sums.v[c] = total;  // of group 0, which nobody else reads
  }
}

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) pool_linear_kernel(const PoolLinear s) {
  using A = acc_t<T>;
  constexpr int N = PACKETS ? kPacket<A> : 1;
  __shared__ Features<A> pooled;
  const Head& h = s.head;
  const int channels = int(h.shape.channels);
  const int64_t sample = blockIdx.x;
  const A *weight = static_cast<const A*>(h.weight), *bias = static_cast<const A*>(s.bias);
  add_up<PACKETS ? kPacket<T> : 1>(static_cast<const T*>(s.x) + sample * h.pixels * channels, h.pixels, channels,
                                   [](int64_t) { return A(1); }, pooled);
  for (int c = threadIdx.x; c < channels; c += kThreads) pooled.v[c] /= A(h.pixels);
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t first = warp * kClasses; first < h.classes; first += kWarps * kClasses) {
    A dot[kClasses] = {};
    for (int c = lane * N; c < channels; c += kWarp * N) {
      const Packet<A, N> features = load<N>(pooled.v + c);
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        if (first + i >= h.classes) continue;
        const Packet<A, N> w = load<N>(weight + (first + i) * channels + c);
#pragma unroll
        for (int j = 0; j < N; ++j) dot[i] += features.v[j] * w.v[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      const A logit = warp_reduce(dot[i], [](A a, A b) { return a + b; });
      const int64_t k = first + i;
      if (lane == 0 && k < h.classes) static_cast<A*>(s.logits)[sample * h.classes + k] = logit + (bias ? bias[k] : A(0));
    }
  }
}

// The largest magnitude that any thread has, in every thread.
template <class A>
__device__ __forceinline__ A block_max(A v) {
  __shared__ A warps[kWarps];
  v = warp_reduce(v, larger_or_nan<A>);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = v;
  __syncthreads();
  for (const A& w : warps) v = larger_or_nan(v, w);
  return v;
}

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) pool_linear_grad_kernel(const PoolLinearGrad s) {
  using A = acc_t<T>;
  __shared__ Features<A> grad;
  const Head& h = s.head;
  const int channels = int(h.shape.channels), octets = int(h.shape.octets);
  const int64_t sample = blockIdx.x;
  const A *dlogits = static_cast<const A*>(s.dlogits) + sample * h.classes, *scale = static_cast<const A*>(s.scale);
  add_up<PACKETS ? kPacket<A> : 1>(static_cast<const A*>(h.weight), h.classes, channels,
                                   [=](int64_t k) { return dlogits[k]; }, grad);
  A largest = 0;
  if (s.factor) {
    for (int c = threadIdx.x; c < channels; c += kThreads) largest = larger_or_nan(magnitude(grad.v[c]), largest);
    largest = block_max(largest);
  }
  const PooledDivisor<A> d(largest, A(h.pixels), s.factor);
  if (s.factor && threadIdx.x == 0) static_cast<A*>(s.factor)[sample] = d.factor;
  for (int c = threadIdx.x; c < channels; c += kThreads) {  // its own, as in add_up
    grad.v[c] /= d.divisor;
    if (scale) grad.v[c] *= scale[c];
  }
  __syncthreads();

  // A thread keeps the eight channels of one mask byte and writes them to every pixel, or to those of its group of threads.
  const int groups = octets < kThreads ? kThreads / octets : 1;
  for (int i = threadIdx.x; i < groups * octets; i += kThreads) {
    const int group = i / octets, octet = i - group * octets, left = channels - octet * kOctet;
    const int size = PACKETS || left > kOctet ? kOctet : left;
    Packet<T, kOctet> on;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) on.v[j] = from_acc<T>(PACKETS || j < size ? grad.v[octet * kOctet + j] : A(0));
    for (int64_t pixel = group; pixel < h.pixels; pixel += groups) {
      const int64_t row = sample * h.pixels + pixel;
      const unsigned bits = s.mask ? s.mask[row * octets + octet] : 0xffu;
      T* to = static_cast<T*>(s.dx) + row * channels + octet * kOctet;
      Packet<T, kOctet> packet;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) packet.v[j] = bits >> j & 1 ? on.v[j] : T{};
      if constexpr (PACKETS) {
        store(to, packet);
      } else {
#pragma unroll
        for (int j = 0; j < kOctet; ++j)
          if (j < size) to[j] = packet.v[j];
      }
    }
  }
}

}  // namespace

#define SPAT_LAUNCH_HEAD(Args, name, images)                                                                              \
  int launch_##name(const Args& args, void* stream) {                                                                     \
    const bool packets = args.head.shape.channels % kOctet == 0 && aligned({images, args.head.weight});                   \
    visit(args.head.shape.dtype, [&](auto t) {                                                                            \
      using T = decltype(t);                                                                                              \
      const auto kernel = packets ? name##_kernel<T, true> : name##_kernel<T, false>;                                     \
      kernel<<<args.head.samples, kThreads, 0, cudaStream_t(stream)>>>(args);                                             \
    });                                                                                                                   \
    return cudaGetLastError();                                                                                            \
  }

SPAT_LAUNCH_HEAD(PoolLinear, pool_linear, args.x)
SPAT_LAUNCH_HEAD(PoolLinearGrad, pool_linear_grad, args.dx)

}  // namespace spat
