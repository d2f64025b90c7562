"""Which weight of a file belongs where in a model, whatever wraps the network on either side; and why some fit nowhere."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .weight_files import listed
from .wrapping import normalizers

UNUSED = re.compile(r"(^|\.)(n_averaged$|sub_block1\.)")  # AveragedModel's counter; layers of TRADES that no forward uses
NUMBERS = re.compile(r"(?:^|\.)(?:new_)?(?:(mean|mu)|std|sigma)$")  # those of a normalisation; group 1: of the mean
DEEPMINDS = {"init_conv.weight": "dm-wrn-DEPTH-WIDTH", "conv_2d.weight": "dm-preactresnet-18"}  # by its first weight
TELLING = 8  # times that the end of a name may occur in a model: where thousands of names end alike, all pairs take minutes
NORMALIZE = "put a spat_train.models.Normalize with the mean and std of its training before the model, or give --mean and --std"


class Match:
    """Where the weights of a file go in a model. Prefixes of wrappers, on either side, are found by matching names."""

    def __init__(self, file: dict[str, Tensor], model: nn.Module):
        self.file = file
        self.own = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        self.theirs, self.ours = prefixes(file, self.own)
        self.source: dict[str, str] = {}  # the model's names -> the file's
        left = [name for name in file if not self._placed(name, name)]
        left = [name for name in left if not self._placed(name, _as_torchvision(name))]
        self.unexpected = [name for name in left if not UNUSED.search(name) and not self._is_copy(name)]

        optional = {f"{at}.{name}".lstrip(".") for at in normalizers(model) for name in ("mean", "std")}
        self.numbers = self._one_normalisation({*left, *(self.source[name] for name in optional & self.source.keys())})
        if optional and self.numbers:
            mean, std = self.numbers
            self.source |= {name: std if name.endswith("std") else mean for name in sorted(optional - self.source.keys())}
            self.unexpected = [name for name in self.unexpected if not NUMBERS.search(name)]
        may_lack = {name for name in self.own if name.endswith("num_batches_tracked")}
        may_lack |= set() if optional & self.source.keys() else optional  # a mean without its std, or the reverse, is none
        self.missing = [name for name in self.own if name not in self.source and name not in may_lack]
        shapes = [(name, file[at].shape, self.own[name].shape) for name, at in self.source.items()]
        # The numbers of a normalisation are [C, 1, 1] here and [1, C, 1, 1] elsewhere.
        self.misshaped = [(n, a, b) for n, a, b in shapes if (a.numel() != b.numel() if n in optional else a != b)]

    def _placed(self, name: str, alias: str) -> bool:
        target = self.ours + alias.removeprefix(self.theirs)
        fits = alias.startswith(self.theirs) and target in self.own and target not in self.source
        if fits:
            self.source[target] = name
        return fits

    def _is_copy(self, name: str) -> bool:
        """Whether it is another name for a weight that has its place, as in files of robustness, which hold each twice."""
        places = (self.source.get(self.ours + rest) for alias in (name, _as_torchvision(name)) for _, rest in _splits(alias))
        return any(at is not None and same_tensor(self.file[at], self.file[name]) for at in places)

    def _one_normalisation(self, names: Iterable[str]) -> tuple[str, str] | None:
        """Among these names of the file, those of mean and std, where there is one normalisation, whatever its names."""
        found = [(name, kind) for name in sorted(names) if (kind := NUMBERS.search(name))]
        means, stds = ([name for name, kind in found if bool(kind[1]) is is_mean] for is_mean in (True, False))
        if not means or not stds:
            return None
        one = all(same_tensor(self.file[group[0]], self.file[name]) for group in (means, stds) for name in group)
        return (means[0], stds[0]) if one else None

    @property
    def classes(self) -> int:
        """The number of classes of the file where it is all that differs, else 0."""
        if self.missing or self.unexpected:
            return 0
        counts = {(a[0], b[0]) if a and b and a[1:] == b[1:] else (0, 0) for _, a, b in self.misshaped}
        return counts.pop()[0] if len(counts) == 1 else 0

    def values(self) -> tuple[list[float], list[float]] | None:
        """Mean and std of the file's normalisation."""
        if self.numbers is None:
            return None
        mean, std = (self.file[name].flatten().tolist() for name in self.numbers)
        return mean, std


def prefixes(file: Iterable[str], own: Iterable[str]) -> tuple[str, str]:
    """The prefixes of the names in the file and in the model without which most names agree."""
    file, own = list(file), list(own)
    places: dict[str, list[str]] = {}
    for name in own:
        for prefix, rest in _splits(name):
            places.setdefault(rest, []).append(prefix)
    telling = {rest: prefixes for rest, prefixes in places.items() if len(prefixes) <= TELLING}
    agree = Counter((theirs, ours) for name in file for theirs, rest in _splits(name) for ours in telling.get(rest, ()))
    best = max(agree, key=agree.__getitem__, default=("", ""))
    return best if 2 * agree[best] > min(len(file), len(own)) else ("", "")  # fewer agree by chance


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """ "a.b" into ("", "a.b") and ("a.", "b")."""
    at = 0
    while at <= len(name):
        yield name[:at], name[at:]
        at = name.find(".", at) + 1 or len(name) + 1


def _as_torchvision(name: str) -> str:
    """A name in kuangliu's ResNets as torchvision has it."""
    return re.sub(r"(^|\.)linear\.", r"\1fc.", re.sub(r"(^|\.)shortcut\.", r"\1downsample.", name))


def unusual_kind(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else ""


def same_tensor(a: Tensor, b: Tensor) -> bool:
    return not unusual_kind(a) and not unusual_kind(b) and a.dtype == b.dtype and torch.equal(a, b)


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
    for names, what, classifier in ((missing, "the model, not the file,", "linear"), (unexpected, "the file's model", "centres")):
        if any(name.endswith("centres") for name in names):
            return f"{what} ends in Max-Mahalanobis centres: create it with classifier={classifier!r}"
    if "logits.weight" in unexpected:
        for first, name in DEEPMINDS.items():
            if first in unexpected:
                return f"the file looks like DeepMind's network, another function: create {name}, with its mean and std"
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
