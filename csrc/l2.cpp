// L2 ball on the CPU: as in l2.cu, a first pass gathers the sums in fp64 and a second one moves and projects.
#include <algorithm>

#include "cpu.h"

namespace spat {
namespace {

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
    L2Sums<double> sums;
    for (;;) {
      L2Sums<D> lanes;
      for (int64_t i = 0; i < n; i += kLanes) {
        const V d = load_lanes(x_adv, n, i, A(0)) - load_lanes(x, n, i, A(0));
        lanes.push(__builtin_convertvector(direction(i), D), __builtin_convertvector(d, D));
      }
      sums = {sum<double>(lanes.gg), sum<double>(lanes.gd), sum<double>(lanes.dd)};
      const bool usable = sum<A>(unusable) == 0;
      if (!usable) flag(a.nan_seen, sample);
      if (sums.gg != 0 || !usable || random) break;
      random = true;  // once more: the gradient is zero everywhere
    }

    const L2Move move(sums, at<A>(a.eps, sample), at<A>(a.step_size, sample));
    for (int64_t i = 0; i < n; i += kLanes) {
      const V clean = load_lanes(x, n, i, A(0)), d = load_lanes(x_adv, n, i, A(0)) - clean;
      const D moved = move.apply<D>(__builtin_convertvector(clean, D), __builtin_convertvector(d, D),
                                    __builtin_convertvector(direction(i), D));
      store_lanes(x_adv, n, i, clamp<V>(__builtin_convertvector(moved, V), lo, hi));
    }
  }
}

}  // namespace

SPAT_CLONES void l2_step_cpu(const L2Step& args, int64_t begin, int64_t end) {
  visit(args.step.images.dtype, args.step.grad_dtype,
        [&](auto t, auto g) SPAT_INLINE { l2_step<decltype(t), decltype(g)>(args, begin, end); });
}

}  // namespace spat
