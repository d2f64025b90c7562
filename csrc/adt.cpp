// Adversarial distributions on the CPU: samples, and steps with the next sample, in loops that the compiler vectorises.
#include "adt.h"
#include "cpu.h"

namespace spat {
namespace {

constexpr int64_t kNoise = 4 * kLanes;  // the words of kLanes Philox calls

// The noise of a draw for the elements from `block` on, a multiple of kNoise.
SPAT_HD void normals(float (&noise)[kNoise], const int64_t* seed, int64_t draw, int64_t block) {
  uint32_t words[4][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Words r = philox(uint64_t(seed[0]), uint64_t(seed[1]) + uint64_t(draw), uint64_t(block / 4 + lane));
    for (int j = 0; j < 4; ++j) words[j][lane] = r.w[j];
  }
  uint32_t ordered[kNoise];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int j = 0; j < 4; ++j) ordered[4 * lane + j] = words[j][lane];
  for (int i = 0; i < kNoise; ++i) noise[i] = normal(ordered[i]);
}

template <class T>
SPAT_HD void adt_sample(const AdtSample& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  T* __restrict__ x_adv = static_cast<T*>(a.images.x_adv);
  const T* __restrict__ x = static_cast<const T*>(a.images.x);
  const A *__restrict__ mu = static_cast<const A*>(a.mu), *__restrict__ rho = static_cast<const A*>(a.rho);
  const A lo = A(a.images.lo), hi = A(a.images.hi);
  for (int64_t block = begin / kNoise * kNoise; block < end; block += kNoise) {
    float noise[kNoise];
    normals(noise, a.seed, a.draw, block);
    for_each_sample(a.images, std::max(begin, block), std::min(end, block + kNoise),
                    [&](int64_t sample, int64_t first, int64_t last) SPAT_INLINE {
                      const A eps = at<A>(a.eps, sample);
                      for (int64_t i = first; i < last; ++i) {
                        const Perturbation<A> p(mu[i], rho[i], A(noise[i - block]));
                        x_adv[i] = from_acc<T>(spat::adt_sample(p, to_acc(x[i]), eps, lo, hi));
                      }
                    });
  }
}

// In passes over a block, each of which the compiler vectorises.
template <class T, class G>
SPAT_HD void adt_step(const AdtStep& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const AdtSample& s = a.sample;
  T* __restrict__ x_adv = static_cast<T*>(s.images.x_adv);
  const T* __restrict__ x = static_cast<const T*>(s.images.x);
  const G* __restrict__ grad = static_cast<const G*>(a.grad);
  A *__restrict__ mu = static_cast<A*>(s.mu), *__restrict__ rho = static_cast<A*>(s.rho);
  A *__restrict__ sum_mu = static_cast<A*>(a.sum_mu), *__restrict__ sum_rho = static_cast<A*>(a.sum_rho);
  const A lo = A(s.images.lo), hi = A(s.images.hi), lr = A(a.lr), entropy = A(a.entropy);
  const bool steps = a.last;
  for (int64_t block = begin / kNoise * kNoise; block < end; block += kNoise) {
    float noise[kNoise], next[kNoise];
    normals(noise, s.seed, s.draw, block);
    normals(next, s.seed, s.draw + 1, block);
    for_each_sample(s.images, std::max(begin, block), std::min(end, block + kNoise),
                    [&](int64_t sample, int64_t first, int64_t last) SPAT_INLINE {
                      const A eps = at<A>(s.eps, sample), factor = at<A>(a.factor, sample);
                      A along_mu[kNoise], along_rho[kNoise];
                      int32_t unusable = 0;
                      for (int64_t i = first; i < last; ++i) {
                        const A r = A(noise[i - block]);
                        const Perturbation<A> p(mu[i], rho[i], r);
                        const AdtGradients<A> g(p, to_acc(x[i]), to_acc(grad[i]), r, eps, factor, entropy, lo, hi);
                        unusable |= !g.usable;
                        along_mu[i - block] = g.mu, along_rho[i - block] = g.rho;
                      }
                      if (unusable) flag(a.nan_seen, sample);
                      if (sum_mu)
                        for (int64_t i = first; i < last; ++i) {
                          along_mu[i - block] += sum_mu[i], along_rho[i - block] += sum_rho[i];
                          sum_mu[i] = steps ? A(0) : along_mu[i - block], sum_rho[i] = steps ? A(0) : along_rho[i - block];
                        }
                      if (steps)
                        for (int64_t i = first; i < last; ++i) {
                          mu[i] = spat::adt_step(mu[i], along_mu[i - block], lr);
                          rho[i] = spat::adt_step(rho[i], along_rho[i - block], lr);
                        }
                      for (int64_t i = first; i < last; ++i) {
                        const Perturbation<A> p(mu[i], rho[i], A(next[i - block]));
                        x_adv[i] = from_acc<T>(spat::adt_sample(p, to_acc(x[i]), eps, lo, hi));
                      }
                    });
  }
}

}  // namespace

SPAT_CLONES void adt_sample_cpu(const AdtSample& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, [&](auto t) SPAT_INLINE { adt_sample<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void adt_step_cpu(const AdtStep& args, int64_t begin, int64_t end) {
  visit(args.sample.images.dtype, args.grad_dtype, [&](auto t, auto g) SPAT_INLINE {
    adt_step<decltype(t), decltype(g)>(args, begin, end);
  });
}

}  // namespace spat
