"""Networks from elsewhere: timm's, torchvision's, and what a factory in any importable module makes."""

import contextlib
import importlib
import inspect
import os
import sys
from types import ModuleType

from torch import nn

from ..errors import did_you_mean, first_line
from .wrapping import wrap

PREFIXES = ("timm:", "torchvision:", "robustbench:")  # names with a colon that do not name the user's code


def is_code(name: str) -> bool:
    """Whether `name` is package.module:factory, which runs the user's code."""
    return ":" in name and not name.startswith(PREFIXES)


def timm_model(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """timm's model `name`, not pretrained, after a `Normalize` with the numbers of its own configuration."""
    timm = import_package("timm", f"timm:{name}")
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise ValueError(f"name='timm:{name}': timm {timm.__version__} has no such model: {hint}see timm.list_models()")
    channels, *size = image_shape
    try:
        # Models with position embeddings and the like need the size of the images.
        img_size = {"img_size": tuple(size)} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        model = timm.create_model(name, num_classes=num_classes, in_chans=channels, **img_size)
    except Exception as error:
        raise ValueError(
            f"name='timm:{name}': timm cannot make it for num_classes={num_classes}, image_shape={image_shape} "
            f"({first_line(error)}): give another model"
        ) from error
    mean, std = (list(model.default_cfg[key]) for key in ("mean", "std"))
    if len(mean) != channels:  # grey images and the like: the average channel
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    return wrap(model, mean, std)


def torchvision_model(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's classifier `name`, not pretrained, after a `Normalize` with the numbers of its public weights."""
    full = f"torchvision:{name}"
    models = import_package("torchvision", full).models
    if name not in (known := models.list_models(module=models)):
        raise ValueError(f"name={full!r}: torchvision has no such model: {did_you_mean(name, known)}see torchvision.models")
    channels, height, width = image_shape
    if channels != 3:
        raise ValueError(f"name={full!r}: it is for 3 channels, image_shape={image_shape}: give timm:NAME, which takes others")
    if name in ("googlenet", "inception_v3"):
        what = "it returns several logits in training, and its public weights read images that it normalises again"
        raise ValueError(f"name={full!r}: {what}: give package.module:factory")
    # Models with position embeddings need the size of the images.
    image_size = {"image_size": height} if name.startswith("vit_") else {}
    try:
        if image_size and height != width:
            raise ValueError("its images are square")
        model = models.get_model(name, weights=None, num_classes=num_classes, **image_size)
    except Exception as error:
        raise ValueError(
            f"name={full!r}: torchvision cannot make it for num_classes={num_classes}, image_shape={image_shape} "
            f"({first_line(error)}): give another model"
        ) from error
    preset = next(iter(models.get_model_weights(name))).transforms()
    return wrap(model, preset.mean, preset.std)


def import_own(name: str) -> ModuleType | None:
    """The module of "package.module:factory", which may register losses; None for other names."""
    if not is_code(name):
        return None
    module_name = name.partition(":")[0]
    with _working_directory_importable():
        try:
            return importlib.import_module(module_name)
        except Exception as error:  # whatever a module's own code raises
            raise ValueError(
                f"name={name!r}: {module_name!r} cannot be imported ({first_line(error)}): "
                "give package.module:factory, installed or in the current directory"
            ) from error


def own_model(name: str, num_classes: int) -> nn.Module:
    """What factory(num_classes=K) of "package.module:factory" returns; errors inside the factory are its own."""
    module, (module_name, _, attribute) = import_own(name), name.partition(":")
    with _working_directory_importable():
        if not callable(factory := getattr(module, attribute, None)):
            public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise ValueError(
                f"name={name!r}: {module_name} has no function or class {attribute!r}: "
                f"{did_you_mean(attribute, public)}give package.module:factory"
            )
        try:
            inspect.signature(factory).bind(num_classes=num_classes)
        except TypeError as error:
            raise ValueError(
                f"name={name!r}: {attribute} cannot be called as {attribute}(num_classes={num_classes}) ({error}): "
                "give it the parameter num_classes, and the others defaults"
            ) from error
        except ValueError:  # no signature to look at
            pass
        model = factory(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"name={name!r}: {attribute} returns {type(model).__name__}: return a torch.nn.Module")
    return model


@contextlib.contextmanager
def _working_directory_importable():
    """As under `python -m`, for as long as this lasts."""
    directory = os.getcwd()
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have removed it
            sys.path.remove(directory)


def import_package(package: str, name: str) -> ModuleType:
    """Import an optional package that the model `name` needs; ValueError where that fails."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # builds for another torch fail in many ways
        raise ValueError(
            f"name={name!r}: it needs {package}, which cannot be imported ({first_line(error)}): pip install {package}"
        ) from error
