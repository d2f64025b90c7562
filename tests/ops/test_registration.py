"""What the dispatcher sees: correct schemas, fakes, torch.compile, and the choice of implementation."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

import spat_kernels
from spat_kernels import ops
from tests.ops.helpers import OPS, all_samples, channels_last


@pytest.mark.parametrize(("op", "arguments"), all_samples(), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(op, arguments):
    opcheck(
        getattr(torch.ops.spat, op).default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_every_op_is_checked():
    assert {op for op, _ in all_samples()} == set(OPS)


def training_step(images, rows, seed, eps, y, weight):
    """Crops, a network and its gradient, and an attack's step: views, new tensors and arithmetic between the ops."""
    x = ops.crop_flip(images, rows, rows + 1, seed, images.new_empty(len(rows), 4, 8, 8, dtype=torch.float32), pad=2, flip=True)
    x = channels_last(x * 2)
    mask, wide = rows.new_zeros(len(rows) * 64, 1, dtype=torch.uint8), channels_last(x.new_empty(len(x), 8, 8, 8).half())
    t = ops.split_image(x, wide).float()
    out = ops.scale_shift_relu(t, torch.empty_like(t), scale=weight[0], mask=mask)
    logits = ops.pool_linear(out, weight, out.new_empty(len(x), len(weight)))
    dlogits = ops.lsce_grad(logits, y, torch.empty_like(logits), alpha=0.1)
    dx = ops.pool_linear_grad(dlogits, weight, torch.empty_like(out), mask=mask, scale=weight[1])
    slope = torch.empty_like(out)
    ops.scale_shift_act(out, torch.empty_like(out), act="gelu", slope=slope)
    dx = ops.scale_shift_act_grad(dx, slope, torch.empty_like(out))
    grad = ops.scale_shift_relu_grad(dx, torch.empty_like(out), mask=mask, scale=weight[0])[:, :4].contiguous()
    x = x.contiguous()
    return ops.linf_step_(x.clone(), x, grad * dlogits.sum().exp(), eps, eps), logits, dlogits, mask


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(device, dynamic):
    compiled = torch.compile(training_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 6):
        with torch.device(device):
            images, rows = torch.randint(256, (10, 8, 8, 4), dtype=torch.uint8), torch.randperm(10)[:batch]
            arguments = images, rows, torch.tensor([3, batch]), torch.tensor([0.1]), rows % 3, torch.randn(3, 8)
        assert all(map(torch.equal, compiled(*arguments), training_step(*arguments)))


def test_config_tells_what_serves():
    config = spat_kernels.config()
    assert config["compiled"]
    assert config["backend"] == "auto"
    cuda = "CUDA C++" if config["cuda"] else "Triton"
    assert all(keys == {"CPU": "C++", "CUDA": cuda} for keys in config["ops"].values())
    for op, keys in config["ops"].items():
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spat::{op}", key)
    json.dumps(config)


PROBE = """
import json, torch, spat_kernels
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
torch.manual_seed(0); [p.data.normal_() for p in model.parameters()]
x, y = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
x_adv = spat_kernels.pgd_ls(model, x, y, 8/255, 0.2, generator=torch.Generator().manual_seed(1))
print(json.dumps([spat_kernels.config()["ops"]["linf_step_"], x_adv.tolist()]))
"""


def run(backend: str, **env) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"SPAT_KERNELS_BACKEND": backend} | env
    return subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_backend_is_forced_and_all_agree():
    """One attack, four backends: the same adversarial images to the bit (no class is near a tie in this model)."""
    built = spat_kernels.config()["cuda"]
    expected = {
        ("auto", ""): {"CPU": "C++", "CUDA": "CUDA C++" if built else "Triton"},
        ("compiled", ""): {"CPU": "C++", "CUDA": "CUDA C++" if built else "reference"},
        ("reference", ""): {"CPU": "reference", "CUDA": "reference"},
        ("triton", "1"): {"CPU": "Triton (interpreted)", "CUDA": "Triton"},
    }
    images = []
    for (backend, interpret), served in expected.items():
        result = run(backend, TRITON_INTERPRET=interpret)
        assert result.returncode == 0, result.stderr
        got, x_adv = json.loads(result.stdout)
        assert got == served
        images.append(x_adv)
    assert all(x_adv == images[0] for x_adv in images)


def test_unknown_backend_is_refused():
    result = run("cuda")
    assert result.returncode != 0
    assert "choose one of auto, compiled, triton, reference" in result.stderr


@pytest.mark.gpu
def test_second_device_is_guarded():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for op, arguments in all_samples(device="cuda:1"):
        with torch.cuda.device(0):
            getattr(torch.ops.spat, op)(*arguments)
    torch.cuda.synchronize(1)


@pytest.mark.gpu
def test_captures_on_a_side_stream():
    for op, arguments in all_samples(device="cuda"):
        eager = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        graph = torch.cuda.CUDAGraph()
        call = getattr(torch.ops.spat, op)
        call(*[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments])  # compiles, where Triton serves
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            call(*arguments)
        graph.replay()
        call(*eager)
        torch.cuda.synchronize()
        for a, b in zip(arguments, eager, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), op
