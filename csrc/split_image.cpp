// An image for a half-precision network, on the CPU: what rounding keeps, what it drops, zeros.
#include <algorithm>

#include "cpu.h"

namespace spat {
namespace {

// Rows [begin, end), kPixels of them at once, channel by channel; loops of 16 would be unrolled instead of vectorised (GCC 12).
constexpr int kPixels = 64;
template <class T>
SPAT_HD void split_image(const SplitImage& s, int64_t begin, int64_t end) {
  const int64_t n = s.x_channels, width = s.shape.channels;
  for (int64_t first = begin; first < end; first += kPixels) {
    const int rows = int(std::min<int64_t>(kPixels, end - first));
    const float* x = s.x + first * n;
    T* out = static_cast<T*>(s.out) + first * width;
    memset(out, 0, sizeof(T) * rows * width);
    for (int64_t c = 0; c < n; ++c) {
      float v[kPixels] = {};
      T hi[kPixels], lo[kPixels];
      for (int row = 0; row < rows; ++row) v[row] = x[row * n + c];
      if (s.scale) for (float& lane : v) lane *= s.scale[c];
      if (s.shift) for (float& lane : v) lane += s.shift[c];
      for (int row = 0; row < kPixels; ++row) {
        hi[row] = from_acc<T>(v[row]);
        lo[row] = from_acc<T>(left_over(v[row], to_acc(hi[row])));
      }
      for (int row = 0; row < rows; ++row) out[row * width + c] = hi[row], out[row * width + n + c] = lo[row];
    }
  }
}

}  // namespace

SPAT_CLONES void split_image_cpu(const SplitImage& args, int64_t begin, int64_t end) {
  if (args.shape.dtype == DType::bf16) return split_image<bfloat16>(args, begin, end);
  split_image<half>(args, begin, end);
}

}  // namespace spat
