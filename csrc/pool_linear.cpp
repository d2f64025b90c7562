// Average pooling and the last linear layer on the CPU, and the way back. Samples go four at a time through the weights, which come
// from L2 once for all four. Images are read or written once.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.h"

namespace spat {
namespace {

template <int N>
using Constant = std::integral_constant<int, N>;

// f(first sample, sample count, vectors) over [begin, end), by fours as long as there are as many, then one by one. Both counts are
// constants: eight sums fit the registers and hide the latency of an addition.
template <class F>
SPAT_HD void for_each_tile(int64_t begin, int64_t end, F&& f) {
  for (; begin + 4 <= end; begin += 4) f(begin, Constant<4>{}, Constant<2>{});
  for (; begin < end; ++begin) f(begin, Constant<1>{}, Constant<8>{});
}

// f(0), ..., f(N - 1). As a loop GCC would keep the tile in memory.
template <int N, class F>
SPAT_HD void unrolled(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) SPAT_INLINE { (f(i), ...); }(std::make_integer_sequence<int, N>{});
}

// f(first channel, count) in blocks of kBlock; the count is a constant but for the last.
template <class F>
SPAT_HD void for_each_block(int64_t channels, F&& f) {
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) f(c, Constant<kBlock>{});
  if (c < channels) f(c, int(channels - c));
}

// f(T{}) for the images' type T, among those whose arithmetic is in A.
template <class A, class F>
SPAT_HD void visit_images(const Head& h, F&& f) {
  visit(h.shape.dtype, [&](auto t) SPAT_INLINE {
    if constexpr (std::is_same_v<acc_t<decltype(t)>, A>) f(t);
  });
}

// Weights [classes, width] in whole vectors: where channels are not, a copy with zeros behind every row.
template <class A>
struct Weights {
  int64_t width;
  const A* data;
  std::vector<A> copy;
  SPAT_HD explicit Weights(const Head& h) : data(static_cast<const A*>(h.weight)) {
    const int64_t channels = h.shape.channels;
    width = (channels + kLanes - 1) / kLanes * kLanes;
    if (width == channels) return;
    copy.resize(h.classes * width);
    for (int64_t k = 0; k < h.classes; ++k) std::copy_n(data + k * channels, channels, copy.data() + k * width);
    data = copy.data();
  }
};

