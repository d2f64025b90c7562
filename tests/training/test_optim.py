"""Optimisers: AdamW against its formula, what is decayed, layer-wise rates, and the schedule with warm-up and cosine."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.models.registry import create
from spat_train.training.optim import learning_rate, make_optimizer
from spat_train.training.step import TrainStep
from spat_train.training.trainer import train
from tests.training.helpers import new_run, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_adamw_is_its_formula():
    """Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2: the weights shrink by lr * decay apart from Adam's step."""
    config = Config(optimizer="adamw", lr=0.01, momentum=0.8, beta2=0.95, weight_decay=0.3, decay_norm=False)
    model = nn.Linear(4, 3).double()
    optimizer = make_optimizer(model, config)
    expected = [p.detach().clone() for p in (model.weight, model.bias)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for t in range(1, 4):
        x = torch.rand(5, 4, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        grads = [model.weight.grad.clone(), model.bias.grad.clone()]
        optimizer.step()
        for p, (m, v), g, decay in zip(expected, moments, grads, (0.3, 0.0), strict=True):
            m.lerp_(g, 1 - 0.8)
            v.mul_(0.95).addcmul_(g, g, value=1 - 0.95)
            p -= 0.01 * (decay * p + m / (1 - 0.8**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
        torch.testing.assert_close([model.weight.detach(), model.bias.detach()], expected, rtol=1e-12, atol=1e-14)


def test_adam_decays_by_an_l2_term():
    made = [make_optimizer(nn.Linear(2, 2), Config(optimizer=name, lr=0.1, weight_decay=0.5)) for name in ("adam", "adamw")]
    assert [type(optimizer) for optimizer in made] == [torch.optim.Adam, torch.optim.AdamW]
    assert not made[0].param_groups[0]["decoupled_weight_decay"]


def names_by_decay(model: nn.Module, config: Config) -> dict[float, set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    return {group["weight_decay"]: {names[p] for p in group["params"]} for group in groups}


def test_position_embeddings_are_not_decayed():
    """As timm's own optimisers do, where biases and norms are left out."""
    pytest.importorskip("timm")
    model = create("timm:test_vit", 5, (3, 32, 32))
    kept = names_by_decay(model, Config(optimizer="adamw", weight_decay=0.05, decay_norm=False))
    assert {"model.pos_embed", "model.cls_token", "model.norm.weight", "model.head.bias"} <= kept[0.0]
    assert all(name.endswith("weight") and ".norm" not in name for name in kept[0.05])
    everything = names_by_decay(model, Config(optimizer="adamw", weight_decay=0.05))
    assert everything == {0.05: {name for name, _ in model.named_parameters()}}


@pytest.mark.parametrize("name", ["timm:test_convnext", "timm:test_vit", "convnext-t-convstem", "vit-s-convstem"])
def test_layer_wise_rates(name):
    """lr 0.8^d, d the number of layers up to the logits, and every parameter once; through a warm-up too."""
    pytest.importorskip("timm")
    config = Config(
        optimizer="adamw", lr=0.01, layer_decay=0.8, decay_norm=False, weight_decay=0.05, schedule="warmup-cosine", warmup=2.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = create(name, 5, (3, 32, 32))
    step = TrainStep(config, model, SimpleNamespace(device=torch.device("cpu"), wrap=lambda module: module))
    step.set_learning_rate(0, 1.0)
    assert step.lr == 0.01 / 2
    names = {p: name for name, p in model.named_parameters()}
    rates, decays = {}, {}
    for group in step.optimizer.param_groups:
        rates |= {names[p]: group["lr"] for p in group["params"]}
        decays |= {names[p]: group["weight_decay"] for p in group["params"]}
    assert rates.keys() == set(names.values())
    depths = {name: math.log(rate / 0.005) / math.log(0.8) for name, rate in rates.items()}
    assert all(abs(depth - round(depth)) < 1e-9 for depth in depths.values())
    head = next(name for name in depths if name.endswith(("head.fc.weight", "head.weight")))
    first = next(name for name in depths if "stem" in name or "patch_embed" in name)
    assert round(depths[head]) == 0
    assert round(depths[first]) == max(round(depth) for depth in depths.values()) >= 4
    blocks = [name for name in depths if "blocks" in name and name.endswith("weight") and "norm" not in name]
    assert [round(depths[name]) for name in blocks] == sorted((round(depths[name]) for name in blocks), reverse=True)
    assert decays[head] == 0.05
    assert decays[head.replace("weight", "bias")] == 0


def test_without_layer_wise_rates_the_last_layer_would_not_lead():
    run = new_run(settings(optimizer="adamw", lr=0.01, schedule="constant"))
    ((x, y), *_) = run.loader.epoch(0)
    run.train_on(x, y, len(x))
    assert run.step.lr == 0.01


def test_layers_must_be_known():
    with pytest.raises(InputError, match="--layer-decay 0.8: tests.* does not say which layers it has: give timm:NAME"):
        new_run(settings(optimizer="adamw", layer_decay=0.8))


def test_no_weight_is_left_out_of_layers():
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = torch.nn.Sequential(create("timm:test_vit", 5, (3, 32, 32)), torch.nn.Linear(5, 3))
    with pytest.raises(InputError, match="--layer-decay 0.8: 2 weights of own:net are in no layer of its VisionTransf"):
        make_optimizer(model, Config(model="own:net", optimizer="adamw", layer_decay=0.8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 0.9}, "--beta2 0.9: it is Adam's: leave it out, or give 0.999"),
        ({"optimizer": "adamw", "beta2": 1.0}, "--beta2 1.0: give a number below 1"),
        ({"layer_decay": 0.0}, r"--layer-decay 0.0: give a number in \(0, 1\], such as 0.8"),
        ({"schedule": "warmup-cosine", "warmup": 4.0}, "--warmup 4.0: it must be shorter than the 4 epochs"),
        ({"optimizer": "adamw", "nesterov": True}, "--nesterov True: it is SGD's"),
        ({"attack": "apgd", "step_size": 2.0}, "--step-size 2.0: apgd chooses its own: leave it out"),
        ({"attack": "apgd", "start": "normal"}, "--start normal: apgd has clean and uniform"),
        ({"attack": "apgd", "method": "fast", "steps": None}, "--attack apgd: fast takes a step of its own"),
        ({"attack": "apgd", "method": "free", "steps": None}, "--attack apgd: free takes its examples from the gradient"),
        ({"attack": "apgd", "method": "adt"}, "--attack apgd: adt has its own: leave it out, or give pgd"),
        ({"attack": "apgd", "method": "standard", "steps": None}, "--attack apgd: standard training attacks nothing"),
        ({"attack": "apgd", "method": "trades", "start": "clean"}, "--start clean: the gradient of kl is 0 at x itself"),
        ({"train_sizes": "8@1", "method": "free", "steps": None}, "--train-sizes 8@1: free keeps perturbations: leave it out"),
        ({"train_sizes": "8@1,16@5"}, "--train-sizes 8@1,16@5: 16 would begin after the last epoch, 4: give others"),
        ({"train_sizes": "16"}, "--train-sizes 16: give sides of at least 8, each with the epoch"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        train(settings(**options), save=False)


def test_warmup_then_cosine():
    config = Config(schedule="warmup-cosine", epochs=10, warmup=2.0, lr=0.3)
    assert learning_rate(config, 0, 0.5) == pytest.approx(0.3 / 4)
    assert learning_rate(config, 1, 1.0) == pytest.approx(0.3)
    assert learning_rate(config, 5, 1.0) == pytest.approx(0.15)
    assert learning_rate(config, 3, 1.0) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 9, 1.0) == pytest.approx(0, abs=1e-12)
