"""Entries of RobustBench's leaderboards (Croce et al., arXiv 2010.09670), in the layout of its model_info/DATASET/NORM/*.json."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime import atomic_write
from .attack_specs import Attack
from .attack_specs.families import AutoAttack
from .result import Evaluation

NORMS = {"linf": "Linf", "l2": "L2"}  # the threat models, which are names of folders there
DATASETS = {"cifar10", "cifar100", "imagenet"}
FIELDS: dict[str, type] = {  # in the order of its files
    "link": str, "name": str, "authors": str, "additional_data": bool, "number_forward_passes": int, "dataset": str,
    "venue": str, "architecture": str, "eps": str, "clean_acc": str, "reported": str, "autoattack_acc": str,
}  # fmt: skip
OPTIONAL: dict[str, type] = {"external": str, "footnote": str, "unreliable": bool}
OF_CORRUPTIONS = {"corruptions_acc", "corruptions_acc_3d", "corruptions_mce", "corruptions_mce_3d"}  # null in files of its tool
FAMILIES = {r"(?:dm-)?wrn-(\d+-\d+)": "WideResNet-", r"resnet-(\d+)": "ResNet-", r"(?:dm-)?preactresnet-(\d+)": "PreActResNet-"}
OURS = r" ?AutoAttack (on [\d,]+ of the [\d,]+ test images(, in \w+)?|in (tf32|bf16|fp16))\."  # in footnotes
BY_HAND = "link", "authors", "venue", "reported"  # what no evaluation knows


def robustbench_entry(
    evaluation: Evaluation,
    attack: str = "autoattack",
    *,
    test_images: int,
    name: str,
    architecture: str,
    dataset: str,
    additional_data: bool = False,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entry of a model: accuracies of the evaluated images, in percent with two decimals.

    Args:
        attack: the standard AutoAttack in `evaluation.attacks`.
        test_images: how many images the whole test set has. Where fewer were evaluated, the footnote says so, as where the
            attack was not in fp32.
        name: of the paper or the model.
        architecture, dataset: as RobustBench names them: WideResNet-34-10, cifar10.
        additional_data: whether images beyond the data set were trained on.
        before: an earlier entry, whose fields are kept, except eps, clean_acc, autoattack_acc, and the sentence in the footnote.

    Raises:
        InputError: the evaluation is not what RobustBench reports.
    """
    if attack not in evaluation.attacks:
        raise InputError(f"attack {attack}: the evaluation has {', '.join(evaluation.attacks)}: add it")
    chosen = evaluation.attacks[attack]
    check_standard(chosen)
    if evaluation.settings["attack_wrong"] or evaluation.settings["source_weights"]:
        raise InputError("RobustBench attacks the model itself, where it is right: leave out attack_wrong and source")
    if evaluation.settings["budget"]:
        raise InputError("RobustBench's AutoAttack has no budget: leave it out")
    kept: dict[str, Any] = {key: value for key, value in (before or {}).items() if value is not None}
    radius = chosen.radius(*(evaluation.settings[name] for name in ("eps", "eps_l2", "eps_l1")))
    defaults: dict[str, Any] = {
        "name": name, "architecture": architecture, "dataset": dataset, "additional_data": additional_data,
        "number_forward_passes": 1,
    }  # fmt: skip
    numbers = {
        "eps": eps_text(radius, chosen.norm), "clean_acc": f"{evaluation.accuracy('clean'):.2f}",
        "autoattack_acc": f"{evaluation.accuracy(attack):.2f}",
    }  # fmt: skip
    entry: dict[str, Any] = {key: "" for key in FIELDS} | defaults | kept | numbers
    theirs = entry.get("footnote", "")
    footnote = re.sub(OURS, "", theirs) + _unlike_theirs(evaluation, test_images)
    if footnote != theirs:
        entry["footnote"] = footnote.strip()
        if not entry["footnote"]:
            del entry["footnote"]
    return entry


def _unlike_theirs(evaluation: Evaluation, test_images: int) -> str:
    """A sentence on what differs from RobustBench's own evaluations, or ""."""
    count, precision = len(evaluation), evaluation.settings["precision"]
    found = [f"on {count:,} of the {test_images:,} test images"] * (count < test_images)
    found += [f"in {precision}"] * (precision not in (None, "fp32"))
    return f" AutoAttack {', '.join(found)}." if found else ""


