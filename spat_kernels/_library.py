"""The `spat` operator library: schemas, references, and which implementation serves which device.

Every op is declared here in Python (schema, reference, fake) before any compiled code exists, then served by the best that is
present: C++ at the CPU key, CUDA C++ at the CUDA key where nvcc built it, else Triton, else the reference.

`SPAT_KERNELS_BACKEND` forces one, for tests and benchmarks: `compiled` (C++, and CUDA where nvcc built it, or an error), `triton`
(on CPU tensors too when TRITON_INTERPRET=1) or `reference`. The default is `auto`.
"""

import functools
import importlib
import importlib.util
import math
import os
from typing import NoReturn

import torch
import triton

BACKENDS = ("auto", "compiled", "triton", "reference")
BACKEND = os.environ.get("SPAT_KERNELS_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ImportError(f"SPAT_KERNELS_BACKEND={BACKEND!r}: choose one of {', '.join(BACKENDS)}")

library = torch.library.Library("spat", "DEF")
# torch's own fallbacks at these keys call an op on copies, and crash where it writes.
REFUSED = ("Negative", "Conjugate", "ZeroTensor", "AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA")
FLOAT32_MAX = torch.finfo(torch.float32).max
served: dict[str, dict[str, str]] = {}  # op name -> dispatch key -> what serves it


def _load_compiled():
    """The extension module; None where SPAT_KERNELS_BACKEND does without. A missing or broken one raises."""
    if BACKEND in ("triton", "reference"):
        return None
    if importlib.util.find_spec("spat_kernels._C") is None:
        raise ImportError(
            f"{os.path.dirname(__file__)} is a checkout, not the installed spat_kernels, and holds no compiled extension: "
            "leave its folder, or run `pip install -e .` in it (SPAT_KERNELS_BACKEND=reference runs the slow references)",
            name="spat_kernels._C",
        )
    return importlib.import_module("spat_kernels._C")


# Imported before the ops are declared: torch keeps kernels for ops that come later.
compiled = _load_compiled()
cuda_built = compiled.CUDA if compiled else ""
_triton_keys = []
if not cuda_built and BACKEND in ("auto", "triton"):
    _triton_keys.append("CUDA")
if BACKEND == "triton" and triton.knobs.runtime.interpret:
    _triton_keys.append("CPU")


def _refuse(name: str, why: str) -> NoReturn:
    raise RuntimeError(f"{name} {why}")


def _check_kind(name: str, t: torch.Tensor, device: torch.device) -> None:
    """An ordinary tensor on `device`, as kernels take it."""
    if t.layout != torch.strided or t.is_nested:
        _refuse(name, f"must be a dense tensor, got {'a nested one' if t.is_nested else t.layout}")
    if t.is_neg() or t.is_conj():
        _refuse(name, f"is a lazily negated or conjugated view: give {name}.resolve_neg().resolve_conj()")
    if torch._is_zerotensor(t):
        _refuse(name, f"is a ZeroTensor: give {name}.clone()")
    if t.device != device:
        _refuse(name, f"is on another device than the first argument, {t.device} instead of {device}")


def _memory(name: str, t: torch.Tensor) -> tuple[int, int]:
    """Where the dense `t` begins and ends. Views and storages that are too short for it are refused."""
    if not (numel := t.numel()):
        return 0, 0
    if (t.storage_offset() + numel) * t.itemsize > t.untyped_storage().nbytes():
        why = "expanded tensors, and those whose storage was resized, must be cloned"
        _refuse(name, f"has fewer elements in memory than in its shape: {why}")
    begin = t.data_ptr()
    return begin, begin + numel * t.itemsize


def _as_float32(value):
    """A number that float32 does not reach is infinite in compiled code. torch raises an error that names no argument."""
    return math.copysign(math.inf, value) if isinstance(value, float) and abs(value) > FLOAT32_MAX else value


class _Gate:
    """What is checked of the arguments of every op: kinds, devices, and that no result overlaps another argument in memory.

    bindings.cpp does so for compiled kernels. `shared` names the images whose memory a result may be.
    """

    def __init__(self, name: str, shared: str = ""):
        arguments = getattr(torch.ops.spat, name).default._schema.arguments
        self.names = [argument.name for argument in arguments]
        self.required = [a.name for a in arguments if isinstance(a.type, torch.TensorType)]
        self.written = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
        self.shared = shared.split()

    def tensors(self, args, kwargs) -> dict[str, torch.Tensor]:
        """The tensors of a call by name, all of a kind that kernels take."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        for name in self.required:
            if given[name] is None:
                _refuse(name, "must be a tensor, got None")
        device = given[self.names[0]].device
        tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        for name, t in tensors.items():
            _check_kind(name, t, device)
        return tensors

    def refuse(self, *args, **kwargs) -> None:
        """For tensors that no kernel takes, and those without data."""
        self.tensors(args, kwargs)

    def before(self, kernel):
        """`kernel` behind all checks."""

        @functools.wraps(kernel)
        def checked(*args):
            tensors = self.tensors(args, {})
            memory = {name: _memory(name, t) for name, t in tensors.items()}
            for result in self.written:
                begin, end = memory.get(result, (0, 0))
                for other, (first, last) in memory.items():
                    if begin < last and first < end and other != result and not self.in_place(result, other, memory):
                        _refuse(result, f"overlaps {other} in memory: clone one of them")
            wide = tensors[self.names[0]].dtype == torch.float64
            with torch.no_grad():
                kernel(*(args if wide else map(_as_float32, args)))

        return checked

    def in_place(self, result: str, other: str, memory: dict) -> bool:
        """Whether `result` may be the memory that `other` is."""
        both = result in self.shared and other in self.shared and other not in self.written
        return both and memory[result] == memory[other]


def guard(name: str, shared: str = "") -> _Gate:
    """Refusals for an op that returns nothing, where torch has no kernel of ours to call or would call it on a copy.

    On tensors without data it does nothing else.
    """
    gate = _Gate(name, shared)
    torch.library.register_fake(f"spat::{name}", gate.refuse, lib=library)
    for key in REFUSED:
        library.impl(name, gate.refuse, key)
    return gate


def define(schema: str, reference, triton_launcher, shared: str = ""):
    """Declare the op `schema` and return its overload. It writes into its arguments and returns nothing.

    shared: the images, by name, whose memory may be that of a result.
    """
    name = schema.split("(")[0]
    library.define(f"{schema} -> ()")
    gate = guard(name, shared)
    library.impl(name, gate.before(reference), "CompositeExplicitAutograd")
    served[name] = {"CPU": "reference", "CUDA": "reference"}
    if compiled:
        served[name]["CPU"] = "C++"
    if cuda_built:
        served[name]["CUDA"] = "CUDA C++"
    for key in _triton_keys:
        library.impl(name, gate.before(triton_launcher), key)
        served[name][key] = "Triton" if key == "CUDA" else "Triton (interpreted)"
    return getattr(torch.ops.spat, name).default


def config() -> dict:
    """What was built, for which GPUs, and what serves each op in this process.

    Returns:
        dict: `version`; `torch`; `backend` (SPAT_KERNELS_BACKEND); `compiled` (is the C++ extension in use); `cuda` (toolkit and
        architectures of the CUDA kernels, "" without); `gpu` (the current device, or None); `ops` (op name to what serves CPU
        and CUDA tensors).
    """
    from importlib.metadata import version

    return {
        "version": version("spat_kernels"),
        "torch": torch.__version__,
        "backend": BACKEND,
        "compiled": compiled is not None,
        "cuda": cuda_built,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ops": {name: dict(keys) for name, keys in sorted(served.items())},
    }