template <class A>
SPAT_HD Lanes<A> load(const A* p) {
  Lanes<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// means[c] over the pixels of one sample. Four pixels are added up before they meet the sum: less traffic, and less rounding.
template <class T>
SPAT_HD void pool(const T* x, int64_t pixels, int64_t channels, acc_t<T>* means) {
  using A = acc_t<T>;
  for_each_block(channels, [&](int64_t first, auto n) SPAT_INLINE {
    A total[kBlock] = {};
    const T* p = x + first;
    int64_t pixel = 0;
    for (; pixel + 4 <= pixels; pixel += 4, p += 4 * channels) {
      const T *p1 = p + channels, *p2 = p1 + channels, *p3 = p2 + channels;
      for (int j = 0; j < n; ++j) total[j] += (to_acc(p[j]) + to_acc(p1[j])) + (to_acc(p2[j]) + to_acc(p3[j]));
    }
    for (; pixel < pixels; ++pixel, p += channels)
      for (int j = 0; j < n; ++j) total[j] += to_acc(p[j]);
    for (int j = 0; j < n; ++j) means[first + j] = total[j] / A(pixels);
  });
}

template <class A>
SPAT_HD void pool_linear(const PoolLinear& s, int64_t begin, int64_t end) {
  const Head& h = s.head;
  const int64_t channels = h.shape.channels, classes = h.classes;
  const Weights<A> w(h);
  const A* bias = static_cast<const A*>(s.bias);
  std::vector<A> pooled(4 * w.width);
  for_each_tile(begin, end, [&](int64_t first, auto samples_, auto vectors_) SPAT_INLINE {
    constexpr int samples = samples_, vectors = vectors_;
    A *means = pooled.data(), *logits = static_cast<A*>(s.logits) + first * classes;
    visit_images<A>(h, [&](auto t) SPAT_INLINE {
      const auto* x = static_cast<const decltype(t)*>(s.x) + first * h.pixels * channels;
      for (int i = 0; i < samples; ++i) pool(x + i * h.pixels * channels, h.pixels, channels, means + i * w.width);
    });
    for (int64_t k0 = 0; k0 < classes; k0 += vectors) {
      Lanes<A> dot[samples][vectors] = {};
      for (int64_t c = 0; c < w.width; c += kLanes)
        unrolled<vectors>([&](int v) SPAT_INLINE {
          const Lanes<A> row = load(w.data + std::min(k0 + v, classes - 1) * w.width + c);
          unrolled<samples>([&](int i) SPAT_INLINE { dot[i][v] += load(means + i * w.width + c) * row; });
        });
      unrolled<vectors>([&](int v) SPAT_INLINE {
        const int64_t k = k0 + v;
        if (k < classes)
          unrolled<samples>([&](int i) SPAT_INLINE { logits[i * classes + k] = sum<A>(dot[i][v]) + (bias ? bias[k] : A(0)); });
      });
    }
  });
}

template <class A>
SPAT_HD A largest_magnitude(const A* g, int64_t width) {
  using V = Lanes<A>;
  V largest = {};
  for (int64_t c = 0; c < width; c += kLanes) largest = larger_or_nan(magnitude(load(g + c)), largest);
  return reduce<A>(largest, [](V a, V b) SPAT_INLINE { return larger_or_nan(a, b); });
}

template <class T>
SPAT_HD T where(bool on, T v) {
  if constexpr (sizeof(T) == 2) return {uint16_t(on ? v.bits : 0)};  // GCC 12 does not vectorise a choice of structs
  else return on ? v : T(0);
}

// dx of one sample: `grad`, the same for all pixels, rounded once, where the mask lets it pass.
template <class T>
SPAT_HD void spread(const acc_t<T>* grad, const Head& h, const uint8_t* mask, T* dx) {
  T rounded[kMaxPooled];
  for_each_block(h.shape.channels, [&](int64_t first, auto n) SPAT_INLINE {
    for (int j = 0; j < n; ++j) rounded[first + j] = from_acc<T>(grad[first + j]);
  });
  for (int64_t pixel = 0; pixel < h.pixels; ++pixel, dx += h.shape.channels)
    for_each_block(h.shape.channels, [&](int64_t first, auto n) SPAT_INLINE {
      uint8_t on[kBlock];
      if (mask) unpack_bits(on, mask + pixel * h.shape.octets + first / kOctet, n);
      if (mask) for (int j = 0; j < n; ++j) dx[first + j] = where(on[j], rounded[first + j]);
      else for (int j = 0; j < n; ++j) dx[first + j] = rounded[first + j];
    });
}

template <class A>
SPAT_HD void pool_linear_grad(const PoolLinearGrad& s, int64_t begin, int64_t end) {
  const Head& h = s.head;
  const int64_t channels = h.shape.channels, classes = h.classes;
  const Weights<A> w(h);
  const A* scale = static_cast<const A*>(s.scale);
  std::vector<A> grads(4 * w.width);
  for_each_tile(begin, end, [&](int64_t first, auto samples_, auto vectors_) SPAT_INLINE {
    constexpr int samples = samples_, vectors = vectors_;
    const A* dlogits = static_cast<const A*>(s.dlogits) + first * classes;
    const auto add = [&](int64_t c, auto count_) SPAT_INLINE {
      constexpr int count = count_;
      Lanes<A> total[samples][count] = {};
      for (int64_t first_k = 0; first_k < classes; first_k += kTerms) {
        Lanes<A> g[samples][count] = {};
        for (int64_t k = first_k; k < std::min(first_k + kTerms, classes); ++k)
          unrolled<count>([&](int v) SPAT_INLINE {
            const Lanes<A> row = load(w.data + k * w.width + c + v * kLanes);
            unrolled<samples>([&](int i) SPAT_INLINE { g[i][v] += dlogits[i * classes + k] * row; });
          });
        unrolled<count>([&](int v) SPAT_INLINE { unrolled<samples>([&](int i) SPAT_INLINE { total[i][v] += g[i][v]; }); });
      }
      for (int i = 0; i < samples; ++i) memcpy(grads.data() + i * w.width + c, total[i], sizeof(total[i]));
    };
    int64_t c = 0;
    for (; c + vectors * kLanes <= w.width; c += vectors * kLanes) add(c, vectors_);
    for (; c < w.width; c += kLanes) add(c, Constant<1>{});
    for (int i = 0; i < samples; ++i) {
      A* g = grads.data() + i * w.width;
      std::fill(g + channels, g + w.width, A(0));  // inf * 0 may be there
      const PooledDivisor<A> d(s.factor ? largest_magnitude(g, w.width) : A(0), A(h.pixels), s.factor);
      if (s.factor) static_cast<A*>(s.factor)[first + i] = d.factor;
      for (int64_t c = 0; c < channels; ++c) g[c] /= d.divisor;
      if (scale) for (int64_t c = 0; c < channels; ++c) g[c] *= scale[c];
      const int64_t row = (first + i) * h.pixels;
      visit_images<A>(h, [&](auto t) SPAT_INLINE {
        auto* dx = static_cast<decltype(t)*>(s.dx) + row * channels;
        spread(g, h, s.mask ? s.mask + row * h.shape.octets : nullptr, dx);
      });
    }
  });
}

}  // namespace

SPAT_CLONES void pool_linear_cpu(const PoolLinear& args, int64_t begin, int64_t end) {
  if (args.head.shape.dtype == DType::f64) return pool_linear<double>(args, begin, end);
  pool_linear<float>(args, begin, end);
}
SPAT_CLONES void pool_linear_grad_cpu(const PoolLinearGrad& args, int64_t begin, int64_t end) {
  if (args.head.shape.dtype == DType::f64) return pool_linear_grad<double>(args, begin, end);
  pool_linear_grad<float>(args, begin, end);
}

}  // namespace spat
