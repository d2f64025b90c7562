// LayerNorm over the channels on the CPU, and its backward to the input. A few rows go through each pass before the next one, in L1:
// the latency of one row's sums, root and divisions hides behind the other rows. A row's sums have one order, whatever the batch and
// the number of threads.
#include "cpu.h"

namespace spat {
namespace {

// Rows at once, as long as they have no more than kHot elements. With twice as many, bf16 rows of 768 are 1.2 times as slow.
constexpr int kRows = 8;
constexpr int64_t kHot = 1024;

// f(first row, count)
template <class F>
SPAT_HD void for_each_group(const Channels& shape, int64_t begin, int64_t end, F&& f) {
  const int64_t rows = std::clamp<int64_t>(kHot / shape.channels, 1, kRows);
  for (int64_t row = begin; row < end; row += rows) f(row, int(std::min(rows, end - row)));
}

// f(first channel, count) for the vectors of a row. The count is the constant kLanes but for the last: with one load_lanes for both,
// every vector would go over the stack.
using Whole = std::integral_constant<int, kLanes>;
template <class F>
SPAT_HD void for_each_vector(int64_t channels, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, Whole{});
  if (c < channels) f(c, int(channels - c));
}

template <class A, class N>
SPAT_HD Lanes<A> load(const A* p, N count, A padding = 0) {
  Lanes<A> v;
  if constexpr (std::is_same_v<N, Whole>) memcpy(&v, p, sizeof(v));
  else v = load_lanes(p, count, 0, padding);
  return v;
}
template <class A, class N>
SPAT_HD void store(A* p, N count, Lanes<A> v) {
  if constexpr (std::is_same_v<N, Whole>) memcpy(p, &v, sizeof(v));
  else store_lanes(p, count, 0, v);
}

// What `rows` rows of t become: `v`, their mean and their rstd.
template <class A>
SPAT_HD void normalise(const LayerNorm& s, const A* t, A* v, int64_t row, int rows) {
  const int64_t n = s.shape.channels;
  const A *weight = static_cast<const A*>(s.weight), *bias = static_cast<const A*>(s.bias);
  A means[kRows], corrections[kRows], rstds[kRows];
  for (int r = 0; r < rows; ++r) {
    Lanes<A> terms = {};
    for_each_vector(n, [&](int64_t c, auto count) SPAT_INLINE { terms += load(t + r * n + c, count); });
    means[r] = sum<A>(terms);
  }
  for (int r = 0; r < rows; ++r) means[r] *= A(s.inverse);
  for (int r = 0; r < rows; ++r) {
    Lanes<A> deviations = {}, squares = {};
    for_each_vector(n, [&](int64_t c, auto count) SPAT_INLINE {
      const Lanes<A> d = load(t + r * n + c, count, means[r]) - means[r];
      deviations += d;
      squares += d * d;
    });
    corrections[r] = sum<A>(deviations);
    rstds[r] = sum<A>(squares);
  }
  for (int r = 0; r < rows; ++r) {
    means[r] += corrections[r] * A(s.inverse);
    rstds[r] = A(1) / std::sqrt(rstds[r] * A(s.inverse) + A(s.eps));
  }
  for (int r = 0; r < rows; ++r)
    for_each_vector(n, [&](int64_t c, auto count) SPAT_INLINE {
      Lanes<A> x = (load(t + r * n + c, count) - means[r]) * rstds[r];
      if (weight) x *= load(weight + c, count);
      if (bias) x += load(bias + c, count);
      store(v + r * n + c, count, x);
    });
  if (s.mean) std::copy_n(means, rows, static_cast<A*>(s.mean) + row);
  if (s.rstd) std::copy_n(rstds, rows, static_cast<A*>(s.rstd) + row);
}

template <class T>
SPAT_HD void layer_norm(const LayerNorm& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for_each_group(s.shape, begin, end, [&](int64_t row, int rows) SPAT_INLINE {
    const int64_t first = row * s.shape.channels, n = rows * s.shape.channels;
    const T *a = from<const T>(s.a, first), *b = from<const T>(s.b, first);
    T *total = from<T>(s.total, first), *out = from<T>(s.out, first);
    if constexpr (std::is_same_v<T, A>) {
      T* t = total ? total : out;  // which has the sum until it has the result
      if (b) for (int64_t j = 0; j < n; ++j) t[j] = a[j] + b[j];
      else if (total) std::copy_n(a, n, total);
      normalise<A>(s, b ? t : a, out, row, rows);
    } else {
      A t[kMaxNormed];
      for (int64_t j = 0; j < n; ++j) t[j] = to_acc(a[j]);
      if (b) for (int64_t j = 0; j < n; ++j) t[j] += to_acc(b[j]);
      if (total) for (int64_t j = 0; j < n; ++j) total[j] = from_acc<T>(t[j]);
      normalise<A>(s, t, t, row, rows);
      for (int64_t j = 0; j < n; ++j) out[j] = from_acc<T>(t[j]);
    }
  });
}

// dx of `rows` rows. It may be the same memory as any of the others.
template <class A>
SPAT_HD void to_input(const LayerNormGrad& s, const A* grad, const A* grad2, const A* t, const A* rest, A* dx, int64_t row,
                      int rows) {
  const int64_t n = s.shape.channels;
  const A *weight = static_cast<const A*>(s.weight);
  const A *means = static_cast<const A*>(s.mean) + row, *rstds = static_cast<const A*>(s.rstd) + row;
  const auto g = [&](int r, int64_t c, auto count) SPAT_INLINE {
    Lanes<A> v = load(grad + r * n + c, count);
    if (grad2) v += load(grad2 + r * n + c, count);
    if (weight) v *= load(weight + c, count);
    return v;
  };
  const auto xhat = [&](int r, int64_t c, auto count) SPAT_INLINE {
    return (load(t + r * n + c, count, means[r]) - means[r]) * rstds[r];
  };
  A mean_g[kRows], mean_gx[kRows];
  for (int r = 0; r < rows; ++r) {
    Lanes<A> terms = {}, products = {};
    for_each_vector(n, [&](int64_t c, auto count) SPAT_INLINE {
      const Lanes<A> v = g(r, c, count);
      terms += v;
      products += v * xhat(r, c, count);
    });
    mean_g[r] = sum<A>(terms);
    mean_gx[r] = sum<A>(products);
  }
  for (int r = 0; r < rows; ++r) mean_g[r] *= A(s.inverse), mean_gx[r] *= A(s.inverse);
  for (int r = 0; r < rows; ++r)
    for_each_vector(n, [&](int64_t c, auto count) SPAT_INLINE {
      Lanes<A> v = rstds[r] * (g(r, c, count) - mean_g[r] - xhat(r, c, count) * mean_gx[r]);
      if (rest) v += load(rest + r * n + c, count);
      store(dx + r * n + c, count, v);
    });
}

template <class T>
SPAT_HD void layer_norm_grad(const LayerNormGrad& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for_each_group(s.shape, begin, end, [&](int64_t row, int rows) SPAT_INLINE {
    const int64_t first = row * s.shape.channels, n = rows * s.shape.channels;
    const T *grad = from<const T>(s.grad, first), *grad2 = from<const T>(s.grad2, first);
    const T *t = from<const T>(s.t, first), *rest = from<const T>(s.residual, first);
    T* dx = from<T>(s.dx, first);
    if constexpr (std::is_same_v<T, A>) {
      to_input<A>(s, grad, grad2, t, rest, dx, row, rows);
    } else {
      A g[kMaxNormed], x[kMaxNormed];
      for (int64_t j = 0; j < n; ++j) g[j] = to_acc(grad[j]);
      if (grad2) for (int64_t j = 0; j < n; ++j) g[j] += to_acc(grad2[j]);
      for (int64_t j = 0; j < n; ++j) x[j] = to_acc(t[j]);
      to_input<A>(s, g, nullptr, x, nullptr, g, row, rows);
      if (rest) for (int64_t j = 0; j < n; ++j) g[j] += to_acc(rest[j]);
      for (int64_t j = 0; j < n; ++j) dx[j] = from_acc<T>(g[j]);
    }
  });
}

}  // namespace

SPAT_CLONES void layer_norm_cpu(const LayerNorm& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { layer_norm<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void layer_norm_grad_cpu(const LayerNormGrad& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { layer_norm_grad<decltype(t)>(args, begin, end); });
}

}  // namespace spat
