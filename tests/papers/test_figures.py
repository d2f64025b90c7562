"""Figures: their numbers are what evaluate finds, each is drawn, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

import matplotlib

from spat_train import plotting
from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.evaluation.evaluate import evaluate
from spat_train.models.checkpoints import load_model
from spat_train.papers import figures, pictures
from spat_train.papers.figure import FigureContext
from spat_train.papers.figures import FIGURES, budget, figure_4_1, gradients, semantics, training_loss
from spat_train.papers.loaded_run import LoadedRun, open_images
from spat_train.papers.options import Extent, Options
from spat_train.papers.runs import Run, read_run
from tests.papers.finished_runs import EPS, copy_run

MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF"}
FEW = Extent(examples=2, restarts=3, ascent_steps=4)


@pytest.fixture(autouse=True)
def _cheap(one_thread, monkeypatch):
    monkeypatch.setattr(plotting, "DPI", 40)
    monkeypatch.setitem(plotting.STYLE, "pdf.fonttype", 3)  # subsets of TrueType fonts take a second each
    monkeypatch.setattr(semantics, "ALPHAS", (0.0, 0.2))


def draw(name, folder, out, given=(), **options) -> list[Path]:
    return figures.draw(name, given, Options(runs=folder, test_images=4, **options), FEW, out)


# ---- pictures


def test_gradients_as_pictures_and_their_smoothness():
    gradient = torch.randn(3, 8, 8)
    picture = figure_4_1.gradient_picture(gradient)
    assert 0 <= picture.min() <= picture.max() <= 1
    assert torch.equal(picture > 0.5, gradient > 0)
    assert torch.equal(figure_4_1.gradient_picture(torch.zeros(3, 8, 8)), torch.full((3, 8, 8), 0.5))
    assert torch.allclose(figure_4_1.gradient_picture(1e-9 * gradient), picture, atol=1e-5)
    # Smoothness tells shapes from noise.
    noise = torch.randn(20, 3, 32, 32)
    shapes = F.avg_pool2d(torch.randn(20, 3, 40, 40), 9, stride=1)
    assert abs(figure_4_1.smoothness(noise).mean()) < 0.05
    assert figure_4_1.smoothness(shapes).mean() > 0.8


class Says(nn.Module):
    """Predicts these classes, whatever it sees."""

    def __init__(self, *classes):
        super().__init__()
        self.classes = torch.tensor(classes)

    def forward(self, x):
        return F.one_hot(self.classes, 4).float()


def test_examples_are_right_for_all_models():
    x, y = torch.rand(8, 1, 4, 4), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    one, other = Says(0, 0, 0, 1, 2, 2, 0, 0), Says(3, 0, 1, 1, 2, 2, 3, 3)
    assert pictures.examples([one, other], x, y, 5) == [1, 3, 4]
    assert pictures.examples([one, other], x, y, 2) == [1, 3]
    assert pictures.examples([Says(3, 3, 3, 3, 3, 3, 0, 0)], x, y, 5) == [0, 2, 4, 6]  # none is right: any will do


# ---- the numbers of curves are what evaluate finds


def context_of(finished_runs, *names) -> FigureContext:
    options = Options(test_images=8, seed=1)
    found = [read_run(finished_runs / name) for name in names]
    return FigureContext(found, open_images(found, options), options, FEW, 0.3)


def check_points(points, context, run, attacks, **settings):
    """`points` are what `evaluate` finds of the run under these attacks."""
    model, _ = load_model(run, context.images.dataset)
    rows, seed = context.images.rows, context.options.seed
    found = evaluate(model, context.images.dataset.test, attacks, eps=0.3, rows=rows, seed=seed, bar=None, **settings)
    for point, attack in zip(points, attacks, strict=True):
        low, high = found.interval(attack)
        assert point == {"accuracy": found.accuracy(attack), "low": low, "high": high}


def test_images_are_drawn_by_the_seed(finished_runs):
    images = context_of(finished_runs, "madry").images
    assert len(images) == len(set(images.rows.tolist())) == 8
    assert images.total == 40
    x, y = images.floats(3, "cpu")
    assert torch.equal(x, images.dataset.test.pixels[images.rows[:3]].permute(0, 3, 1, 2) / 255)
    assert len(y) == 3
    others = [Run(Path("a"), Config(data="cifar10")), Run(Path("b"), Config(data="/somewhere/mnist.npz"))]
    with pytest.raises(InputError, match="--data: the runs were trained on different data .*a on cifar10, .*b on mnist"):
        open_images(others, Options())


def test_accuracy_against_alpha(finished_runs):
    context = context_of(finished_runs, "standard")
    numbers = FIGURES["5.3"].make(context)[1]["models"]["standard"]
    assert numbers["alphas"] == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    points = [numbers["clean"], numbers["pgd-kl"], numbers["pgd-ls"][3], numbers["pgd-ls"][10]]
    attacks = ["clean", "pgd-kl-20", "pgd-ls-20:alpha=0.3", "pgd-ls-20:alpha=1"]
    check_points(points, context, finished_runs / "standard", attacks, attack_wrong=True)
    assert numbers["pgd-ls"][10]["accuracy"] >= numbers["clean"]["accuracy"]


def test_accuracy_against_the_radius_and_steps(finished_runs):
    context = context_of(finished_runs, "standard", "madry")
    panels = FIGURES["budget"].make(context)[1]["panels"]
    assert panels["L∞"]["names"] == ["0", "0.075", "0.15", "0.225", "0.3", "0.375", "0.45"]
    assert panels["L∞"]["trained"] == 0.3
    assert panels["L2"]["radii"] == [0, 1, 2, 3, 4, 5, 6]  # of 0.3 * 28 / 2
    curves = {norm: panel["models"]["Madry"] for norm, panel in panels.items()}
    points = [curves["L∞"][0], curves["L∞"][1], curves["L2"][2]]
    check_points(points, context, finished_runs / "madry", ["clean", "pgd-20:eps=0.075", "pgd-l2-20:eps=2"])
    small = budget.panels_of(8 / 255, 784, trained=False)["L∞"]
    assert small["names"] == ["0", "2", "4", "6", "8", "10", "12"]
    assert small["trained"] is None

    points = FIGURES["steps"].make(context)[1]["models"]["standard"]
    attacks = ["clean", "pgd-20:steps=5", "pgd-20:steps=100"]
    check_points([points[0], points[3], points[-1]], context, finished_runs / "standard", attacks)


def test_accuracy_against_width(finished_runs):
    context = context_of(finished_runs, "wide", "madry", "standard", "wide-standard")
    panels = FIGURES["capacity"].make(context)[1]["panels"]
    assert {name: panel["widths"] for name, panel in panels.items()} == {
        "standard training": [1, 2],
        "adversarial training": [1, 2],
    }
    attacks = panels["adversarial training"]["attacks"]
    check_points([attacks["FGSM"][1], attacks["PGD-20"][1]], context, finished_runs / "wide", ["fgsm", "pgd-20"])
    assert panels["adversarial training"]["loss"][1] == training_loss.training_loss(context.runs[0])["losses"][-1]


def test_semantics_is_what_the_judge_sees_of_the_attacked_model_s_examples(finished_runs, monkeypatch, capsys):
    monkeypatch.setattr(semantics, "SHARES", (0.5, 1.0))
    context = context_of(finished_runs, "wide", "madry")
    drawn, numbers = FIGURES["semantics"].make(context)
    clean = {role: f"{numbers[role]['clean']['accuracy']:.1f} % clean" for role in ("attacked", "judge")}
    title = " ".join(drawn[""].get_suptitle().split())
    assert title.startswith(f"examples made on wide ({clean['attacked']}), judge: madry ({clean['judge']}); ")
    assert f"; {numbers['judged images']} of {len(context.images.rows)} images" in title
    assert title.endswith(numbers["note"] or "images")
    assert list(numbers["lines"]) == ["ε = 38.25/255", "ε = 76.5/255"]
    assert [line["eps"] for line in numbers["lines"].values()] == [0.15, 0.3]
    dataset, rows = context.images.dataset, context.images.rows
    attacked, judge = (load_model(finished_runs / name, dataset)[0] for name in ("wide", "madry"))
    specs = {"pgd-ls-20:alpha=0.2:eps=0.3": ("pgd-ls", 1), "pgd-kl-20:eps=0.3": ("KL", None), "noise:eps=0.3": ("noise", None)}
    common = {"eps": 0.3, "rows": rows, "seed": 1, "bar": None, "attack_wrong": True}
    seen = evaluate(judge, dataset.test, [*specs], source=attacked, **common)
    own = evaluate(attacked, dataset.test, [*specs], **common)
    known = seen.predicted["clean"] == seen.labels
    assert numbers["judged images"] == int(known.sum()) > 0
    for spec, (name, place) in specs.items():
        kinds = {"changed": seen.predicted[spec] != seen.labels, "right": own.predicted[spec] == own.labels}
        for kind, flags in kinds.items():
            found = numbers["lines"]["ε = 76.5/255"][name][kind]
            found = found if place is None else found[place]
            assert found[kind] == pytest.approx(100 * float(flags[known].double().mean()))
            assert found["low"] <= found[kind] <= found["high"]
    for role, name in (("attacked", "wide"), ("judge", "madry")):
        assert numbers[role]["name"] == name
        check_points([numbers[role]["clean"], numbers[role]["pgd-20"]], context, finished_runs / name, ["clean", "pgd-20"])
    assert (numbers["note"] or "") in capsys.readouterr().err


def test_radii_go_up_to_what_images_bear():
    assert semantics.radii_of(0.3, 1) == [0.15, 0.3, 0.45]
    assert [round(255 * eps) for eps in semantics.radii_of(8 / 255, 3)] == [4, 8, 16, 32]


def test_a_judge_should_be_stronger():
    strength = [{"clean": {"accuracy": c}, "pgd-20": {"accuracy": p}} for c, p in ((90.0, 50.0), (90.0, 51.0), (91.0, 40.0))]
    assert semantics.weakness(strength[0], strength[1]) is None
    assert semantics.weakness(strength[0], strength[2]) is None
    assert "no stronger than the attacked model (clean 90.0 %, the attacked one 90.0 %; " in semantics.weakness(*strength[1::-1])


def test_scores_of_gradients_are_those_of_figure_4_1(finished_runs):
    context = context_of(finished_runs, "madry", "standard")
    expected = FIGURES["4.1"].make(context)[1]["gradients"]
    found = FIGURES["gradients"].make(context)[1]["models"]
    for name, scores in found.items():
        assert scores["alignment"]["mean"] == pytest.approx(expected[name]["alignment"])
        assert scores["neighbours"]["mean"] == pytest.approx(expected[name]["neighbours' correlation"])
        assert -1 <= scores["towards"]["low"] <= scores["towards"]["mean"] <= scores["towards"]["high"] <= 1


def test_gradients_towards_the_nearest_image_of_the_next_class():
    """In a linear model the margin falls along a difference of weights; the ways are along the axes here."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0, 0, 0], [3, 4, 0, 0], [-1, -1, 0, 7]]))
    x = torch.full((3, 1, 2, 2), 0.5).double()
    x[2, 0, 1, 1] = 1.0  # its next class is 2
    pool = x[:1].repeat(4, 1, 1, 1)
    for i, (pixel, change) in enumerate((((0, 0), 0.4), ((0, 1), 0.1), ((0, 0), 0.01), ((1, 1), 0.02))):
        pool[i, 0][pixel] += change
    labels = torch.tensor([1, 1, 0, 0])  # none of class 2
    y = torch.tensor([0, 0, 1])
    found = gradients.towards_next_class(model, x, y, pool, labels)
    # The nearest of class 1 is the second, along the second pixel, on which the logit grows by 4 of 5.
    assert found.tolist() == pytest.approx([0.8, 0.8])


