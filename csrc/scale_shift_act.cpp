// Between convolutions, on the CPU: residual addition, scale and shift, an activation and its derivative, and the way back.
#include "activations.h"
#include "cpu.h"

namespace spat {
namespace {

// f(element count): a constant for whole blocks, which are nearly all.
template <class F>
SPAT_HD void in_block(int n, F&& f) {
  if (n == kBlock) f(std::integral_constant<int, kBlock>{});
  else f(n);
}

template <class T>
SPAT_HD void scale_shift_act(const ScaleShiftAct& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t channels = s.shape.channels, size = channels + kBlock;
  const auto scales = cyclic<A>(s.scale, channels, size, A(1)), shifts = cyclic<A>(s.shift, channels, size, A(-0.));
  const auto negatives = cyclic<A>(s.negative, s.negative_varies ? channels : 1, size, A(0));
  int64_t channel = 0;
  for (int64_t first = begin * channels; first < end * channels; first += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, end * channels - first));
    const A *scale = scales.data() + channel, *shift = shifts.data() + channel, *negative = negatives.data() + channel;
    A v[kBlock], slope[kBlock];
    in_block(count, [&](auto n) SPAT_INLINE {
      const T *a = from<const T>(s.a, first), *b = from<const T>(s.b, first);
      T* total = from<T>(s.total, first);
      for (int j = 0; j < n; ++j) v[j] = to_acc(a[j]);
      if (b) for (int j = 0; j < n; ++j) v[j] += to_acc(b[j]);
      if (total) for (int j = 0; j < n; ++j) total[j] = from_acc<T>(v[j]);
    });
    for (int j = count; j < kBlock; ++j) v[j] = A(0);
    visit(s.act, [&](auto act) SPAT_INLINE {
      for (int j = 0; j < kBlock; ++j) {
        const Activated<A> y = act(v[j] * scale[j] + shift[j], negative[j]);
        v[j] = y.value, slope[j] = scale[j] * y.slope;
      }
    });
    in_block(count, [&](auto n) SPAT_INLINE {
      T *out = from<T>(s.out, first), *kept = from<T>(s.slope, first);
      if (kept) for (int j = 0; j < n; ++j) kept[j] = from_acc<T>(slope[j]);
      for (int j = 0; j < n; ++j) out[j] = from_acc<T>(v[j]);
    });
    channel = (channel + kBlock) % channels;
  }
}

template <class T>
SPAT_HD void scale_shift_act_grad(const ScaleShiftActGrad& s, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t last = end * s.shape.channels;
  for (int64_t first = begin * s.shape.channels; first < last; first += kBlock) {
    in_block(int(std::min<int64_t>(kBlock, last - first)), [&](auto n) SPAT_INLINE {
      const T *grad = from<const T>(s.grad, first), *grad2 = from<const T>(s.grad2, first);
      const T *slope = from<const T>(s.slope, first), *rest = from<const T>(s.residual, first);
      T* dx = from<T>(s.dx, first);
      A g[kBlock];
      for (int j = 0; j < n; ++j) g[j] = to_acc(grad[j]);
      if (grad2) for (int j = 0; j < n; ++j) g[j] += to_acc(grad2[j]);
      for (int j = 0; j < n; ++j) g[j] *= to_acc(slope[j]);
      if (rest) for (int j = 0; j < n; ++j) g[j] += to_acc(rest[j]);
      for (int j = 0; j < n; ++j) dx[j] = from_acc<T>(g[j]);
    });
  }
}

}  // namespace

SPAT_CLONES void scale_shift_act_cpu(const ScaleShiftAct& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { scale_shift_act<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void scale_shift_act_grad_cpu(const ScaleShiftActGrad& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { scale_shift_act_grad<decltype(t)>(args, begin, end); });
}

}  // namespace spat
