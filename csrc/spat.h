// The contract between kernels and bindings: one plain struct of raw pointers per op, a CPU function and a CUDA launcher.
//
// No torch and no CUDA header here, so nvcc alone compiles every kernel and bindings.cpp also builds where there is no CUDA.
// Images are dense with the batch outermost (contiguous or channels_last): sample b owns [b * sample_numel, (b + 1) * sample_numel).
// Logits, probabilities and logit gradients are contiguous [rows, classes]. Arithmetic is fp32, and fp64 for fp64 tensors.
// `foo_cpu(args, begin, end)` does a range of elements (linf_*, adt_*), samples (l2_*, keep_best, pool_linear*, crop_flip) or rows
// (the others), so that the caller splits the threads. `launch_foo(args, stream)` returns a cudaError_t.
#pragma once
#include <cstdint>

namespace spat {

enum class DType : int8_t { f32, f16, bf16, f64 };

// One value for the whole batch, or one for each sample; fp32, and fp64 beside fp64 images.
struct PerSample {
  const void* data;
  bool varies;
};

struct Images {
  void* x_adv;
  const void* x;
  int64_t samples, sample_numel;
  double samples_per_element;  // 1 / sample_numel
  double lo, hi;
  DType dtype;
};

struct LinfRandomStart {
  Images images;
  PerSample eps;
  const int64_t* seed;  // [2]: key and counter of the Philox stream
};

struct Step {
  Images images;
  const void* grad;
  DType grad_dtype;
  PerSample eps, step_size;
  uint8_t* nan_seen;  // [samples] or null: set to 1 where the gradient is not usable, never cleared
  uint64_t* hash;     // [samples] or null: the hashes of the new x_adv are added (math.h); linf_step only
};

// mu and rho are like the images, in fp32 (fp64 for fp64 images). Draws are numbered within a seed.
struct AdtSample {
  Images images;  // x_adv is written, never read
  void *mu, *rho;
  PerSample eps;
  const int64_t* seed;  // [2]: key and counter of the Philox stream
  int64_t draw;
};

struct AdtStep {
  AdtSample sample;  // its draw is that at which the gradient was taken; the next one is written
  const void* grad;
  DType grad_dtype;
  PerSample factor;  // what gradients are to be multiplied by
  double lr, entropy;
  void *sum_mu, *sum_rho;  // like mu, or both null
  bool last;               // steps; else gradients are only added to the sums
  uint8_t* nan_seen;       // as in Step
};

struct Rows {
  const void* logits;
  void* dlogits;
  void* loss;  // [rows] in fp32 (fp64 for fp64 logits), or null
  int64_t rows, classes;
  double scale;
  DType dtype;
};

struct LsceGrad {
  Rows rows;
  const int64_t* labels;
  double alpha;
  bool targeted, normalize;
};

struct KlGrad {
  Rows rows;
  const void* probs;  // fp32 (fp64 for fp64 logits)
};

struct MarginGrad {
  Rows rows;
  const int64_t* labels;
  double kappa;
  bool targeted;
};

struct PmaGrad {
  Rows rows;
  const int64_t* labels;
  bool targeted, normalize;
};

struct DlrGrad {
  Rows rows;
  const int64_t* labels;
  const int64_t* targets;  // null: the untargeted form
};

struct KeepBest {
  void* best;
  void* best_loss;        // [samples], fp32 (fp64 for fp64 images)
  uint8_t* best_success;  // [samples] of 0 and 1, or null
  const void* x_adv;
  const void* loss;
  const uint8_t* success;  // null exactly when best_success is
  int64_t samples, sample_numel;
  DType dtype;
};

// Images with channels innermost, as rows of `channels`; a mask holds `octets` bytes a row, one bit a channel.
struct Channels {
  int64_t rows, channels, octets;
  double rows_per_octet;  // 1 / octets
  DType dtype;
};

struct ScaleShiftRelu {
  Channels shape;
  const void *a, *b;          // b, scale, shift, total and mask may be null
  const void *scale, *shift;  // [channels], fp32 (fp64 for fp64 images)
  void *total, *out;
  uint8_t* mask;
  bool relu;
};

struct ScaleShiftReluGrad {
  Channels shape;
  const void *grad, *grad2;  // grad2, mask, scale and residual may be null
  const uint8_t* mask;
  const void* scale;
  const void* residual;
  void* dx;
};

// In the order of ACTIVATIONS in ops/scale_shift_act.py.
enum class Activation : int64_t {
  gelu, gelu_tanh, silu, sigmoid, hardswish, hardsigmoid, relu6, leaky_relu, tanh, mish, elu, softplus
};

struct ScaleShiftAct {
  Channels shape;
  double rows_per_element;              // 1 / channels
  const void *a, *b;                    // all but a and out may be null
  const void *scale, *shift;            // [channels], fp32 (fp64 for fp64 images)
  const void* negative;                 // [channels] or [1] like scale: leaky_relu's slope below 0
  bool negative_varies;
  void *total, *out, *slope;
  Activation act;
};

struct ScaleShiftActGrad {
  Channels shape;
  const void *grad, *grad2, *slope, *residual;  // grad2 and residual may be null
  void* dx;
};

struct SplitImage {
  Channels shape;  // of `out`, whose dtype is f16 or bf16
  const float* x;
  int64_t x_channels;
  const float *scale, *shift;  // [x_channels], or null
  void* out;
};

// The head of a network: average pooling over the pixels of each sample, and a linear layer. What lies between them, fp32 (fp64 for
// fp64 images), stays on the chip: a sample's channels in a block's shared memory, so there is a limit to them.
constexpr int64_t kMaxPooled = 4096;
struct Head {
  Channels shape;  // of the images: rows = samples * pixels
  int64_t samples, pixels, classes;
  const void* weight;  // [classes, channels]
};

struct PoolLinear {
  Head head;
  const void* x;
  const void* bias;  // [classes], or null
  void* logits;      // [samples, classes]
};

struct PoolLinearGrad {
  Head head;
  const void* dlogits;
  const uint8_t* mask;  // mask, scale and factor may be null
  const void* scale;    // [channels]
  void* factor;         // [samples]
  void* dx;
};

// Images are [count, height, width, channels], `out` is [samples, channels / inner, height, width, inner] in memory. A sample holds
// fewer than 2^30 values and pad is less than 2^30, so that coordinates and offsets within one fit 32 bits.
struct CropFlip {
  const uint8_t* images;
  const int64_t *rows, *ids;  // [samples]
  const int64_t* seed;        // [2]: key and counter of the Philox stream
  void* out;
  int64_t count, samples, sample_numel;
  int32_t height, width, channels, inner;  // inner: 1 (contiguous) or all the channels (channels_last)
  int32_t pad;
  bool flip;
  DType dtype;
};

// A convolution in half precision, for Hopper alone: images [samples, height, width, channels], weights [out_channels, kernel_height,
// kernel_width, channels] in memory, all channels multiples of 8. A block does `tile` output channels: 64, 128 or 160. `rows`: its
// pixels are whole rows of the image, which are copied once for all weights of a column of the window.
struct Conv {
  const void *x, *weight;
  int32_t samples, height, width, channels, out_height, out_width, out_channels, kernel_height, kernel_width;
  int32_t stride, pad_height, pad_width, tile;
  bool rows;
  int32_t tile_pixels, half_tile, pixel_stages, weight_stages;  // conv_sm90a.cu sets them
};

// Pixels of a tile of whole rows, with the rows above and below; 0 where a tile is not whole rows of one image, or of two.
int pixels_in_rows(const Conv& c);

struct ConvScaleShiftRelu {
  Conv conv;
  ScaleShiftRelu pass;  // its `a` is what the convolution gives
};

struct ConvScaleShiftReluGrad {
  Conv conv;
  ScaleShiftReluGrad pass;  // its `grad` is
};

// A convolution of 3x3, stride 1 and padding 1 in fp32, for CPUs with AVX-512 alone: images [samples, height, width, channels], all
// channels multiples of 32, weights as WinogradWeights makes them.
struct Winograd {
  const float *x, *weight;
  float* out;
  int64_t height, width, channels, out_channels;
};

// Its weights, of [out_channels, 3, 3, channels] in memory; `turned`: of [channels, 3, 3, out_channels], for the gradient.
struct WinogradWeights {
  const float* weight;
  float* out;
  int64_t channels, out_channels;
  bool turned;
};

bool has_winograd();
void winograd_cpu(const Winograd& args, int64_t begin, int64_t end);
void winograd_weights_cpu(const WinogradWeights& args, int64_t begin, int64_t end);

#define SPAT_DECLARE(Args, name)                               \
  void name##_cpu(const Args& args, int64_t begin, int64_t end); \
  int launch_##name(const Args& args, void* stream);

SPAT_DECLARE(LinfRandomStart, linf_random_start)
SPAT_DECLARE(Step, linf_step)
SPAT_DECLARE(Step, l2_step)
SPAT_DECLARE(AdtSample, adt_sample)
SPAT_DECLARE(AdtStep, adt_step)
SPAT_DECLARE(LsceGrad, lsce_grad)
SPAT_DECLARE(KlGrad, kl_grad)
SPAT_DECLARE(MarginGrad, margin_grad)
SPAT_DECLARE(PmaGrad, pma_grad)
SPAT_DECLARE(DlrGrad, dlr_grad)
SPAT_DECLARE(KeepBest, keep_best)
SPAT_DECLARE(ScaleShiftRelu, scale_shift_relu)
SPAT_DECLARE(ScaleShiftReluGrad, scale_shift_relu_grad)
SPAT_DECLARE(ScaleShiftAct, scale_shift_act)
SPAT_DECLARE(ScaleShiftActGrad, scale_shift_act_grad)
SPAT_DECLARE(SplitImage, split_image)
SPAT_DECLARE(PoolLinear, pool_linear)
SPAT_DECLARE(PoolLinearGrad, pool_linear_grad)
SPAT_DECLARE(CropFlip, crop_flip)
#undef SPAT_DECLARE

int launch_conv_scale_shift_relu(const ConvScaleShiftRelu& args, void* stream);
int launch_conv_scale_shift_relu_grad(const ConvScaleShiftReluGrad& args, void* stream);

const char* cuda_error_name(int error);

}  // namespace spat
