"""An evaluation on disk, as far as it got: a line of samples.jsonl for each attack on each batch, and settings.json."""

import base64
import hashlib
import io
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime import atomic_write
from ..runtime.atomic_write import SaveError

FORMAT = "spat_train evaluation 2"
LATER = ("eps_l1",)  # settings that folders of earlier versions lack: no attack in them depends on these
DIFFER = {  # settings whose values say nothing to a reader
    "format": "another version made it", "weights": "the model differs, in weights, architecture or normalisation",
    "source_weights": "the source differs, in weights, architecture or normalisation",
    "data": "the images or labels of --data differ", "rows": "the chosen images differ",
    "memory_format": "the memory format differs",
}  # fmt: skip


class Samples:
    """The records of an evaluation, in `folder`, or in memory alone where it is None.

    A record is appended and flushed at once; what follows the last whole line, of a killed evaluation, is dropped.

    Args:
        settings: all that a record depends on, except its attack.
        attacks: what each attack is, by name; later evaluations may add others.

    Raises:
        InputError: the folder holds an evaluation with other settings, or something else.
    """

    def __init__(self, folder: Path | None, settings: dict, attacks: dict[str, str]):
        self.records: dict[tuple[str, int], dict] = {}
        self.folder, self.attacks = folder, attacks
        self.file: BinaryIO | None = None
        if folder is None:
            return
        self.path = folder / "samples.jsonl"
        self.attacks = self._check(folder / "settings.json", {"format": FORMAT, **settings}, attacks) | attacks
        content = {"settings": {"format": FORMAT, **settings}, "attacks": self.attacks}
        atomic_write.write(folder / "settings.json", (json.dumps(content, indent=1) + "\n").encode())
        try:
            self.file = open(self.path, "a+b")  # noqa: SIM115  (until close)
            self._read(self.file)
        except OSError as error:
            raise SaveError(f"cannot write {self.path} ({error.strerror}): make room, or choose another --out") from error

    def _check(self, path: Path, settings: dict, attacks: dict[str, str]) -> dict[str, str]:
        """The attacks that are known there."""
        if not path.exists():
            if self.path.exists():
                raise InputError(f"--out {path.parent}: it holds samples.jsonl without {path.name}: choose another --out")
            return {}
        try:
            content = json.loads(path.read_bytes())
            before, known = content["settings"], content["attacks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({type(error).__name__}): choose another --out") from error
        before = {name: settings[name] for name in LATER if name in settings} | before
        changed = changes(before, settings)
        changed += [f"attack {n} was {known[n]}, now {what}" for n, what in attacks.items() if known.get(n, what) != what]
        if changed:
            raise InputError(
                f"--out {path.parent}: it holds another evaluation ({'; '.join(changed)}): give the same, or choose another --out"
            )
        return known

    def _read(self, file: BinaryIO) -> None:
        file.seek(0)
        whole = 0
        for line in file.read().split(b"\n")[:-1]:
            try:
                record = json.loads(line)
            except ValueError:
                break
            whole += len(line) + 1
            self.records[record["attack"], record["batch"]] = record
        file.truncate(whole)

    def finished(self, batches: int) -> dict[str, str]:
        """Those of `attacks` that all batches have a record of."""
        return {name: spec for name, spec in self.attacks.items() if all((name, k) in self.records for k in range(batches))}

    def add(self, record: dict) -> None:
        """Keep the record of `record["attack"]` on `record["batch"]`."""
        self.records[record["attack"], record["batch"]] = record
        if self.file is None:
            return
        try:
            self.file.write((json.dumps(record) + "\n").encode())
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise SaveError(f"cannot write {self.path} ({error.strerror}): make room, and give the same command again") from error

    def save(self, attack: str, batch: int, **arrays: Tensor) -> None:
        """Write images/ATTACK/BATCH.npz; before the record, so that what has a record has its images."""
        content = io.BytesIO()
        copies = {name: np.ascontiguousarray(t.cpu().numpy()) for name, t in arrays.items()}
        np.savez(content, **copies)  # type: ignore[arg-type]  # NumPy's hints take one of them for allow_pickle
        assert self.folder is not None  # else there is nothing to save for
        folder = self.folder / "images" / file_name(attack)
        atomic_write.make_folder(folder)
        atomic_write.write(folder / f"{batch:05}.npz", content.getbuffer())

    def close(self) -> None:
        """Close the file; without any record remove it, so that an evaluation with other settings may follow."""
        if self.file:
            with suppress(OSError):  # a line that could not be written, which `add` has reported
                self.file.close()
            if not self.records:
                self.path.unlink(missing_ok=True)
                self.path.with_name("settings.json").unlink(missing_ok=True)


def changes(before: dict, now: dict) -> list[str]:
    """How settings differ, by the options of `spat-train evaluate`."""
    names = [name for name in now | before if before.get(name) != now.get(name)]
    if {"images", "seed", "data"} & set(names):  # which images are chosen follows from these
        names = [name for name in names if name != "rows"]
    found = []
    for name in names:
        was, is_now = (f"{255 * s[name]:.6g}" if name == "eps" and name in s else str(s.get(name)) for s in (before, now))
        option = "limit" if name == "images" else name.replace("_", "-")
        found.append(DIFFER.get(name) or f"--{option} was {was}, now {is_now}")
    return found


def weights_hash(model: nn.Module) -> str:
    """A short hash of all parameters and buffers with their names, and of the modules with the settings that they print: an
    activation, a stride or a dilation leaves no trace in the weights."""
    kinds = " ".join(f"{name} {type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules())
    # Without the addresses of functions and the devices of parameters in lists, which are not alike everywhere.
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+| \((cuda|xpu|mps)[^)]*\)", "", kinds).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of the values."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def file_name(attack: str) -> str:
    """The name of an attack, with _ for what file systems do not take."""
    return re.sub(r"[^\w.+=-]", "_", attack)


def encoded(image: Tensor) -> dict:
    """uint8 [H, W, C] for JSON."""
    return {"shape": list(image.shape), "bytes": base64.b64encode(image.contiguous().numpy().tobytes()).decode()}


def decoded(image: dict) -> Tensor:
    """What `encoded` was given."""
    return torch.frombuffer(bytearray(base64.b64decode(image["bytes"])), dtype=torch.uint8).view(image["shape"])
