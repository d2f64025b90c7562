"""The lines of samples.jsonl: what an attack did to a batch, with a digest by which altered lines are noticed."""

import base64
import json
from typing import Any

import torch
from torch import Tensor

from ..runtime import json_files

EXAMPLES = 4  # images kept of each attack


def to_line(record: dict, settings: dict) -> bytes:
    """`record` as JSON. Its digest is of `settings` too, all that it depends on: a line of another evaluation is noticed."""
    return (json.dumps(record | {json_files.DIGEST: json_files.digest([settings, record])}) + "\n").encode()


def from_json(content: Any, settings: dict) -> dict | None:
    """The record in a line, whose JSON is `content`; None where no evaluation with these settings wrote it."""
    if not isinstance(content, dict) or content.pop(json_files.DIGEST, None) != json_files.digest([settings, content]):
        return None
    return content


def encoded(image: Tensor) -> dict:
    """uint8 [H, W, C] for JSON."""
    return {"shape": list(image.shape), "bytes": base64.b64encode(image.contiguous().numpy().tobytes()).decode()}


def decoded(image: dict) -> Tensor:
    """What `encoded` was given."""
    return torch.frombuffer(bytearray(base64.b64decode(image["bytes"])), dtype=torch.uint8).view(image["shape"])
