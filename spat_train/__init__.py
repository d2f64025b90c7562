"""Adversarial training and evaluation of image classifiers. What follows is the library behind the `spat-train` command.

    import spat_train

    result = spat_train.train(spat_train.Config(data="cifar10", model="resnet-18", method="trades", alpha=0.1))
    evaluation = spat_train.evaluate(result.model, (x, y), "fgsm,pgd-20,autoattack", eps=8 / 255)

    model = spat_train.create_model("wrn-28-10")
    spat_train.load_checkpoint(model, "weights.pt")  # ours, RobustBench's, those of TRADES, MART, RST, ...
    model, config = spat_train.load_model("runs/my-run", spat_train.load_data("cifar10"))
    spat_train.export("runs/my-run", "exported")  # for the Hugging Face Hub, with a model card
    model = spat_train.from_folder("exported")

Names are imported when they are used: `import spat_train` is cheap, and needs none of the packages of the extra "train".
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models
    from .config import Config
    from .data.datasets import load as load_data
    from .evaluation.evaluate import evaluate
    from .evaluation.result import Evaluation
    from .models.checkpoints import load_checkpoint, load_model
    from .models.hub import from_folder, from_pretrained
    from .models.registry import create as create_model
    from .sharing.export import export
    from .training.trainer import Result, train

__all__ = [
    "Config", "Evaluation", "Result", "create_model", "evaluate", "export", "from_folder", "from_pretrained", "load_checkpoint",
    "load_data", "load_model", "models", "train",
]  # fmt: skip

_PLACES = {
    "Config": "config:Config", "train": "training.trainer:train", "Result": "training.trainer:Result",
    "evaluate": "evaluation.evaluate:evaluate", "Evaluation": "evaluation.result:Evaluation",
    "create_model": "models.registry:create", "load_model": "models.checkpoints:load_model",
    "load_checkpoint": "models.checkpoints:load_checkpoint", "load_data": "data.datasets:load",
    "export": "sharing.export:export", "from_folder": "models.hub:from_folder",
    "from_pretrained": "models.hub:from_pretrained",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "models":
        return import_module(".models", __name__)
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
