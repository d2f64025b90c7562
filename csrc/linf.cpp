// L-infinity ball on the CPU: random start, and the sign step with both projections, in loops that the compiler vectorises.
#include <algorithm>

#include "cpu.h"

namespace spat {
namespace {

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
    if (a.hash) {
      const int64_t start = sample * a.images.sample_numel;
      uint64_t sum = 0;
      for (int64_t i = first; i < last; ++i) sum += hashed(x_adv[i], i - start);
      add(a.hash, sample, sum);
    }
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

}  // namespace

SPAT_CLONES void linf_random_start_cpu(const LinfRandomStart& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, [&](auto t) SPAT_INLINE { linf_random_start<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void linf_step_cpu(const Step& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, args.grad_dtype, [&](auto t, auto g) SPAT_INLINE { linf_step<decltype(t), decltype(g)>(args, begin, end); });
}

}  // namespace spat
