"""Where the milliseconds go: kinds of kernels, and times that overlap."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType

from benchmarks import breakdown, measure


def test_breakdown_accounts_for_a_call():
    torch.manual_seed(0)
    a, b = torch.randn(2, 300, 300), torch.randn(300, 300)
    found = breakdown.taken_apart(lambda: [(a @ b).relu_() for _ in range(4)], "cpu", steps=4, seconds=0.01)
    kernels = {k["name"]: (k["kind"], k["calls"]) for k in found["longest"]}
    assert kernels["aten::mm"] == ("matrix product", 1)
    assert kernels["aten::clamp_min_"] == ("pointwise", 1)
    assert min(found["kinds"]["matrix product"], found["kinds"]["pointwise"], found["step_ms"]) > 0


KINDS = {
    "void spat::(anonymous namespace)::linf_step_kernel<float, float, 4>(spat::Step)": "spat",
    "void at::native::(anonymous namespace)::dispatched_kernel<float>": "other",
    "void at::native::batch_norm_backward_elemt_channels_last_kernel<4, c10::BFloat16>": "batch norm",
    "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>": "batch norm",
    "scale_shift_relu_grad_kernel": "spat",
    "adt_step_kernel": "spat",
    "pool_linear_grad_kernel": "spat",
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>": "layout",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
    "sm80_xmma_dgrad_implicit_gemm_indexed_tf32f32": "convolution",
    "nvjet_hsh_64x8_64x16_1x2_h_bz_TNT": "matrix product",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "pointwise",
    "Memcpy DtoD (Device -> Device)": "copy",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>": "optimiser",
}


def test_kinds_of_kernels():
    assert {name: breakdown.kind_of(name) for name in KINDS} == KINDS


def test_annotations_are_no_kernels(monkeypatch):
    """CUPTI reports an optimiser's step on the device too, beside the kernels in it."""
    span = SimpleNamespace(start=3000.0, elapsed_us=lambda: 500.0)

    def event(name: str, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span)

    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event("kernel", cuda), event("Optimizer.step#SGD.step", cuda, True), event("cudaGraphLaunch", cpu)]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(breakdown, "profile", lambda activities: nullcontext(profiler))
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    assert breakdown.spans(lambda: None, "cuda") == [("kernel", 3.0, 0.5)]


def test_busy_time_counts_overlaps_once():
    assert breakdown.busy([("a", 0.0, 2.0), ("b", 1.0, 2.0), ("c", 10.0, 1.0), ("d", 10.2, 0.5)]) == 4.0
