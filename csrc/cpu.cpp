// The ops on the CPU: plain loops over math.h that the compiler vectorises, once for each level of the x86-64 instruction set
// (the loader picks at run time, so one wheel serves every machine). Threads come from the caller, as [begin, end).
#include <algorithm>

#include "math.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// `flatten` pulls the templates below into each clone; without it they would keep the baseline instruction set
#define SPAT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), flatten))
#else
#define SPAT_CLONES
#endif

namespace spat {
namespace {

constexpr int kLanes = 16;  // one AVX-512 register of fp32

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
  for_each_sample(a.images, begin, end, [&](int64_t sample, int64_t first, int64_t last) {
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
                    [&](int64_t sample, int64_t first, int64_t last) {
                      const A eps = at<A>(a.eps, sample);
                      for (int64_t i = first; i < last; ++i)
                        x_adv[i] = from_acc<T>(spat::linf_random_start(to_acc(x[i]), unit[i - block], eps, lo, hi));
                    });
  }
}

template <class T, class G>
SPAT_HD void l2_step(const L2Step& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const Step& a = args.step;
  const int64_t n = a.images.sample_numel;
  for (int64_t sample = begin; sample < end; ++sample) {
    T* __restrict__ x_adv = static_cast<T*>(a.images.x_adv) + sample * n;
    const T* __restrict__ x = static_cast<const T*>(a.images.x) + sample * n;
    const G* __restrict__ grad = static_cast<const G*>(a.grad) + sample * n;
    const auto direction = [&](int64_t i) {
      const A g = to_acc(grad[i]);
      return finite(g) ? g : A(0);
    };
    const auto random_direction = [&](int64_t i) {
      return A(random_sign(philox(uint64_t(args.seed[0]), uint64_t(args.seed[1]), uint64_t(i) / 4).w[i % 4]));
    };
    const auto sums = [&](const auto& g) {
      L2Sums lanes[kLanes];
      for (int64_t i = 0; i < n; i += kLanes)
        for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, n - i); ++lane)
          lanes[lane].push(g(i + lane), to_acc(x_adv[i + lane]) - to_acc(x[i + lane]));
      L2Sums total;
      for (const L2Sums& s : lanes) total.gg += s.gg, total.gd += s.gd, total.dd += s.dd;
      return total;
    };
    const auto move = [&](const L2Sums& s, const auto& g) {
      const L2Move m(s, at<A>(a.eps, sample), at<A>(a.step_size, sample));
      for (int64_t i = 0; i < n; ++i)
        x_adv[i] = from_acc<T>(m.apply(to_acc(x_adv[i]), to_acc(x[i]), g(i), A(a.images.lo), A(a.images.hi)));
    };
    int32_t unusable = 0;
    for (int64_t i = 0; i < n; ++i) unusable |= !finite(to_acc(grad[i]));
    if (unusable) flag(a.nan_seen, sample);
    const L2Sums s = sums(direction);
    if (s.gg == 0 && !unusable) {
      move(sums(random_direction), random_direction);
    } else {
      move(s, direction);
    }
  }
}

// A chunk of a row in registers: kLanes logits, -inf (or q = 0) beyond the last class.
template <class T>
SPAT_HD void load_chunk(const T* row, int64_t classes, int64_t k0, acc_t<T> (&z)[kLanes], acc_t<T> padding) {
  if (k0 + kLanes <= classes) {
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = to_acc(row[k0 + lane]);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) z[lane] = k0 + lane < classes ? to_acc(row[k0 + lane]) : padding;
  }
}

template <class T>
SPAT_HD void store_chunk(T* row, int64_t classes, int64_t k0, const acc_t<T> (&g)[kLanes]) {
  for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, classes - k0); ++lane) row[k0 + lane] = from_acc<T>(g[lane]);
}

template <class A>
SPAT_HD A sum(const A (&lanes)[kLanes]) {
  A total = 0;
  for (A v : lanes) total += v;
  return total;
}

template <class T>
SPAT_HD acc_t<T> row_max(const T* row, int64_t classes, acc_t<T> start) {
  using A = acc_t<T>;
  A z[kLanes], lanes[kLanes];
  for (A& lane : lanes) lane = start;
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
    load_chunk(row, classes, k0, z, A(-INFINITY));
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(lanes[lane], z[lane]);
  }
  A max = lanes[0];
  for (A lane : lanes) max = larger(max, lane);
  return max;
}

// Sum of e^(z - max) over the classes other than `skip` (-1: over all).
template <class T>
SPAT_HD acc_t<T> exp_sum(const T* row, int64_t classes, acc_t<T> max, int64_t skip) {
  using A = acc_t<T>;
  A z[kLanes], lanes[kLanes] = {};
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
    load_chunk(row, classes, k0, z, A(-INFINITY));
    if (skip >= k0 && skip < k0 + kLanes) z[skip - k0] = A(-INFINITY);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += exp_nonpositive(z[lane] - max);
  }
  return sum(lanes);
}

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
  const A z_y = to_acc(logits[label]), max = row_max(logits, classes, larger(z_y, lowest<A>()));
  const LsceRow<A> stats(max, exp_sum(logits, classes, max, label), z_y);
  A z[kLanes], g[kLanes], gaps[kLanes] = {};
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
    load_chunk(logits, classes, k0, z, z_y);
    for (int lane = 0; lane < kLanes; ++lane) {
      gaps[lane] += z_y - z[lane];
      g[lane] = stats.grad(z[lane], false, alpha, off_target, scale);
    }
    if (label >= k0 && label < k0 + kLanes) g[label - k0] = stats.grad(z_y, true, alpha, off_target, scale);
    store_chunk(dlogits, classes, k0, g);
  }
  if (a.rows.loss) static_cast<A*>(a.rows.loss)[row] = sign * stats.loss(sum(gaps), alpha, off_target);
}

