"""The reports of an evaluation: evaluation.json, report.md, and report.html with its pictures inside."""

import base64
import html
import io
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import spat_kernels

from ..data.images import Floats, Folder, Images, floats
from ..runtime import atomic_write, json_files, rounding
from .alarms import Alarm
from .attack_specs import NAMED, published
from .result import WORST, Evaluation, interval, percent

FORMAT = "spat_train evaluation 1"
STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 70em; margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; overflow-wrap: normal; }
pre { white-space: pre-wrap; background: #f5f5f5; padding: .5em .8em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: .25em .8em; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.ALARM { color: #fff; background: #b3261e; padding: 0 .4em; font-weight: bold; }
figure { display: inline-block; margin: .5em 1.5em .5em 0; }
figcaption { font-size: 13px; color: #555; }
img { width: min(112px, 28vw); height: min(112px, 28vw); image-rendering: pixelated; border: 1px solid #ddd; }
"""
HASHES = "weights", "source weights", "data", "rows"


class Section(NamedTuple):
    title: str
    text: str = ""
    header: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    code: str = ""


def write_report(
    folder: Path,
    evaluation: Evaluation,
    images: Images | Folder | Floats,
    classes: Sequence[str],
    found: Sequence[Alarm] = (),
    about: dict[str, str] | None = None,
) -> None:
    """Write the three files, which are functions of the arguments.

    Args:
        images: those that were evaluated. classes: the names of the K classes.
        found: what `alarms` returned.
        about: facts about the model, the data and the machine; `command` is what was typed.

    Raises:
        SaveError: the disk is full.
    """
    about = about or {}
    title = f"Evaluation of {about.get('model', 'a model')}"
    sections = [
        accuracy_section(evaluation),
        *alarm_section(found),
        recheck_section(evaluation),
        settings_section(evaluation, about),
        *([Section("Command", code=about["command"])] if "command" in about else []),
    ]
    atomic_write.write(folder / "evaluation.json", to_json(evaluation, classes, found, about).encode())
    atomic_write.write(folder / "report.md", markdown(title, sections).encode())
    atomic_write.write(folder / "report.html", web_page(title, sections, gallery(evaluation, images, classes)).encode())


# ---- sections


def summary(evaluation: Evaluation, found: Sequence[Alarm]) -> str:
    """For the terminal."""
    raised = [f"ALARM: expected that {a.name}; found {_numbers(a)}. {a.meaning}" for a in found if a.raised]
    return "\n".join([evaluation.table(), *raised])


def accuracy_section(e: Evaluation) -> Section:
    wrong = "Images that the model gets wrong are attacked too." if e.settings["attack_wrong"] else (
        "Images that the model gets wrong as they are count as broken by every attack, and are not attacked."
    )  # fmt: skip
    made = " Adversarial images are made on another model (black box)." if e.settings["source_weights"] else ""
    limit = f", {e.settings['budget']} at most" if e.settings["budget"] else ""
    text = (
        f"{len(e)} images, eps {255 * e.settings['eps']:.4g}/255 ({e.settings['eps']:.4g}), for L2 {e.settings['eps_l2']:g}, "
        f"for L1 {e.settings['eps_l1']:g}. {wrong}{made} Intervals are Wilson's, 95 %. "
        f"Passes are the forwards and backwards that an attack took for an image, the mean of those that it attacked{limit}."
    )
    return Section("Accuracy", text, ("attack", "accuracy, %", "95 % interval", "passes", "broken", "settings"), e.lines())


def alarm_section(found: Sequence[Alarm]) -> list[Section]:
    if not found:
        return []
    rows = [("ALARM" if alarm.raised else "ok", alarm.name, _numbers(alarm), alarm.meaning) for alarm in found]
    raised = sum(alarm.raised for alarm in found)
    text = f"{raised} of {len(found)} checks raise an alarm" + (": the accuracies may not be what they seem." if raised else ".")
    return [Section("Alarms", text, ("", "expected", "found", "why"), rows)]


def recheck_section(e: Evaluation) -> Section:
    rows = [(name, str(r.adversarial), str(r.outside), str(r.rounded)) for name, r in e.rechecks.items()]
    text = (
        "Adversarial images of images that the model gets right; how many images an attack left outside of the ball or the box "
        "(after rounding: by more than half a level); and how many are still misclassified when rounded to 8 bits."
    )
    return Section("Adversarial images checked again", text, ("attack", "adversarial", "outside", "after rounding"), rows)


def settings_section(e: Evaluation, about: dict[str, str]) -> Section:
    settings = {name.replace("_", " "): value for name, value in e.settings.items() if value is not None}
    values = about | {f"hash of the {name}" if name in HASHES else name: value for name, value in settings.items()} | versions()
    return Section("Settings", header=("", ""), rows=[(name, str(v)) for name, v in values.items() if name != "command"])


def versions() -> dict[str, str]:
    config = spat_kernels.config()
    return {"spat_kernels": config["version"], "torch": config["torch"], "python": platform.python_version()}


def hardware(device: torch.device) -> str:
    return rounding.hardware(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def _numbers(alarm: Alarm) -> str:
    shown = ((name.removesuffix(", %"), f"{value:.4g}" + " %" * name.endswith(", %")) for name, value in alarm.numbers.items())
    return ", ".join(f"{name} {value}" for name, value in shown)


# ---- pictures


def gallery(e: Evaluation, images: Images | Folder | Floats, classes: Sequence[str]) -> list[str]:
    """HTML of the first images that each attack broke."""
    parts = []
    for name, examples in e.examples.items():
        parts += [f"<h3>{html.escape(name)}</h3>"] if examples else []
        for example in examples:
            at = example.index
            x, _ = floats(images, e.rows[at : at + 1], "cpu", torch.contiguous_format)
            clean = x[0].float().permute(1, 2, 0)
            moved = example.image / 255 - clean
            # So that the largest difference is as bright as it can be: for L2 and L1 it is that of this image.
            radius = e.attacks[name].radius(*(e.settings[key] for key in ("eps", "eps_l2", "eps_l1")))
            most = radius if e.attacks[name].norm == "linf" else float(moved.abs().max())
            factor = max(int(0.5 / max(most, 1 / 255)), 1)
            predicted = int(e.predicted[name][at])
            became = classes[predicted] if predicted >= 0 else "NaN"
            caption = f"image {int(e.rows[at])}: {classes[int(e.labels[at])]}, predicted {became}; difference x {factor}"
            shown = {"original": clean, "adversarial": example.image / 255, "difference": (0.5 + factor * moved).clamp(0, 1)}
            row = "".join(f'<img alt="{what}" src="data:image/png;base64,{png(image)}">' for what, image in shown.items())
            parts.append(f"<figure>{row}<figcaption>{html.escape(caption)}</figcaption></figure>")
    text = "The original, the adversarial image and their difference." if parts else "None broke an image."
    return ["<h2>Images that attacks broke</h2>", f"<p>{text}</p>", *parts]


def png(image: Tensor) -> str:
    """An image [H, W, C] in [0, 1], C 1 or 3, as PNG in base64."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray((255 * image).round().to(torch.uint8).squeeze(-1).numpy()).save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


# ---- as files


def to_json(e: Evaluation, classes: Sequence[str], found: Sequence[Alarm], about: dict[str, str]) -> str:
    attacks = {
        name: {"spec": attack.spec, "settings": attack.describe(), "source": NAMED.get(published(name)[0], ("", ""))[1]}
        for name, attack in e.attacks.items()
    }
    results: dict[str, dict] = {name: _result(e.correct(name)) for name in (*e.attacks, WORST)}
    for name in e.attacks:
        if passes := e.passes(name):
            results[name] |= dict(zip(("forwards", "backwards"), passes, strict=True))
    for name in e.part:
        results[name]["after"] = {part: _result(left) for part, left in e.after(name).items()}
    content = {
        "format": FORMAT, "about": about, "settings": e.settings, "versions": versions(), "classes": list(classes),
        "attacks": attacks, "results": results, "checked": {name: vars(r) for name, r in e.rechecks.items()},
        # JSON knows no NaN
        "alarms": [
            vars(a) | {"numbers": {name: v if math.isfinite(v) else None for name, v in a.numbers.items()}} for a in found
        ],
    }  # fmt: skip
    samples = []
    for row, label, *classes_found in zip(*(t.tolist() for t in (e.rows, e.labels, *e.predicted.values())), strict=True):
        predicted = dict(zip(e.predicted, classes_found, strict=True))
        broken_by = [name for name, found_class in predicted.items() if found_class != label]
        samples.append({"row": row, "label": label, "broken_by": broken_by, "predicted": predicted})
    content = json_files.with_digest(content | {"samples": samples})
    lines = ",\n  ".join(map(json.dumps, content.pop("samples")))  # a line for each image
    return f'{json.dumps(content, indent=1)[:-2]},\n "samples": [\n  {lines}\n ]\n}}\n'


def _result(correct: Tensor) -> dict:
    return {"accuracy": percent(correct), "interval": interval(correct), "broken": int((~correct).sum())}


def markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}", "", *([section.text, ""] if section.text else [])]
        lines += [markdown_table(section.header, section.rows)] if section.rows else []
        lines += ["```", section.code, "```"] if section.code else []
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """`numbers`: how many of the last columns are aligned to the right."""
    cells = [header, ["---"] * (len(header) - numbers) + ["---:"] * numbers, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def web_page(title: str, sections: Sequence[Section], pictures: Sequence[str]) -> str:
    """One file: styles and pictures are in it."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>" if section.text else ""]
        header = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.header)
        rows = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in section.rows)
        parts += [f'<div class="wide"><table>\n<tr>{header}</tr>\n{rows}\n</table></div>'] if section.rows else []
        parts += [f"<pre>{html.escape(section.code)}</pre>"] if section.code else []
        parts += pictures if section.title == "Accuracy" else []
    body = "\n".join(parts)
    phones = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">\n{phones}\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _cell(text: str) -> str:
    if text in ("ALARM", "ok"):
        return f'<td><span class="{text}">{text}</span></td>'
    number = text.replace(".", "").replace(" to ", "").replace(" + ", "").isdecimal()
    return f'<td class="number">{text}</td>' if number else f"<td>{html.escape(text)}</td>"