def check_standard(attack: Attack) -> None:
    """Raise InputError unless `attack` is AutoAttack as RobustBench runs it, at any radius."""
    if not isinstance(attack, AutoAttack) or replace(attack, norm="linf", eps=None).spec != AutoAttack.family:
        raise InputError(
            f"attack {attack.name}: RobustBench reports AutoAttack's standard version with its own steps and queries: give "
            "autoattack"
        )
    if attack.norm not in NORMS:
        raise InputError(f"attack {attack.name}: RobustBench has no leaderboard of {attack.norm}: give {' or '.join(NORMS)}")


def chosen_attack(attacks: dict[str, Attack], file: Path) -> str:
    """The name of the AutoAttack that an entry in `file` is about.

    Raises:
        InputError: there is none, or several, or the folder is of another norm; or the file cannot be written there.
    """
    found = [name for name, attack in attacks.items() if isinstance(attack, AutoAttack)]
    if len(found) != 1:
        there = f"--attacks has {', '.join(found) or 'none'}"
        raise InputError(f"--robustbench {file}: an entry needs one AutoAttack, and {there}: give --attacks autoattack")
    check_standard(attacks[found[0]])
    norm, folder = NORMS[attacks[found[0]].norm], file.resolve().parent
    if not folder.is_dir():
        raise InputError(f"--robustbench {file}: there is no folder {folder}: make it, or choose another place")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise InputError(f"--robustbench {file}: it cannot be written there: choose another place")
    if folder.name in NORMS.values() and folder.name != norm:
        raise InputError(f"--robustbench {file}: that folder is for {folder.name}, and the attack is {norm}: choose {norm}/")
    return found[0]


def read_entry(file: Path, dataset: str) -> dict[str, Any]:
    """The entry in `file`, as far as it is filled in; {} where there is no file.

    Raises:
        InputError: it holds something else, or another data set of RobustBench's.
    """
    if not file.exists():
        return {}
    remedy = "choose another file, or mend it"
    try:
        entry = json.loads(file.read_bytes())
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"--robustbench {file}: it cannot be read as JSON ({type(error).__name__}): {remedy}") from error
    kinds = FIELDS | OPTIONAL
    if not isinstance(entry, dict):
        raise InputError(f"--robustbench {file}: it holds no entry of RobustBench: {remedy}")
    for key, value in entry.items():
        if value is not None and type(value) is not kinds.get(key) or key not in kinds.keys() | OF_CORRUPTIONS:
            raise InputError(f"--robustbench {file}: no entry of AutoAttack has {json.dumps({key: value})[1:-1]}: {remedy}")
    if {dataset, entry.get("dataset")} <= DATASETS and entry["dataset"] != dataset:
        raise InputError(f"--robustbench {file}: it is about {entry['dataset']}, and --data is {dataset}: choose another file")
    return entry


def write_entry(file: Path, entry: dict[str, Any]) -> str:
    """Write `entry`. Returns what there is to say of it.

    Raises:
        SaveError: the disk is full.
    """
    atomic_write.write(file, (json.dumps(entry, indent=2, ensure_ascii=False) + "\n").encode())
    empty = [key for key in BY_HAND if not entry[key]]
    return f"{file} written" + (f": fill in {', '.join(empty)}, which later evaluations keep" if empty else "")


def eps_text(eps: float, norm: str) -> str:
    """8/255 where it is a whole number of levels, else 0.031; for L2 0.5."""
    levels = 255 * eps
    whole = norm == "linf" and round(levels) > 0 and abs(levels - round(levels)) < 1e-6
    return f"{round(levels)}/255" if whole else f"{eps:.6g}"


def architecture_of(model_name: str) -> str:
    """What RobustBench calls an architecture of ours: wrn-34-10 is WideResNet-34-10. Others are as they are."""
    for pattern, family in FAMILIES.items():
        if found := re.fullmatch(rf"{pattern}(/[\w-]+)?", model_name):
            return family + found[1]
    return model_name.removeprefix("timm:").removeprefix("torchvision:")
