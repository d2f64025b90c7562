"""Figures: their numbers against plain ones, the runs that they take, what is written, and that each can be drawn."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

import matplotlib
import numpy as np

from spat_train import cli
from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.evaluation.evaluate import evaluate
from spat_train.models.checkpoints import load_model
from spat_train.papers import figures, gallery, landscape, pictures, sweeps
from spat_train.papers import selection as roles
from spat_train.papers.measure import TestImages as Drawn
from spat_train.papers.measure import open_images, open_models, radius
from spat_train.papers.runs import Options, Run, Scale, read_run
from spat_train.runtime.atomic_write import SaveError
from tests.papers.finished_runs import EPS

PNG, PDF = b"\x89PNG", b"%PDF"
FEW = gallery.Extent(examples=2, restarts=3, ascent_steps=4)


@pytest.fixture
def folder(finished_runs):
    return finished_runs


@pytest.fixture(autouse=True)
def _cheap(one_thread, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 40)
    monkeypatch.setitem(figures.LOOK, "pdf.fonttype", 3)  # subsets of TrueType fonts take a second each


def run(name, **settings) -> Run:
    return Run(Path("nowhere") / name, Config(**settings))


# ---- the landscape's numbers


class Bumpy(nn.Module):
    """With many maxima, and a mode and statistics that must stay."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(3 * torch.randn(6, 3, generator=generator))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(torch.sin(7 * x.flatten(1))) @ self.weight


