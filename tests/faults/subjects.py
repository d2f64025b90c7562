"""The commands under test, and what of their folders must be the same after a fault as without it."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten_with_path

MODEL = "tests.training.helpers:network"
TRAIN = f"""train --data digits --model {MODEL} --method mart --alpha 0.3 --ema 0.9 --awp 0.01 --eps 25.5 --steps 2 --epochs 2
    --batch-size 32 --limit 150 --holdout 15 --lr 0.05 --schedule cosine --val-steps 2 --pad 1 --flip True --device cpu
    --log-every 3 --track none --checkpoint-minutes 1e-9 --resume""".split()
EVALUATE = f"""--model-name {MODEL} --device cpu --batch-size 30 --limit 90 --attacks fgsm,pgd:steps=2:restarts=2 --no-alarms
    --save-images""".split()


def train(inputs: Path, out: Path) -> list[str]:
    """Two epochs of five steps, saved after each; a validation after each, and a test."""
    return [*TRAIN, "--out", str(out)]


def evaluate(inputs: Path, out: Path) -> list[str]:
    return ["evaluate", str(inputs / "run"), *EVALUATE, "--out", str(out)]


def export(inputs: Path, out: Path) -> list[str]:
    return ["export", str(inputs / "run"), "--evaluation", str(inputs / "evaluation"), "--model-name", MODEL, "--out", str(out)]


def evaluate_export(inputs: Path, out: Path) -> list[str]:
    return ["evaluate", str(inputs / "export"), *EVALUATE, "--out", str(out)]


def resume(inputs: Path, out: Path) -> list[str]:
    """Go on with the run in `inputs`; `out` is not used."""
    return train(inputs, inputs / "run")


def evaluate_again(inputs: Path, out: Path) -> list[str]:
    return evaluate(inputs, inputs / "evaluation")


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {"train": train, "evaluate": evaluate, "export": export}


# ---- what must be the same


def essence(folder: Path) -> dict[str, str]:
    """A digest of each file in a folder that a command wrote, without times, identities and the folder's own place.

    previous.pt and the images of a step that is not finite are no results.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name != "previous.pt" and not name.startswith("nonfinite-"):
            found[name] = hashlib.sha256(_content(path)).hexdigest()[:16]
    return found


def _content(path: Path) -> bytes:
    if path.suffix == ".pt":
        return _tensors(torch.load(path, weights_only=True))
    content = path.read_bytes()
    if path.name == "log.jsonl":
        events = [json.loads(line) for line in content.splitlines()]
        return repr([e | {"images_per_second": 0} for e in events if e["kind"] != "start"]).encode()
    if path.name == "result.json":
        return repr({name: json.loads(content)[name] for name in ("test", "test_images", "best")}).encode()
    if path.suffix in (".json", ".md", ".html"):
        own = rb"(?m)^.*(--out|\"out\":|\"digest\":|\d{4}-\d\d-\d\d \d\d:\d\d UTC).*$"
        return re.sub(own, b"", re.sub(rb"/[^\s\"'<]*/(run|evaluation|export)\b", rb"\1", content))
    return content


def _tensors(state: object) -> bytes:
    """The values in a checkpoint, and where they are; a run's without its identity and place."""
    if isinstance(state, dict):
        state = {name: dict(v) if isinstance(v, dict) else v for name, v in state.items() if name != "id"}
        for part, own in (("config", "out"), ("progress", "log_bytes"), ("progress", "log_crc")):
            if isinstance(state.get(part), dict):
                state[part].pop(own, None)
    content = io.BytesIO()
    for place, value in tree_flatten_with_path(state)[0]:
        content.write(repr(place).encode())
        bits = isinstance(value, torch.Tensor)
        content.write(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if bits else repr(value).encode())
    return content.getvalue()


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    return ", ".join(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))


# ---- damage to files


@dataclass(frozen=True)
class Reading:
    """A file that was written, and a command that reads it.

    Attributes:
        folders: that the command needs, under their names in PRISTINE, or "PRISTINE:name".
        result: the folder that the command writes.
    """

    file: str
    folders: tuple[str, ...]
    command: Callable[[Path, Path], list[str]]
    result: str = "out"

    @property
    def label(self) -> str:
        return f"{'unfinished ' * (':' in self.folders[-1])}{self.file}, {self.command.__name__}"


# "unfinished" and "partial" are a run and an evaluation that were killed in the middle.
RUN, PARTIAL, BOTH = ("unfinished:run",), ("run", "partial:evaluation"), ("run", "evaluation")
_READINGS = (
    *(Reading(f"run/{name}", RUN, resume, "run") for name in ("last.pt", "previous.pt", "best.pt", "config.json", "log.jsonl")),
    *(Reading(f"run/{name}", ("run",), resume, "run") for name in ("last.pt", "result.json")),
    *(Reading(f"run/{name}", ("run",), evaluate) for name in ("best.pt", "config.json")),
    *(Reading(f"evaluation/{name}", PARTIAL, evaluate_again, "evaluation") for name in ("settings.json", "samples.jsonl")),
    *(Reading(name, BOTH, export) for name in ("run/best.pt", "run/last.pt", "run/result.json", "evaluation/evaluation.json")),
    *(Reading(f"export/{name}", ("export",), evaluate_export) for name in ("model.safetensors", "config.json")),
)
READINGS = {reading.label: reading for reading in _READINGS}
OF_WEIGHTS = [r.label for r in _READINGS if r.file.endswith(".pt") and r.label != "run/last.pt, resume"]  # that run is finished


def damage(path: Path, kind: str, place: float) -> None:
    """Flip a bit, cut the file, or lose half a kilobyte to zeros, at the `place` from 0 to 1."""
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if kind == "flip":
        content[at] ^= 1 << int(place * 8 * len(content)) % 8
    elif kind == "cut":
        del content[at:]
    else:
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)


def copy(name: str, pristine: Path, inputs: Path) -> None:
    """Copy a folder that a reading needs."""
    source, _, target = name.rpartition(":")
    shutil.copytree(pristine / (source or target), inputs / target)
