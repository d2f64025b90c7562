// The ops on the CPU: math.h over loops that the compiler vectorises, or over explicit vectors where it does not, compiled once
// for each level of the x86-64 instruction set (the loader picks, so one wheel serves every machine). Threads come from the
// caller, as [begin, end).
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "math.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPAT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPAT_CLONES
#endif

namespace spat {
namespace {

constexpr int kLanes = 16;  // one AVX-512 register of fp32; on smaller machines the compiler splits it

// A vector of kLanes A: arithmetic, comparisons and ?: go lane by lane.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <class A>
using Lanes = typename LanesOf<A>::type;

// All lanes by `op`, in four halvings.
template <class A, class Op>
SPAT_HD A reduce(Lanes<A> v, Op op) {
  v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}
template <class A>
SPAT_HD A sum(Lanes<A> v) {
  return reduce<A>(v, [](Lanes<A> a, Lanes<A> b) SPAT_INLINE { return a + b; });
}

SPAT_HD Lanes<float> exp_nonpositive(Lanes<float> x) { return exp_polynomial<Lanes<float>, Lanes<uint32_t>>(x); }
SPAT_HD Lanes<double> exp_nonpositive(Lanes<double> x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = exp(x[lane]);
  return x;
}

// Elements [first, first + kLanes) of p, `padding` from n on. By memcpy, since vectors filled lane by lane go through scalars.
template <class T>
SPAT_HD Lanes<acc_t<T>> load_lanes(const T* p, int64_t n, int64_t first, acc_t<T> padding) {
  using A = acc_t<T>;
  A chunk[kLanes];
  if (std::is_same_v<T, A> && first + kLanes <= n) {
    memcpy(chunk, p + first, sizeof(chunk));
  } else if (first + kLanes <= n) {
    for (int lane = 0; lane < kLanes; ++lane) chunk[lane] = to_acc(p[first + lane]);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) chunk[lane] = first + lane < n ? to_acc(p[first + lane]) : padding;
  }
  Lanes<A> v;
  memcpy(&v, chunk, sizeof(v));
  return v;
}

template <class T>
SPAT_HD void store_lanes(T* p, int64_t n, int64_t first, Lanes<acc_t<T>> v) {
  acc_t<T> chunk[kLanes];
  memcpy(chunk, &v, sizeof(v));
  if (std::is_same_v<T, acc_t<T>> && first + kLanes <= n) {
    memcpy(p + first, chunk, sizeof(chunk));
  } else if (first + kLanes <= n) {
    for (int lane = 0; lane < kLanes; ++lane) p[first + lane] = from_acc<T>(chunk[lane]);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)  // a variable bound would make it a call of memcpy
      if (first + lane < n) p[first + lane] = from_acc<T>(chunk[lane]);
  }
}

// f(sample, first, last) for the stretch of elements that each sample has in [begin, end)
template <class F>
SPAT_HD void for_each_sample(const Images& images, int64_t begin, int64_t end, F&& f) {
  while (begin < end) {
    const int64_t sample = sample_of(images, begin), last = std::min(end, (sample + 1) * images.sample_numel);
    f(sample, begin, last);
    begin = last;
  }
}

SPAT_HD void flag(uint8_t* seen, int64_t sample) {
  if (seen) __atomic_store_n(seen + sample, uint8_t(1), __ATOMIC_RELAXED);  // other threads may set it too
}

template <class T, class G>
SPAT_HD void linf_step(const Step& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* __restrict__ x_adv = static_cast<T*>(a.images.x_adv);
  const T* __restrict__ x = static_cast<const T*>(a.images.x);
  const G* __restrict__ grad = static_cast<const G*>(a.grad);
  const A lo = A(a.images.lo), hi = A(a.images.hi);
  for_each_sample(a.images, begin, end, [&](int64_t sample, int64_t first, int64_t last) SPAT_INLINE {
    const A eps = at<A>(a.eps, sample), step_size = at<A>(a.step_size, sample);
    int32_t nan = 0;
    for (int64_t i = first; i < last; ++i) {
      const A g = to_acc(grad[i]);
      nan |= g != g;
      x_adv[i] = from_acc<T>(spat::linf_step(to_acc(x_adv[i]), to_acc(x[i]), g, eps, step_size, lo, hi));
    }
    if (nan) flag(a.nan_seen, sample);
  });
}