@pytest.fixture
def bumpy():
    torch.manual_seed(0)
    return Bumpy().double(), torch.rand(4, 1, 2, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def gradient_of(model, x, y):
    x = x.clone().requires_grad_()
    model = model.eval()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def test_ascents_are_a_plain_loop(bumpy):
    model, x, y = bumpy
    eps, steps, step_size, restarts = 0.2, 6, 0.05, 5
    found = landscape.ascend(model, x, y, eps, restarts=restarts, steps=steps, step_size=step_size, seed=3)
    assert found.losses.shape == (5, 4, 7)
    assert found.starts.shape == (5, 4, 1, 2, 3)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    for r in range(restarts):
        point = found.starts[r]
        assert bool(((point - x).abs() <= eps + 1e-12).all() and (point >= 0).all() and (point <= 1).all())
        for t in range(steps + 1):
            losses = F.cross_entropy(model(point), y, reduction="none")
            assert torch.allclose(found.losses[r, :, t], losses)
            if t < steps:
                point = point + step_size * gradient_of(model, point, y).sign()
                point = torch.minimum(torch.maximum(point, x - eps), x + eps).clamp(0, 1)
        assert torch.allclose(found.ends[r], point, atol=1e-12)
        assert torch.equal(found.predicted[r], model(point).argmax(1))
    assert len(found.starts[:, 0].flatten(1).unique(dim=0)) == restarts  # no two alike
    again = landscape.ascend(model, x, y, eps, restarts=restarts, steps=steps, step_size=step_size, seed=3)
    assert torch.equal(again.losses, found.losses)


def test_many_starts_go_in_rounds(bumpy, monkeypatch):
    model, x, y = bumpy
    whole = landscape.ascend(model, x, y, 0.2, restarts=5, steps=2, step_size=0.05, seed=3)
    monkeypatch.setattr(landscape, "CHUNK", 8)  # two restarts of four images
    parts = landscape.ascend(model, x, y, 0.2, restarts=5, steps=2, step_size=0.05, seed=3)
    assert torch.allclose(whole.losses, parts.losses)


def test_input_gradients(bumpy):
    model, x, y = bumpy
    found = landscape.input_gradients(model, x, y)
    assert model.training
    assert not found.requires_grad
    assert torch.allclose(found, gradient_of(model, x, y))
    assert torch.allclose(landscape.logits_of(model, x), model.eval()(x))


def test_distances_and_angles_of_all_pairs():
    points, centre = torch.rand(5, 2, 3), torch.rand(2, 3)
    distances, cosines = landscape.pairwise(points, centre)
    at = 0
    for i in range(5):
        for j in range(i + 1, 5):
            a, b = (points[i] - centre).flatten().tolist(), (points[j] - centre).flatten().tolist()
            dot, norms = sum(p * q for p, q in zip(a, b, strict=True)), math.dist(a, [0] * 6) * math.dist(b, [0] * 6)
            assert float(distances[at]) == pytest.approx(math.dist(a, b), rel=1e-5)
            assert float(cosines[at]) == pytest.approx(dot / norms, rel=1e-5)
            at += 1
    assert at == len(distances) == len(cosines) == 10


def test_corners_of_the_ball():
    x = torch.full((1, 20, 20), 0.5)
    found = landscape.corners(x, 0.3, 4, seed=0)
    assert torch.allclose((found - x).abs(), torch.tensor(0.3))
    assert abs(float((found > x).float().mean()) - 0.5) < 0.05
    assert float(landscape.corners(torch.zeros(1, 4, 4), 0.3, 2, seed=0).min()) == 0


def test_losses_between_maxima(bumpy):
    model, x, y = bumpy
    points = torch.rand(4, 1, 2, 3, dtype=torch.float64)
    found = landscape.between(model, points, y[0], pairs=2, parts=4)
    model.eval()

    def loss(point):
        return F.cross_entropy(model(point[None]), y[:1]).item()

    expected = [sum(loss(points[i] + t / 4 * (points[i + 1] - points[i])) for i in (0, 1)) / 2 for t in range(5)]
    assert found.tolist() == pytest.approx([loss / ((expected[0] + expected[-1]) / 2) for loss in expected])


def test_surface(bumpy):
    model, x, y = bumpy
    eps, found = 0.1, landscape.surface(model, x[0], y[0], 0.1, points=5, seed=2)
    model.eval()
    g = gradient_of(model, x[:1], y[:1])[0].sign()
    r = torch.randint(2, x[0].shape, generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    assert found["shares"] == [-1, -0.5, 0, 0.5, 1]
    for row, b in enumerate(found["shares"]):
        for column, a in enumerate(found["shares"]):
            logits = model((x[0] + eps * (a * g + b * r)).clamp(0, 1)[None])[0]
            margin = logits[y[0]] - max(value for k, value in enumerate(logits) if k != y[0])
            assert found["losses"][row][column] == pytest.approx(F.cross_entropy(logits, y[0]).item(), rel=1e-6)
            assert found["margins"][row][column] == pytest.approx(margin.item(), rel=1e-6)


def test_what_the_maxima_mean(bumpy):
    model, x, y = bumpy
    found = landscape.ascend(model, x, y, 0.2, restarts=8, steps=20, step_size=0.02, seed=0)
    numbers = landscape.compare(model, x, y, 0.2, found, seed=0)
    distances, cosines = zip(*(landscape.pairwise(found.ends[:, n], x[n]) for n in range(4)), strict=True)
    assert numbers["distances"] == torch.cat(distances).tolist()
    assert numbers["cosines"] == torch.cat(cosines).tolist()
    starts = torch.cat([landscape.pairwise(found.starts[:, n], x[n])[0] for n in range(4)])
    assert numbers["random_distance"] == pytest.approx(float(starts.mean()))
    assert numbers["losses"] == found.losses[..., -1].tolist()
    assert len(numbers["between"]) == 11
    assert numbers["fooled"] == pytest.approx(float((found.predicted != y).float().mean()))
    assert landscape.meaning(numbers).startswith("distinct maxima")
    assert landscape.meaning(numbers | {"between": [1.0] * 11}).startswith("different points of one plateau")
    assert landscape.meaning(numbers | {"distances": [1e-3]}).startswith("all starts lead to one maximum")


# ---- pictures


def test_a_gradient_as_a_picture():
    gradient = torch.randn(3, 8, 8)
    picture = figures.gradient_picture(gradient)
    assert float(picture.min()) >= 0
    assert float(picture.max()) <= 1
    assert torch.equal(picture > 0.5, gradient > 0)
    assert torch.equal(figures.gradient_picture(torch.zeros(3, 8, 8)), torch.full((3, 8, 8), 0.5))
    assert torch.allclose(figures.gradient_picture(1e-9 * gradient), picture, atol=1e-5)


def test_smoothness_tells_shapes_from_noise():
    torch.manual_seed(0)
    noise = torch.randn(20, 3, 32, 32)
    shapes = F.avg_pool2d(torch.randn(20, 3, 40, 40), 9, stride=1)
    assert abs(pictures.smoothness(noise)) < 0.05
    assert pictures.smoothness(shapes) > 0.8


def test_examples_are_right_for_all_models():
    x, y = torch.rand(8, 1, 4, 4), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])

    class Says(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.classes = torch.tensor(classes)

        def forward(self, x):
            return F.one_hot(self.classes, 4).float()

    one, other = Says([0, 0, 0, 1, 2, 2, 0, 0]), Says([3, 0, 1, 1, 2, 2, 3, 3])
    assert pictures.examples([one, other], x, y, 5) == [1, 3, 4]
    assert pictures.examples([one, other], x, y, 2) == [1, 3]
    assert pictures.examples([Says([3] * 6 + [0, 0])], x, y, 5) == [0, 2, 4, 6]  # none is right: any will do


# ---- the numbers of curves are what evaluate finds


def subjects_of(folder, *names):
    options = Options(test_images=8, seed=1)
    found = [read_run(folder / name) for name in names]
    images = open_images(found, options)
    return open_models(found, images, options), images, options


def compared(points, found, attacks):
    for point, attack in zip(points, attacks, strict=True):
        low, high = found.interval(attack)
        assert point == {"accuracy": found.accuracy(attack), "low": low, "high": high}


def test_images_are_drawn_by_the_seed(folder):
    _, images, _ = subjects_of(folder, "madry")
    assert isinstance(images, Drawn)
    assert len(images) == 8
    assert images.total == 40
    assert len(set(images.rows.tolist())) == 8
    x, y = images.floats(3, "cpu")
    assert torch.equal(x, images.dataset.test.pixels[images.rows[:3]].permute(0, 3, 1, 2) / 255)
    assert len(y) == 3


def test_accuracy_against_alpha(folder):
    (subject,), images, options = subjects_of(folder, "standard")
    numbers = sweeps.against_alpha(subject, images, options, 0.3)
    assert numbers["alphas"] == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    names = ["clean", "pgd-kl-20", "pgd-ls-20:alpha=0.3", "pgd-ls-20:alpha=1"]
    model, _ = load_model(folder / "standard", images.dataset)
    how = {"eps": 0.3, "rows": images.rows, "seed": 1, "bar": None}
    found = evaluate(model, images.dataset.test, names, attack_wrong=True, **how)
    compared([numbers["clean"], numbers["pgd-kl"], numbers["pgd-ls"][3], numbers["pgd-ls"][10]], found, names)
    assert numbers["pgd-ls"][10]["accuracy"] >= numbers["clean"]["accuracy"]


def test_accuracy_against_the_radius_and_steps(folder):
    subjects, images, options = subjects_of(folder, "standard", "madry")
    panels = sweeps.against_budget(subjects, images, options, 0.3)
    assert panels["L∞"]["names"] == ["0", "0.075", "0.15", "0.225", "0.3", "0.375", "0.45"]
    assert panels["L∞"]["trained"] == 0.3
    assert panels["L2"]["radii"] == [0, 1, 2, 3, 4, 5, 6]  # of 0.3 * 28 / 2
    how = {"eps": 0.3, "rows": images.rows, "seed": 1, "bar": None}
    names = ["clean", "pgd-20:eps=0.075", "pgd-l2-20:eps=2"]
    found = evaluate(subjects[1].model, images.dataset.test, names, **how)
    curves = {norm: panel["models"]["Madry"] for norm, panel in panels.items()}
    compared([curves["L∞"][0], curves["L∞"][1], curves["L2"][2]], found, names)
    assert sweeps.against_budget([], images, options, 8 / 255)["L∞"]["names"] == ["0", "2", "4", "6", "8", "10", "12"]

    numbers = sweeps.against_steps(subjects, images, options, 0.3)
    found = evaluate(subjects[0].model, images.dataset.test, ["clean", "pgd-20:steps=5", "pgd-20:steps=100"], **how)
    points = numbers["models"]["standard"]
    compared([points[0], points[3], points[-1]], found, ["clean", "pgd-20:steps=5", "pgd-20:steps=100"])


def test_accuracy_against_width(folder):
    _, images, options = subjects_of(folder, "madry")
    found = [read_run(folder / name) for name in ("wide", "madry", "standard", "wide-standard")]
    panels = sweeps.against_width(found, images, options, 0.3)
    assert {name: panel["widths"] for name, panel in panels.items()} == {
        "standard training": [1, 2],
        "adversarial training": [1, 2],
    }
    (subject,), *_ = subjects_of(folder, "wide")
    again = evaluate(subject.model, images.dataset.test, ["fgsm", "pgd-20"], eps=0.3, rows=images.rows, seed=1, bar=None)
    attacks = panels["adversarial training"]["attacks"]
    compared([attacks["FGSM"][1], attacks["PGD-20"][1]], again, ["fgsm", "pgd-20"])
    assert panels["adversarial training"]["loss"][1] == sweeps.training_loss(found[0])["losses"][-1]


def test_losses_are_means_of_epochs(tmp_path):
    events = [(1, 2, 3.0), (1, 3, 6.0), (2, 6, 1.0)]  # epoch, step after so many, their mean
    lines = [json.dumps({"kind": "train", "epoch": e, "step": s, "loss": 9.0, "adv_ce": v}) for e, s, v in events]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert sweeps.training_loss(Run(tmp_path, Config())) == {"epochs": [1, 2], "losses": [4.0, 1.0], "term": "adv_ce"}
    with pytest.raises(InputError, match="no log.jsonl"):
        sweeps.training_loss(Run(tmp_path / "nowhere", Config()))


# ---- which runs a figure takes


def test_roles_in_a_folder(folder, capsys):
    options = Options(runs=folder)

    def names(role, given=(), **changes):
        return [found.folder.name for found in role.take("x", given, replace(options, **changes))]

    assert names(roles.PAIR) == ["wide-standard", "wide"]
    assert names(roles.ROBUST) == ["wide"]
    assert names(roles.WIDTHS) == ["madry", "standard", "wide", "wide-standard"]
    assert names(roles.ANY, [folder / "b", folder / "wide"]) == ["b", "wide"]
    assert names(roles.ROBUST, [folder / "standard", folder / "madry"]) == ["madry"]
    assert capsys.readouterr().out == "figure x: standard runs are left out, it needs one robust run\n"
    with pytest.raises(
        InputError, match="figure x: it needs one standard and one robust run: .*b .standard, mnist-b.: name others"
    ):
        names(roles.PAIR, [folder / "b"])
    with pytest.raises(InputError, match="--runs .* has standard mnist-b on mnist: name folders, or add --train"):
        names(roles.ROBUST, scale=Scale(model="mnist-b"))
    with pytest.raises(InputError, match="has nothing on cifar10"):
        names(roles.grid("6.1", "cifar10"))
    with pytest.raises(InputError, match="it needs Madry runs"):  # one alpha alone
        names(roles.grid("6.1", "cifar10"), data="mnist")


def test_the_standard_run_is_of_the_robust_ones_model():
    found = [
        run("a", method="standard", model="wrn-34-10"),
        run("b", method="standard", model="wrn-10-2"),
        run("c", model="wrn-10-2"),
    ]
    assert [r.folder.name for r in roles._pair(found, Options(data="cifar10"))] == ["b", "c"]
    mart = run("d", method="mart", model="wrn-34-10")
    assert [r.folder.name for r in roles._pair([*found, mart], Options(data="cifar10"))] == ["b", "c"]  # rather Madry's
    assert [r.folder.name for r in roles._pair([mart], Options(data="cifar10"))] == ["d"]


def test_a_grid_is_of_one_model_and_the_closest_runs():
    def grid(*runs):
        return [r.folder.name for r in roles.grid("6.1", "cifar10").pick(list(runs), Options(data="cifar10"))]

    small = [run(f"s{e}-{a}", model="wrn-10-2", eps=e, alpha=a) for e in (4.0, 8.0) for a in (0.0, 0.2)]
    large = [run("l", model="resnet-50", eps=4.0, alpha=0.0), run("standard", method="standard"), run("t", method="trades")]
    assert grid(*small, *large) == ["s4.0-0.0", "s4.0-0.2", "s8.0-0.0", "s8.0-0.2"]
    assert grid(run("short", epochs=1), run("long", epochs=80), run("other", alpha=0.5)) == ["long", "other"]


def test_the_radius(folder):
    standard, robust = run("a", method="standard", eps=4.0), run("b", eps=8.0, eval_eps=16.0)
    assert radius([standard, robust], Options()) == 16 / 255
    assert radius([standard], Options()) == 4 / 255
    assert radius([robust], Options(eps=2.0)) == 2 / 255


# ---- all of them are drawn


def draw(name, folder, out, given=(), **options):
    options = {"runs": None if given else folder, "test_images": 4} | options
    return gallery.draw(name, given, Options(**options), FEW, out)


@pytest.mark.parametrize("name", [name for name in gallery.FIGURES if not name.startswith("6")])
def test_every_figure_is_drawn(name, folder, tmp_path, capsys):
    settings = dict(matplotlib.rcParams)
    paths = draw(name, folder, tmp_path)
    assert dict(matplotlib.rcParams) == settings
    assert "figure " + name in capsys.readouterr().out
    parts = ["-curves", "-maxima", "-surface"] if name == "landscape" else [""]
    expected = [f"figure-{name}{part}{ending}" for part in parts for ending in (".png", ".pdf")] + [f"figure-{name}.json"]
    assert [path.name for path in paths] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
    for path in paths[:-1]:
        assert path.read_bytes().startswith(PNG if path.suffix == ".png" else PDF)
    content = json.loads(paths[-1].read_text())
    assert content["figure"] == name
    assert content["data"] == "mnist"
    assert content["eps"] == (0.45 if name == "5.2" else EPS / 255)
    assert all(Path(told["folder"]).is_dir() and told["config"]["eps"] == EPS for told in content["runs"].values())
    if name in ("4.1", "5.3"):
        before = {path: path.read_bytes() for path in paths}
        draw(name, folder, tmp_path)
        assert {path: path.read_bytes() for path in paths} == before


def test_pictures_say_what_they_show(folder, tmp_path):
    content = json.loads(draw("5.1", folder, tmp_path)[-1].read_text())
    assert content["radii"] == [0.45, 0.3, 0.15]
    assert list(content["columns"]) == ["original", "ε = 0.45", "ε = 0.3", "ε = 0.15"]
    assert all(len(column["predicted"]) == len(column["loss"]) == len(content["rows"]) for column in content["columns"].values())
    content = json.loads(draw("5.1", folder, tmp_path, eps=32.0)[-1].read_text())
    assert list(content["columns"]) == ["original", "ε = 32/255", "ε = 16/255", "ε = 8/255"]
    content = json.loads(draw("5.2", folder, tmp_path)[-1].read_text())
    assert content["eps"] == 0.45
    assert list(content["columns"]) == ["original", "PGD-CE", "PGD-LS(.2)", "PGD-LS(.8)"]


def test_what_is_missing_is_trained(tmp_path):
    pytest.importorskip("sklearn")
    scale = Scale(limit=40, epochs=1, model="small-cnn", batch_size=20, steps=1)
    options = {"train": True, "scale": scale, "data": "digits", "device": "cpu", "eps": 51.0}
    content = json.loads(draw("training-loss", tmp_path / "runs", tmp_path, **options)[-1].read_text())
    assert [told["config"]["method"] for told in content["runs"].values()] == ["madry"]
    content = json.loads(draw("4.1", tmp_path / "runs", tmp_path, **options)[-1].read_text())
    assert {told["config"]["method"] for told in content["runs"].values()} == {"standard", "madry"}
    assert all(told["config"]["epochs"] == 1 and told["config"]["limit"] == 40 for told in content["runs"].values())
    again = draw("4.1", tmp_path / "runs", tmp_path, **options)
    assert json.loads(again[-1].read_text())["runs"] == content["runs"]  # nothing is missing now
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_grid_of_trainings(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    sources = {name: c for name, c in roles.PRESETS.items() if re.match(r"figure6.1/eps(4|16)-alpha(0|1)$", name)}
    monkeypatch.setattr(roles, "PRESETS", sources)
    scale = Scale(limit=40, epochs=1, model="small-cnn", batch_size=20, steps=1)
    monkeypatch.setitem(gallery.FIGURES, "6.1", replace(gallery.FIGURES["6.1"], role=roles.grid("6.1", "cifar10")))
    paths = draw("6.1", tmp_path / "runs", tmp_path, train=True, scale=scale, data="digits", device="cpu", eps=51.0)
    content = json.loads(paths[-1].read_text())
    assert content["eps"] == 0.2
    assert {(t["config"]["eps"], t["config"]["alpha"]) for t in content["runs"].values()} == {
        (25.5, 0.0), (25.5, 1.0), (102.0, 0.0), (102.0, 1.0)
    }  # fmt: skip
    assert [line["alphas"] for line in content["lines"].values()] == [[0.0, 1.0]] * 2
    given = [Path(told["folder"]) for told in content["runs"].values()]
    again = json.loads(draw("6.1", None, tmp_path, given, eps=51.0)[-1].read_text())
    assert again["lines"] == content["lines"]


def test_the_thesis_s_point_of_figure_61(folder, tmp_path, monkeypatch):
    _, images, options = subjects_of(folder, "madry")
    own = replace(images, dataset=replace(images.dataset, name="cifar10"))
    runs = [replace(read_run(folder / "madry"), config=Config(eps=e, alpha=a)) for e in (4.0, 8.0) for a in (0.0, 1.0)]
    bench = gallery.Bench(runs, own, options, FEW, 8 / 255)
    drawn, numbers = gallery.trained_with_alpha(bench)
    assert numbers["source"] == {"alphas": [1.0], "clean": [32.44], "robust": [0.0]}
    for ax, value in zip(drawn[""].axes, (32.44, 0.0), strict=True):
        (theirs,) = [line for line in ax.lines if line.get_label().startswith("thesis")]
        assert theirs.get_xydata().tolist() == [[1.0, value]]
    _, numbers = gallery.trained_with_alpha(replace(bench, images=images))  # other data
    assert numbers["source"] is None


@pytest.mark.parametrize(
    ("low", "high", "count"), [(1e-4, 10, 5), (1.36, 2.4, 5), (0.5, 30, 5), (1.0, 50, 10), (1.37, 1.375, 1), (3, 4, 3)]
)
def test_labels_of_the_landscape_do_not_overlap(low, high, count):
    generator = np.random.default_rng(0)
    spread = min(0.3, math.log(high / low) / 10)
    models = {name: loss * np.exp(spread * generator.normal(size=(20, count))) for name, loss in (("a", low), ("b", high))}
    pairs = {"distances": generator.normal(5, 1, 99), "cosines": generator.normal(0.5, 0.1, 99), "between": [1, 0.9, 1]}
    random = {f"{kind}_{name}": 0.2 for kind in ("random", "corner") for name in ("distance", "cosine")}
    names = [f"class {i}" for i in range(count)]
    ends = {name: {"losses": losses, **pairs, **random} for name, losses in models.items()}
    ways = {name: losses[..., None] * np.linspace(0.9, 1, 101) for name, losses in models.items()}
    with figures.look():
        for figure in (figures.maxima(ends, names), figures.ascents(ways, [torch.rand(3, 4, 4)] * count, names)):
            figure.draw_without_rendering()
            for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
                start, end = sorted(axis.get_view_interval())
                labels = [t.label1 for t in axis.get_major_ticks() + axis.get_minor_ticks() if start <= t.get_loc() <= end]
                boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
                assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        assert len(figures.maxima(ends, names).subfigs[0].axes[0].get_xticks()) > 1


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    figure = figures.new_figure(2, 2)
    figure.subplots().plot([1, 2])
    path = tmp_path / "a.png"
    figures.save(figure, path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spat_train.runtime.atomic_write.os.replace", full)
    figure.axes[0].plot([2, 1])
    with pytest.raises(SaveError, match="No space left"):
        figures.save(figure, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# ---- the command


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["spat-train", *map(str, arguments)])
    cli.main()


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "figure")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gallery.FIGURES)
    assert all("needs" in line for line in lines)
    command(monkeypatch, "figure", "training-loss", folder / "madry", folder / "wide", "--out", "there")
    assert "there/figure-training-loss.png written" in capsys.readouterr().out
    content = json.loads(Path("there/figure-training-loss.json").read_text())
    assert list(content["models"]) == ["madry", "wide"]  # alike by their method, so named by their folders
    with pytest.raises(SystemExit):
        command(monkeypatch, "figure", "--help")
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert all(name in text for name in gallery.FIGURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["landscap"], "figure landscap: there is none: did you mean landscape. there are 4.1"),
        (["5.3"], "figure 5.3: it needs one standard and one robust run: name their folders, or give the folder"),
        (
            ["5.3", "RUNS/madry"],
            "figure 5.3: it needs one standard and one robust run: .*madry .Madry, mnist-cnn/1.: name others",
        ),
        (["5.2", "RUNS/standard"], "figure 5.2: it needs one robust run"),
        (["5.2", "RUNS/madry", "RUNS/wide"], "figure 5.2: it needs one robust run: .*madry .Madry.*wide .Madry.*: name others"),
        (["training-loss", "RUNS/standard"], "it needs robust runs, one or more"),
        (["capacity", "RUNS/madry", "RUNS/b"], "it needs runs of wrn-DEPTH-WIDTH"),
        (["6.1", "--runs", "RUNS", "--data", "mnist"], "figure 6.1: it needs Madry runs that differ in alpha"),
        (["5.2", "nowhere"], "nowhere: no config.json there"),
        (["5.2", "RUNS/madry", "--train", "--runs", "RUNS"], "--train: figure 5.2 has its runs named"),
        (["5.2", "RUNS/madry", "--data", "digits"], "as mnist-cnn/1 for digits"),
        (["landscape", "RUNS/madry", "--restarts", "1"], "--restarts 1: give at least 2"),
        (["capacity", "--train", "--runs", "RUNS", "--model", "small-cnn"], "--model small-cnn: it has no width"),
    ],
)
def test_errors_come_before_any_work(folder, tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spat_train.papers.runs.train", lambda *args, **kwargs: pytest.fail("training began"))
    monkeypatch.setattr("spat_train.papers.measure.evaluate", lambda *args, **kwargs: pytest.fail("work began"))
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, "figure", *(argument.replace("RUNS", str(folder)) for argument in arguments))
    _, err = capsys.readouterr()
    assert exit_info.value.code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_runs_on_different_data(folder):
    others = [run("a", method="standard", data="cifar10"), run("b", data="/somewhere/mnist.npz")]
    with pytest.raises(InputError, match="--data: the runs were trained on different data .*a on cifar10, .*b on mnist"):
        open_images(others, Options())
    with pytest.raises(InputError, match="holds runs on cifar10, mnist: say which"):
        roles.ANY._data(others, Options(runs=folder))
