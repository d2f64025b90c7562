// LayerNorm over the channels on the CPU, and its backward to the input. A row is converted once, into L1, where its passes run. Its
// sums have one order for any batch, number of threads and instruction set.
#include "cpu.h"

namespace spat {
namespace {

template <class A>
struct alignas(64) Row {
  A v[kMaxNormed];
};

template <class A>
SPAT_HD Lanes<A> load(const A* p) {
  Lanes<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// f(first element) for each vector of a row.
template <class F>
SPAT_HD void for_each_vector(int64_t channels, F&& f) {
  for (int64_t c = 0; c < channels; c += kLanes) f(c);
}

// [channels, whole vectors) of a row
template <class A>
SPAT_HD void pad(Row<A>& row, int64_t channels, A value) {
  for (int64_t c = channels; c % kLanes; ++c) row.v[c] = value;
}

// Null stays null.
template <class T, class V>
SPAT_HD T* from(V* p, int64_t first) {
  return p ? static_cast<T*>(p) + first : nullptr;
}

template <class T>
SPAT_HD void layer_norm(const LayerNorm& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = Lanes<A>;
  const int64_t n = s.shape.channels;
  const A *weight = static_cast<const A*>(s.weight), *bias = static_cast<const A*>(s.bias);
  Row<A> row;
  A* t = row.v;
  for (int64_t r = begin; r < end; ++r) {
    const T *a = from<const T>(s.a, r * n), *b = from<const T>(s.b, r * n);
    T *total = from<T>(s.total, r * n), *out = from<T>(s.out, r * n);
    for (int64_t c = 0; c < n; ++c) t[c] = to_acc(a[c]);
    if (b) for (int64_t c = 0; c < n; ++c) t[c] += to_acc(b[c]);
    if (total) for (int64_t c = 0; c < n; ++c) total[c] = from_acc<T>(t[c]);
    V terms = {};
    pad(row, n, A(0));
    for_each_vector(n, [&](int64_t c) SPAT_INLINE { terms += load(t + c); });
    const A mean = sum<A>(terms) / A(n);
    V squares = {};
    pad(row, n, mean);
    for_each_vector(n, [&](int64_t c) SPAT_INLINE {
      const V d = load(t + c) - mean;
      squares += d * d;
    });
    const A rstd = A(1) / std::sqrt(sum<A>(squares) / A(n) + A(s.eps));
    if (s.mean) static_cast<A*>(s.mean)[r] = mean;
    if (s.rstd) static_cast<A*>(s.rstd)[r] = rstd;
    for (int64_t c = 0; c < n; ++c) t[c] = (t[c] - mean) * rstd;
    if (weight) for (int64_t c = 0; c < n; ++c) t[c] *= weight[c];
    if (bias) for (int64_t c = 0; c < n; ++c) t[c] += bias[c];
    for (int64_t c = 0; c < n; ++c) out[c] = from_acc<T>(t[c]);
  }
}

template <class T>
SPAT_HD void layer_norm_grad(const LayerNormGrad& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = Lanes<A>;
  const int64_t n = s.shape.channels;
  const A *weight = static_cast<const A*>(s.weight), *means = static_cast<const A*>(s.mean), *rstds = static_cast<const A*>(s.rstd);
  Row<A> g_row, xhat_row;
  A *g = g_row.v, *xhat = xhat_row.v;
  for (int64_t r = begin; r < end; ++r) {
    const T *grad = from<const T>(s.grad, r * n), *grad2 = from<const T>(s.grad2, r * n);
    const T *t = from<const T>(s.t, r * n), *rest = from<const T>(s.residual, r * n);
    T* dx = from<T>(s.dx, r * n);
    const A mean = means[r], rstd = rstds[r];
    for (int64_t c = 0; c < n; ++c) g[c] = to_acc(grad[c]);
    if (grad2) for (int64_t c = 0; c < n; ++c) g[c] += to_acc(grad2[c]);
    if (weight) for (int64_t c = 0; c < n; ++c) g[c] *= weight[c];
    for (int64_t c = 0; c < n; ++c) xhat[c] = (to_acc(t[c]) - mean) * rstd;
    pad(g_row, n, A(0));
    pad(xhat_row, n, A(0));
    V terms = {}, products = {};
    for_each_vector(n, [&](int64_t c) SPAT_INLINE {
      const V v = load(g + c);
      terms += v;
      products += v * load(xhat + c);
    });
    const A mean_g = sum<A>(terms) / A(n), mean_gx = sum<A>(products) / A(n);
    for (int64_t c = 0; c < n; ++c) g[c] = rstd * (g[c] - mean_g - xhat[c] * mean_gx);
    if (rest) for (int64_t c = 0; c < n; ++c) g[c] += to_acc(rest[c]);
    for (int64_t c = 0; c < n; ++c) dx[c] = from_acc<T>(g[c]);
  }
}

}  // namespace

SPAT_CLONES void layer_norm_cpu(const LayerNorm& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { layer_norm<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void layer_norm_grad_cpu(const LayerNormGrad& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { layer_norm_grad<decltype(t)>(args, begin, end); });
}

}  // namespace spat