template <class T>
SPAT_HD void linf_random_start(const LinfRandomStart& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* __restrict__ x_adv = static_cast<T*>(a.images.x_adv);
  const T* __restrict__ x = static_cast<const T*>(a.images.x);
  const A lo = A(a.images.lo), hi = A(a.images.hi);
  constexpr int64_t kBlock = 4 * kLanes;  // the words of kLanes Philox calls
  for (int64_t block = begin / kBlock * kBlock; block < end; block += kBlock) {
    float unit[kBlock];
    uint32_t words[4][kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Words r = philox(uint64_t(a.seed[0]), uint64_t(a.seed[1]), uint64_t(block / 4 + lane));
      for (int j = 0; j < 4; ++j) words[j][lane] = r.w[j];
    }
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < 4; ++j) unit[4 * lane + j] = symmetric_unit(words[j][lane]);
    for_each_sample(a.images, std::max(begin, block), std::min(end, block + kBlock),
                    [&](int64_t sample, int64_t first, int64_t last) SPAT_INLINE {
                      const A eps = at<A>(a.eps, sample);
                      for (int64_t i = first; i < last; ++i)
                        x_adv[i] = from_acc<T>(spat::linf_random_start(to_acc(x[i]), unit[i - block], eps, lo, hi));
                    });
  }
}

template <class T, class G>
SPAT_HD void l2_step(const L2Step& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = Lanes<A>;
  using D = Lanes<double>;
  const Step& a = args.step;
  const int64_t n = a.images.sample_numel;
  const V lo = V{} + A(a.images.lo), hi = V{} + A(a.images.hi);
  for (int64_t sample = begin; sample < end; ++sample) {
    T* x_adv = static_cast<T*>(a.images.x_adv) + sample * n;
    const T* x = static_cast<const T*>(a.images.x) + sample * n;
    const G* grad = static_cast<const G*>(a.grad) + sample * n;
    bool random = false;
    Lanes<A> unusable = {};  // NaN where a gradient was not finite
    const auto direction = [&](int64_t first) SPAT_INLINE {
      V g = load_lanes(grad, n, first, acc_t<G>(0));
      if (random) {
        for (int64_t i = first; i < std::min(n, first + kLanes); ++i)
          g[i - first] = random_sign(philox(uint64_t(args.seed[0]), uint64_t(args.seed[1]), uint64_t(i) / 4).w[i % 4]);
      }
      const V zero = g - g;  // NaN where g is infinite or NaN
      unusable += zero;
      return V(zero == V{} ? g : V{});
    };
    const auto gather = [&]() SPAT_INLINE {
      L2Sums<D> sums;
      for (int64_t i = 0; i < n; i += kLanes) {
        const V d = load_lanes(x_adv, n, i, A(0)) - load_lanes(x, n, i, A(0));
        sums.push(__builtin_convertvector(direction(i), D), __builtin_convertvector(d, D));
      }
      return L2Sums<double>{sum<double>(sums.gg), sum<double>(sums.gd), sum<double>(sums.dd)};
    };

    L2Sums<double> sums = gather();
    const bool usable = sum<A>(unusable) == 0;
    if (!usable) flag(a.nan_seen, sample);
    random = sums.gg == 0 && usable;
    if (random) sums = gather();

    const L2Move move(sums, at<A>(a.eps, sample), at<A>(a.step_size, sample));
    for (int64_t i = 0; i < n; i += kLanes) {
      const V clean = load_lanes(x, n, i, A(0)), d = load_lanes(x_adv, n, i, A(0)) - clean;
      const D moved = move.apply<D>(__builtin_convertvector(clean, D), __builtin_convertvector(d, D),
                                    __builtin_convertvector(direction(i), D));
      store_lanes(x_adv, n, i, clamp<V>(__builtin_convertvector(moved, V), lo, hi));
    }
  }
}

