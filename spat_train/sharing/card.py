"""The model card: README.md with metadata as the Hugging Face Hub reads them (huggingface.co/docs/hub/model-cards)."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..data.datasets import DATASETS
from ..errors import as_input_error
from ..evaluation.alarms import NOT_ZERO
from ..evaluation.attack_specs import parse
from ..evaluation.attack_specs.attack import NORM_NAMES
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
    import yaml

    header = f"---\n{yaml.safe_dump(_metadata(subject, results, license), sort_keys=False, allow_unicode=True)}---"
    sections = [
        f"# {_md(subject.title)}",
        _about(subject),
        _use(subject),
        _training(subject, results),
        *_results(subject, results),
    ]
    text = "\n\n".join([header, *sections]) + "\n"
    text = text.encode(errors="backslashreplace").decode()  # names of folders need not be UTF-8
    return text + MARK.format(_hash(text))


def edited(text: str) -> bool:
    """Whether `text` is no card, or one that was changed since `card` returned it."""
    body, _, end = text.rpartition(MARK.split("{}")[0])
    return not body or end != MARK.format(_hash(body)).removeprefix(MARK.split("{}")[0])


def _md(text: str) -> str:
    """Any text in a line of Markdown, or in a cell of a table, as it is."""
    return re.sub(r"([\\`*_~\[\]<>#&])", r"\\\1", " ".join(text.split())).replace("|", "&#124;")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- metadata


def _metadata(subject: Subject, results: Results, license: str | None) -> dict[str, Any]:
    robust = subject.config is not None and subject.config.objective.attacks
    tags = ["image-classification", "adversarial-robustness", *["adversarial-training"] * robust, "pytorch"]
    measured = list(_metrics(subject, results))
    found: dict[str, Any] = {"license": license} if license else {}
    found |= {"library_name": "spat_kernels", "pipeline_tag": "image-classification", "tags": tags}
    found |= {"datasets": [subject.data]} if subject.config and subject.data in DATASETS else {}
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
    about: dict[str, dict] = {}
    if e := results.evaluation:
        found = {name: result["accuracy"] for name, result in e["results"].items()}
        for name, attack in e["attacks"].items():
            with as_input_error(f"evaluation.json: attack {name}"):
                parsed = parse(attack["spec"])
            radius = parsed.radius(*(e["settings"][key] for key in ("eps", "eps_l2", "eps_l1")))
            eps = _eps(radius) if parsed.norm == "linf" else radius
            about[name] = {"norm": NORM_NAMES[parsed.norm], "eps": eps, "attack": attack["settings"]}
    elif found := results.test or {}:
        assert subject.config  # only a run has such a test
        about = {name: {"norm": NORM_NAMES["linf"], "eps": _eps(subject.config.evaluation_eps_in_x)} for name in found}
    for name, accuracy in found.items():
        args = {} if name in ("clean", WORST) else {"args": about[name]}
        yield {"type": "accuracy", "name": f"accuracy, {name}, %", "value": round(accuracy, 2)} | args


def _eps(radius: float) -> str:
    """A radius for images in [0, 1] as text."""
    return format_eps(round(255 * radius, 4))


# ---- sections


def _about(subject: Subject) -> str:
    classes = f"{len(subject.classes)} classes"
    listed = f": {', '.join(map(_md, subject.classes))}" if len(subject.classes) <= CLASSES else ", which config.json lists"
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

{pictures}`spat-train evaluate . --data DATA{option}` attacks it. DATA is a data set, an .npz file, a folder or shards."""
PICTURES = """Pictures were resized until the short side had {} pixels, and cropped to the square in the middle. Do the same, as
`torchvision.transforms.Resize({})` and `CenterCrop({})` do to RGB images of PIL.

"""


def _use(subject: Subject) -> str:
    shape, name = ", ".join(map(str, subject.image_shape)), subject.name
    size = subject.config.image_size if subject.config else None
    pictures = PICTURES.format(size, size, size) if size else ""
    if not subject.code:
        return USE.format(needs="", given="", option="", shape=shape, pictures=pictures)
    needs = f"Its architecture is code, `{name}`, which is not in this folder and has to be importable.\n"
    return USE.format(needs=needs, given=f', model="{name}"', option=f" --model-name {name}", shape=shape, pictures=pictures)


