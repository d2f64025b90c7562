// Training images on the CPU: crops are of bytes, and one long loop over all of a sample makes floats of them, since its rows are
// too short to vectorise well.
#include <algorithm>
#include <vector>

#include "cpu.h"

namespace spat {
namespace {

// A crop over zeros, pixels as they are in the image.
template <int C>  // the channels, 0: any number
SPAT_HD void crop_pixels(const CropFlip& s, const uint8_t* image, Crop crop, uint8_t* __restrict__ pixels) {
  const int64_t height = s.height, width = s.width, channels = C ? C : s.channels;
  // what of the crop is inside the image, before the flip
  const int64_t top = std::max<int64_t>(0, -crop.y), bottom = std::min(height, height - crop.y);
  const int64_t left = std::max<int64_t>(0, -crop.x), n = std::min(width, width - crop.x) - left;
  if (n <= 0) return;
  for (int64_t h = top; h < bottom; ++h) {
    const uint8_t* __restrict__ from = image + ((h + crop.y) * width + left + crop.x) * channels;
    uint8_t* to = pixels + (h * width + (crop.flip ? width - 1 - left : left)) * channels;
    if (!crop.flip) memcpy(to, from, n * channels);
    else for (int64_t i = 0; i < n; ++i) memcpy(to - i * channels, from + i * channels, channels);
  }
}

SPAT_HD void to_planes(const uint8_t* __restrict__ pixels, int64_t n, int64_t channels, uint8_t* planes) {
  if (channels == 3) {  // compilers have shuffles for three streams
    uint8_t *__restrict__ r = planes, *__restrict__ g = planes + n, *__restrict__ b = planes + 2 * n;
    for (int64_t i = 0; i < n; ++i) r[i] = pixels[3 * i], g[i] = pixels[3 * i + 1], b[i] = pixels[3 * i + 2];
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < n; ++i) planes[c * n + i] = pixels[i * channels + c];
  }
}

SPAT_HD void crop_flip(const CropFlip& s, int64_t begin, int64_t end) {
  const int64_t n = s.sample_numel, channels = s.channels;
  const bool moves = s.pad || s.flip, planar = s.inner != channels;
  std::vector<uint8_t> pixels(moves ? n : 0), planes(planar ? n : 0);
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t row = s.rows[sample];
    const bool known = row >= 0 && row < s.count;
    const uint8_t* bytes = known ? s.images + row * n : nullptr;
    if (known && moves) {
      const Crop crop = crop_of(s, sample);
      if (s.pad) std::fill(pixels.begin(), pixels.end(), uint8_t(0));
      if (channels == 1) crop_pixels<1>(s, bytes, crop, pixels.data());
      else if (channels == 3) crop_pixels<3>(s, bytes, crop, pixels.data());
      else crop_pixels<0>(s, bytes, crop, pixels.data());
      bytes = pixels.data();
    }
    if (known && planar) {
      to_planes(bytes, n / channels, channels, planes.data());
      bytes = planes.data();
    }
    visit(s.dtype, [&](auto t) SPAT_INLINE {
      using T = decltype(t);
      T* __restrict__ out = static_cast<T*>(s.out) + sample * n;
      if (!known) std::fill_n(out, n, from_acc<T>(acc_t<T>(NAN)));
      else for (int64_t i = 0; i < n; ++i) out[i] = from_acc<T>(over_255<acc_t<T>>(bytes[i]));
    });
  }
}

}  // namespace

SPAT_CLONES void crop_flip_cpu(const CropFlip& args, int64_t begin, int64_t end) { crop_flip(args, begin, end); }

}  // namespace spat
