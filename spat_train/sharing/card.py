"""The model card: README.md with metadata as the Hugging Face Hub reads them (huggingface.co/docs/hub/model-cards)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..data.datasets import DATASETS
from ..evaluation.report import markdown_table
from ..evaluation.result import WORST
from ..papers.runs import data_name, format_eps, settings, title
from .results import Results

MARK = "\n<!-- Written by spat-train export ({}), which replaces this file only as long as nobody has changed it. -->\n"
BOUND = "What an attack leaves is an upper bound of the robust accuracy."
CLASSES = 20  # more are left to config.json


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: the architecture. code: whether that is code, which a reader has to allow.
        config: that of its run; None for checkpoints of others.
        data: what it was trained on. normalisation: its numbers as text, "" without.
        version: of this package.
    """

    name: str
    code: bool
    config: Config | None
    data: str
    classes: Sequence[str]
    image_shape: tuple[int, int, int]
    normalisation: str
    version: str

    @property
    def title(self) -> str:
        how = f" trained by {title(self.config)}" if self.config else ""
        return f"{self.name}{how} on {data_name(self.data)}"


def card(subject: Subject, results: Results, license: str | None = None) -> str:
    """The text of README.md, a function of the arguments. It ends with a hash of itself, which `edited` reads."""
    header = "\n".join(["---", *_yaml(_metadata(subject, results, license)), "---"])
    sections = [f"# {subject.title}", _about(subject), _use(subject), _training(subject, results), *_results(subject, results)]
    text = "\n\n".join([header, *sections]) + "\n"
    return text + MARK.format(_hash(text))


def edited(text: str) -> bool:
    """Whether `text` is no card, or one that was changed since `card` returned it."""
    body, _, end = text.rpartition(MARK.split("{}")[0])
    return not body or end != MARK.format(_hash(body)).removeprefix(MARK.split("{}")[0])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- metadata


def _metadata(subject: Subject, results: Results, license: str | None) -> dict[str, Any]:
    robust = subject.config is not None and subject.config.objective.attacks
    tags = ["image-classification", "adversarial-robustness", *["adversarial-training"] * robust, "pytorch"]
    known = data_name(subject.data)
    measured = list(_metrics(subject, results))
    found: dict[str, Any] = {"license": license} if license else {}
    found |= {"library_name": "spat_kernels", "pipeline_tag": "image-classification", "tags": tags}
    found |= {"datasets": [known]} if known in DATASETS else {}
    found |= {"metrics": ["accuracy"]}
    if measured:
        e, data = results.evaluation, _measured_on(subject, results)
        images = str(e["about"].get("test images", e["settings"]["images"]) if e else results.test_images)
        dataset = {"type": data, "name": data, "split": "test", "args": {"images": images}}
        task = {"type": "image-classification", "name": "Image classification"}
        found["model-index"] = [{"name": subject.title, "results": [{"task": task, "dataset": dataset, "metrics": measured}]}]
    return found


def _measured_on(subject: Subject, results: Results) -> str:
    return data_name(results.evaluation["about"].get("data", subject.data) if results.evaluation else subject.data)


def _metrics(subject: Subject, results: Results) -> Iterator[dict[str, Any]]:
    """Accuracies in percent: of the evaluation, else of the test at the end of the training."""
    if e := results.evaluation:
        found = {name: result["accuracy"] for name, result in e["results"].items()}
        described = {name: attack["settings"] for name, attack in e["attacks"].items()}
        radii = {"eps": _eps(e["settings"]["eps"]), "eps_l2": e["settings"]["eps_l2"], "eps_l1": e["settings"]["eps_l1"]}
    elif results.test:
        assert subject.config  # only a run has such a test
        found, described, radii = results.test, {}, {"eps": _eps(subject.config.evaluation_eps_in_x)}
    else:
        return
    for name, accuracy in found.items():
        plain = name in ("clean", WORST)
        metric = {"type": "accuracy", "name": f"accuracy, {name}, %", "value": round(accuracy, 2)}
        yield metric if plain else metric | {"args": radii | ({"attack": described[name]} if name in described else {})}


def _eps(radius: float) -> str:
    """A radius for images in [0, 1] as text."""
    return format_eps(round(255 * radius, 4))


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Lines of YAML for nested dicts and lists; strings are quoted as in JSON, which YAML reads."""
    if not isinstance(value, (dict, list)):
        return [indent + json.dumps(value, ensure_ascii=False)]
    lines = []
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        first, *rest = _yaml(each, indent + "  ")
        if isinstance(value, list):
            lines += [f"{indent}- {first.strip()}", *rest]
        else:
            nested = isinstance(each, (dict, list))
            lines += [f"{indent}{key}:", first, *rest] if nested else [f"{indent}{key}: {first.strip()}"]
    return lines


# ---- sections


def _about(subject: Subject) -> str:
    classes = f"{len(subject.classes)} classes"
    listed = f": {', '.join(subject.classes)}" if len(subject.classes) <= CLASSES else ", which config.json lists"
    normalised = f"normalises images itself ({subject.normalisation})" if subject.normalisation else "does not normalise images"
    shape, count = ", ".join(map(str, subject.image_shape)), len(subject.classes)
    return (
        f"A classifier of images. It takes images [B, {shape}] in [0, 1] to logits [B, {count}], for {classes}{listed}.\n"
        f"The model {normalised}: give it pixels in [0, 1], so that the eps of an attack is in pixels."
    )


USE = """## Use