// Lane k - k0 of a vector that begins at class k0, made `value`, where it has class k (-1: never).
template <class V, class A>
SPAT_HD void replace(V& v, int64_t k0, int64_t k, A value) {
  if (k >= k0 && k < k0 + kLanes) v[k - k0] = value;
}

// The largest logit of the classes other than `skip` (-1: of all).
template <class T>
SPAT_HD acc_t<T> row_max(const T* row, int64_t classes, int64_t skip) {
  using V = Lanes<acc_t<T>>;
  const acc_t<T> start = lowest<acc_t<T>>();
  V largest = V{} + start;
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
    V z = load_lanes(row, classes, k0, start);
    replace(z, k0, skip, start);
    largest = largest > z ? largest : z;
  }
  return reduce<acc_t<T>>(largest, [](V a, V b) SPAT_INLINE { return a > b ? a : b; });
}

// e^(z - max) of one row, chunk by chunk. The first 1024 classes are kept from the sum for the gradient, later ones computed again.
template <class T>
struct Exponentials {
  using A = acc_t<T>;
  static constexpr int64_t kKept = 1024;
  const T* row;
  int64_t classes;
  A max;
  Lanes<A> kept[kKept / kLanes];

  SPAT_HD Exponentials(const T* row, int64_t classes, A max) : row(row), classes(classes), max(max) {}
  SPAT_HD Lanes<A> compute(int64_t k0) const { return exp_nonpositive(load_lanes(row, classes, k0, A(-INFINITY)) - max); }
  SPAT_HD Lanes<A> at(int64_t k0) const { return k0 < kKept ? kept[k0 / kLanes] : compute(k0); }

  // The sum over the classes other than `skip` (-1: over all). Comes before `at`.
  SPAT_HD A sum(int64_t skip) {
    Lanes<A> total = {};
    for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
      Lanes<A> e = compute(k0);
      if (k0 < kKept) kept[k0 / kLanes] = e;
      replace(e, k0, skip, A(0));  // where it may be anything: z_y - max can be positive
      total += e;
    }
    return spat::sum<A>(total);
  }
};

template <class T>
SPAT_HD void fill_nan(const Rows& rows, int64_t row) {
  T* dlogits = static_cast<T*>(rows.dlogits) + row * rows.classes;
  for (int64_t k = 0; k < rows.classes; ++k) dlogits[k] = from_acc<T>(acc_t<T>(NAN));
  if (rows.loss) static_cast<acc_t<T>*>(rows.loss)[row] = NAN;
}

SPAT_HD bool is_class(int64_t label, const Rows& rows) { return label >= 0 && label < rows.classes; }

template <class T>
SPAT_HD void lsce_grad(const LsceGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes, label = a.labels[row];
  if (!is_class(label, a.rows)) return fill_nan<T>(a.rows, row);
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  const A sign = a.targeted ? A(-1) : A(1), scale = sign * A(a.rows.scale);
  const A alpha = A(a.alpha), off_target = A(a.alpha / double(classes - 1));
  const A z_y = to_acc(logits[label]);
  Exponentials<T> e(logits, classes, row_max(logits, classes, label));
  const LsceRow<A> stats(e.max, e.sum(label), z_y, a.normalize);
  Lanes<A> gaps = {};
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
    if (a.rows.loss) gaps += z_y - load_lanes(logits, classes, k0, z_y);
    store_lanes(dlogits, classes, k0, stats.other_grad(e.at(k0), off_target, scale));
  }
  dlogits[label] = from_acc<T>(stats.label_grad(alpha, scale));
  if (a.rows.loss) static_cast<A*>(a.rows.loss)[row] = sign * stats.loss(sum<A>(gaps), alpha, off_target);
}

template <class T>
SPAT_HD void kl_grad(const KlGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes;
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  const A* probs = static_cast<const A*>(a.probs) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  Exponentials<T> e(logits, classes, row_max(logits, classes, -1));
  const A total = e.sum(-1);
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
    const Lanes<A> p = e.at(k0) / total;
    store_lanes(dlogits, classes, k0, A(a.rows.scale) * (p - load_lanes(probs, classes, k0, A(0))));
  }
  if (a.rows.loss) {
    const A log_total = e.max + A(log(total));
    Lanes<A> terms = {};
    for (int64_t k = 0; k < classes; ++k) terms[k % kLanes] += kl_term(probs[k], to_acc(logits[k]) - log_total);
    static_cast<A*>(a.rows.loss)[row] = sum<A>(terms);
  }
}

