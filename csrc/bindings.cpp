// The only file that sees torch: checks, threads or stream, and exports. It uses the stable ABI alone, so that one wheel runs
// on every torch from 2.11 on, with CUDA or without.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "spat.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Weak: a CPU-only libtorch does not have it, and never calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using namespace spat;

// ---- checks ----------------------------------------------------------------------------------------------------------------

template <class... Words>
[[noreturn, gnu::noinline]] void refuse(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

// STD_TORCH_CHECK without the place in this file, which says nothing to a caller.
#define SPAT_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]   \
  refuse(__VA_ARGS__)

// What the memory of an argument is for, after its name: "x" is read, "x!" is written. "~": results may be this very memory.
struct Role {
  char name[16] = {};
  bool written = false, shared = false;
  constexpr Role(const char* text) {
    for (char* end = name; *text; ++text) {
      if (*text == '!') written = true;
      else if (*text == '~') shared = true;
      else *end++ = *text;
    }
  }
};

struct Memory {
  const char *begin = nullptr, *end = nullptr;  // both null for what is absent or empty
};

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device&) const = default;
};

Device device_of(const Tensor& t) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

// The stretch of memory of a dense tensor, which the ops require. Views and storages that are too short for one are refused.
Memory memory_of(const Tensor& t, const Role& role) {
  const int64_t numel = t.numel();
  if (numel == 0) {
    SPAT_CHECK(t.defined(), role.name, " must be a tensor, got None");
    return {};
  }
  const int64_t size = int64_t(t.element_size()), last = t.storage_offset() + numel;
  int64_t storage = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage));
  SPAT_CHECK(last <= storage && last * size <= storage, role.name,  // without overflow
             " has fewer elements in memory than in its shape: expanded tensors, and those whose storage was resized, must be ",
             "cloned");
  const void* begin = role.written ? t.mutable_data_ptr() : t.const_data_ptr();  // lazy copies part here
  return {static_cast<const char*>(begin), static_cast<const char*>(begin) + numel * size};
}

// What is checked of the tensors of every op, null where absent: one device, memory for all elements, and that no result overlaps
// another argument, unless both are shared and the same.
template <size_t N>
void check_arguments(const Role (&roles)[N], const Tensor* const (&tensors)[N]) {
  Memory memory[N];
  Device first;
  for (size_t i = 0; i < N; ++i) {
    if (!tensors[i]) continue;
    memory[i] = memory_of(*tensors[i], roles[i]);
    const Device device = device_of(*tensors[i]);
    if (i == 0) first = device;
    SPAT_CHECK(device == first, roles[i].name, " is on another device than the first argument");
  }
  for (size_t i = 0; i < N; ++i)
    for (size_t j = 0; roles[i].written && j < N; ++j) {
      if (i == j || memory[i].end <= memory[j].begin || memory[j].end <= memory[i].begin) continue;
      const bool in_place = roles[i].shared && roles[j].shared && !roles[j].written && memory[i].begin == memory[j].begin &&
                            memory[i].end == memory[j].end;
      SPAT_CHECK(in_place, roles[i].name, " overlaps ", roles[j].name, " in memory: clone one of them");
    }
}

const Tensor* pointer_to(const Tensor& t) { return &t; }
const Tensor* pointer_to(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

template <class T>
constexpr bool is_tensor = std::is_same_v<T, Tensor> || std::is_same_v<T, std::optional<Tensor>>;

// An op behind the checks that are the same for all: `roles` are those of its tensors, in order.
template <auto op, Role... roles>
struct Gate;
template <class... Args, void (*op)(Args...), Role... roles>
struct Gate<op, roles...> {
  static constexpr Role all[] = {roles...};
  static_assert((is_tensor<Args> + ...) == sizeof...(roles));
  static void call(Args... args) {
    const Tensor* tensors[sizeof...(roles)];
    const Tensor** next = tensors;
    const auto note = [&]<class T>(const T& argument) {
      if constexpr (is_tensor<T>) *next++ = pointer_to(argument);
    };
    (note(args), ...);
    check_arguments(all, tensors);
    op(std::move(args)...);
  }
};

ScalarType scalar_type_of(const Tensor& t, const char* name) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {  // a dtype that the stable ABI has no name for
    refuse(name, " has the wrong dtype (see the op's docstring)");
  }
}

DType dtype_of(const Tensor& t, const char* name) {
  switch (scalar_type_of(t, name)) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    default: refuse(name, " must be float32, float16, bfloat16 or float64");
  }
}

ScalarType acc_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  SPAT_CHECK(scalar_type_of(t, name) == dtype, name, " has the wrong dtype (see the op's docstring)");
}

// That `t` has the dtype, and `fits` what is then said of its shape.
template <class... Words>
void check_tensor(bool fits, const Tensor& t, ScalarType dtype, const char* name, Words... must) {
  check_dtype(t, dtype, name);
  SPAT_CHECK(fits, name, " must ", must...);
}

void check_vector(const Tensor& t, int64_t numel, ScalarType dtype, const char* name) {
  check_tensor(t.dim() == 1 && t.numel() == numel && t.is_contiguous(), t, dtype, name, "be contiguous [", numel, "]");
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto s = a.sizes(), t = b.sizes();
  if (s.size() != t.size()) return false;
  for (size_t i = 0; i < s.size(); ++i)
    if (s[i] != t[i]) return false;
  return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  if (!same_sizes(a, b)) return false;
  const auto sizes = a.sizes(), s = a.strides(), t = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && s[i] != t[i]) return false;
  return true;
}

