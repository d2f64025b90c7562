"""Why weights do not fit a model, in one line, with the remedy."""

import re

from torch import Tensor

from .matching import NUMBERS, Match, unusual_kind
from .weight_files import listed

NORMALIZE = "put a spat_train.models.Normalize with the mean and std of its training before the model, or give --mean and --std"


def misfit(match: Match) -> str:
    """The weights that do not fit, and the remedy; "" where all can be copied."""
    shapes = [f"{name} {list(theirs)} (the model has {list(ours)})" for name, theirs, ours in match.misshaped]
    pairs = [(name, match.file[at], match.own[name]) for name, at in match.source.items()]
    odd = [f"{name} ({why})" for name, theirs, ours in pairs if (why := _uncopied(name, theirs, ours))]
    fixed = [f"{name} ({why})" for name, _, ours in pairs if (why := _unwritable(ours))]
    lists = {"missing": match.missing, "unexpected": match.unexpected, "of another shape": shapes, "no such numbers": odd,
             "fixed in the model": fixed}  # fmt: skip
    what = "; ".join(f"{kind}: {listed(names)}" for kind, names in lists.items() if names)
    if match.missing or match.unexpected or shapes:
        return f"{what}: {_hint(match)}"
    remedy = "save dense tensors of the model's kind of numbers" if odd else "give each weight of the model memory of its own"
    return f"{what}: {remedy}" if what else ""


def _uncopied(name: str, theirs: Tensor, ours: Tensor) -> str:
    alike = name.endswith("num_batches_tracked")  # a float in files that average all they hold
    alike |= (theirs.is_floating_point(), theirs.is_complex()) == (ours.is_floating_point(), ours.is_complex())
    return unusual_kind(theirs) or ("" if alike else f"{theirs.dtype}, the model has {ours.dtype}".replace("torch.", ""))


def _unwritable(ours: Tensor) -> str:
    expanded = not unusual_kind(ours) and any(step == 0 and n > 1 for step, n in zip(ours.stride(), ours.shape, strict=True))
    return unusual_kind(ours) or ("expanded" if expanded else "")


def _hint(match: Match) -> str:
    """Which model the file probably belongs to."""
    missing = {name.removeprefix(match.ours) for name in match.missing}
    unexpected = {name.removeprefix(match.theirs) for name in match.unexpected}
    if unexpected and not missing and all(map(NUMBERS.search, unexpected)):
        return f"the file's network normalises its images: {NORMALIZE}"
    if missing and not unexpected and all(map(NUMBERS.search, missing)):
        if any(map(NUMBERS.search, match.file)):
            return "the file has a mean without its std, or the reverse: save both, or neither"
        return "the file has no normalisation: use a spat_train.models.Normalize, which keeps its numbers"
    if {"init_conv.weight", "logits.weight"} <= unexpected:
        return (
            "the file looks like DeepMind's WRN, another function, which pads its convolutions of stride 2 on one side: give its "
            "own code, as package.module:factory"
        )
    if missing or unexpected:
        fitting = {name.removeprefix(match.ours) for name in match.source}
        kinds, others = ({re.sub(r"\d+", "#", name) for name in names} for names in (fitting, missing | unexpected))
        if not others <= kinds:
            return "the file looks like another architecture: create that one"
        depth = "the file looks like this architecture in another depth"
        return depth + (" or width" if match.misshaped else "") + ": create that one"
    if classes := match.classes:
        has = match.misshaped[0][2][0]
        return f"the file looks like {classes} classes, the model has {has}: create it with num_classes={classes}"
    if len(match.misshaped) == 1:
        return "the file looks like images of another shape or another stem: create the model for those"
    return "the file looks like this architecture in another width: create that one"
