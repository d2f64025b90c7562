"""The numbers of a model that are known from files, each checked to be about these very weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..evaluation.command import default_folder
from ..evaluation.record_log import weights_hash
from ..evaluation.report import FORMAT
from ..models.matching import same_tensor
from ..models.run_config import checkpoint_file
from ..models.weight_files import read_file, select
from ..runtime import json_files
from ..training.checkpoint import say


@dataclass(frozen=True)
class Results:
    """What is known of a model.

    Attributes:
        validation: the record by which its weights were chosen: epoch, clean and pgd accuracy in percent.
        epochs: that the run has finished.
        trained_with: versions and hardware, by `spat_train.training.checkpoint.arithmetic`.
        test, test_images: accuracy in percent by attack, from result.json, and the number of images.
        evaluation: the content of the evaluation.json of `spat-train evaluate`.
    """

    validation: dict[str, Any] | None = None
    epochs: int | None = None
    trained_with: dict[str, Any] | None = None
    test: dict[str, float] | None = None
    test_images: int = 0
    evaluation: dict[str, Any] | None = None


def results_of(path: Path, network: nn.Module, evaluation: Path | None) -> Results:
    """All that is known of `network`, the model in the run or checkpoint `path`.

    What is about other weights is left out, and a line on stderr says so.

    Args:
        evaluation: an evaluation.json, or the folder of one, which must be about these weights. None is that in its usual place,
            where there is one.

    Raises:
        InputError: a file cannot be read, or `evaluation` is about something else.
    """
    found: dict[str, Any] = {}
    file = checkpoint_file(path)
    content = read_file(file)
    if isinstance(content, dict) and isinstance(content.get("validation"), dict):
        found["validation"] = content["validation"]
    if file != path and (path / "last.pt").is_file():
        last = content if file.name == "last.pt" else read_file(path / "last.pt")
        tested = last["best"] if last["best"] is not None else select(last, "auto", path / "last.pt")
        same = same_state(select(content, "auto", file), tested)
        if same or file.name == "last.pt":
            found |= {"trained_with": last["arithmetic"], "epochs": last["progress"]["epoch"]}
        result = json_files.read(path / "result.json") if (path / "result.json").is_file() else None
        if result and same and result["checkpoint"] == last["id"]:
            found |= {"test": result["test"], "test_images": result["test_images"]}
        elif result:
            say(f"{path / 'result.json'} is left out of the card: it is not about the weights in {file}")
    elif file != path and (path / "result.json").is_file():
        say(f"{path / 'result.json'} is left out of the card: without last.pt it does not show which weights it is about")
    usual = default_folder(path, None) / "evaluation.json"
    if evaluation or usual.is_file():
        try:
            found["evaluation"] = _read_evaluation(evaluation or usual, network)
        except InputError as error:
            if evaluation:
                raise InputError(f"--evaluation: {error}") from error
            say(f"left out of the card: {error}")
    return Results(**found)


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_tensor(value, b[name]) for name, value in a.items())


def _read_evaluation(path: Path, network: nn.Module) -> dict[str, Any]:
    """The content of an evaluation.json, or of that in a folder, checked to be about `network`."""
    file = path / "evaluation.json" if path.is_dir() else path
    content = json_files.read(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{file}: it is no evaluation of this version: give the folder that spat-train evaluate wrote")
    if content["settings"]["weights"] != weights_hash(network):
        raise InputError(f"{file}: it is about another model, in weights, architecture or normalisation: evaluate this one")
    if content["settings"]["source_weights"]:
        raise InputError(f"{file}: its attacks were made on another model (black box): give one without --source")
    return content