template <class T>
SPAT_HD bool has_nan(const T* row, int64_t classes) {
  bool nan = false;
  for (int64_t k = 0; k < classes; ++k) nan |= to_acc(row[k]) != to_acc(row[k]);
  return nan;
}

// The N first logits in rank order, without class `skip` (-1: none is skipped).
template <int N, class T>
SPAT_HD void rank(const T* row, int64_t classes, int64_t skip, Ranked<acc_t<T>> (&best)[N]) {
  for (Ranked<acc_t<T>>& b : best) b = {-INFINITY, classes};
  for (int64_t k = 0; k < classes; ++k) {
    Ranked<acc_t<T>> candidate{to_acc(row[k]), k};
    if (k == skip || !before(candidate, best[N - 1])) continue;  // most logits end here
    for (Ranked<acc_t<T>>& b : best)
      if (before(candidate, b)) std::swap(candidate, b);
  }
}

template <class T>
SPAT_HD void margin_grad(const MarginGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes, label = a.labels[row];
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  if (!is_class(label, a.rows) || has_nan(logits, classes)) return fill_nan<T>(a.rows, row);
  Ranked<A> other[1];
  rank(logits, classes, label, other);
  const MarginRow<A> margin(other[0].z, to_acc(logits[label]), A(a.kappa), a.targeted);
  for (int64_t k = 0; k < classes; ++k) dlogits[k] = from_acc<T>(margin.grad(k, other[0].k, label, A(a.rows.scale)));
  if (a.rows.loss) static_cast<A*>(a.rows.loss)[row] = margin.loss;
}

template <class T>
SPAT_HD void dlr_grad(const DlrGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes, label = a.labels[row], target = a.targets ? a.targets[row] : 0;
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  if (!is_class(label, a.rows) || !is_class(target, a.rows) || has_nan(logits, classes)) return fill_nan<T>(a.rows, row);
  Ranked<A> best[4];
  rank(logits, classes, -1, best);
  const Ranked<A> up = a.targets ? Ranked<A>{to_acc(logits[target]), target} : best[0].k == label ? best[1] : best[0];
  const DlrRow<A> dlr(best, {to_acc(logits[label]), label}, up, a.targets != nullptr);
  for (int64_t k = 0; k < classes; ++k) dlogits[k] = from_acc<T>(dlr.grad(k, A(a.rows.scale)));
  if (a.rows.loss) static_cast<A*>(a.rows.loss)[row] = dlr.loss;
}

template <class T>
SPAT_HD void keep_best(const KeepBest& a, int64_t sample) {
  using A = acc_t<T>;
  A& best_loss = static_cast<A*>(a.best_loss)[sample];
  const A loss = static_cast<const A*>(a.loss)[sample];
  const bool success = a.success && a.success[sample], best_success = a.best_success && a.best_success[sample];
  if (!takes_over(loss, success, best_loss, best_success)) return;
  best_loss = loss;
  if (a.best_success) a.best_success[sample] = success;
  memcpy(static_cast<T*>(a.best) + sample * a.sample_numel, static_cast<const T*>(a.x_adv) + sample * a.sample_numel,
         sizeof(T) * a.sample_numel);
}

// ---- between convolutions ----

// These ops run through blocks of this many elements, pass after pass over arrays in L1 that the compiler vectorises for every
// instruction set (explicit vectors of 16 bits it does not: GCC 12). Twice and half the size are slower.
constexpr int kBlock = 256, kOctet = 8;

// scale or shift for elements that run on from row to row, so that a block may begin at any channel; `absent` changes nothing.
template <class A>
std::vector<A> cyclic(const void* values, int64_t channels, int64_t size, A absent) {
  std::vector<A> table(size, absent);
  if (values)
    for (int64_t i = 0; i < size; i += channels)
      std::copy_n(static_cast<const A*>(values), std::min(channels, size - i), table.begin() + i);
  return table;
}