def test_means_have_normal_intervals():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    half = 1.96 * (5 / 3) ** 0.5 / 2
    assert gradients.mean_interval(scores) == pytest.approx({"mean": 2.5, "low": 2.5 - half, "high": 2.5 + half})
    assert gradients.mean_interval(scores[:1]) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_runs_that_differ_in_alpha_are_a_line():
    def lines(*configs) -> dict:
        runs = [LoadedRun(Run(Path(f"r{i}"), config), nn.Identity(), f"r{i}") for i, config in enumerate(configs)]
        return {label: [run.name for run in line] for label, line in gradients.lines_of(runs).items()}

    standard, plain, spat, mart = (
        Config(method=m, alpha=a) for m, a in (("standard", 0), ("madry", 0), ("madry", 0.4), ("mart", 0))
    )
    assert lines(standard, plain, mart) == {"r0": ["r0"], "r1": ["r1"], "r2": ["r2"]}
    assert lines(spat, plain, mart, standard) == {"standard": ["r3"], "Madry": ["r1", "r0"], "MART": ["r2"]}
    smaller = replace(spat, eps=4.0, model="resnet-18")
    assert list(lines(plain, smaller)) == ["Madry, wrn-34-10, ε = 8/255", "Madry, resnet-18, ε = 4/255"]