template <class T>
SPAT_HD void kl_grad(const KlGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes;
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  const A* probs = static_cast<const A*>(a.probs) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  const A max = row_max(logits, classes, lowest<A>()), total = exp_sum(logits, classes, max, -1);
  A z[kLanes], q[kLanes], g[kLanes];
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) {
    load_chunk(logits, classes, k0, z, A(-INFINITY));
    load_chunk(probs, classes, k0, q, A(0));
    for (int lane = 0; lane < kLanes; ++lane) g[lane] = A(a.rows.scale) * (exp_nonpositive(z[lane] - max) / total - q[lane]);
    store_chunk(dlogits, classes, k0, g);
  }
  if (a.rows.loss) {
    const A log_total = max + A(log(total));
    A terms[kLanes] = {};
    for (int64_t k = 0; k < classes; ++k) terms[k % kLanes] += kl_term(probs[k], to_acc(logits[k]) - log_total);
    static_cast<A*>(a.rows.loss)[row] = sum(terms);
  }
}

// The first logit in rank order after `previous` that is not class `skip` (-1: none is skipped).
template <class T>
SPAT_HD Ranked<acc_t<T>> next_ranked(const T* row, int64_t classes, Ranked<acc_t<T>> previous, int64_t skip) {
  Ranked<acc_t<T>> best{-INFINITY, classes};
  for (int64_t k = 0; k < classes; ++k) {
    const Ranked<acc_t<T>> candidate{to_acc(row[k]), k};
    if (k != skip && before(previous, candidate) && before(candidate, best)) best = candidate;
  }
  return best;
}
template <class A>
SPAT_HD Ranked<A> ahead_of_all() {
  return {INFINITY, -1};
}

template <class T>
SPAT_HD void margin_grad(const MarginGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes, label = a.labels[row];
  if (!is_class(label, a.rows)) return fill_nan<T>(a.rows, row);
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  const Ranked<A> other = next_ranked(logits, classes, ahead_of_all<A>(), label);
  const MarginRow<A> margin(other.z, to_acc(logits[label]), A(a.kappa), a.targeted);
  for (int64_t k = 0; k < classes; ++k) dlogits[k] = from_acc<T>(margin.grad(k, other.k, label, A(a.rows.scale)));
  if (a.rows.loss) static_cast<A*>(a.rows.loss)[row] = margin.loss;
}

template <class T>
SPAT_HD void dlr_grad(const DlrGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes, label = a.labels[row], target = a.targets ? a.targets[row] : 0;
  if (!is_class(label, a.rows) || !is_class(target, a.rows)) return fill_nan<T>(a.rows, row);
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  Ranked<A> rank[4], previous = ahead_of_all<A>();
  for (Ranked<A>& r : rank) r = previous = next_ranked(logits, classes, previous, -1);
  const Ranked<A> up = a.targets ? Ranked<A>{to_acc(logits[target]), target} : rank[0].k == label ? rank[1] : rank[0];
  const DlrRow<A> dlr(rank, {to_acc(logits[label]), label}, up, a.targets != nullptr);
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

}  // namespace

SPAT_CLONES void linf_random_start_cpu(const LinfRandomStart& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, [&](auto t) { linf_random_start<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void linf_step_cpu(const Step& args, int64_t begin, int64_t end) {
  visit(args.images.dtype, args.grad_dtype, [&](auto t, auto g) { linf_step<decltype(t), decltype(g)>(args, begin, end); });
}
SPAT_CLONES void l2_step_cpu(const L2Step& args, int64_t begin, int64_t end) {
  visit(args.step.images.dtype, args.step.grad_dtype,
        [&](auto t, auto g) { l2_step<decltype(t), decltype(g)>(args, begin, end); });
}
SPAT_CLONES void lsce_grad_cpu(const LsceGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) lsce_grad<decltype(t)>(args, row);
  });
}
SPAT_CLONES void kl_grad_cpu(const KlGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) kl_grad<decltype(t)>(args, row);
  });
}
SPAT_CLONES void margin_grad_cpu(const MarginGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) margin_grad<decltype(t)>(args, row);
  });
}
SPAT_CLONES void dlr_grad_cpu(const DlrGrad& args, int64_t begin, int64_t end) {
  visit(args.rows.dtype, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) dlr_grad<decltype(t)>(args, row);
  });
}
void keep_best_cpu(const KeepBest& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&](auto t) {
    for (int64_t sample = begin; sample < end; ++sample) keep_best<decltype(t)>(args, sample);
  });
}

}  // namespace spat