// f(first element, its channel, its mask byte, element count) over rows [begin, end) in blocks. The count is a constant nearly
// always. Where octets are whole, a mask is one row of bits and so are the images; elsewhere every row has its own blocks.
template <class F>
SPAT_HD void for_each_block(const Channels& shape, int64_t begin, int64_t end, F&& f) {
  const int64_t n = shape.channels, rows = n % kOctet ? 1 : end - begin;
  for (int64_t row = begin; row < end; row += rows) {
    int64_t channel = 0;
    for (int64_t i = 0; i < rows * n; i += kBlock) {
      const int64_t first = row * n + i, octet = row * shape.octets + i / kOctet;
      if (i + kBlock <= rows * n) f(first, channel, octet, std::integral_constant<int, kBlock>{});
      else f(first, channel, octet, int(rows * n - i));
      channel = (channel + kBlock) % n;
    }
  }
}

// The longest stretch of a cyclic table that for_each_block asks for.
SPAT_HD int64_t cycle(const Channels& shape, int64_t begin, int64_t end) {
  return std::min((end - begin) * shape.channels, shape.channels + kBlock);
}

// Null stays null.
template <class T, class V>
SPAT_HD T* from(V* p, int64_t first) {
  return p ? static_cast<T*>(p) + first : nullptr;
}

// One byte a channel, 0 where the bit is, in both directions. Octets are multiplied as a whole: no two bits meet.
constexpr uint64_t kOnes = 0x0101010101010101u, kDiagonal = 0x8040201008040201u;

SPAT_HD void pack_bits(uint8_t* mask, const uint8_t (&on)[kBlock], int n) {
  for (int j = 0; j < n; j += kOctet) {
    uint64_t octet;
    memcpy(&octet, on + j, sizeof(octet));
    mask[j / kOctet] = uint8_t(octet * kOnes >> 56);
  }
}
SPAT_HD void unpack_bits(uint8_t (&on)[kBlock], const uint8_t* mask, int n) {
  for (int j = 0; j < n; j += kOctet) {
    const uint64_t octet = mask[j / kOctet] * kOnes & kDiagonal;
    memcpy(on + j, &octet, sizeof(octet));
  }
}

template <class T>
SPAT_HD void scale_shift_relu(const ScaleShiftRelu& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t size = cycle(s.shape, begin, end);
  const auto scales = cyclic<A>(s.scale, s.shape.channels, size, A(1)), shifts = cyclic<A>(s.shift, s.shape.channels, size, A(-0.));
  for_each_block(s.shape, begin, end, [&](int64_t first, int64_t channel, int64_t octet, auto n) SPAT_INLINE {
    const T *a = from<const T>(s.a, first), *b = from<const T>(s.b, first);
    T *total = from<T>(s.total, first), *out = from<T>(s.out, first);
    const A *scale = scales.data() + channel, *shift = shifts.data() + channel;
    A v[kBlock];
    for (int j = 0; j < n; ++j) v[j] = to_acc(a[j]);
    if (b) for (int j = 0; j < n; ++j) v[j] += to_acc(b[j]);
    if (total) for (int j = 0; j < n; ++j) total[j] = from_acc<T>(v[j]);
    for (int j = 0; j < n; ++j) v[j] = v[j] * scale[j] + shift[j];
    if (s.relu) {
      uint8_t on[kBlock];
      for (int j = 0; j < n; ++j) {
        const bool off = stopped(v[j]);
        on[j] = off ? 0 : 1 << j % kOctet;
        v[j] = off ? A(0) : v[j];
      }
      for (int j = n; j % kOctet; ++j) on[j] = 0;
      if (s.mask) pack_bits(s.mask + octet, on, n);
    }
    for (int j = 0; j < n; ++j) out[j] = from_acc<T>(v[j]);
  });
}

