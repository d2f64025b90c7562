"""The lines of samples.jsonl: what an attack did to a batch, with a digest by which altered lines are noticed."""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

EXAMPLES = 4  # images kept of each attack
LISTS = {"predicted": -1, "forwards": 0, "backwards": 0, "part": -1}  # an integer for each image, and the least one
COUNTS = "adversarial", "outside", "rounded"  # of images


@dataclass(frozen=True)
class Layout:
    """The form of the records of an evaluation.

    Attributes:
        settings: all that a record depends on, except its attack.
        classes: of the model.
        image_shape: (C, H, W).
    """

    settings: Mapping[str, Any]
    classes: int
    image_shape: tuple[int, int, int]

    @cached_property
    def longest(self) -> int:
        """Bytes that no line exceeds."""
        return 4096 + 128 * self.settings["batch_size"] + EXAMPLES * (256 + 2 * torch.Size(self.image_shape).numel())

    def digest(self, record: dict) -> str:
        """A short hash of the record and of the settings, so that a line of another evaluation is noticed too."""
        return hashlib.sha256(json.dumps([dict(self.settings), record]).encode()).hexdigest()[:16]

    def line(self, record: dict) -> bytes:
        return (json.dumps(record | {"digest": self.digest(record)}) + "\n").encode()

    def read(self, content: Any) -> dict:
        """The record in a line, whose JSON is `content`.

        Raises:
            ValueError: no evaluation with these settings wrote it.
        """
        if not isinstance(content, dict) or content.pop("digest", None) != self.digest(content):
            raise ValueError("it was altered, or is of another evaluation")
        if not self._fits(content):  # who writes a digest may write anything
            raise ValueError("no evaluation writes such a line")
        return content

    def _fits(self, record: dict) -> bool:
        attack, batch, examples = record.get("attack"), record.get("batch"), record.get("examples", [])
        size, images = self.settings["batch_size"], self.settings["images"]
        if not isinstance(attack, str) or not _whole(batch, 0, -(-images // size) - 1):
            return False
        count = min(size, images - batch * size)
        needed = {"predicted"} if attack == "clean" else {"predicted", "forwards", "backwards", "examples", *COUNTS}
        most = {"predicted": self.classes - 1}
        return (
            needed <= record.keys() <= {"attack", "batch", "examples", *LISTS, *COUNTS}
            and all(_integers(record[k], count, least, most.get(k, 2**31)) for k, least in LISTS.items() if k in record)
            and all(_whole(record[key], 0, count) for key in COUNTS if key in record)
            and isinstance(examples, list)
            and len(examples) <= EXAMPLES
            and all(self._is_example(each, batch * size, count) for each in examples)
        )

    def _is_example(self, example: Any, first: int, count: int) -> bool:
        channels, height, width = self.image_shape
        try:
            image = decoded(example["image"])
            return _whole(example["index"], first, first + count - 1) and list(image.shape) == [height, width, channels]
        except (TypeError, KeyError, ValueError, RuntimeError, binascii.Error):
            return False


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _integers(values: Any, count: int, least: int, most: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(_whole(value, least, most) for value in values)


def encoded(image: Tensor) -> dict:
    """uint8 [H, W, C] for JSON."""
    return {"shape": list(image.shape), "bytes": base64.b64encode(image.contiguous().numpy().tobytes()).decode()}


def decoded(image: dict) -> Tensor:
    """What `encoded` was given."""
    return torch.frombuffer(bytearray(base64.b64decode(image["bytes"])), dtype=torch.uint8).view(image["shape"])
