// Restarts on the CPU: keep per sample the better of two adversarial images.
#include "math.h"

namespace spat {
namespace {

template <class T>
SPAT_HD void keep_best(const KeepBest& a, int64_t sample) {
  using A = acc_t<T>;
  A& best_loss = static_cast<A*>(a.best_loss)[sample];
  const A loss = static_cast<const A*>(a.loss)[sample];
  const bool success = a.success && a.success[sample], best_success = a.best_success && a.best_success[sample];
  if (!takes_over(loss, success, best_loss, best_success)) return;
  best_loss = loss;
  if (a.best_success) a.best_success[sample] = success;
  if (a.sample_numel == 0) return;  // no memory either, which memcpy may not be given
  memcpy(static_cast<T*>(a.best) + sample * a.sample_numel, static_cast<const T*>(a.x_adv) + sample * a.sample_numel,
         sizeof(T) * a.sample_numel);
}

}  // namespace

void keep_best_cpu(const KeepBest& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&](auto t) SPAT_INLINE {
    for (int64_t sample = begin; sample < end; ++sample) keep_best<decltype(t)>(args, sample);
  });
}

}  // namespace spat