template <class T>
SPAT_HD void scale_shift_relu_grad(const ScaleShiftReluGrad& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const auto scales = cyclic<A>(s.scale, s.shape.channels, cycle(s.shape, begin, end), A(1));
  for_each_block(s.shape, begin, end, [&](int64_t first, int64_t channel, int64_t octet, auto n) SPAT_INLINE {
    const T *grad = from<const T>(s.grad, first), *grad2 = from<const T>(s.grad2, first), *rest = from<const T>(s.residual, first);
    T* dx = from<T>(s.dx, first);
    const A *scale = scales.data() + channel, off = rest ? A(-0.) : A(0);  // what leaves `rest` as it is, its -0 too
    A g[kBlock];
    for (int j = 0; j < n; ++j) g[j] = to_acc(grad[j]);
    if (grad2) for (int j = 0; j < n; ++j) g[j] += to_acc(grad2[j]);
    for (int j = 0; j < n; ++j) g[j] *= scale[j];
    if (s.mask) {
      uint8_t on[kBlock];
      unpack_bits(on, s.mask + octet, n);
      for (int j = 0; j < n; ++j) g[j] = on[j] ? g[j] : off;
    }
    if (rest) for (int j = 0; j < n; ++j) g[j] += to_acc(rest[j]);
    for (int j = 0; j < n; ++j) dx[j] = from_acc<T>(g[j]);
  });
}

// Rows [begin, end), kPixels of them at once, channel by channel; loops of 16 would be unrolled instead of vectorised (GCC 12).
constexpr int kPixels = 64;
template <class T>
SPAT_HD void split_image(const SplitImage& s, int64_t begin, int64_t end) {
  const int64_t n = s.x_channels, width = s.shape.channels;
  for (int64_t first = begin; first < end; first += kPixels) {
    const int rows = int(std::min<int64_t>(kPixels, end - first));
    const float* x = s.x + first * n;
    T* out = static_cast<T*>(s.out) + first * width;
    memset(out, 0, sizeof(T) * rows * width);
    for (int64_t c = 0; c < n; ++c) {
      float v[kPixels] = {};
      T hi[kPixels], lo[kPixels];
      for (int row = 0; row < rows; ++row) v[row] = x[row * n + c];
      if (s.scale) for (float& lane : v) lane *= s.scale[c];
      if (s.shift) for (float& lane : v) lane += s.shift[c];
      for (int row = 0; row < kPixels; ++row) {
        hi[row] = from_acc<T>(v[row]);
        lo[row] = from_acc<T>(left_over(v[row], to_acc(hi[row])));
      }
      for (int row = 0; row < rows; ++row) out[row * width + c] = hi[row], out[row * width + n + c] = lo[row];
    }
  }
}

// ---- training images ----

// Crops are of bytes, and one long loop over all of a sample makes floats of them: its rows are too short to vectorise well.

// A crop over zeros, pixels as they are in the image.
template <int C>  // the channels, 0: any number
SPAT_HD void crop_pixels(const CropFlip& s, const uint8_t* image, Crop crop, uint8_t* __restrict__ pixels) {
  const int64_t height = s.height, width = s.width, channels = C ? C : s.channels;
  // what of the crop is inside the image, before the flip
  const int64_t top = std::max<int64_t>(0, -crop.y), bottom = std::min(height, height - crop.y);
  const int64_t left = std::max<int64_t>(0, -crop.x), n = std::min(width, width - crop.x) - left;
  if (n <= 0) return;
  for (int64_t h = top; h < bottom; ++h) {
    const uint8_t* __restrict__ from = image + ((h + crop.y) * width + left + crop.x) * channels;
    uint8_t* to = pixels + (h * width + (crop.flip ? width - 1 - left : left)) * channels;
    if (!crop.flip) memcpy(to, from, n * channels);
    else for (int64_t i = 0; i < n; ++i) memcpy(to - i * channels, from + i * channels, channels);
  }
}

SPAT_HD void to_planes(const uint8_t* __restrict__ pixels, int64_t n, int64_t channels, uint8_t* planes) {
  if (channels == 3) {  // compilers have shuffles for three streams
    uint8_t *__restrict__ r = planes, *__restrict__ g = planes + n, *__restrict__ b = planes + 2 * n;
    for (int64_t i = 0; i < n; ++i) r[i] = pixels[3 * i], g[i] = pixels[3 * i + 1], b[i] = pixels[3 * i + 2];
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < n; ++i) planes[c * n + i] = pixels[i * channels + c];
  }
}

