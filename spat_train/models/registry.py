"""Models by name: the networks of this package, timm's, torchvision's, and anybody's own.

A model takes images [B, C, H, W] in [0, 1] to logits [B, K]. Where it needs them normalised it does so itself (`Normalize`), so
that the eps of an attack is always in pixels.
"""

from collections.abc import Sequence

from torch import nn

from ..errors import did_you_mean, lookup
from . import robustbench_names
from .centres import put_centres
from .external import own_model, timm_model, torchvision_model
from .networks import FAMILIES, ImageShape
from .wrapping import replace_relus, wrap

EXTERNAL = "timm:NAME, torchvision:NAME, robustbench:NAME or package.module:factory"
NAMES = tuple(name for family in FAMILIES for name in family.names)


def create(
    name: str,
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    activation: str = "relu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classifier: str = "linear",
) -> nn.Module:
    """The network called `name`, newly initialised: images [B, *image_shape] in [0, 1] -> logits [B, num_classes].

    Args:
        name: one of
            a name of this package (`NAMES` has the usual ones), such as "wrn-34-10" or "resnet-18"; what follows a "/" picks a
                variant, such as "preactresnet-18/raw", "resnet-18/imagenet" or "mnist-cnn/4", as `networks` describes;
            "package.module:factory": factory(num_classes=K) of an importable module, one in the current directory included;
            "timm:NAME" or "torchvision:NAME": a model of theirs, not pretrained, with the normalisation of its own configuration
            (torchvision: of its public weights) before it;
            "robustbench:NAME": the network and normalisation of that entry of RobustBench, not its weights
            (`robustbench_names`).
        num_classes: K, at least 2.
        image_shape: (C, H, W) of one image.
        activation: what takes the place of every `nn.ReLU` module, a name in `wrapping.ACTIVATIONS`.
        mean, std: those of a `Normalize` before the network, a number for each channel; in place of timm's and torchvision's own.
        classifier: "linear" is that of the network. "centres" puts a `centres.CentreClassifier` in its place.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and the remedy.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: give at least 2")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape={image_shape}: give (channels, height, width)")
    if name.startswith(robustbench_names.PREFIX):
        entry = robustbench_names.resolve(name, num_classes)
        given = {"activation": None if activation == "relu" else activation, "mean": mean, "std": std}
        if twice := ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None):
            raise ValueError(f"{twice}: {name} says its own: leave it out, or name the network, {entry.network}")
        mean, std = entry.normalisation or (None, None)
        return create(entry.network, num_classes, image_shape, mean=mean, std=std, classifier=classifier)
    model = _create(name, num_classes, image_shape)
    if activation != "relu":
        replace_relus(model, name, activation)
    if lookup("classifier", classifier, {"linear": False, "centres": True}):
        put_centres(model, name, num_classes)
    network = model.get_submodule("model") if name.startswith(("timm:", "torchvision:")) else model
    made = (full_name(name, image_shape), activation, image_shape, num_classes)  # what a run's config is compared with
    network.made_as = made  # type: ignore[assignment]
    if mean is None and std is None:
        return model
    if mean is None or std is None:
        raise ValueError(f"mean={mean}, std={std}: give both one number a channel ({image_shape[0]}), for images in [0, 1]")
    return wrap(network, mean, std, channels=image_shape[0])


def full_name(name: str, image_shape: ImageShape) -> str:
    """`name` with the variant that it leaves open, which may depend on the images: "resnet-18" -> "resnet-18/cifar".

    timm's are without the tag of pretrained weights, which leaves the network as it is.
    """
    if name.startswith("timm:"):
        return name.partition(".")[0]
    for family in FAMILIES:
        if family.variant and "/" not in name and family.pattern.fullmatch(name):
            return f"{name}/{family.variant if isinstance(family.variant, str) else family.variant(image_shape)}"
    return name


def _create(name: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    if name.startswith("timm:"):
        return timm_model(name.removeprefix("timm:"), num_classes, image_shape)
    if name.startswith("torchvision:"):
        return torchvision_model(name.removeprefix("torchvision:"), num_classes, image_shape)
    if ":" in name:
        return own_model(name, num_classes)
    for family in FAMILIES:
        if found := family.pattern.fullmatch(name):
            settings = {key: int(v) if v.isdigit() else v for key, v in found.groupdict().items() if v is not None}
            return family.make(num_classes=num_classes, image_shape=image_shape, **settings)
    usages = ", ".join(family.usage for family in FAMILIES)
    hint = did_you_mean(name, NAMES)
    raise ValueError(f"name={name!r}: there is no such model: {hint}give {usages}, {EXTERNAL}")