// Dense with the dimensions in the order batch, spatial..., channels. Contiguous [N, C] is, too.
bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dims = sizes.size();
  if (dims < 2) return false;
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (int64_t j = 0; j < dims; ++j) {
    const int64_t d = j == 0 ? 1 : j == dims - 1 ? 0 : dims - j;  // 1, dims-1, ..., 2, 0
    if (sizes[d] > 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Images images_of(const Tensor& x_adv, const Tensor& x, double lo, double hi, const char* name = "x_adv",
                 const char* other = "x") {
  const DType dtype = dtype_of(x_adv, name);
  SPAT_CHECK(lo <= hi, "lo must be at most hi, got ", lo, " and ", hi);
  SPAT_CHECK(x_adv.dim() >= 1, name, " must have a batch dimension");
  SPAT_CHECK(x_adv.is_contiguous() || is_channels_last(x_adv), name, " must be contiguous or channels_last");
  check_tensor(same_layout(x_adv, x), x, x_adv.scalar_type(), other, "have the shape and the strides of ", name);
  const int64_t samples = x_adv.size(0), sample_numel = samples ? x_adv.numel() / samples : 0;
  return {x_adv.mutable_data_ptr(), x.const_data_ptr(), samples, sample_numel, 1. / double(sample_numel), lo, hi, dtype};
}

PerSample per_sample(const Tensor& t, const Images& images, const char* name) {
  const bool varies = t.numel() != 1;
  const int64_t numel = varies ? images.samples : 1;
  check_tensor(t.numel() == numel && t.is_contiguous(), t, acc_type(images.dtype), name, "hold 1 or ", images.samples,
               " elements, contiguous");
  return {t.const_data_ptr(), varies};
}

const int64_t* int64_vector(const Tensor& t, int64_t numel, const char* name) {
  check_vector(t, numel, ScalarType::Long, name);
  return t.const_data_ptr<int64_t>();
}

DType grad_dtype_of(const Tensor& grad, const Images& images, const Tensor& x_adv) {
  const DType dtype = dtype_of(grad, "grad");
  SPAT_CHECK((images.dtype == DType::f64) == (dtype == DType::f64), "grad must be float64 exactly when x_adv is");
  SPAT_CHECK(same_layout(x_adv, grad), "grad must have the shape and the strides of x_adv");
  return dtype;
}

uint8_t* nan_seen_of(const std::optional<Tensor>& t, const Images& images) {
  if (!t) return nullptr;
  check_vector(*t, images.samples, ScalarType::Byte, "nan_seen");
  return t->mutable_data_ptr<uint8_t>();
}

Step step_of(const Tensor& x_adv, const Tensor& x, const Tensor& grad, const Tensor& eps, const Tensor& step_size, double lo,
             double hi, const std::optional<Tensor>& nan_seen) {
  const Images images = images_of(x_adv, x, lo, hi);
  const DType grad_dtype = grad_dtype_of(grad, images, x_adv);
  uint8_t* seen = nan_seen_of(nan_seen, images);
  return {images, grad.const_data_ptr(), grad_dtype, per_sample(eps, images, "eps"), per_sample(step_size, images, "step_size"),
          seen, nullptr};
}

// A tensor like the images in the dtype that arithmetic on them is done in.
void* acc_like_images(const Tensor& t, const Images& images, const Tensor& x_adv, const char* name) {
  check_tensor(same_layout(x_adv, t), t, acc_type(images.dtype), name, "have the shape and the strides of x_adv");
  return t.mutable_data_ptr();
}

AdtSample adt_sample_of(const Tensor& x_adv, const Tensor& mu, const Tensor& rho, const Tensor& x, const Tensor& eps,
                        const Tensor& seed, int64_t draw, double lo, double hi) {
  const Images images = images_of(x_adv, x, lo, hi);
  return {images, acc_like_images(mu, images, x_adv, "mu"), acc_like_images(rho, images, x_adv, "rho"),
          per_sample(eps, images, "eps"), int64_vector(seed, 2, "seed"), draw};
}

void check_like_logits(const Tensor& t, ScalarType dtype, const Tensor& logits, const char* name) {
  check_tensor(same_sizes(t, logits) && t.is_contiguous(), t, dtype, name, "be contiguous with logits' shape");
}

Rows rows_of(const Tensor& logits, const Tensor& dlogits, const std::optional<Tensor>& loss, double scale, int64_t min_classes) {
  const DType dtype = dtype_of(logits, "logits");
  SPAT_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous [B, K]");
  SPAT_CHECK(logits.size(1) >= min_classes, "logits must have at least ", min_classes, " classes, got ", logits.size(1));
  check_like_logits(dlogits, logits.scalar_type(), logits, "dlogits");
  if (loss) check_vector(*loss, logits.size(0), acc_type(dtype), "loss");
  return {logits.const_data_ptr(), dlogits.mutable_data_ptr(), loss ? loss->mutable_data_ptr() : nullptr, logits.size(0),
          logits.size(1), scale, dtype};
}

void check_channels_last(const Tensor& t, const char* name) {
  SPAT_CHECK(is_channels_last(t), name, " must be [N, C, ...] with channels innermost in memory (channels_last)");
}

Channels channels_of(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  check_channels_last(t, name);
  const int64_t channels = t.size(1), rows = channels ? t.numel() / channels : 0, octets = (channels + 7) / 8;
  return {rows, channels, octets, 1. / double(octets), dtype};
}

// The data of a tensor like `like`, or null.
void* channels_like(const std::optional<Tensor>& t, const Tensor& like, const char* name, const char* like_name) {
  if (!t) return nullptr;
  check_tensor(same_sizes(*t, like), *t, like.scalar_type(), name, "have the shape of ", like_name);
  check_channels_last(*t, name);
  return t->mutable_data_ptr();
}

// The data of a vector, or null.
void* optional_vector(const std::optional<Tensor>& t, int64_t numel, ScalarType dtype, const char* name) {
  if (!t) return nullptr;
  check_vector(*t, numel, dtype, name);
  return t->mutable_data_ptr();
}

uint8_t* mask_of(const std::optional<Tensor>& t, const Channels& shape) {
  if (!t) return nullptr;
  const bool fits = t->dim() == 2 && t->numel() == shape.rows * shape.octets && t->size(1) == shape.octets && t->is_contiguous();
  check_tensor(fits, *t, ScalarType::Byte, "mask", "be contiguous [", shape.rows, ", ", shape.octets, "]");
  return t->mutable_data_ptr<uint8_t>();
}

// What LayerNorm takes: `channels` is 1 for channels_last images, -1 where they are the last dimension.
void check_normed(const Tensor& t, int64_t channels, const char* name) {
  SPAT_CHECK(t.dim() >= 2, name, " must have at least two dimensions, the rows and the channels");
  if (channels == 1) return check_channels_last(t, name);
  SPAT_CHECK(t.is_contiguous(), name, " must be contiguous, with the channels last (channels=1 takes channels_last images)");
}

Channels normed_of(const Tensor& t, int64_t channels, const char* name) {
  const DType dtype = dtype_of(t, name);
  SPAT_CHECK(channels == 1 || channels == -1,
             "channels must be -1 (the last dimension) or 1 (channels_last images), got ", channels);
  check_normed(t, channels, name);
  const int64_t count = t.size(channels == 1 ? 1 : t.dim() - 1), octets = (count + 7) / 8;
  SPAT_CHECK(count >= 1 && count <= kMaxNormed, name, " must have 1 to ", kMaxNormed, " channels, got ", count);
  return {t.numel() / count, count, octets, 1. / double(octets), dtype};
}

// The data of a tensor like `like`, or null.
void* normed_like(const std::optional<Tensor>& t, const Tensor& like, int64_t channels, const char* name, const char* like_name) {
  if (!t) return nullptr;
  check_tensor(same_sizes(*t, like), *t, like.scalar_type(), name, "have the shape of ", like_name);
  check_normed(*t, channels, name);
  return t->mutable_data_ptr();
}

Head head_of(const Tensor& images, const Tensor& weight, const char* name) {
  const Channels shape = channels_of(images, name);
  const int64_t samples = images.size(0), pixels = samples ? shape.rows / samples : 0;
  SPAT_CHECK(images.numel() > 0 || samples == 0, name, " must have at least one channel and one pixel");
  SPAT_CHECK(shape.channels <= kMaxPooled, name, " must have at most ", kMaxPooled, " channels, got ", shape.channels);
  const bool fits = weight.dim() == 2 && weight.size(1) == shape.channels && weight.is_contiguous();
  check_tensor(fits, weight, acc_type(shape.dtype), "weight", "be contiguous [K, ", shape.channels, "]");
  return {shape, samples, pixels, weight.size(0), weight.const_data_ptr()};
}

// Logits or their gradients, [samples, classes].
void check_head_rows(const Tensor& t, const Head& head, const char* name) {
  const bool fits = t.dim() == 2 && t.size(0) == head.samples && t.size(1) == head.classes && t.is_contiguous();
  check_tensor(fits, t, acc_type(head.shape.dtype), name, "be contiguous [", head.samples, ", ", head.classes, "]");
}

// ---- threads or a stream ---------------------------------------------------------------------------------------------------

// Does `count` items, each worth about `item` elements of an L-infinity step. Less than kGrain (about 4 us) is not worth a second
// thread; exponentials, ranks, crops, normal numbers and activations weigh more than a step.
#ifndef SPAT_GRAIN
#define SPAT_GRAIN 32768
#endif
constexpr int64_t kGrain = SPAT_GRAIN, kExp = 32, kRank = 8, kCrop = 4, kNormal = 8, kActivation = 4, kNorm = 2;

#ifdef SPAT_CUDA
// On the current stream of the device of `t`.
template <class Args>
void run_on_gpu(const Args& args, const Tensor& t, int (*launch)(const Args&, void*), const char* remedy) {
  torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const int error = launch(args, stream);
  SPAT_CHECK(error == 0, "CUDA launch failed: ", cuda_error_name(error), " (built for CUDA " SPAT_CUDA "; ", remedy, ")");
}
#endif

template <class Args>
void run(const Args& args, const Tensor& t, int64_t count, int64_t item, void (*cpu)(const Args&, int64_t, int64_t),
         [[maybe_unused]] std::type_identity_t<int (*)(const Args&, void*)> launch) {
  if (count == 0 || item == 0) return;
  if (!t.is_cuda()) {
    const int64_t grain = item < kGrain ? kGrain / item : 1;
    if (count <= grain) return cpu(args, 0, count);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { cpu(args, begin, end); });
    return;
  }
#ifdef SPAT_CUDA
  run_on_gpu(args, t, launch, "for another GPU set TORCH_CUDA_ARCH_LIST and install again, or set SPAT_KERNELS_BACKEND=triton");
#endif
}

#ifdef SPAT_CUDA
#define SPAT_LAUNCHER(name) launch_##name
#else
#define SPAT_LAUNCHER(name) nullptr
#endif
#define SPAT_RUN(name, args, t, count, item) run(args, t, count, item, name##_cpu, SPAT_LAUNCHER(name))

#if defined(SPAT_CUDA) || defined(SPAT_CUDA_ON_CPU)
#define SPAT_CONVOLUTIONS
// Convolutions are for Hopper alone; tests/cuda_on_cpu has them on CPU tensors.
template <class Args>
void run_conv(const Args& args, const Tensor& out, int (*launch)(const Args&, void*)) {
  if (out.numel() == 0) return;
#ifdef SPAT_CUDA
  run_on_gpu(args, out, launch, "this kernel is for Hopper, by a driver for CUDA 12 or later: on other GPUs use fuse=False");
#else
  const int error = launch(args, nullptr);
  SPAT_CHECK(error == 0, cuda_error_name(error), " (", error, ")");
#endif
}
#endif

// ---- the ops, in the order of their schemas' arguments -----------------------------------------------------------------------

void linf_random_start_(Tensor x_adv, Tensor x, Tensor eps, Tensor seed, double lo, double hi) {
  const Images images = images_of(x_adv, x, lo, hi);
  const LinfRandomStart args{images, per_sample(eps, images, "eps"), int64_vector(seed, 2, "seed")};
  SPAT_RUN(linf_random_start, args, x_adv, images.samples * images.sample_numel, 1);
}

void linf_step_(Tensor x_adv, Tensor x, Tensor grad, Tensor eps, Tensor step_size, double lo, double hi,
                std::optional<Tensor> nan_seen, std::optional<Tensor> hash) {
  Step args = step_of(x_adv, x, grad, eps, step_size, lo, hi, nan_seen);
  if (hash) {
    check_vector(*hash, args.images.samples, ScalarType::Long, "hash");
    args.hash = static_cast<uint64_t*>(hash->mutable_data_ptr());
  }
  SPAT_RUN(linf_step, args, x_adv, args.images.samples * args.images.sample_numel, 1);
}

void l2_step_(Tensor x_adv, Tensor x, Tensor grad, Tensor eps, Tensor step_size, double lo, double hi,
              std::optional<Tensor> nan_seen) {
  const Step args = step_of(x_adv, x, grad, eps, step_size, lo, hi, nan_seen);
  SPAT_RUN(l2_step, args, x_adv, args.images.samples, args.images.sample_numel);
}

void adt_sample_(Tensor x_adv, Tensor mu, Tensor rho, Tensor x, Tensor eps, Tensor seed, int64_t draw, double lo, double hi) {
  const AdtSample args = adt_sample_of(x_adv, mu, rho, x, eps, seed, draw, lo, hi);
  SPAT_RUN(adt_sample, args, x_adv, args.images.samples * args.images.sample_numel, kNormal);
}

void adt_step_(Tensor x_adv, Tensor mu, Tensor rho, Tensor x, Tensor grad, Tensor eps, Tensor factor, Tensor seed, int64_t draw,
               double lr, double entropy, double lo, double hi, std::optional<Tensor> nan_seen, std::optional<Tensor> sum_mu,
               std::optional<Tensor> sum_rho, bool last) {
  const AdtSample sample = adt_sample_of(x_adv, mu, rho, x, eps, seed, draw, lo, hi);
  const Images& images = sample.images;
  SPAT_CHECK(sum_mu.has_value() == sum_rho.has_value(), "sum_mu and sum_rho go together");
  SPAT_CHECK(sum_mu || last, "last=False needs sum_mu and sum_rho");
  const AdtStep args{sample, grad.const_data_ptr(), grad_dtype_of(grad, images, x_adv), per_sample(factor, images, "factor"),
                     lr, entropy, sum_mu ? acc_like_images(*sum_mu, images, x_adv, "sum_mu") : nullptr,
                     sum_rho ? acc_like_images(*sum_rho, images, x_adv, "sum_rho") : nullptr, last,
                     nan_seen_of(nan_seen, images)};
  SPAT_RUN(adt_step, args, x_adv, images.samples * images.sample_numel, 2 * kNormal);
}

void lsce_grad(Tensor logits, Tensor labels, Tensor dlogits, std::optional<Tensor> loss, double alpha, bool targeted,
               double scale, bool normalize) {
  const Rows rows = rows_of(logits, dlogits, loss, scale, 2);
  SPAT_CHECK(!normalize || alpha == 0, "normalize goes with alpha = 0");
  const LsceGrad args{rows, int64_vector(labels, rows.rows, "labels"), alpha, targeted, normalize};
  SPAT_RUN(lsce_grad, args, logits, rows.rows, kExp * rows.classes);
}

void kl_grad(Tensor logits, Tensor probs, Tensor dlogits, std::optional<Tensor> loss, double scale) {
  const Rows rows = rows_of(logits, dlogits, loss, scale, 2);
  check_like_logits(probs, acc_type(rows.dtype), logits, "probs");
  const KlGrad args{rows, probs.const_data_ptr()};
  SPAT_RUN(kl_grad, args, logits, rows.rows, kExp * rows.classes);
}

void margin_grad(Tensor logits, Tensor labels, Tensor dlogits, std::optional<Tensor> loss, double kappa, bool targeted,
                 double scale) {
  const Rows rows = rows_of(logits, dlogits, loss, scale, 2);
  const MarginGrad args{rows, int64_vector(labels, rows.rows, "labels"), kappa, targeted};
  SPAT_RUN(margin_grad, args, logits, rows.rows, kRank * rows.classes);
}

void pma_grad(Tensor logits, Tensor labels, Tensor dlogits, std::optional<Tensor> loss, bool targeted, double scale,
              bool normalize) {
  const Rows rows = rows_of(logits, dlogits, loss, scale, 2);
  const PmaGrad args{rows, int64_vector(labels, rows.rows, "labels"), targeted, normalize};
  SPAT_RUN(pma_grad, args, logits, rows.rows, kExp * rows.classes);
}

void dlr_grad(Tensor logits, Tensor labels, std::optional<Tensor> targets, Tensor dlogits, std::optional<Tensor> loss,
              double scale) {
  const Rows rows = rows_of(logits, dlogits, loss, scale, targets ? 4 : 3);
  const DlrGrad args{rows, int64_vector(labels, rows.rows, "labels"),
                     targets ? int64_vector(*targets, rows.rows, "targets") : nullptr};
  SPAT_RUN(dlr_grad, args, logits, rows.rows, kRank * rows.classes);
}

void keep_best_(Tensor best, Tensor best_loss, std::optional<Tensor> best_success, Tensor x_adv, Tensor loss,
                std::optional<Tensor> success) {
  const Images images = images_of(best, x_adv, 0, 0, "best", "x_adv");
  check_vector(best_loss, images.samples, acc_type(images.dtype), "best_loss");
  check_vector(loss, images.samples, acc_type(images.dtype), "loss");
  SPAT_CHECK(best_success.has_value() == success.has_value(), "best_success and success go together");
  if (success) {
    check_vector(*best_success, images.samples, ScalarType::Bool, "best_success");
    check_vector(*success, images.samples, ScalarType::Bool, "success");
  }
  const KeepBest args{best.mutable_data_ptr(), best_loss.mutable_data_ptr(),
                      success ? static_cast<uint8_t*>(best_success->mutable_data_ptr()) : nullptr,
                      x_adv.const_data_ptr(), loss.const_data_ptr(),
                      success ? static_cast<const uint8_t*>(success->const_data_ptr()) : nullptr,
                      images.samples, images.sample_numel, images.dtype};
  SPAT_RUN(keep_best, args, best, images.samples, 1 + images.sample_numel);  // the loss and the image
}

// `like` is what the images of a pass have the shape of, by its name.
ScaleShiftRelu forward_pass(const Tensor& like, const char* name, const void* a, const std::optional<Tensor>& b,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                            const std::optional<Tensor>& total, const Tensor& out, const std::optional<Tensor>& mask, bool relu) {
  const Channels shape = channels_of(like, name);
  const ScalarType acc = acc_type(shape.dtype);
  SPAT_CHECK(relu || !mask, "mask goes with relu");
  return {shape, a, channels_like(b, like, "b", name), optional_vector(scale, shape.channels, acc, "scale"),
          optional_vector(shift, shape.channels, acc, "shift"), channels_like(total, like, "total", name),
          channels_like(out, like, "out", name), mask_of(mask, shape), relu};
}

ScaleShiftReluGrad backward_pass(const Tensor& like, const char* name, const void* grad, const std::optional<Tensor>& grad2,
                                 const std::optional<Tensor>& mask, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& residual, const Tensor& dx) {
  const Channels shape = channels_of(like, name);
  return {shape, grad, channels_like(grad2, like, "grad2", name), mask_of(mask, shape),
          optional_vector(scale, shape.channels, acc_type(shape.dtype), "scale"),
          channels_like(residual, like, "residual", name), channels_like(dx, like, "dx", name)};
}

void scale_shift_relu(Tensor a, std::optional<Tensor> b, std::optional<Tensor> scale, std::optional<Tensor> shift,
                      std::optional<Tensor> total, Tensor out, std::optional<Tensor> mask, bool relu) {
  const ScaleShiftRelu args = forward_pass(a, "a", a.const_data_ptr(), b, scale, shift, total, out, mask, relu);
  SPAT_RUN(scale_shift_relu, args, a, args.shape.rows, args.shape.channels);
}

void scale_shift_relu_grad(Tensor grad, std::optional<Tensor> grad2, std::optional<Tensor> mask, std::optional<Tensor> scale,
                           std::optional<Tensor> residual, Tensor dx) {
  const ScaleShiftReluGrad args = backward_pass(grad, "grad", grad.const_data_ptr(), grad2, mask, scale, residual, dx);
  SPAT_RUN(scale_shift_relu_grad, args, grad, args.shape.rows, args.shape.channels);
}

void scale_shift_act(Tensor a, std::optional<Tensor> b, std::optional<Tensor> scale, std::optional<Tensor> shift,
                     std::optional<Tensor> negative, std::optional<Tensor> total, Tensor out, std::optional<Tensor> slope,
                     int64_t act) {
  const Channels shape = channels_of(a, "a");
  const ScalarType acc = acc_type(shape.dtype);
  SPAT_CHECK(act >= 0 && act <= int64_t(Activation::softplus), "act must be the index of one of ACTIVATIONS, got ", act);
  SPAT_CHECK(negative.has_value() == (Activation(act) == Activation::leaky_relu), "negative goes with leaky_relu");
  const bool varies = negative && negative->numel() != 1;
  const ScaleShiftAct args{shape, 1. / double(shape.channels), a.const_data_ptr(), channels_like(b, a, "b", "a"),
                           optional_vector(scale, shape.channels, acc, "scale"),
                           optional_vector(shift, shape.channels, acc, "shift"),
                           optional_vector(negative, varies ? shape.channels : 1, acc, "negative"), varies,
                           channels_like(total, a, "total", "a"), channels_like(out, a, "out", "a"),
                           channels_like(slope, a, "slope", "a"), Activation(act)};
  SPAT_RUN(scale_shift_act, args, a, shape.rows, kActivation * shape.channels);
}

void scale_shift_act_grad(Tensor grad, std::optional<Tensor> grad2, Tensor slope, std::optional<Tensor> residual, Tensor dx) {
  const ScaleShiftActGrad args{channels_of(grad, "grad"), grad.const_data_ptr(), channels_like(grad2, grad, "grad2", "grad"),
                               channels_like(slope, grad, "slope", "grad"), channels_like(residual, grad, "residual", "grad"),
                               channels_like(dx, grad, "dx", "grad")};
  SPAT_RUN(scale_shift_act_grad, args, grad, args.shape.rows, args.shape.channels);
}

void layer_norm(Tensor a, std::optional<Tensor> b, std::optional<Tensor> weight, std::optional<Tensor> bias,
                std::optional<Tensor> total, Tensor out, std::optional<Tensor> mean, std::optional<Tensor> rstd, double eps,
                int64_t channels) {
  const Channels shape = normed_of(a, channels, "a");
  const ScalarType acc = acc_type(shape.dtype);
  const LayerNorm args{shape, 1. / double(shape.channels), a.const_data_ptr(), normed_like(b, a, channels, "b", "a"),
                       optional_vector(weight, shape.channels, acc, "weight"),
                       optional_vector(bias, shape.channels, acc, "bias"), normed_like(total, a, channels, "total", "a"),
                       normed_like(out, a, channels, "out", "a"), optional_vector(mean, shape.rows, acc, "mean"),
                       optional_vector(rstd, shape.rows, acc, "rstd"), eps};
  SPAT_RUN(layer_norm, args, a, shape.rows, kNorm * shape.channels);
}

void layer_norm_grad(Tensor grad, std::optional<Tensor> grad2, Tensor t, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                     std::optional<Tensor> residual, Tensor dx, int64_t channels) {
  const Channels shape = normed_of(grad, channels, "grad");
  const ScalarType acc = acc_type(shape.dtype);
  const auto image = [&](const std::optional<Tensor>& v, const char* name) { return normed_like(v, grad, channels, name, "grad"); };
  const LayerNormGrad args{shape, 1. / double(shape.channels), grad.const_data_ptr(), image(grad2, "grad2"), image(t, "t"),
                           optional_vector(mean, shape.rows, acc, "mean"),
                           optional_vector(rstd, shape.rows, acc, "rstd"),
                           optional_vector(weight, shape.channels, acc, "weight"), image(residual, "residual"),
                           image(dx, "dx")};
  SPAT_RUN(layer_norm_grad, args, grad, shape.rows, kNorm * shape.channels);
}

void split_image(Tensor x, std::optional<Tensor> scale, std::optional<Tensor> shift, Tensor out) {
  check_dtype(x, ScalarType::Float, "x");
  SPAT_CHECK(x.dim() == 4, "x must be [B, C, H, W]");
  check_channels_last(x, "x");
  const int64_t channels = x.size(1);
  const Channels shape = channels_of(out, "out");
  SPAT_CHECK(shape.dtype == DType::f16 || shape.dtype == DType::bf16, "out must be float16 or bfloat16");
  SPAT_CHECK(out.dim() == 4 && out.size(1) >= 2 * channels && out.size(0) == x.size(0) && out.size(2) == x.size(2) &&
                 out.size(3) == x.size(3),
             "out must be [", x.size(0), ", at least ", 2 * channels, ", ", x.size(2), ", ", x.size(3), "]");
  const auto vector = [&](const std::optional<Tensor>& t, const char* name) {
    return static_cast<const float*>(optional_vector(t, channels, ScalarType::Float, name));
  };
  const SplitImage args{shape, x.const_data_ptr<float>(), channels, vector(scale, "scale"), vector(shift, "shift"),
                        out.mutable_data_ptr()};
  SPAT_RUN(split_image, args, x, shape.rows, shape.channels);
}

void check_winograd(const Tensor& t, const char* name) {
  check_dtype(t, ScalarType::Float, name);
  SPAT_CHECK(has_winograd(), "Winograd's convolutions need a CPU with AVX-512");
  SPAT_CHECK(t.dim() == 4 && is_channels_last(t) && t.size(1) > 0 && t.size(1) % 32 == 0, name,
             " must be channels_last with a multiple of 32 channels");
}

// Weights for `winograd`: [16, out_channels, channels] in number, in panels (winograd.cpp).
void check_winograd_weights(const Tensor& t, int64_t out_channels, int64_t channels, const char* name) {
  const bool fits = t.dim() == 3 && t.size(0) == 16 && t.size(1) == out_channels && t.size(2) == channels && t.is_contiguous();
  check_tensor(fits, t, ScalarType::Float, name, "be contiguous [16, ", out_channels, ", ", channels, "]");
}

constexpr int64_t kLeastTiles = 12;  // for a thread: with fewer it waits for the weights

void winograd(Tensor x, Tensor weight, Tensor out) {
  check_winograd(x, "x");
  check_winograd(out, "out");
  SPAT_CHECK(out.size(0) == x.size(0) && out.size(2) == x.size(2) && out.size(3) == x.size(3), "out must have x's pixels");
  check_winograd_weights(weight, out.size(1), x.size(1), "weight");
  const Winograd args{x.const_data_ptr<float>(), weight.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                      x.size(2), x.size(3), x.size(1), out.size(1)};
  const int64_t tiles = x.size(0) * ((args.height + 1) / 2) * ((args.width + 1) / 2);
  if (tiles == 0) return;
  torch::stable::parallel_for(0, tiles, kLeastTiles, [&](int64_t begin, int64_t end) { winograd_cpu(args, begin, end); });
}

void winograd_weights(Tensor weight, bool turned, Tensor out) {
  check_winograd(weight, "weight");
  SPAT_CHECK(weight.size(0) % 32 == 0 && weight.size(2) == 3 && weight.size(3) == 3, "weight must be [K, C, 3, 3], K in 32s");
  const int64_t channels = weight.size(turned ? 0 : 1), out_channels = weight.size(turned ? 1 : 0);
  check_winograd_weights(out, out_channels, channels, "out");
  const WinogradWeights args{weight.const_data_ptr<float>(), out.mutable_data_ptr<float>(), channels, out_channels, turned};
  torch::stable::parallel_for(0, channels / 16, 1, [&](int64_t begin, int64_t end) { winograd_weights_cpu(args, begin, end); });
}

// A sample's work: its pixels, which are converted, and a row of the weights, read from L2, for every class.
int64_t head_work(const Head& head) { return head.shape.channels * (head.pixels + head.classes); }

void pool_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor logits) {
  const Head head = head_of(x, weight, "x");
  check_head_rows(logits, head, "logits");
  const void* offset = optional_vector(bias, head.classes, acc_type(head.shape.dtype), "bias");
  const PoolLinear args{head, x.const_data_ptr(), offset, logits.mutable_data_ptr()};
  SPAT_RUN(pool_linear, args, x, head.samples, head_work(head));
}