def test_losses_are_means_of_epochs(tmp_path):
    events = [(1, 2, 3.0), (1, 3, 6.0), (2, 6, 1.0)]  # epoch, steps so far, mean loss since the line before
    lines = [json.dumps({"kind": "train", "epoch": e, "step": s, "loss": 9.0, "adv_ce": v, "lr": 0.1}) for e, s, v in events]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    found = training_loss.training_loss(Run(tmp_path, Config()))
    assert found == {"epochs": [1, 2], "losses": [4.0, 1.0], "term": "adv_ce"}
    with pytest.raises(InputError, match=r"no log.jsonl"):
        training_loss.training_loss(Run(tmp_path / "nowhere", Config()))


# ---- all of them are drawn


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn(name, finished_runs, tmp_path, capsys):
    if name.startswith("6"):
        runs = tmp_path / "runs"
        for alpha in (0.0, 0.4):
            preset = f"figure{name}/eps8-alpha{alpha:g}"
            copy_run(finished_runs / "madry", runs / f"alpha{alpha}", preset=preset, alpha=alpha)
    else:
        runs = finished_runs
    settings, out = dict(matplotlib.rcParams), tmp_path / "out"
    paths = draw(name, runs, out)
    assert dict(matplotlib.rcParams) == settings
    assert "figure " + name in capsys.readouterr().out
    parts = ["-curves", "-maxima", "-surface"] if name == "landscape" else [""]
    expected = [f"figure-{name}{part}{ending}" for part in parts for ending in MAGIC] + [f"figure-{name}.json"]
    assert [path.name for path in paths] == expected
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    assert all(path.read_bytes().startswith(MAGIC[path.suffix]) for path in paths[:-1])
    content = json.loads(paths[-1].read_text())
    assert (content["figure"], content["data"]) == (name, "mnist")
    assert content["eps"] == (0.45 if name == "5.2" else EPS / 255)
    for each in content["runs"].values():
        assert Path(each["folder"]).is_dir()
        assert each["config"]["eps"] == EPS
    if name in ("4.1", "5.3"):
        before = {path: path.read_bytes() for path in paths}
        draw(name, finished_runs, out)
        assert {path: path.read_bytes() for path in paths} == before


