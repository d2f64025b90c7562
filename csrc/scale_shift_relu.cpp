// Between convolutions, on the CPU: residual addition, scale and shift, ReLU and its bits, and the way back.
#include <algorithm>
#include <type_traits>

#include "cpu.h"

namespace spat {
namespace {

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

}  // namespace

SPAT_CLONES void scale_shift_relu_cpu(const ScaleShiftRelu& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { scale_shift_relu<decltype(t)>(args, begin, end); });
}
SPAT_CLONES void scale_shift_relu_grad_cpu(const ScaleShiftReluGrad& args, int64_t begin, int64_t end) {
  visit(args.shape.dtype, [&](auto t) SPAT_INLINE { scale_shift_relu_grad<decltype(t)>(args, begin, end); });
}

}  // namespace spat
