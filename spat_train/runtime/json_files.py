"""JSON files that are read back, each with a digest of its content, by which a flipped bit or an edit is noticed.

Who edits one on purpose removes the digest. It is no signature: anybody can make it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import InputError

MOST = 2**28  # bytes of a file; those of evaluations have a line for each image
DIGEST = "digest"


def digest(content: Any) -> str:
    """A short hash of a value as JSON has it, whatever the layout of the file and the order of the entries."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def with_digest(content: dict[str, Any]) -> dict[str, Any]:
    """`content` as it is read back from JSON, and its digest."""
    content = json.loads(json.dumps(content))
    return content | {DIGEST: digest(content)}


def to_bytes(content: dict[str, Any]) -> bytes:
    """A file of `content`, with its digest."""
    return (json.dumps(with_digest(content), indent=1) + "\n").encode()


def checked(content: Any, file: Path) -> Any:
    """`content`, read from `file`, without its digest, which files of earlier versions and of others lack.

    Raises:
        InputError: it was altered since it was written.
    """
    if not isinstance(content, dict) or DIGEST not in content:
        return content
    rest = {name: value for name, value in content.items() if name != DIGEST}
    if content[DIGEST] != digest(rest):
        remedy = f'restore it, or, if you changed it on purpose, remove "{DIGEST}" from it'
        raise InputError(f"{file}: it was altered since it was written (its digest differs): {remedy}")
    return rest


def read(file: Path) -> Any:
    """What is in `file`, `checked`. Raises InputError where it cannot be read, too."""
    try:
        if file.stat().st_size > MOST or not file.is_file():
            raise InputError(f"{file}: it is no file of less than {MOST:,} bytes, as runs write them: restore it")
        content = json.loads(file.read_bytes())
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}): restore it") from error
    return checked(content, file)
