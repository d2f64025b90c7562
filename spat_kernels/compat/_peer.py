"""What the adapters share: optional packages, and settings that the other library does not have."""

import importlib
from collections.abc import Iterable
from types import ModuleType


def import_peer(module: str, package: str) -> ModuleType:
    """The `module` of a library that an adapter builds on; `package` is its name for pip.

    Raises:
        ImportError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").split(".")[0] == module.split(".")[0]:
            what = f"it adapts attacks to {package}, which is not installed: pip install {package}"
        else:
            what = f"{package} cannot be imported ({error}): mend its installation"
        raise ImportError(f"spat_kernels.compat.{module.split('.')[0]}: {what}", name=error.name) from error


def check_extras(name: str, settings: Iterable[str], known: type) -> None:
    """Raise TypeError unless the names in `settings` are among those of `known`, a TypedDict."""
    ours = known.__annotations__
    for setting in settings:
        if setting not in ours:
            raise TypeError(f"{name}() got an unexpected keyword argument {setting!r}: ours beside its own are {', '.join(ours)}")
