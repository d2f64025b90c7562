// Restarts: keep per sample the better of two adversarial images. One block a sample decides once and copies, or leaves;
// samples that stay cost no traffic.
#include "vec.cuh"

namespace spat {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kThreads) keep_best_kernel(const KeepBest a) {
  using A = acc_t<T>;
  const int64_t sample = blockIdx.x, n = a.sample_numel;
  A& best_loss = static_cast<A*>(a.best_loss)[sample];
  const A loss = static_cast<const A*>(a.loss)[sample];
  const bool success = a.success && a.success[sample], best_success = a.best_success && a.best_success[sample];
  const bool take = takes_over(loss, success, best_loss, best_success);
  __syncthreads();  // everyone has read before thread 0 writes
  if (!take) return;
  if (threadIdx.x == 0) {
    best_loss = loss;
    if (a.best_success) a.best_success[sample] = success;
  }
  T* best = static_cast<T*>(a.best) + sample * n;
  const T* x_adv = static_cast<const T*>(a.x_adv) + sample * n;
  for (int64_t i = int64_t(threadIdx.x) * N; i < n; i += kThreads * N) store(best + i, load<N>(x_adv + i));
}

}  // namespace

int launch_keep_best(const KeepBest& args, void* stream) {
  visit(args.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kPacket<T>;
    const bool whole = args.sample_numel % N == 0 && aligned({args.best, args.x_adv});
    const auto kernel = whole ? keep_best_kernel<T, N> : keep_best_kernel<T, 1>;
    kernel<<<args.samples, kThreads, 0, cudaStream_t(stream)>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace spat
