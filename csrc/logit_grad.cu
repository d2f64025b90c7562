// Gradients of the attack losses at the logits. One warp a row: the row is read from memory once and again from L1, the
// gradient is written once. Rows that start on 16 bytes go in packets, others (K = 10 in fp32) element by element.
#include "vec.cuh"

#include "losses.h"

namespace spat {
namespace {

constexpr int kRowsPerBlock = kThreads / kWarp;

template <class T>
struct Row {
  const T* logits;
  T* dlogits;
  acc_t<T>* loss;  // this row's, or null
  int64_t classes;
  int lane;
};

__device__ __forceinline__ int64_t row_index() {
  return int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
}

template <class T>
__device__ __forceinline__ Row<T> row_of(const Rows& a, int64_t row) {
  return {static_cast<const T*>(a.logits) + row * a.classes, static_cast<T*>(a.dlogits) + row * a.classes,
          a.loss ? static_cast<acc_t<T>*>(a.loss) + row : nullptr, a.classes, int(threadIdx.x % kWarp)};
}

// f(k, packet of logits) over the row, the lanes side by side.
template <int N, class T, class F>
__device__ __forceinline__ void for_each_packet(const Row<T>& row, F f) {
  for (int64_t k = row.lane * N; k < row.classes; k += kWarp * N) f(k, load<N>(row.logits + k));
}

template <int N, class T, class F>
__device__ __forceinline__ void write_grad(const Row<T>& row, F grad) {
  for_each_packet<N>(row, [&](int64_t k, const Packet<T, N>& z) {
    Packet<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.v[j] = from_acc<T>(grad(k + j, to_acc(z.v[j])));
    store(row.dlogits + k, out);
  });
}

template <class T>
__device__ __forceinline__ void write_loss(const Row<T>& row, acc_t<T> loss) {
  if (row.loss && row.lane == 0) *row.loss = loss;
}

template <int N, class T>
__device__ __forceinline__ void fill_nan(const Row<T>& row) {
  write_grad<N>(row, [](int64_t, acc_t<T>) { return acc_t<T>(NAN); });
  write_loss(row, acc_t<T>(NAN));
}

template <class A>
struct OnlineSum {
  A max, sum;  // sum of e^(z - max)
};

// One pass for the maximum and the sum: when the maximum grows, the sum so far shrinks. Class `skip` counts for neither.
template <int N, class T>
__device__ __forceinline__ OnlineSum<acc_t<T>> online_softmax(const Row<T>& row, int64_t skip) {
  using A = acc_t<T>;
  OnlineSum<A> s{lowest<A>(), 0};
  for_each_packet<N>(row, [&](int64_t k, const Packet<T, N>& p) {
    A z[N], max = s.max;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[j] = k + j == skip ? A(-INFINITY) : to_acc(p.v[j]);
      max = larger(max, z[j]);
    }
    s.sum *= exp_nonpositive(s.max - max);
#pragma unroll
    for (int j = 0; j < N; ++j) s.sum += exp_nonpositive(z[j] - max);
    s.max = max;
  });
  const A max = warp_reduce(s.max, larger<A>);
  return {max, warp_reduce(s.sum * exp_nonpositive(s.max - max), [](A a, A b) { return a + b; })};
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) lsce_grad_kernel(const LsceGrad a) {
  using A = acc_t<T>;
  const int64_t i_row = row_index();
  if (i_row >= a.rows.rows) return;
  const Row<T> row = row_of<T>(a.rows, i_row);
  const int64_t label = a.labels[i_row];
  if (label < 0 || label >= row.classes) return fill_nan<N>(row);

  const A sign = a.targeted ? A(-1) : A(1), scale = sign * A(a.rows.scale);
  const A alpha = A(a.alpha), off_target = A(a.alpha / double(row.classes - 1));
  const A z_y = to_acc(row.logits[label]);
  const OnlineSum<A> s = online_softmax<N>(row, label);
  const LsceRow<A> stats(s.max, s.sum, z_y, a.normalize);
  A gaps = 0;
  write_grad<N>(row, [&](int64_t k, A z) {
    gaps += z_y - z;
    return k == label ? stats.label_grad(alpha, scale) : stats.other_grad(exp_nonpositive(z - stats.top), off_target, scale);
  });
  if (row.loss) {
    gaps = warp_reduce(gaps, [](A x, A y) { return x + y; });
    write_loss(row, sign * stats.loss(gaps, alpha, off_target));
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) kl_grad_kernel(const KlGrad a) {
  using A = acc_t<T>;
  const int64_t i_row = row_index();
  if (i_row >= a.rows.rows) return;
  const Row<T> row = row_of<T>(a.rows, i_row);
  const A* probs = static_cast<const A*>(a.probs) + i_row * row.classes;
  const OnlineSum<A> s = online_softmax<N>(row, -1);
  const A log_total = s.max + A(log(s.sum)), scale = A(a.rows.scale);
  A loss = 0;
  write_grad<N>(row, [&](int64_t k, A z) {
    const A q = probs[k];
    if (row.loss) loss += kl_term(q, z - log_total);
    return scale * (exp_nonpositive(z - s.max) / s.sum - q);
  });
  if (row.loss) write_loss(row, warp_reduce(loss, [](A x, A y) { return x + y; }));
}

// The first logit in rank order after `previous` that is not class `skip` (-1: none is skipped), in every lane.
template <int N, class T>
__device__ __forceinline__ Ranked<acc_t<T>> next_ranked(const Row<T>& row, Ranked<acc_t<T>> previous, int64_t skip) {
  using A = acc_t<T>;
  Ranked<A> best{-INFINITY, row.classes};
  for_each_packet<N>(row, [&](int64_t k, const Packet<T, N>& p) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Ranked<A> candidate{to_acc(p.v[j]), k + j};
      if (candidate.k != skip && before(previous, candidate) && before(candidate, best)) best = candidate;
    }
  });
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Ranked<A> other{__shfl_xor_sync(kAllLanes, best.z, offset), __shfl_xor_sync(kAllLanes, best.k, offset)};
    if (before(other, best)) best = other;
  }
  return best;
}

