// L-infinity ball: random start, and the sign step with both projections. One packet a thread; x, x_adv and the gradient are
// read once and x_adv is written once, so device memory is the limit (12 + 4 bytes an element in fp32). Hashes of the new x_adv
// are summed up in the warp first, where that is in one sample.
#include "vec.cuh"

namespace spat {
namespace {

__device__ __forceinline__ void add_hash(uint64_t* hash, int64_t sample, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(hash + sample), value);
}

// The same by a whole warp: one addition where all lanes have the same sample.
__device__ __forceinline__ void add_hashes(uint64_t* hash, int64_t sample, uint64_t value) {
  const bool same = !__any_sync(kAllLanes, sample != __shfl_sync(kAllLanes, sample, 0));
  if (same) value = warp_reduce(value, [](uint64_t a, uint64_t b) { return a + b; });
  if (!same || threadIdx.x % kWarp == 0) add_hash(hash, sample, value);
}

template <class T, class G, int N, bool HASH>
__global__ void __launch_bounds__(kThreads) linf_step_kernel(const Step a) {
  using A = acc_t<T>;
  T* x_adv = static_cast<T*>(a.images.x_adv);
  const T* x = static_cast<const T*>(a.images.x);
  const G* grad = static_cast<const G*>(a.grad);
  const A lo = A(a.images.lo), hi = A(a.images.hi);
  const int64_t numel = a.images.samples * a.images.sample_numel;
  const bool varies = HASH || a.eps.varies || a.step_size.varies;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  int64_t hash_sample = HASH ? sample_of(a.images, i < numel ? i : numel - 1) : 0;
  uint64_t hash = 0;  // of this thread's elements in `hash_sample`

  const auto step = [&](int64_t i, T adv, T clean, G g_) -> T {
    const A g = to_acc(g_);
    const int64_t sample = varies ? sample_of(a.images, i) : 0;
    if (g != g && a.nan_seen) a.nan_seen[sample_of(a.images, i)] = 1;  // every writer writes the same
    const T moved = from_acc<T>(
        linf_step(to_acc(adv), to_acc(clean), g, at<A>(a.eps, sample), at<A>(a.step_size, sample), lo, hi));
    if constexpr (HASH) {
      if (sample != hash_sample) {  // a packet may hold the end of one sample and the beginning of the next
        add_hash(a.hash, hash_sample, hash);
        hash_sample = sample, hash = 0;
      }
      hash += hashed(moved, i - sample * a.images.sample_numel);
    }
    return moved;
  };

  if (i + N <= numel) {
    Packet<T, N> p_adv = load<N>(x_adv + i);
    const Packet<T, N> p_x = load<N>(x + i);
    const Packet<G, N> p_grad = load<N>(grad + i);
#pragma unroll
    for (int j = 0; j < N; ++j) p_adv.v[j] = step(i + j, p_adv.v[j], p_x.v[j], p_grad.v[j]);
    store(x_adv + i, p_adv);
  } else {
    for (int64_t k = i; k < numel; ++k) x_adv[k] = step(k, x_adv[k], x[k], grad[k]);
  }
  if constexpr (HASH) add_hashes(a.hash, hash_sample, hash);
}

// kStart elements a thread, for each four of them one Philox call.
template <class T>
constexpr int kStart = 16 / sizeof(T) < 4 ? 4 : 16 / sizeof(T);

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) linf_random_start_kernel(const LinfRandomStart a) {
  using A = acc_t<T>;
  constexpr int N = kStart<T>;
  T* x_adv = static_cast<T*>(a.images.x_adv);
  const T* x = static_cast<const T*>(a.images.x);
  const A lo = A(a.images.lo), hi = A(a.images.hi);
  const int64_t numel = a.images.samples * a.images.sample_numel;

  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  const bool whole = PACKETS && i + N <= numel;
  Packet<T, N> p;
  if (whole) p = load<N>(x + i);
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const Words words = philox(uint64_t(a.seed[0]), uint64_t(a.seed[1]), uint64_t(i + j) / 4);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t k = i + j + w;
      if (!whole && k >= numel) continue;
      const A eps = at<A>(a.eps, a.eps.varies ? sample_of(a.images, k) : 0);
      const T start = from_acc<T>(
          linf_random_start(to_acc(whole ? p.v[j + w] : x[k]), symmetric_unit(words.w[w]), eps, lo, hi));
      if (whole) p.v[j + w] = start;
      else x_adv[k] = start;
    }
  }
  if (whole) store(x_adv + i, p);
}

}  // namespace

int launch_linf_step(const Step& args, void* stream) {
  const Images& im = args.images;
  const int64_t numel = im.samples * im.sample_numel;
  visit(im.dtype, args.grad_dtype, [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    const auto launch = [&](auto kernel, int packet) {
      kernel<<<ceil_div(numel, int64_t(packet) * kThreads), kThreads, 0, cudaStream_t(stream)>>>(args);
    };
    constexpr int N = kPacket<T, G>;
    if (aligned({im.x_adv, im.x, args.grad})) {
      launch(args.hash ? linf_step_kernel<T, G, N, true> : linf_step_kernel<T, G, N, false>, N);
    } else {
      launch(args.hash ? linf_step_kernel<T, G, 1, true> : linf_step_kernel<T, G, 1, false>, 1);
    }
  });
  return cudaGetLastError();
}

int launch_linf_random_start(const LinfRandomStart& args, void* stream) {
  const int64_t numel = args.images.samples * args.images.sample_numel;
  visit(args.images.dtype, [&](auto t) {
    using T = decltype(t);
    const bool packets = aligned({args.images.x_adv, args.images.x});
    const auto kernel = packets ? linf_random_start_kernel<T, true> : linf_random_start_kernel<T, false>;
    kernel<<<ceil_div(numel, int64_t(kStart<T>) * kThreads), kThreads, 0, cudaStream_t(stream)>>>(args);
  });
  return cudaGetLastError();
}

const char* cuda_error_name(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace spat
