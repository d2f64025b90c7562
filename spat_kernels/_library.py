"""The `spat` operator library: schemas, references, and which implementation serves which device.

Every op is declared here in Python (schema, reference, fake) before any compiled code exists, then served by the best that is
present: C++ at the CPU key, CUDA C++ at the CUDA key where nvcc built it, else Triton, else the reference.

`SPAT_KERNELS_BACKEND` forces one, for tests and benchmarks: `compiled` (C++ and CUDA, or an error), `triton` (on CPU tensors too
when TRITON_INTERPRET=1) or `reference`. The default is `auto`.
"""

import functools
import importlib
import importlib.util
import itertools
import os

import torch
import triton

BACKENDS = ("auto", "compiled", "triton", "reference")
BACKEND = os.environ.get("SPAT_KERNELS_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ImportError(f"SPAT_KERNELS_BACKEND={BACKEND!r}: choose one of {', '.join(BACKENDS)}")

library = torch.library.Library("spat", "DEF")
# torch's own fallbacks at these keys call an op on copies, and crash where it writes.
REFUSED = ("Negative", "Conjugate", "ZeroTensor", "AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA")
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


def _refusal(name: str, t: torch.Tensor, first: torch.Tensor) -> str | None:
    """Why no kernel takes the tensor `t`, the argument `name`; None for an ordinary tensor on the device of `first`."""
    if t.layout != torch.strided or t.is_nested:
        return f"{name} must be a dense tensor, got {'a nested one' if t.is_nested else t.layout}"
    if t.is_neg() or t.is_conj():
        return f"{name} is a lazily negated or conjugated view: give {name}.resolve_neg().resolve_conj()"
    if torch._is_zerotensor(t):
        return f"{name} is a ZeroTensor: give {name}.clone()"
    if t.device != first.device:
        return f"{name} is on another device than the first argument, {t.device} instead of {first.device}"
    return None


def _memory(name: str, t: torch.Tensor) -> tuple[int, int]:
    """Where the dense `t` begins and ends. Views and storages that are too short for it are refused."""
    if t.numel() == 0:
        return 0, 0
    size = t.numel() * t.itemsize
    if t.storage_offset() * t.itemsize + size > t.untyped_storage().nbytes():
        raise RuntimeError(
            f"{name} has fewer elements in memory than in its shape: expanded tensors, and those whose storage was resized, "
            "must be cloned"
        )
    return t.data_ptr(), t.data_ptr() + size


class _Gate:
    """What is checked of the arguments of every op: kinds, devices, and that no result overlaps another argument in memory.

    bindings.cpp does so for compiled kernels. `shared` names the images whose memory a result may be.
    """

    def __init__(self, name: str, shared: str = ""):
        arguments = getattr(torch.ops.spat, name).default._schema.arguments
        self.names = [argument.name for argument in arguments]
        self.written = {a.name for a in arguments if a.alias_info and a.alias_info.is_write}
        self.shared = set(shared.split())

    def tensors(self, args, kwargs) -> dict[str, torch.Tensor]:
        """The tensors of a call by name, all of a kind that kernels take."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        first = next(iter(tensors.values()))
        if refusal := next(filter(None, (_refusal(name, t, first) for name, t in tensors.items())), None):
            raise RuntimeError(refusal)
        return tensors

    def refuse(self, *args, **kwargs) -> None:
        """For tensors that no kernel takes, and those without data."""
        self.tensors(args, kwargs)

    def before(self, kernel):
        """`kernel` behind all checks."""

        @functools.wraps(kernel)
        def checked(*args, **kwargs):
            memory = {name: _memory(name, t) for name, t in self.tensors(args, kwargs).items()}
            for result, other in itertools.permutations(memory, 2):
                (begin, end), (first, last) = memory[result], memory[other]
                in_place = {result, other} <= self.shared and other not in self.written and (begin, end) == (first, last)
                if result in self.written and begin < last and first < end and not in_place:
                    raise RuntimeError(f"{result} overlaps {other} in memory: clone one of them")
            with torch.no_grad():
                kernel(*args, **kwargs)

        return checked


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
