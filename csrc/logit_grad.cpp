// Gradients of the attack losses at the logits on the CPU, a row at a time.
#include <utility>

#include "cpu.h"
#include "losses.h"

namespace spat {
namespace {

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

SPAT_HD Lanes<float> exp_nonpositive(Lanes<float> x) { return exp_polynomial<Lanes<float>, Lanes<uint32_t>>(x); }
SPAT_HD Lanes<double> exp_nonpositive(Lanes<double> x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = exp(x[lane]);
  return x;
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
  const MarginRow<A> margin(other[0].z, to_acc(logits[label]), A(a.kappa), a.targeted, A(a.rows.scale));
  for (int64_t k = 0; k < classes; ++k) dlogits[k] = from_acc<T>(margin.grad(k, other[0].k, label));
  if (a.rows.loss) static_cast<A*>(a.rows.loss)[row] = margin.loss;
}

template <class T>
SPAT_HD void pma_grad(const PmaGrad& a, int64_t row) {
  using A = acc_t<T>;
  const int64_t classes = a.rows.classes, label = a.labels[row];
  if (!is_class(label, a.rows)) return fill_nan<T>(a.rows, row);
  const T* logits = static_cast<const T*>(a.rows.logits) + row * classes;
  T* dlogits = static_cast<T*>(a.rows.dlogits) + row * classes;
  Ranked<A> other[1];
  rank(logits, classes, label, other);
  PmaRow<A> pma({to_acc(logits[label]), label}, other[0], a.targeted);
  Exponentials<T> e(logits, classes, row_max(logits, classes, pma.w.k));
  if (!pma.weigh(e.max, e.sum(pma.w.k), A(a.rows.scale), a.normalize)) return fill_nan<T>(a.rows, row);
  for (int64_t k0 = 0; k0 < classes; k0 += kLanes) store_lanes(dlogits, classes, k0, pma.per_e * e.at(k0));
  dlogits[pma.w.k] = from_acc<T>(pma.at_w);
  dlogits[pma.l.k] = from_acc<T>(pma.at_l);
  if (a.rows.loss) static_cast<A*>(a.rows.loss)[row] = pma.loss;
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

}  // namespace

#define SPAT_ROWS(Args, name)                                                    \
  SPAT_CLONES void name##_cpu(const Args& args, int64_t begin, int64_t end) {     \
    visit(args.rows.dtype, [&](auto t) SPAT_INLINE {                              \
      for (int64_t row = begin; row < end; ++row) name<decltype(t)>(args, row);   \
    });                                                                           \
  }

SPAT_ROWS(LsceGrad, lsce_grad)
SPAT_ROWS(KlGrad, kl_grad)
SPAT_ROWS(MarginGrad, margin_grad)
SPAT_ROWS(PmaGrad, pma_grad)
SPAT_ROWS(DlrGrad, dlr_grad)

}  // namespace spat
