// Adversarial distributions: samples, and steps with the next sample. Four elements a thread, as many as a Philox call has words
// for: all noise is made in registers, so a step moves 28 bytes an element in fp32, and 44 with sums of gradients.
#include "adt.h"
#include "vec.cuh"

namespace spat {
namespace {

constexpr int kNoise = 4;

struct Noise {
  float r[kNoise];
  __device__ __forceinline__ Noise(const int64_t* seed, int64_t draw, int64_t i) {
    const Words words = philox(uint64_t(seed[0]), uint64_t(seed[1]) + uint64_t(draw), uint64_t(i) / kNoise);
#pragma unroll
    for (int j = 0; j < kNoise; ++j) r[j] = normal(words.w[j]);
  }
};

// Elements [i, i + kNoise) of p; WHOLE: as a packet, else those below `numel`.
template <bool WHOLE, class T>
__device__ __forceinline__ Packet<T, kNoise> read(const T* p, int64_t i, int64_t numel) {
  if constexpr (WHOLE) {
    return load<kNoise>(p + i);
  } else {
    Packet<T, kNoise> packet = {};
#pragma unroll
    for (int j = 0; j < kNoise; ++j)
      if (i + j < numel) packet.v[j] = p[i + j];
    return packet;
  }
}
template <bool WHOLE, class T>
__device__ __forceinline__ void write(T* p, int64_t i, int64_t numel, const Packet<T, kNoise>& packet) {
  if constexpr (WHOLE) {
    store(p + i, packet);
  } else {
#pragma unroll
    for (int j = 0; j < kNoise; ++j)
      if (i + j < numel) p[i + j] = packet.v[j];
  }
}

template <bool WHOLE, class T, class A>
__device__ __forceinline__ void write_sample(const AdtSample& a, int64_t draw, int64_t i, int64_t numel, const Packet<T, kNoise>& x,
                                             const Packet<A, kNoise>& mu, const Packet<A, kNoise>& rho) {
  const A lo = A(a.images.lo), hi = A(a.images.hi);
  const Noise noise(a.seed, draw, i);
  Packet<T, kNoise> x_adv;
#pragma unroll
  for (int j = 0; j < kNoise; ++j) {
    const bool inside = WHOLE || i + j < numel;
    const A eps = at<A>(a.eps, a.eps.varies && inside ? sample_of(a.images, i + j) : 0);
    x_adv.v[j] = from_acc<T>(adt_sample(Perturbation<A>(mu.v[j], rho.v[j], A(noise.r[j])), to_acc(x.v[j]), eps, lo, hi));
  }
  write<WHOLE>(static_cast<T*>(a.images.x_adv), i, numel, x_adv);
}

template <class T, bool WHOLE>
__device__ __forceinline__ void sample_at(const AdtSample& a, int64_t i, int64_t numel) {
  using A = acc_t<T>;
  const auto x = read<WHOLE>(static_cast<const T*>(a.images.x), i, numel);
  const auto mu = read<WHOLE>(static_cast<const A*>(a.mu), i, numel), rho = read<WHOLE>(static_cast<const A*>(a.rho), i, numel);
  write_sample<WHOLE>(a, a.draw, i, numel, x, mu, rho);
}

template <class T, bool PACKETS>
__global__ void __launch_bounds__(kThreads) adt_sample_kernel(const AdtSample a) {
  const int64_t numel = a.images.samples * a.images.sample_numel, i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kNoise;
  if (PACKETS && i + kNoise <= numel) sample_at<T, PACKETS>(a, i, numel);
  else if (i < numel) sample_at<T, false>(a, i, numel);
}

template <class T, class G, bool WHOLE>
__device__ __forceinline__ void step_at(const AdtStep& a, int64_t i, int64_t numel) {
  using A = acc_t<T>;
  const AdtSample& s = a.sample;
  const A lo = A(s.images.lo), hi = A(s.images.hi), lr = A(a.lr), entropy = A(a.entropy);
  A *mu_at = static_cast<A*>(s.mu), *rho_at = static_cast<A*>(s.rho);
  A *sum_mu_at = static_cast<A*>(a.sum_mu), *sum_rho_at = static_cast<A*>(a.sum_rho);
  const bool steps = !sum_mu_at || a.last;

  const auto x = read<WHOLE>(static_cast<const T*>(s.images.x), i, numel);
  const auto grad = read<WHOLE>(static_cast<const G*>(a.grad), i, numel);
  auto mu = read<WHOLE>(mu_at, i, numel), rho = read<WHOLE>(rho_at, i, numel);
  Packet<A, kNoise> sum_mu = {}, sum_rho = {};
  if (sum_mu_at) sum_mu = read<WHOLE>(sum_mu_at, i, numel), sum_rho = read<WHOLE>(sum_rho_at, i, numel);
  const Noise noise(s.seed, s.draw, i);
#pragma unroll
  for (int j = 0; j < kNoise; ++j) {
    const bool inside = WHOLE || i + j < numel;
    const int64_t sample = inside && (s.eps.varies || a.factor.varies) ? sample_of(s.images, i + j) : 0;
    const A eps = at<A>(s.eps, sample), clean = to_acc(x.v[j]), r = A(noise.r[j]);
    const Perturbation<A> p(mu.v[j], rho.v[j], r);
    const AdtGradients<A> g(p, clean, to_acc(grad.v[j]), r, eps, at<A>(a.factor, sample), entropy, lo, hi);
    if (!g.usable && inside && a.nan_seen) a.nan_seen[sample_of(s.images, i + j)] = 1;  // every writer writes the same
    A along_mu = g.mu, along_rho = g.rho;
    if (sum_mu_at) along_mu += sum_mu.v[j], along_rho += sum_rho.v[j];  // 0 + -0 would be 0
    if (steps) mu.v[j] = adt_step(mu.v[j], along_mu, lr), rho.v[j] = adt_step(rho.v[j], along_rho, lr);
    sum_mu.v[j] = steps ? A(0) : along_mu, sum_rho.v[j] = steps ? A(0) : along_rho;
  }
  if (steps) write<WHOLE>(mu_at, i, numel, mu), write<WHOLE>(rho_at, i, numel, rho);
  if (sum_mu_at) write<WHOLE>(sum_mu_at, i, numel, sum_mu), write<WHOLE>(sum_rho_at, i, numel, sum_rho);
  write_sample<WHOLE>(s, s.draw + 1, i, numel, x, mu, rho);
}

template <class T, class G, bool PACKETS>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 8 ? 2 : 3) adt_step_kernel(const AdtStep a) {
  const Images& im = a.sample.images;
  const int64_t numel = im.samples * im.sample_numel, i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kNoise;
  if (PACKETS && i + kNoise <= numel) step_at<T, G, PACKETS>(a, i, numel);
  else if (i < numel) step_at<T, G, false>(a, i, numel);
}

int64_t blocks(const Images& images) { return ceil_div(images.samples * images.sample_numel, int64_t(kNoise) * kThreads); }

}  // namespace

int launch_adt_sample(const AdtSample& args, void* stream) {
  visit(args.images.dtype, [&](auto t) {
    using T = decltype(t);
    const bool packets = aligned({args.images.x_adv, args.images.x, args.mu, args.rho});
    const auto kernel = packets ? adt_sample_kernel<T, true> : adt_sample_kernel<T, false>;
    kernel<<<blocks(args.images), kThreads, 0, cudaStream_t(stream)>>>(args);
  });
  return cudaGetLastError();
}

int launch_adt_step(const AdtStep& args, void* stream) {
  const AdtSample& s = args.sample;
  visit(s.images.dtype, args.grad_dtype, [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    const bool packets = aligned({s.images.x_adv, s.images.x, s.mu, s.rho, args.grad, args.sum_mu, args.sum_rho});
    const auto kernel = packets ? adt_step_kernel<T, G, true> : adt_step_kernel<T, G, false>;
    kernel<<<blocks(s.images), kThreads, 0, cudaStream_t(stream)>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace spat
