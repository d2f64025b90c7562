"""Scripts of other libraries, as they are and with our import in its place: `python -m benchmarks.drop_in --help`.

    python -m benchmarks.drop_in tests/assets/wrn-10-2-madry.pt --network wrn-10-2 --data cifar10.npz --out drop_in.json

Batch by batch, in turns, so that whatever else the machine does hits both alike. Most attacks draw random numbers, which differ:
an image may be broken by the one and not by the other. What counts is how many are. A library that is not installed is left out.
AutoAttack's reference package must be on PYTHONPATH.
"""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import tyro
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.agreement import given
from benchmarks.tables import environment, markdown

Script = Callable[[ModuleType, nn.Module, Tensor, Tensor, float], Tensor]  # library, model, x, y, eps -> adversarial images
MODULES = {  # where a script finds the attacks: of the library, and of ours
    "torchattacks": "torchattacks",
    "foolbox": "foolbox.attacks",
    "art": "art.attacks.evasion",
    "adv_lib": "adv_lib.attacks",
    "autoattack": "autoattack",
}


def _foolbox(attack: str, **options) -> Script:
    def script(library, model, x, y, eps):
        fmodel = import_module("foolbox").PyTorchModel(model, bounds=(0, 1))
        return getattr(library, attack)(**options)(fmodel, x, y, epsilons=eps)[1]

    return script


def _art(attack: str, **options) -> Script:
    def script(library, model, x, y, eps):
        classes = model(x[:1]).shape[1]
        wrapper = import_module("art.estimators.classification").PyTorchClassifier
        classifier = wrapper(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0, 1))
        made = getattr(library, attack)(classifier, eps=eps, eps_step=eps / 4, batch_size=len(x), **options)
        return torch.from_numpy(made.generate(x.numpy(), y.numpy()))

    return script


def _torchattacks(attack: str, **options) -> Script:
    return lambda library, model, x, y, eps: getattr(library, attack)(model, **{"eps": eps} | options)(x, y)


def _adv_lib(library, model, x, y, eps):
    return library.pgd_linf(model, x, y, eps)


def _autoattack(library, model, x, y, eps):
    adversary = library.AutoAttack(model, norm="Linf", eps=eps, version="standard", device="cpu", seed=0, verbose=False)
    return adversary.run_standard_evaluation(x, y, bs=len(x))


SCRIPTS: dict[tuple[str, str], Script] = {
    ("torchattacks", "FGSM"): _torchattacks("FGSM"),
    ("torchattacks", "PGD"): _torchattacks("PGD"),
    ("torchattacks", "PGDL2"): _torchattacks("PGDL2", eps=0.5),
    ("torchattacks", "TPGD"): _torchattacks("TPGD"),
    ("torchattacks", "APGD"): _torchattacks("APGD"),
    ("torchattacks", "APGDT"): _torchattacks("APGDT"),
    ("torchattacks", "FAB"): _torchattacks("FAB", multi_targeted=True),
    ("torchattacks", "Square"): _torchattacks("Square"),
    ("torchattacks", "AutoAttack"): _torchattacks("AutoAttack"),
    ("foolbox", "LinfPGD"): _foolbox("LinfPGD"),
    ("foolbox", "L2PGD"): _foolbox("L2PGD"),
    ("foolbox", "LinfFastGradientAttack"): _foolbox("LinfFastGradientAttack"),
    ("art", "ProjectedGradientDescent"): _art("ProjectedGradientDescent", max_iter=10, num_random_init=1, verbose=False),
    ("art", "FastGradientMethod"): _art("FastGradientMethod"),
    ("adv_lib", "pgd_linf"): _adv_lib,
    ("autoattack", "AutoAttack, standard"): _autoattack,
}


@dataclass
class Arguments:
    """Scripts of other libraries, as they are and with our import in its place."""

    model: tyro.conf.Positional[Path]
    """The folder of a run, or a checkpoint."""
    data: Path
    """The data set as an .npz file, of which test images are attacked."""
    out: Path
    """JSON file to write."""
    images: int = 1000
    """Maximum number of test images, the first ones."""
    batch_size: int = 250
    """Images in a call."""
    libraries: tuple[str, ...] = tuple(MODULES)
    """Whose scripts."""
    network: str | None = None
    """The architecture of a checkpoint, which is attacked at eps 8/255."""


def installed(names: tuple[str, ...]) -> Iterator[tuple[str, ModuleType, ModuleType]]:
    """The name, the module of the library and ours in its place, of those that are installed."""
    for name in names:
        try:
            theirs = import_module(MODULES[name])
        except ImportError as error:
            print(f"{name} is left out: {error}")
        else:
            yield name, theirs, import_module(f"spat_kernels.compat.{name}")


def compare(script: Script, libraries: list[ModuleType], model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int) -> dict:
    """`script` with each of the libraries, ours first: accuracies in percent, agreement, and seconds."""
    seconds, right, draw = [0.0, 0.0], [[], []], random.Random(0)  # type: ignore[var-annotated]
    for library in libraries:  # what is done once, such as our plan of the model
        script(library, model, x[:2], y[:2], eps)
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        for which in draw.sample(range(2), 2):
            begin = time.perf_counter()
            found = script(libraries[which], model, images, labels, eps)
            seconds[which] += time.perf_counter() - begin
            with torch.no_grad():
                right[which].append(model(found).argmax(1) == labels)
    ours, theirs = (torch.cat(flags) for flags in right)
    accuracy = [100 * float(flags.double().mean()) for flags in (ours, theirs)]
    return {"accuracy": accuracy, "agree": 100 * float((ours == theirs).double().mean()), "seconds": seconds}


def table(results: dict) -> str:
    """Ours beside theirs."""
    return markdown(
        results, results["drop_in"],
        "library | attack || accuracy, %: ours | theirs | images that agree, % | s: ours | theirs | faster",
        "{library} {version} | {attack} || {accuracy[0]:.1f} | {accuracy[1]:.1f} | {agree:.1f} | "
        "{seconds[0]:.2f} | {seconds[1]:.2f} | {faster:.2f}x",
        "{settings[model]} ({settings[network]}), fp32, eps {settings[eps]:.4g} (L2: as in the scripts), {settings[images]:,} "
        "images, {settings[clean]:.1f} % correct; batches of {settings[batch_size]}.", environment,
        faster=lambda r: r["seconds"][1] / r["seconds"][0],
    )  # fmt: skip


def main(args: Arguments) -> None:
    torch.set_num_threads(2)
    name, network, model, eps, x, y = given(args.model, args.data, args.images, args.network)
    with torch.no_grad():
        clean = 100 * float((model(x).argmax(1) == y).double().mean())
    settings = {"model": name, "network": network, "eps": eps, "images": len(x), "batch_size": args.batch_size, "clean": clean}
    results = measure.begun("drop_in", "cpu", settings=settings, drop_in=[])
    for library, theirs, ours in installed(args.libraries):
        version = getattr(import_module(MODULES[library].split(".")[0]), "__version__", "")
        for (owner, attack), script in SCRIPTS.items():
            if owner == library:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # signs of masked gradients are looked for in every batch
                    found = compare(script, [ours, theirs], model, x, y, eps, args.batch_size)
                results["drop_in"].append({"library": library, "version": version, "attack": attack} | found)
                print(results["drop_in"][-1], flush=True)
                measure.write(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