// Ranks pass over NaN, which must not pass for a result.
template <int N, class T>
__device__ __forceinline__ bool has_nan(const Row<T>& row) {
  bool nan = false;
  for_each_packet<N>(row, [&](int64_t, const Packet<T, N>& p) {
#pragma unroll
    for (int j = 0; j < N; ++j) nan |= to_acc(p.v[j]) != to_acc(p.v[j]);
  });
  return __any_sync(kAllLanes, nan);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) margin_grad_kernel(const MarginGrad a) {
  using A = acc_t<T>;
  const int64_t i_row = row_index();
  if (i_row >= a.rows.rows) return;
  const Row<T> row = row_of<T>(a.rows, i_row);
  const int64_t label = a.labels[i_row];
  if (label < 0 || label >= row.classes || has_nan<N>(row)) return fill_nan<N>(row);

  const Ranked<A> other = next_ranked<N>(row, {INFINITY, -1}, label);
  const MarginRow<A> margin(other.z, to_acc(row.logits[label]), A(a.kappa), a.targeted, A(a.rows.scale));
  write_grad<N>(row, [&](int64_t k, A) { return margin.grad(k, other.k, label); });
  write_loss(row, margin.loss);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) pma_grad_kernel(const PmaGrad a) {
  using A = acc_t<T>;
  const int64_t i_row = row_index();
  if (i_row >= a.rows.rows) return;
  const Row<T> row = row_of<T>(a.rows, i_row);
  const int64_t label = a.labels[i_row];
  if (label < 0 || label >= row.classes) return fill_nan<N>(row);

  PmaRow<A> pma({to_acc(row.logits[label]), label}, next_ranked<N>(row, {INFINITY, -1}, label), a.targeted);
  const OnlineSum<A> s = online_softmax<N>(row, pma.w.k);
  if (!pma.weigh(s.max, s.sum, A(a.rows.scale), a.normalize)) return fill_nan<N>(row);
  write_grad<N>(row, [&](int64_t k, A z) {
    return k == pma.w.k ? pma.at_w : k == pma.l.k ? pma.at_l : pma.per_e * exp_nonpositive(z - s.max);
  });
  write_loss(row, pma.loss);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) dlr_grad_kernel(const DlrGrad a) {
  using A = acc_t<T>;
  const int64_t i_row = row_index();
  if (i_row >= a.rows.rows) return;
  const Row<T> row = row_of<T>(a.rows, i_row);
  const int64_t label = a.labels[i_row], target = a.targets ? a.targets[i_row] : 0;
  if (label < 0 || label >= row.classes || target < 0 || target >= row.classes || has_nan<N>(row))
    return fill_nan<N>(row);

  Ranked<A> rank[4], previous{INFINITY, -1};
#pragma unroll
  for (Ranked<A>& r : rank) r = previous = next_ranked<N>(row, previous, -1);
  const Ranked<A> up = a.targets ? Ranked<A>{to_acc(row.logits[target]), target} : rank[0].k == label ? rank[1] : rank[0];
  const DlrRow<A> dlr(rank, {to_acc(row.logits[label]), label}, up, a.targets != nullptr);
  write_grad<N>(row, [&](int64_t k, A) { return dlr.grad(k, A(a.rows.scale)); });
  write_loss(row, dlr.loss);
}

}  // namespace

// Rows keep the alignment of the first one when their bytes are a multiple of 16.
#define SPAT_LAUNCH_ROWS(Args, name)                                                                               \
  int launch_##name(const Args& args, void* stream) {                                                              \
    visit(args.rows.dtype, [&](auto t) {                                                                           \
      using T = decltype(t);                                                                                       \
      const bool packets = aligned({args.rows.logits, args.rows.dlogits}, args.rows.classes * int64_t(sizeof(T))); \
      const auto kernel = packets ? name##_kernel<T, kPacket<T>> : name##_kernel<T, 1>;                            \
      kernel<<<ceil_div(args.rows.rows, kRowsPerBlock), kThreads, 0, cudaStream_t(stream)>>>(args);                \
    });                                                                                                            \
    return cudaGetLastError();                                                                                     \
  }

SPAT_LAUNCH_ROWS(LsceGrad, lsce_grad)
SPAT_LAUNCH_ROWS(KlGrad, kl_grad)
SPAT_LAUNCH_ROWS(MarginGrad, margin_grad)
SPAT_LAUNCH_ROWS(PmaGrad, pma_grad)
SPAT_LAUNCH_ROWS(DlrGrad, dlr_grad)

}  // namespace spat