{needs}`spat_kernels` and `safetensors` are needed. `model.pt` is the plain state dict, for `torch.load(weights_only=True)`.

```python
import torch
from spat_train.models import from_folder, from_pretrained

model = from_folder("."{given})  # the folder of this card; from_pretrained("USER/NAME"{given}) downloads it
x = torch.rand(2, {shape})  # your images, in [0, 1]
classes = model(x).argmax(1)
```

`spat-train evaluate . --data DATA{option}` attacks it. DATA is a data set, an .npz file or a folder."""


def _use(subject: Subject) -> str:
    shape, name = ", ".join(map(str, subject.image_shape)), subject.name
    if not subject.code:
        return USE.format(needs="", given="", option="", shape=shape)
    needs = f"Its architecture is code, `{name}`, which is not in this folder and has to be importable.\n"
    return USE.format(needs=needs, given=f', model="{name}"', option=f" --model-name {name}", shape=shape)


def _training(subject: Subject, results: Results) -> str:
    c = subject.config
    if c is None:
        return "## Training\n\nIt was not trained by this package, and the file of its weights does not say how."
    known = {name: text for name, text in settings(c).items() if text not in ("default", "none")}
    known |= {"seed": f"{c.seed}"} | ({"preset": c.preset} if c.preset else {})
    if results.trained_with:
        by = results.trained_with
        known["trained with"] = (
            f"spat_kernels {by['spat_kernels']}, torch {by['torch']}, {by['device']}, processes: {by['processes']}"
        )
    lines = [f"By `spat-train train` of spat_kernels. Exported with version {subject.version}."]
    if results.epochs is not None and results.epochs < c.epochs:
        lines.append(f"The run has finished {results.epochs} of its {c.epochs} epochs.")
    if chosen := results.validation:
        percent = ", ".join(f"{name} {value:.2f} %" for name, value in chosen.items() if name != "epoch")
        lines.append(f"These are the weights of epoch {chosen['epoch']}, the best on held-out training images: {percent}.")
    averaged = " They are the averaged ones." if c.ema else ""
    return f"## Training\n\n{' '.join(lines)}{averaged}\n\n{markdown_table(('setting', ''), list(known.items()))}"


def _results(subject: Subject, results: Results) -> list[str]:
    if not results.evaluation and not results.test:
        return ["## Evaluation\n\nThese weights were not evaluated: their accuracy on test images is not known."]
    return ([_evaluation(subject, results)] if results.evaluation else []) + ([_test(subject, results)] if results.test else [])


def _evaluation(subject: Subject, results: Results) -> str:
    assert results.evaluation
    e, how, about = results.evaluation, results.evaluation["settings"], results.evaluation["about"]
    text = (
        f"By `spat-train evaluate`, on {about.get('test images', how['images'])} images of {_measured_on(subject, results)}, "
        f"with eps {_eps(how['eps'])} (L2: {how['eps_l2']:g}, L1: {how['eps_l1']:g}) where an attack has none of its own, "
        f"seed {how['seed']}, attacks in {how['precision']}. Images that the model gets wrong are "
        f"{'attacked too' if how['attack_wrong'] else 'counted as broken'}. {BOUND}"
    )
    described = {name: attack["settings"] for name, attack in e["attacks"].items()} | {WORST: "broken by any of the above"}
    rows = [
        (name, f"{found['accuracy']:.2f}", f"{found['interval'][0]:.2f} to {found['interval'][1]:.2f}", described[name])
        for name, found in e["results"].items()
    ]
    alarms = [f"- Alarm: it was expected that {a['name']}. {a['meaning']}" for a in e["alarms"] if a["raised"]]
    table = markdown_table(("attack", "accuracy, %", "95 % interval", "settings"), rows)
    return "\n\n".join(["## Evaluation", text, table, *(["\n".join(alarms)] if alarms else [])])


def _test(subject: Subject, results: Results) -> str:
    assert results.test
    assert subject.config  # only a run has such a test
    eps = _eps(subject.config.evaluation_eps_in_x)
    text = f"At the end of the training, on {results.test_images} test images with eps {eps}. {BOUND}"
    rows = [(name, f"{value:.2f}") for name, value in results.test.items()]
    return f"## Test\n\n{text}\n\n{markdown_table(('attack', 'accuracy, %'), rows, 1)}"
