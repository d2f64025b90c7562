// L2 ball: one block a sample. A first pass gathers <g,g>, <g,d> and <d,d> (d = x_adv - x) in fp64, which give both the
// gradient's norm and the norm after the step; a second pass, from cache, moves and projects.
#include "vec.cuh"

namespace spat {
namespace {

// The sums of all threads, in every thread.
__device__ L2Sums<double> block_sum(L2Sums<double> s) {
  __shared__ double warps[kThreads / kWarp][3];
  const auto add = [](double a, double b) { return a + b; };
  s.gg = warp_reduce(s.gg, add), s.gd = warp_reduce(s.gd, add), s.dd = warp_reduce(s.dd, add);
  double* mine = warps[threadIdx.x / kWarp];
  if (threadIdx.x % kWarp == 0) mine[0] = s.gg, mine[1] = s.gd, mine[2] = s.dd;
  __syncthreads();
  L2Sums<double> total;
  for (const auto& w : warps) total.gg += w[0], total.gd += w[1], total.dd += w[2];
  return total;
}

template <class T, class G, int N>
__global__ void __launch_bounds__(kThreads) l2_step_kernel(const Step a) {
  using A = acc_t<T>;
  const int64_t n = a.images.sample_numel, sample = blockIdx.x;
  T* x_adv = static_cast<T*>(a.images.x_adv) + sample * n;
  const T* x = static_cast<const T*>(a.images.x) + sample * n;
  const G* grad = static_cast<const G*>(a.grad) + sample * n;
  const A lo = A(a.images.lo), hi = A(a.images.hi);

  bool unusable = false;
  const auto direction = [&](G g_) -> A {
    const A g = to_acc(g_);
    if (finite(g)) return g;
    unusable = true;
    return 0;
  };
  L2Sums<double> sums;
  for (int64_t i = int64_t(threadIdx.x) * N; i < n; i += kThreads * N) {
    const Packet<T, N> p_adv = load<N>(x_adv + i), p_x = load<N>(x + i);
    const Packet<G, N> p_grad = load<N>(grad + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sums.push(direction(p_grad.v[j]), to_acc(p_adv.v[j]) - to_acc(p_x.v[j]));
  }
  sums = block_sum(sums);
  unusable = __syncthreads_or(unusable);
  if (unusable && a.nan_seen && threadIdx.x == 0) a.nan_seen[sample] = 1;

  const L2Move move(sums, at<A>(a.eps, sample), at<A>(a.step_size, sample));
  for (int64_t i = int64_t(threadIdx.x) * N; i < n; i += kThreads * N) {
    Packet<T, N> p_adv = load<N>(x_adv + i);
    const Packet<T, N> p_x = load<N>(x + i);
    const Packet<G, N> p_grad = load<N>(grad + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const double moved = move.apply<double>(to_acc(p_x.v[j]), to_acc(p_adv.v[j]), direction(p_grad.v[j]));
      p_adv.v[j] = from_acc<T>(clamp(A(moved), lo, hi));
    }
    store(x_adv + i, p_adv);
  }
}

}  // namespace

int launch_l2_step(const Step& args, void* stream) {
  const Images& im = args.images;
  visit(im.dtype, args.grad_dtype, [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    constexpr int N = kPacket<T, G>;
    const bool whole = im.sample_numel % N == 0 && aligned({im.x_adv, im.x, args.grad});
    const auto kernel = whole ? l2_step_kernel<T, G, N> : l2_step_kernel<T, G, 1>;
    kernel<<<im.samples, kThreads, 0, cudaStream_t(stream)>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace spat