void pool_linear_grad(Tensor dlogits, Tensor weight, std::optional<Tensor> mask, std::optional<Tensor> scale,
                      std::optional<Tensor> factor, Tensor dx) {
  const Head head = head_of(dx, weight, "dx");
  const ScalarType acc = acc_type(head.shape.dtype);
  check_head_rows(dlogits, head, "dlogits");
  const PoolLinearGrad args{head, dlogits.const_data_ptr(), mask_of(mask, head.shape),
                            optional_vector(scale, head.shape.channels, acc, "scale"),
                            optional_vector(factor, head.samples, acc, "factor"), dx.mutable_data_ptr()};
  SPAT_RUN(pool_linear_grad, args, dlogits, head.samples, head_work(head));
}

void crop_flip(Tensor images, Tensor rows, Tensor ids, Tensor seed, Tensor out, int64_t pad, bool flip) {
  constexpr int64_t kLimit = int64_t(1) << 30;
  check_dtype(images, ScalarType::Byte, "images");
  SPAT_CHECK(images.dim() == 4 && images.is_contiguous(), "images must be contiguous [N, H, W, C]");
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2), channels = images.size(3);
  SPAT_CHECK(count > 0, "images must hold at least one");
  const int64_t sample_numel = images.numel() / count;
  SPAT_CHECK(sample_numel < kLimit, "images must hold fewer than 2^30 values each");
  const DType dtype = dtype_of(out, "out");
  SPAT_CHECK(out.dim() == 4 && out.size(1) == channels && out.size(2) == height && out.size(3) == width, "out must be [B, ",
             channels, ", ", height, ", ", width, "]");
  const bool channels_last = is_channels_last(out);
  SPAT_CHECK(channels_last || out.is_contiguous(), "out must be contiguous or channels_last");
  SPAT_CHECK(pad >= 0 && pad < kLimit, "pad must be at least 0 and less than 2^30, got ", pad);
  const int64_t samples = out.size(0);
  const CropFlip args{images.const_data_ptr<uint8_t>(),
                      int64_vector(rows, samples, "rows"),
                      int64_vector(ids, samples, "ids"),
                      int64_vector(seed, 2, "seed"),
                      out.mutable_data_ptr(), count, samples, sample_numel, int32_t(height), int32_t(width),
                      int32_t(channels), int32_t(channels_last ? channels : 1), int32_t(pad), flip, dtype};
  SPAT_RUN(crop_flip, args, images, samples, kCrop * sample_numel);
}

