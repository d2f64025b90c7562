// L2 ball on the CPU: as in l2.cu, a first pass gathers the sums in fp64 and a second one moves and projects.
#include "cpu.h"

namespace spat {
namespace {

template <class T, class G>
SPAT_HD void l2_step(const Step& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = Lanes<A>;
  using D = Lanes<double>;
  const int64_t n = a.images.sample_numel;
  const V lo = V{} + A(a.images.lo), hi = V{} + A(a.images.hi);
  for (int64_t sample = begin; sample < end; ++sample) {
    T* x_adv = static_cast<T*>(a.images.x_adv) + sample * n;
    const T* x = static_cast<const T*>(a.images.x) + sample * n;
    const G* grad = static_cast<const G*>(a.grad) + sample * n;
    V unusable = {};  // NaN where a gradient was not finite
    const auto direction = [&](int64_t first) SPAT_INLINE {
      const V g = load_lanes(grad, n, first, acc_t<G>(0)), zero = g - g;  // NaN where g is infinite or NaN
      unusable += zero;
      return __builtin_convertvector(V(zero == V{} ? g : V{}), D);
    };
    L2Sums<D> lanes;
    for (int64_t i = 0; i < n; i += kLanes) {
      const V d = load_lanes(x_adv, n, i, A(0)) - load_lanes(x, n, i, A(0));
      lanes.push(direction(i), __builtin_convertvector(d, D));
    }
    if (sum<A>(unusable) != 0) flag(a.nan_seen, sample);

    const L2Sums<double> sums{sum<double>(lanes.gg), sum<double>(lanes.gd), sum<double>(lanes.dd)};
    const L2Move move(sums, at<A>(a.eps, sample), at<A>(a.step_size, sample));
    for (int64_t i = 0; i < n; i += kLanes) {
      const D clean = __builtin_convertvector(load_lanes(x, n, i, A(0)), D);
      const D moved = move.apply<D>(clean, __builtin_convertvector(load_lanes(x_adv, n, i, A(0)), D), direction(i));
      store_lanes(x_adv, n, i, clamp<V>(__builtin_convertvector(moved, V), lo, hi));
    }
  }
}

}  // namespace

SPAT_CLONES void l2_step_cpu(const Step& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, args.grad_dtype,
        [&](auto t, auto g) SPAT_INLINE { l2_step<decltype(t), decltype(g)>(args, begin, end); });
}

}  // namespace spat
