"""APGD: step by step what torchattacks does, in fewer passes, of each sample by itself, and as a capture."""

import pytest
import torch

from spat_kernels import APGD, balls
from tests.test_judges import task  # noqa: F401  the fixture

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks needs torchvision, which needs its own build of torch")


def start_at(monkeypatch, x, start):
    monkeypatch.setattr(balls.Ball, "surface_start_", lambda self, x_adv, draws: x_adv.copy_(start))


@pytest.mark.parametrize("steps", [10, 33])
@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("linf", 0.15), ("l2", 0.3), ("l2", 1.0)])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_equals_torchattacks(task, loss, norm, eps, steps, monkeypatch):  # noqa: F811
    model, x, y = task
    x, y = x[:100], y[:100]
    noise = torch.randn_like(x) if norm == "l2" else torch.rand_like(x)
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, lambda *_: noise.clone())
    judge = torchattacks.APGD(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=steps, loss=loss)
    best, robust, _, _ = judge.attack_single_run(x, y)
    monkeypatch.undo()
    direction = noise / noise.flatten(1).norm(dim=1)[:, None, None, None] if norm == "l2" else None
    if norm == "linf":
        t = 2 * noise - 1
        direction = t / t.abs().flatten(1).amax(1)[:, None, None, None]
    for ball in (balls.LinfBall, balls.L2Ball):
        monkeypatch.setattr(ball, "surface_start_", lambda self, x_adv, draws: x_adv.copy_((x + eps * direction).clamp(0, 1)))
    pass
    ours = APGD(eps, norm=norm, steps=steps, loss=loss, input_gradient="autograd")(model, x, y)
    print(
        robust.float().mean(),
        ((ours - best).abs() <= 1e-6)[robust].double().mean(),
        (model(ours).argmax(1) == y)[~robust].float().mean(),
        (model(ours).argmax(1) == y)[robust].float().mean(),
    )