#ifdef SPAT_CONVOLUTIONS

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

Conv conv_of(const Tensor& x, const Tensor& weight, const Tensor& out, int64_t stride, int64_t pad_height, int64_t pad_width,
             int64_t tile, bool rows) {
  const ScalarType dtype = x.scalar_type();
  SPAT_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "x must be float16 or bfloat16");
  for (const Tensor* t : {&x, &weight, &out}) {
    const char* name = t == &x ? "x" : t == &weight ? "weight" : "out";
    check_tensor(t->dim() == 4 && is_channels_last(*t) && t->size(1) % 8 == 0 && t->size(1) > 0, *t, dtype, name,
                 "be channels_last with a multiple of 8 channels");
    SPAT_CHECK(is_aligned(t->const_data_ptr()), name, " must begin at a multiple of 16 bytes");
  }
  const int64_t samples = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t out_channels = weight.size(0), kernel_height = weight.size(2), kernel_width = weight.size(3);
  SPAT_CHECK(weight.size(1) == channels, "weight must be [K, ", channels, ", R, S]");
  SPAT_CHECK(stride >= 1 && stride <= 8 && pad_height >= 0 && pad_height < kernel_height && pad_width >= 0 &&
                 pad_width < kernel_width && kernel_height <= 64 && kernel_width <= 64,
             "stride must be 1 to 8, and padding less than the kernel, of at most 64 by 64");
  const int64_t out_height = (height + 2 * pad_height - kernel_height) / stride + 1;
  const int64_t out_width = (width + 2 * pad_width - kernel_width) / stride + 1;
  SPAT_CHECK(height + 2 * pad_height >= kernel_height && width + 2 * pad_width >= kernel_width, "weight is larger than x");
  SPAT_CHECK(out.size(0) == samples && out.size(1) == out_channels && out.size(2) == out_height && out.size(3) == out_width,
             "out must be [", samples, ", ", out_channels, ", ", out_height, ", ", out_width, "]");
  SPAT_CHECK(tile == 64 || tile == 128 || tile == 160, "tile must be 64, 128 or 160, got ", tile);
  SPAT_CHECK(samples * out_height * out_width < (int64_t(1) << 30) && samples * height * width < (int64_t(1) << 30),
             "x must have fewer than 2^30 pixels");
  const auto n = [](int64_t v) { return int32_t(v); };
  const Conv c{x.const_data_ptr(), weight.const_data_ptr(), n(samples), n(height), n(width), n(channels), n(out_height),
               n(out_width), n(out_channels), n(kernel_height), n(kernel_width), n(stride), n(pad_height), n(pad_width), n(tile),
               rows, 0, 0, 0, 0};
  SPAT_CHECK(!rows || pixels_in_rows(c), "rows needs stride 1, out as large as x, 8, 16, 32 or 64 pixels in a row, tiles of 128 "
             "pixels that are whole rows of an image, or two images, and at most 192 pixels with the rows above and below");
  return c;
}