def test_pictures_say_what_they_show(finished_runs, tmp_path):
    def content_of(name, given=(), **options) -> dict:
        return json.loads(draw(name, finished_runs, tmp_path, given, **options)[-1].read_text())

    content = content_of("5.1")
    assert content["radii"] == [0.45, 0.3, 0.15]
    assert list(content["columns"]) == ["original", "ε = 0.45", "ε = 0.3", "ε = 0.15"]
    assert all(len(column["predicted"]) == len(column["loss"]) == len(content["rows"]) for column in content["columns"].values())
    assert list(content_of("5.1", eps=32.0)["columns"]) == ["original", "ε = 32/255", "ε = 16/255", "ε = 8/255"]
    assert list(content_of("5.2")["columns"]) == ["original", "PGD-CE", "PGD-LS(.2)", "PGD-LS(.8)"]
    given = [finished_runs / "madry", finished_runs / "standard"]
    assert list(content_of("4.1", given)["gradients"]) == ["standard", "Madry"]


def test_titles_name_model_data_and_radius(finished_runs, tmp_path, monkeypatch):
    titles = {}
    monkeypatch.setattr(figures, "save", lambda drawing, path, _: titles.update({path.stem: drawing.get_suptitle()}))
    given = [finished_runs / "madry", finished_runs / "standard"]
    for name, runs in {"4.1": given, "5.2": given[:1], "5.3": given, "capacity": (), "landscape": given[:1]}.items():
        draw(name, finished_runs, tmp_path, runs)
    model = read_run(given[0]).config.model
    assert titles == {
        "figure-4.1": f"{model} on mnist",
        "figure-5.2": f"{model} on mnist, ε = 0.45",
        "figure-5.3": f"{model} on mnist, ε = 0.3",
        "figure-landscape-curves": f"{model} on mnist, ε = 0.3",
        "figure-landscape-maxima": f"{model} on mnist, ε = 0.3",
        "figure-landscape-surface": f"{model} on mnist",
        "figure-capacity": "mnist-cnn/1, mnist-cnn/2 on mnist, ε = 0.3",
    }


def test_lines_of_trainings_and_the_thesis_s_point(finished_runs):
    context = context_of(finished_runs, "madry")
    own = replace(context.images, dataset=replace(context.images.dataset, name="cifar10"))
    runs = [replace(context.runs[0], config=Config(eps=e, alpha=a)) for e in (8.0, 4.0) for a in (1.0, 0.0)]
    drawn, numbers = FIGURES["6.1"].make(replace(context, runs=runs, images=own))
    assert {name: line["alphas"] for name, line in numbers["lines"].items()} == {
        "trained with ε = 4/255": [0.0, 1.0],
        "trained with ε = 8/255": [0.0, 1.0],
    }
    assert numbers["eps"] == 8 / 255
    assert drawn[""].get_suptitle() == "attacked at ε = 8/255"
    assert numbers["source"] == {"alphas": [1.0], "clean": [32.44], "robust": [0.0]}
    for ax, value in zip(drawn[""].axes, (32.44, 0.0), strict=True):
        (theirs,) = [line for line in ax.lines if line.get_label().startswith("thesis")]
        assert theirs.get_xydata().tolist() == [[1.0, value]]
    _, numbers = FIGURES["6.1"].make(replace(context, runs=runs))  # other data
    assert numbers["source"] is None
