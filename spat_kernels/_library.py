"""The `spat` operator library: schemas, references, and which implementation serves which device.

Every op is declared here in Python (schema, reference, fake) before any compiled code exists, then served by the best that is
present: C++ at the CPU key, CUDA C++ at the CUDA key where nvcc built it, else Triton, else the reference.

`SPAT_KERNELS_BACKEND` forces one, for tests and benchmarks: `compiled` (C++ and CUDA, or an error), `triton` (on CPU tensors too
when TRITON_INTERPRET=1) or `reference`. The default is `auto`.
"""

import importlib
import importlib.util
import os

import torch
import triton

BACKENDS = ("auto", "compiled", "triton", "reference")
BACKEND = os.environ.get("SPAT_KERNELS_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ImportError(f"SPAT_KERNELS_BACKEND={BACKEND!r}: choose one of {', '.join(BACKENDS)}")

library = torch.library.Library("spat", "DEF")
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


def register_fake(name: str) -> None:
    """For an op that returns nothing: it also does nothing where tensors have no data."""
    torch.library.register_fake(f"spat::{name}", lambda *args, **kwargs: None, lib=library)


def define(schema: str, reference, triton_launcher):
    """Declare the op `schema` and return its overload. It writes into its arguments and returns nothing."""
    name = schema.split("(")[0]
    library.define(f"{schema} -> ()")
    library.impl(name, reference, "CompositeExplicitAutograd")
    register_fake(name)
    served[name] = {"CPU": "reference", "CUDA": "reference"}
    if compiled:
        served[name]["CPU"] = "C++"
    if cuda_built:
        served[name]["CUDA"] = "CUDA C++"
    for key in _triton_keys:
        library.impl(name, triton_launcher, key)
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