// The tensors of a pass are read in packets of 16 bytes.
void check_packets(std::initializer_list<const void*> tensors) {
  for (const void* p : tensors) SPAT_CHECK(is_aligned(p), "every tensor but mask must begin at a multiple of 16 bytes");
}

void conv_scale_shift_relu(Tensor x, Tensor weight, int64_t stride, int64_t pad_height, int64_t pad_width, std::optional<Tensor> b,
                           std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> total, Tensor out,
                           std::optional<Tensor> mask, bool relu, int64_t tile, bool rows) {
  const ConvScaleShiftRelu args{conv_of(x, weight, out, stride, pad_height, pad_width, tile, rows),
                                forward_pass(out, "out", nullptr, b, scale, shift, total, out, mask, relu)};
  check_packets({args.pass.b, args.pass.scale, args.pass.shift, args.pass.total});
  run_conv(args, out, launch_conv_scale_shift_relu);
}

void conv_scale_shift_relu_grad(Tensor x, Tensor weight, int64_t stride, int64_t pad_height, int64_t pad_width,
                                std::optional<Tensor> grad2, std::optional<Tensor> mask, std::optional<Tensor> scale,
                                std::optional<Tensor> residual, Tensor out, int64_t tile, bool rows) {
  const ConvScaleShiftReluGrad args{conv_of(x, weight, out, stride, pad_height, pad_width, tile, rows),
                                    backward_pass(out, "out", nullptr, grad2, mask, scale, residual, out)};
  check_packets({args.pass.grad2, args.pass.scale, args.pass.residual});
  run_conv(args, out, launch_conv_scale_shift_relu_grad);
}