def _training(subject: Subject, results: Results) -> str:
    c = subject.config
    if c is None:
        return "## Training\n\nThe file of its weights does not say how it was trained."
    known = {name: text for name, text in settings(c).items() if text not in ("default", "none")}
    if c.activation == "relu":
        del known["activation"]  # it replaces ReLUs: the network's own may be others
    if c.last_layer == "linear":
        del known["classifier"]
    if "lr drops" in known:
        known["lr drops"] = f"from epoch {' and '.join(map(str, c.lr_drops))} on"
    known |= {"seed": f"{c.seed}"} | ({"preset": c.preset} if c.preset else {})
    if results.trained_with:
        by = results.trained_with
        known["last trained with"] = f"spat_kernels {by['spat_kernels']}, torch {by['torch']}, {by['device']}"
    lines = [f"By `spat-train train` of spat_kernels. Exported with version {subject.version}."]
    if results.epochs is not None and results.epochs < c.epochs:
        lines.append(f"The run has finished {results.epochs} of its {c.epochs} epochs.")
    if chosen := results.validation:
        percent = ", ".join(f"{name} {value:.2f} %" for name, value in chosen.items() if name != "epoch")
        lines.append(f"These are the weights of epoch {chosen['epoch']}, the best on held-out training images: {percent}.")
    averaged = " They are the averaged ones." if c.ema else ""
    table = markdown_table(("setting", ""), [(name, _md(value)) for name, value in known.items()])
    return f"## Training\n\n{' '.join(lines)}{averaged}\n\n{table}"


def _results(subject: Subject, results: Results) -> list[str]:
    if not results.evaluation and not results.test:
        return ["## Evaluation\n\nThese weights were not evaluated: their accuracy on test images is not known."]
    return ([_evaluation(subject, results)] if results.evaluation else []) + ([_test(subject, results)] if results.test else [])


def _evaluation(subject: Subject, results: Results) -> str:
    assert results.evaluation
    e, how, about = results.evaluation, results.evaluation["settings"], results.evaluation["about"]
    limit = f", {how['budget']} at most" if how["budget"] else ""
    data = _md(_measured_on(subject, results))
    text = (
        f"By `spat-train evaluate`, on {about.get('test images', how['images'])} images of {data}, "
        f"with eps {_eps(how['eps'])} (L2: {how['eps_l2']:g}, L1: {how['eps_l1']:g}) where an attack has none of its own, "
        f"seed {how['seed']}, attacks in {how['precision']}. Images that the model gets wrong are "
        f"{'attacked too' if how['attack_wrong'] else 'counted as broken'}. {BOUND} "
        f"Passes are the forwards and backwards that an attack took for an image, the mean of those that it attacked{limit}."
    )
    described = {name: attack["settings"] for name, attack in e["attacks"].items()} | {WORST: "broken by any of the above"}
    rows = [
        (
            _md(name), f"{found['accuracy']:.2f}", f"{found['interval'][0]:.2f} to {found['interval'][1]:.2f}",
            f"{found['forwards']:.0f} + {found['backwards']:.0f}" if "forwards" in found else "", _md(described[name]),
        )
        for name, found in e["results"].items()
    ]  # fmt: skip
    if all(alarm["name"] != NOT_ZERO for alarm in e["alarms"]):
        text += " It was not checked for signs of masked gradients (`--no-alarms`)."
    alarms = [f"- Alarm: it was expected that {a['name']}. {a['meaning']}" for a in e["alarms"] if a["raised"]]
    table = markdown_table(("attack", "accuracy, %", "95 % interval", "passes", "settings"), rows)
    return "\n\n".join(["## Evaluation", text, table, *(["\n".join(alarms)] if alarms else [])])


def _test(subject: Subject, results: Results) -> str:
    assert results.test
    assert subject.config  # only a run has such a test
    eps = _eps(subject.config.evaluation_eps_in_x)
    text = f"At the end of the training, on {results.test_images} test images with eps {eps}. {BOUND}"
    rows = [(name, f"{value:.2f}") for name, value in results.test.items()]
    return f"## Test\n\n{text}\n\n{markdown_table(('attack', 'accuracy, %'), rows, 1)}"
