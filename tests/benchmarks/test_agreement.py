"""Judges nobody here wrote: torchattacks, foolbox and ART (`benchmarks.agreement`).

In fp64 at least 99.9 % of the pixels must be equal. In fp32 fewer are, on confident samples: there p_y - 1 cancels in PyTorch's
cross-entropy, to 0 in the end, while spat::lsce_grad keeps its digits. test_fp32_differences shows that these are ties, and that
where the two differ ours has the sign of fp64.
"""

import copy

import pytest
import torch

import spat_kernels as sk
from benchmarks import agreement

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks needs torchvision, which needs its own build of torch")

EPS = 0.15


@pytest.mark.parametrize("pair", agreement.PAIRS, ids=lambda pair: f"{pair.judge}-{pair.attack}")
def test_pairs(task, pair):
    """In the dtype that each of them is compared in first: fp64 but for ART."""
    pytest.importorskip(pair.judge.lower())
    model, x, y = task
    dtype = pair.dtypes[0]
    found = agreement.compare(pair, copy.deepcopy(model).to(dtype), x.to(dtype), y, EPS)
    assert found["pixels_differ"] <= (0.1 if dtype == torch.float64 else 5), found
    assert abs(found["accuracy"][0] - found["accuracy"][1]) <= 0.3, found
    assert 0 < found["accuracy"][0] < 99, "an attack that does something, and leaves something to disagree on"


def test_fp32_differences(task):
    model64, x, y = task
    model = copy.deepcopy(model64).float()
    exact = sk.fgsm(model64, x, y, EPS)
    x = x.float()
    ours, theirs = sk.fgsm(model, x, y, EPS), torchattacks.FGSM(model, eps=EPS)(x, y)
    differ = (ours - theirs).abs() > 1e-6
    right = [((v - exact).abs() < 1e-6)[differ].float().mean().item() for v in (ours, theirs)]
    assert differ.float().mean() < 0.05
    assert right[0] > 0.9 > right[1]
    confident = model64(x.double()).softmax(1).gather(1, y[:, None])[:, 0] > 1 - 1e-4
    assert differ.flatten(1).any(1)[~confident].float().mean() < 0.1, "other samples rarely differ"
