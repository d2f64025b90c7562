"""Evaluations: the outcome of every attack on every image, as counted by hand."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import spat_kernels
from spat_train.data.datasets import load
from spat_train.data.images import Images, floats
from spat_train.errors import InputError
from spat_train.evaluation import evaluate as module
from spat_train.evaluation.alarms import alarms, rechecked
from spat_train.evaluation.attack_specs import parse
from spat_train.evaluation.evaluate import TEST, accuracies, evaluate, validation
from spat_train.evaluation.record_log import file_name
from spat_train.evaluation.result import WORST, interval
from spat_train.runtime import logs
from spat_train.runtime.seeding import derived_seed
from tests.evaluation.helpers import EPS, Escaping, Features, Maps, digits, fitted, quiet
from tests.helpers import assert_same, distance, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_trainer_uses_the_same_attacks():
    """And measures as it always did: every image attacked, all random starts of a batch from seed + its number."""
    model, data = fitted(), load("digits").test
    rows = torch.arange(50)
    found = accuracies(model, data, TEST | {"pgd": validation(3)["pgd"]}, EPS, rows=rows, seed=3, batch_size=20)
    correct = dict.fromkeys(found, 0)
    for number, batch in enumerate(rows.split(20)):
        x, y = floats(data, batch, "cpu")
        how = [{"generator": torch.Generator().manual_seed(3 + number)} for _ in range(4)]
        images = {
            "clean": x,
            "FGSM": spat_kernels.fgsm(model, x, y, EPS, **how[0]),
            "PGD-20": spat_kernels.pgd(model, x, y, EPS, steps=20, step_size=EPS / 10, **how[1]),
            "C&W-inf-30": spat_kernels.cw_linf(model, x, y, EPS, steps=30, step_size=EPS / 10, **how[2]),
            "pgd": spat_kernels.pgd(model, x, y, EPS, steps=3, step_size=EPS / 4, **how[3]),
        }
        for name in found:
            correct[name] += int((model(images[name]).argmax(1) == y).sum())
    assert found == {name: 100 * count / 50 for name, count in correct.items()}
    for name in ("pgd-7-all", "pgd-7x2"):
        with pytest.raises(InputError, match=f"attack {name}: it has several runs"):
            accuracies(model, data, {"pgd": parse(name)}, EPS)
    assert [TEST[name].spec for name in list(TEST)[1:]] == [parse(name).spec for name in ("fgsm", "pgd-20", "cw-30")]


# ---- the truth about every image


def test_autoattack_by_parts(monkeypatch, capsys):
    """What each broke, by its own record, batch for batch; and a bar that moves with them."""
    seen = []

    class Bar(logs.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append((self.postfix, self.n))

    monkeypatch.setattr(logs, "_Lines", Bar)
    model, (x, y) = fitted(), digits(120)
    name = "autoattack:steps=2:queries=60"
    found = quiet(model, (x, y), f"fgsm,{name},pgd-7x3", batch_size=50, eps=0.12, bar="bar")
    parts = [(f"{name} {part}", 100 + 50 * i) for i, part in enumerate(("apgd-ce", "apgd-t", "fab-t", "square"))]
    at = seen.index(parts[0])
    runs = [(f"pgd-7x3 run {run} of 3", 250 + 50 * run) for run in (1, 2, 3)]
    assert seen[at : at + 9] == [*parts, (name, 300), *runs, ("pgd-7x3", 450)]
    assert seen[-1] == ("pgd-7x3", 120 * 9)
    assert "1080/1080" in capsys.readouterr().err
    expected = []
    for number, rows in enumerate(torch.arange(120).split(50)):
        generator = torch.Generator().manual_seed(derived_seed(0, name, number, 0))
        keep = (model(x[rows]).argmax(1) == y[rows]).nonzero()[:, 0]
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        run = spat_kernels.AutoAttack(0.12, steps=2, queries=60, seed=seed, precision="fp32")
        by = torch.full((len(rows),), -1)
        by[keep] = run.run(model, x[rows][keep], y[rows][keep]).broken_by.sub(1).clamp(min=-1)
        expected.append(by)
    expected = torch.cat(expected)
    assert found.part.keys() == {name}
    assert torch.equal(found.part[name], expected)
    assert len(expected.unique()) > 3, "several broke some"
    after = found.after(name)
    assert list(after) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    right = found.correct("clean")
    for number, left in enumerate(after.values()):
        assert torch.equal(left, right & ~((expected >= 0) & (expected <= number)))
    assert torch.equal(left, found.correct(name))
    assert found.after("fgsm") == {}
    shown = [line[:2] for line in found.lines() if line[0].startswith("  after")]
    assert shown == [(f"  after {part}", f"{100 * int(left.sum()) / 120:.2f}") for part, left in after.items()]


def brute_force(model, source, x, y, attack, eps, seed, batch_size) -> torch.Tensor:
    """bool [N]: broken, by attacking all images in every run and looking at all of them."""
    broken = model(x).argmax(1) != y
    for number, rows in enumerate(torch.arange(len(x)).split(batch_size)):
        for run in range(attack.runs(10)):
            generator = torch.Generator().manual_seed(derived_seed(seed, attack.name, number, run))
            x_adv = attack(source, x[rows], y[rows], eps, generator, run=run)
            broken[rows] |= model(x_adv).argmax(1) != y[rows]
    return broken


@pytest.mark.parametrize(
    "name", ["pgd-7x4", "pgd-7-all", "pgd-7-random:restarts=3", "pgd:norm=l2:restarts=3:steps=5", "noisex20"]
)
@pytest.mark.parametrize("black_box", [False, True])
def test_restarts_on_what_is_left_find_what_restarts_on_all_find(name, black_box):
    model, source = fitted(0, torch.float64), fitted(1, torch.float64)
    source = source if black_box else model
    x, y = digits(50, torch.float64)
    found = quiet(model, (x, y), [name, "fgsm"], source=source if black_box else None, seed=5, batch_size=20, precision=None)
    attack = parse(name)
    expected = brute_force(model, source, x, y, attack, attack.radius(EPS, 0.5, 12.0), 5, 20)
    assert torch.equal(~found.correct(name), expected)
    assert name == "noisex20" or 0 < found.accuracy(name) < found.accuracy("clean")
    fgsm = brute_force(model, source, x, y, parse("fgsm"), EPS, 5, 20)
    assert torch.equal(found.correct(WORST), ~(expected | fgsm))
    assert found.worst_case() == 100 * float((~(expected | fgsm)).sum()) / 50
    wrong = model(x).argmax(1) != y
    assert torch.equal(found.predicted[name][wrong], model(x).argmax(1)[wrong])  # as it was, not attacked


def test_images_that_are_wrong_are_attacked_where_that_is_asked():
    """PGD-LS at alpha = 1 then makes more images right than were (thesis, Fig. 5.3)."""
    model, (x, y) = fitted(), digits(200)
    x = (x + 0.5 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)  # else few are wrong
    name = "pgd-ls-20:alpha=1"
    plain, asked = (quiet(model, (x, y), [name], attack_wrong=wanted, batch_size=200) for wanted in (False, True))
    assert plain.accuracy(name) <= plain.accuracy("clean") < asked.accuracy(name)
    generator = torch.Generator().manual_seed(derived_seed(0, name, 0, 0))
    x_adv = parse(name)(model, x, y, EPS, generator)
    assert torch.equal(asked.predicted[name], model(x_adv).argmax(1))
    parts = quiet(model, (x, y), "autoattack:steps=2:queries=5", attack_wrong=True)
    (part,) = parts.part.values()
    assert (part[parts.correct("clean")] >= 0).any()
    assert (part[~parts.correct("clean")] == -1).all()


def test_the_interval_is_wilsons():
    """Newcombe (1998), Table I, method 3. None broken, or all, is exactly an end."""
    for correct, count, low, high in ((81, 263, 25.53, 36.62), (0, 20, 0, 16.11), (5, 5, 56.55, 100)):
        found = interval(torch.arange(count) < correct)
        assert found == pytest.approx((low, high), abs=5e-3)
        p, z2 = correct / count, 1.959963984540054**2 / count
        half = math.sqrt(z2 * p * (1 - p) + z2 * z2 / 4)
        assert found == pytest.approx([100 * (p + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1)], abs=1e-9)
    assert interval(torch.zeros(20, dtype=torch.bool))[0] == 0
    assert interval(torch.ones(5, dtype=torch.bool))[1] == 100


def test_nothing_else_is_changed():
    model, (x, y) = fitted(), digits(30)
    model.features.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before, numpy_state = (snapshot(model, x, y), torch.get_rng_state()), np.random.get_state()[1].copy()  # noqa: NPY002
    quiet(model, (x, y), "pgd-10x2,pgd-7-random,square:queries=5")
    alarms(model, (x, y), eps=EPS, bar=None)
    assert_same(dict(enumerate((snapshot(model, x, y), torch.get_rng_state()))), dict(enumerate(before)))
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002  (the global one is meant)


def test_models_that_take_contiguous_images_alone(tmp_path):
    model, reshaped = Maps().eval(), Maps().eval()
    reshaped.load_state_dict(model.state_dict())
    reshaped.forward = lambda x: reshaped.classifier(reshaped.maps(x).flatten(1))
    names, images = "fgsm,square:queries=5,autoattack:steps=2:queries=5", digits(40)
    found, expected = quiet(model, images, names), quiet(reshaped, images, names, memory_format=torch.contiguous_format)
    assert all(torch.equal(found.predicted[name], expected.predicted[name]) for name in found.attacks)
    formats = [quiet(reshaped, images, "fgsm", source=source).settings["memory_format"] for source in (None, model)]
    assert found.settings["memory_format"] == "contiguous"
    assert formats == [None, "contiguous"]
    assert len(alarms(model, images, eps=EPS, bar=None)) > 10
    with pytest.raises(InputError, match=r"model: it does not take images \[1, 9, 9\]"):
        quiet(model, (torch.rand(4, 1, 9, 9), torch.arange(4)), "fgsm")


def test_images_with_strides_and_gradients():
    model, (x, y) = fitted(), digits(40)
    expected = quiet(model, (x[::2].clone(), y[::2].clone()), "pgd-10").predicted["pgd-10"]
    assert torch.equal(quiet(model, (x.requires_grad_()[::2], y[::2]), "pgd-10").predicted["pgd-10"], expected)


class Noisy(Features):
    """Draws at random in eval mode."""

    def forward(self, x):
        return super().forward(x + 0.3 * torch.randn_like(x))


def test_a_model_that_draws_is_a_function_of_the_seed_and_leaves_the_global_generator():
    model = Noisy().eval()
    model.load_state_dict(fitted().state_dict())
    state = torch.get_rng_state()
    first, again, other = (
        quiet(model, digits(60), names, seed=seed) for names, seed in (("fgsm,noise", 0), ("noise", 0), ("noise", 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.predicted[name], again.predicted[name]) for name in ("clean", "noise"))
    assert not torch.equal(first.predicted["noise"], other.predicted["noise"])


# ---- adversarial images, checked again and saved


def test_an_attack_that_leaves_the_ball_is_caught():
    model, (x, y) = fitted(), digits(30)
    x[:, 0, 4, 4] = 0.9
    found = quiet(model, (x, y), [Escaping(name="escaping"), "fgsm"], batch_size=30)
    attacked = model(x).argmax(1) == y
    assert found.rechecks["escaping"].outside == (int(attacked.sum()) + 1) // 2
    assert found.rechecks["fgsm"].outside == 0
    alarm = rechecked(found)
    assert alarm.raised
    assert alarm.numbers["escaping"] == found.rechecks["escaping"].outside
    assert not rechecked(quiet(model, (x, y), "fgsm,pgd-l2-20")).raised


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_inside(norm):
    x = torch.full((4, 1, 8, 8), 0.5)
    far = {"linf": 0.1, "l2": 0.1 / 8, "l1": 0.1 / 64}[norm]
    x_adv = x + far * torch.tensor([1.0, 1.001, -1.0, 0.0])[:, None, None, None]
    x_adv[3, 0, 0, 0] = 1 + 1e-6
    assert module.inside(x_adv, x, 0.1, norm).tolist() == [True, False, True, False]
    assert module.inside(x_adv, x, 0.1, norm, 0.5 / 255).tolist() == [True, True, True, False]


def test_inside_in_l1_gives_slack_for_what_has_moved_alone():
    x = torch.full((2, 1, 8, 8), 0.5)
    x_adv = x.clone()
    x_adv[:, 0, 0, :2] += 0.05 + torch.tensor([0.4, 0.6])[:, None] / 255
    assert module.inside(x_adv, x, 0.1, "l1", 0.5 / 255).tolist() == [True, False]


def test_saved_images(tmp_path):
    data, model = load("digits").test, fitted()
    found = quiet(
        model,
        data,
        "pgd-10,pgd:norm=l2:eps=1/2,apgd:norm=l1:eps=2:steps=10",
        rows=torch.arange(50),
        batch_size=20,
        folder=tmp_path,
        save_images=True,
    )
    for name, eps in (("pgd-10", EPS), ("pgd:norm=l2:eps=1/2", 0.5), ("apgd:norm=l1:eps=2:steps=10", 2)):
        arrays = [np.load(file) for file in sorted((tmp_path / "images" / file_name(name)).iterdir())]
        saved = {key: torch.from_numpy(np.concatenate([a[key] for a in arrays])) for key in arrays[0]}
        assert len(arrays) == 3
        assert (saved["x_adv"].dtype, saved["x_adv"].shape) == (torch.uint8, (50, 8, 8, 1))
        assert torch.equal(saved["rows"], torch.arange(50))
        assert torch.equal(saved["y"], data.labels[:50])
        assert torch.equal(saved["predicted"], found.predicted[name])
        moved = distance(saved["x_adv"], data.pixels[:50], parse(name).norm) / 255
        assert (moved <= eps + {"linf": 1, "l2": 8, "l1": 64}[parse(name).norm] * 0.5 / 255).all()
        assert moved.max() > 0.95 * eps
        broken = found.correct("clean") & ~found.correct(name)
        x = saved["x_adv"].permute(0, 3, 1, 2).float() / 255
        kept = int((model(x).argmax(1) != saved["y"])[broken].sum())
        assert found.rechecks[name].adversarial == int(broken.sum()) > 4
        assert found.rechecks[name].rounded == kept
        for example, row in zip(found.examples[name], broken.nonzero()[:4, 0].tolist(), strict=True):
            assert example.index == row
            assert torch.equal(example.image, saved["x_adv"][row])


def test_the_hash_of_weights_knows_settings_that_leave_no_trace_in_them():
    convolution = partial(nn.Conv2d, 1, 1, 3, padding=1)
    for plain, other in (
        (convolution, partial(convolution, dilation=2)), (nn.LeakyReLU, partial(nn.LeakyReLU, 0.5)),
        (nn.Softplus, partial(nn.Softplus, 2)), (partial(nn.BatchNorm2d, 1), partial(nn.BatchNorm2d, 1, 0.1)),
    ):  # fmt: skip
        models = [nn.Sequential(kind()) for kind in (plain, plain, other)]
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        first, same, changed = map(module.weights_hash, models)
        assert first == same != changed


# ---- bad input


class Branching(Features):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else -x)


X, Y = torch.rand(6, 1, 8, 8), torch.arange(6)
PIXELS = torch.zeros(6, 8, 8, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": fitted().train()}, "model: Features is in training mode.*call model.eval"),
        ({"model": lambda x: x}, "model: give a torch.nn.Module, not a function"),
        ({"model": nn.Conv2d(3, 4, 3).eval()}, r"model: it does not take images \[1, 8, 8\]"),
        ({"model": nn.Flatten(0).eval()}, r"model: two images give \[128\]: it must return logits \[2, K\]"),
        ({"source": Features(7).eval()}, r"source: two images give \[2, 7\]: it must return logits \[2, 10\]"),
        ({"images": (X[:0], Y[:0])}, "images: there is none"),
        ({"images": (X - 0.1, Y)}, r"images: x must lie inside .*from -0\.\d+ to .*normalise inside the model.*net\)$"),
        ({"images": (X[0], Y)}, r"images: they are torch.float32 \[1, 8, 8\]: give torch.float32 or torch.float64 \[N, C"),
        ({"images": (X, Y[:5])}, "images: there are 6 and 5 labels"),
        ({"images": (X, Y + 5)}, "there is a label 10, and the model has classes 0 to 9"),
        ({"images": (X, Y - 1)}, "there is a label -1"),
        ({"images": (X, Y.float())}, "labels must be an int64 tensor"),
        ({"images": Images(PIXELS[..., 0], Y)}, r"images: they are torch.uint8 \[6, 8, 8\]: give torch.uint8 \[N, H, W, C\]"),
        ({"images": [1, 2]}, "images: give Images"),
        ({"rows": torch.arange(7)}, "rows: they go from 0 to 6, there are 6 images"),
        ({"rows": torch.arange(0)}, "rows: give an int64 tensor"),
        ({"attacks": "apgd-t", "model": Features(6).eval()}, "apgd-t: it needs 10 classes, the model has 6: give fewer targets"),
        ({"eps": 8}, "eps=8: give a number above 0, for images in .0, 1.: 8/255"),
        ({"eps_l2": 128.0, "attacks": "pgd-l2-20"}, r"attack pgd-l2-20: eps_l2=128 exceeds the diagonal, 8, .*\(128/255 for"),
        ({"attacks": "fgsm,fab:norm=l2:eps=9"}, "attack fab:norm=l2:eps=9: eps=9 exceeds the diagonal, 8,"),
        ({"eps_l1": 65.0, "attacks": "pgd-l1-20"}, "attack pgd-l1-20: eps_l1=65 exceeds the diagonal, 64,"),
        ({"eps_l1": 0.0}, "eps_l1=0.0: give a number above 0"),
        ({"seed": -1}, "seed=-1: give an integer"),
        ({"batch_size": 0}, "batch_size=0: give an integer from 1"),
        ({"precision": "tf32"}, "precision='tf32': TF32 is for GPUs"),
        ({"images": (X.double(), Y), "model": fitted().double()}, "precision='fp32' is for float32 images"),
        ({"graph": "never"}, "graph='never': choose"),
        ({"graph": True}, "graph=True: CUDA graphs are for GPUs"),
        ({"model": Branching().eval(), "input_gradient": "plan"}, "input_gradient='plan', but torch.fx cannot trace it"),
        ({"save_images": True, "folder": None}, "save_images=True: give a folder"),
        (
            {"attacks": "fgsm,pgd-20-rst", "source": fitted(1)},
            "attack pgd-20-rst: right_at=every asks the model that is attacked",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_before_any_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(module, "broken_by", None)
    given = {"model": fitted(), "images": (X, Y), "attacks": "fgsm", "eps": 0.1, "folder": tmp_path / "out", **arguments}
    with pytest.raises(InputError, match=message) as caught:
        evaluate(given.pop("model"), given.pop("images"), given.pop("attacks"), bar=None, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- what it cost

COSTS = {  # forwards and backwards of an image that is attacked to the end
    "noise": (0, 0), "pgd-7": (7, 7), "pgd-7-least-likely": (8, 7), "pgd-kl-20": (21, 20), "pgd-20-rst": (40, 20),
    "square:queries=30": None, "apgd-ce:steps=6": (8, 6), "fab-t:steps=2:targets=3": (13, 6), "pgd-7-all": (81, 63),
    "autoattack:steps=3:queries=20": None,
}  # fmt: skip


def test_costs_of_every_attack_are_beside_its_accuracy(tmp_path):
    model, (x, y) = fitted(), digits(40)
    found = quiet(model, (x, y), [*COSTS, "pgd-7x3"], folder=tmp_path, batch_size=30)
    right = found.correct("clean")
    for name, expected in COSTS.items():
        forwards, backwards = found.forwards[name], found.backwards[name]
        assert not (forwards + backwards)[~right].any(), "what is wrong is not attacked"
        if expected is not None:
            robust = found.correct(name)
            assert forwards[robust].unique().tolist() == [expected[0]] * bool(robust.any()), name
            assert backwards[robust].unique().tolist() == [expected[1]] * bool(robust.any()), name
        mean = found.passes(name)
        assert mean == (float(forwards[right].double().mean()), float(backwards[right].double().mean()))
        (line,) = (line for line in found.lines() if line[0] == name)
        assert line[3] == f"{mean[0]:.0f} + {mean[1]:.0f}"
    broken_at_once = right & ~found.correct("pgd-7")
    assert found.forwards["pgd-7x3"][broken_at_once].max() < 24
    assert found.forwards["pgd-7x3"][found.correct("pgd-7x3")].unique().tolist() == [24], "and a look after each run"
    assert found.passes("clean") is None
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [len(r["forwards"]) for r in records if r["attack"] == "pgd-7"] == [30, 10]


@pytest.mark.parametrize("budget", [11, 15, 30, 200])
def test_no_image_costs_more_than_the_budget(budget, tmp_path):
    model, (x, y) = fitted(), digits(30)
    names = [*COSTS, "pgd-7x3", "pgd-7-random:restarts=3", "apgd-ce:steps=6:restarts=2", "pgd-l2-20"]
    found = quiet(model, (x, y), names, budget=budget, batch_size=20, folder=tmp_path)
    for name in names:
        cost = found.forwards[name] + found.backwards[name]
        assert cost.max() <= budget, name
    assert found.settings["budget"] == budget
    said = {line[0]: line[5] for line in found.lines()}
    assert ("ended by the budget" in said["pgd-20-rst"]) is (budget < 60 and bool(found.correct("pgd-20-rst").any()))
    assert "ended by the budget" not in said["noise"]
    unlimited = quiet(model, (x, y), "pgd-7,pgd-7x3")
    enough = found.forwards["pgd-7"] + found.backwards["pgd-7"] == 14
    assert torch.equal(found.predicted["pgd-7"][enough], unlimited.predicted["pgd-7"][enough])
    with pytest.raises(InputError, match=f"--budget was {budget}, now None"):
        quiet(model, (x, y), "pgd-7", folder=tmp_path, batch_size=20)


def test_what_the_budget_does_not_suffice_for_stays_as_it_was():
    """With attack_wrong: an image that a run does not attack keeps what the run before it found."""
    model, images = fitted(), digits(64)
    name = "pgd-ls-20:alpha=1:restarts=3"
    once, twice = (quiet(model, images, name, attack_wrong=True, budget=n, eps=0.02) for n in (41, 60))
    assert torch.equal(once.predicted[name], twice.predicted[name]), "60 passes are one run, too, and 18 that are left"
    assert torch.equal(once.backwards[name], torch.full((64,), 20))


def test_a_budget_switches_off_what_it_would_pay_for():
    model, images = fitted(), digits(48)
    found = quiet(model, images, "pgd:steps=96:start=clean", budget=150, eps=0.1, batch_size=32)
    whole = quiet(model, images, "pgd:steps=75:start=clean:stop=none", eps=0.1, batch_size=32)
    assert torch.equal(*(e.predicted[name] for e, name in ((found, "pgd:steps=96:start=clean"),
                                                           (whole, "pgd:steps=75:start=clean:stop=none"))))  # fmt: skip


def test_budgets_that_do_not_fit():
    model, images = fitted(), digits(4)
    for budget, attack, message in (
        (0, "fgsm", "budget=0"),
        (1, "pgd-7", "budget=1: attack pgd-7 takes 2 passes for its first step: give at least 2"),
        (13, "apgd-t:targeting=malt", "takes 14 passes for its first step"),
        (6, "autoattack-fast", "takes 7 passes"),
        (2, "pgd-7-all", "takes 3 passes"),
        (99, "pgd:target=all:targeting=malt", "leave out the budget"),
    ):
        with pytest.raises(InputError, match=message):
            quiet(model, images, attack, budget=budget)


def test_cycles_change_no_record_but_the_cost(monkeypatch):
    model, images = fitted(), digits(48)
    how = {"batch_size": 32, "eps": 0.1}
    whole = quiet(model, images, ["pgd:steps=96:start=clean:stop=none"], **how)
    found = quiet(model, images, ["pgd:steps=96:start=clean", "pgd:steps=96:start=clean:stop=cycle", "pgd:steps=40"], **how)
    for name in ("pgd:steps=96:start=clean", "pgd:steps=96:start=clean:stop=cycle"):
        assert torch.equal(found.predicted[name], whole.predicted["pgd:steps=96:start=clean:stop=none"])
        assert found.backwards[name].sum() < whole.backwards["pgd:steps=96:start=clean:stop=none"].sum()
    assert found.passes("pgd:steps=40") == (40, 40), "where nothing cycles, nothing is looked for"


def test_stops_that_do_not_fit():
    for spec, message in (
        ("pgd-l2-20:stop=cycle", "stop='cycle' looks for cycles"),
        ("pgd-20-rst:stop=success", "leave out stop"),
        ("pgd-20:stop=sometimes", "choose one of"),
    ):
        with pytest.raises(InputError, match=message):
            parse(spec)
    with pytest.raises(InputError, match="attack pgd-1000: stop='cycle', but the model's gradient"):
        quiet(Chancy().eval(), digits(16), "pgd-1000")
    assert "until misclassified or in a cycle" in parse("pgd-20:stop=exact").describe()
    assert "until at the target" in parse("pgd-20-random:stop=success").describe()
    with pytest.raises(InputError, match="ends at what the source gets wrong"):
        quiet(fitted(), digits(4), "pgd-20:stop=exact", source=fitted(1))
    with pytest.raises(InputError, match="queries=9 are of Square, which version=rand has not: leave it out"):
        parse("autoattack-rand:queries=9")
    with pytest.raises(InputError, match="leave out start, target, right_at and stop"):
        parse("noise:stop=cycle")


class Chancy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = fitted()

    def forward(self, x):
        return self.net(x + 0.01 * torch.rand_like(x))