SPAT_HD void crop_flip(const CropFlip& s, int64_t begin, int64_t end) {
  const int64_t n = s.sample_numel, channels = s.channels;
  const bool moves = s.pad || s.flip, planar = s.inner != channels;
  std::vector<uint8_t> pixels(moves ? n : 0), planes(planar ? n : 0);
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t row = s.rows[sample];
    const bool known = row >= 0 && row < s.count;
    const uint8_t* bytes = known ? s.images + row * n : nullptr;
    if (known && moves) {
      const Crop crop = crop_of(s, sample);
      if (s.pad) std::fill(pixels.begin(), pixels.end(), uint8_t(0));
      if (channels == 1) crop_pixels<1>(s, bytes, crop, pixels.data());
      else if (channels == 3) crop_pixels<3>(s, bytes, crop, pixels.data());
      else crop_pixels<0>(s, bytes, crop, pixels.data());
      bytes = pixels.data();
    }
    if (known && planar) {
      to_planes(bytes, n / channels, channels, planes.data());
      bytes = planes.data();
    }
    visit(s.dtype, [&](auto t) SPAT_INLINE {
      using T = decltype(t);
      T* __restrict__ out = static_cast<T*>(s.out) + sample * n;
      if (!known) std::fill_n(out, n, from_acc<T>(acc_t<T>(NAN)));
      else for (int64_t i = 0; i < n; ++i) out[i] = from_acc<T>(over_255<acc_t<T>>(bytes[i]));
    });
  }
}

}  // namespace

SPAT_CLONES void linf_random_start_cpu(const LinfRandomStart& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, [&](auto t) SPAT_INLINE { linf_random_start<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void linf_step_cpu(const Step& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, args.grad_dtype, [&](auto t, auto g) SPAT_INLINE { linf_step<decltype(t), decltype(g)>(args, begin, end); });
}
SPAT_CLONES void l2_step_cpu(const L2Step& args, int64_t begin, int64_t end) {
  visit(args.step.images.dtype, args.step.grad_dtype,
        [&](auto t, auto g) SPAT_INLINE { l2_step<decltype(t), decltype(g)>(args, begin, end); });
}
SPAT_CLONES void lsce_grad_cpu(const LsceGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) SPAT_INLINE {
    for (int64_t row = begin; row < end; ++row) lsce_grad<decltype(t)>(args, row);
  });
}
SPAT_CLONES void kl_grad_cpu(const KlGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) SPAT_INLINE {
    for (int64_t row = begin; row < end; ++row) kl_grad<decltype(t)>(args, row);
  });
}
SPAT_CLONES void margin_grad_cpu(const MarginGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) SPAT_INLINE {
    for (int64_t row = begin; row < end; ++row) margin_grad<decltype(t)>(args, row);
  });
}
SPAT_CLONES void dlr_grad_cpu(const DlrGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) SPAT_INLINE {
    for (int64_t row = begin; row < end; ++row) dlr_grad<decltype(t)>(args, row);
  });
}
SPAT_CLONES void scale_shift_relu_cpu(const ScaleShiftRelu& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { scale_shift_relu<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void scale_shift_relu_grad_cpu(const ScaleShiftReluGrad& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { scale_shift_relu_grad<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void split_image_cpu(const SplitImage& args, int64_t begin, int64_t end) {
  if (args.shape.dtype == DType::bf16) return split_image<bfloat16>(args, begin, end);
  split_image<half>(args, begin, end);
}
SPAT_CLONES void crop_flip_cpu(const CropFlip& args, int64_t begin, int64_t end) { crop_flip(args, begin, end); }
void keep_best_cpu(const KeepBest& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&](auto t) SPAT_INLINE {
    for (int64_t sample = begin; sample < end; ++sample) keep_best<decltype(t)>(args, sample);
  });
}

}  // namespace spat