#endif

}  // namespace

#define SPAT_BOX(op, ...) TORCH_BOX((&Gate<&op, __VA_ARGS__>::call))

#define SPAT_IMPLEMENT_CONVOLUTIONS(m) \
  m.impl("conv_scale_shift_relu", SPAT_BOX(conv_scale_shift_relu, "x", "weight", "b~", "scale", "shift", "total!~", "out!~", \
                                           "mask!")); \
  m.impl("conv_scale_shift_relu_grad", SPAT_BOX(conv_scale_shift_relu_grad, "x", "weight", "grad2~", "mask", "scale", \
                                                "residual~", "out!~"));

#define SPAT_IMPLEMENT(m) \
  m.impl("linf_random_start_", SPAT_BOX(linf_random_start_, "x_adv!", "x", "eps", "seed")); \
  m.impl("linf_step_", SPAT_BOX(linf_step_, "x_adv!", "x", "grad", "eps", "step_size", "nan_seen!", "hash!")); \
  m.impl("l2_step_", SPAT_BOX(l2_step_, "x_adv!", "x", "grad", "eps", "step_size", "nan_seen!")); \
  m.impl("adt_sample_", SPAT_BOX(adt_sample_, "x_adv!", "mu", "rho", "x", "eps", "seed")); \
  m.impl("adt_step_", SPAT_BOX(adt_step_, "x_adv!", "mu!", "rho!", "x", "grad", "eps", "factor", "seed", \
                                "nan_seen!", "sum_mu!", "sum_rho!")); \
  m.impl("lsce_grad", SPAT_BOX(lsce_grad, "logits", "labels", "dlogits!", "loss!")); \
  m.impl("kl_grad", SPAT_BOX(kl_grad, "logits", "probs", "dlogits!", "loss!")); \
  m.impl("margin_grad", SPAT_BOX(margin_grad, "logits", "labels", "dlogits!", "loss!")); \
  m.impl("pma_grad", SPAT_BOX(pma_grad, "logits", "labels", "dlogits!", "loss!")); \
  m.impl("dlr_grad", SPAT_BOX(dlr_grad, "logits", "labels", "targets", "dlogits!", "loss!")); \
  m.impl("keep_best_", SPAT_BOX(keep_best_, "best!", "best_loss!", "best_success!", "x_adv", "loss", "success")); \
  m.impl("scale_shift_relu", SPAT_BOX(scale_shift_relu, "a~", "b~", "scale", "shift", "total!~", "out!~", "mask!")); \
  m.impl("scale_shift_relu_grad", SPAT_BOX(scale_shift_relu_grad, "grad~", "grad2~", "mask", "scale", "residual~", "dx!~")); \
  m.impl("scale_shift_act", SPAT_BOX(scale_shift_act, "a~", "b~", "scale", "shift", "negative", "total!~", "out!~", "slope!~")); \
  m.impl("scale_shift_act_grad", SPAT_BOX(scale_shift_act_grad, "grad~", "grad2~", "slope~", "residual~", "dx!~")); \
  m.impl("layer_norm", SPAT_BOX(layer_norm, "a~", "b~", "weight", "bias", "total!~", "out!~", "mean!", "rstd!")); \
  m.impl("layer_norm_grad", SPAT_BOX(layer_norm_grad, "grad~", "grad2~", "t~", "mean", "rstd", "weight", "residual~", "dx!~")); \
  m.impl("split_image", SPAT_BOX(split_image, "x", "scale", "shift", "out!")); \
  m.impl("pool_linear", SPAT_BOX(pool_linear, "x", "weight", "bias", "logits!")); \
  m.impl("pool_linear_grad", SPAT_BOX(pool_linear_grad, "dlogits", "weight", "mask", "scale", "factor!", "dx!")); \
  m.impl("crop_flip", SPAT_BOX(crop_flip, "images", "rows", "ids", "seed", "out!"));

STABLE_TORCH_LIBRARY_IMPL(spat, CPU, m) {
  SPAT_IMPLEMENT(m)
  m.impl("winograd", SPAT_BOX(winograd, "x", "weight", "out!"));
  m.impl("winograd_weights", SPAT_BOX(winograd_weights, "weight", "out!"));
#ifdef SPAT_CUDA_ON_CPU
  SPAT_IMPLEMENT_CONVOLUTIONS(m)
#endif
}
#ifdef SPAT_CUDA
STABLE_TORCH_LIBRARY_IMPL(spat, CUDA, m) {
  SPAT_IMPLEMENT(m)
  SPAT_IMPLEMENT_CONVOLUTIONS(m)
}
#else
#define SPAT_CUDA ""
#endif

// _C.CUDA: the toolkit and the architectures that setup.py built for ("13.0 sm_80 sm_90 sm_100 compute_100"), or "".
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "CUDA", SPAT_CUDA) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
