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

// act(v * scale + shift) and, if it is wanted, its derivative.
template <bool SLOPE, class A>
SPAT_HD void activate(Activation act, const A (&v)[kBlock], const A* scale, const A* shift, const A* negative,
                      A* __restrict out, A* __restrict slope) {
  visit(act, [&](auto f) SPAT_INLINE {
    for (int j = 0; j < kBlock; ++j) {
      const Activated<A> y = f(v[j] * scale[j] + shift[j], negative[j]);
      out[j] = y.value;
      if constexpr (SLOPE) slope[j] = scale[j] * y.slope;
    }
  });
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
    T *total = from<T>(s.total, first), *out = from<T>(s.out, first), *slope = from<T>(s.slope, first);
    A v[kBlock], kept_out[kBlock], kept_slope[kBlock], *to_out = kept_out, *to_slope = kept_slope;
    if constexpr (std::is_same_v<T, A>)
      if (count == kBlock) to_out = out, to_slope = slope;  // without a detour
    in_block(count, [&](auto n) SPAT_INLINE {
      const T *a = from<const T>(s.a, first), *b = from<const T>(s.b, first);
      if (b) for (int j = 0; j < n; ++j) v[j] = to_acc(a[j]) + to_acc(b[j]);
      else for (int j = 0; j < n; ++j) v[j] = to_acc(a[j]);
      if (total) for (int j = 0; j < n; ++j) total[j] = from_acc<T>(v[j]);
    });
    for (int j = count; j < kBlock; ++j) v[j] = A(0);
    if (slope) activate<true>(s.act, v, scale, shift, negative, to_out, to_slope);
    else activate<false>(s.act, v, scale, shift, negative, to_out, to_slope);
    if (to_out == kept_out)
      in_block(count, [&](auto n) SPAT_INLINE {
        if (slope) for (int j = 0; j < n; ++j) slope[j] = from_acc<T>(kept_slope[j]);
        for (int j = 0; j < n; ++j) out[j] = from_acc<T>(kept_out[j]);
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
