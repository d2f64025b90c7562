"""The tests of other libraries, on our attacks in the place of theirs: `python -m benchmarks.peer_tests --help`.

    python -m benchmarks.peer_tests --foolbox ../foolbox --art ../adversarial-robustness-toolbox --out peers.json

Each argument is a checkout, since packages leave their tests out. The tests in which an attack of ours takes part run twice: on
the library's own attacks, and on ours. This module is also the plugin of pytest that replaces them. What fails on both is not
about ours: other frameworks, files that are fetched from a network, versions of NumPy.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARY, WHOSE, REPORT = "PEER_TESTS_LIBRARY", "PEER_TESTS_WHOSE", "PEER_TESTS_REPORT"  # variables that the plugin reads


@dataclass(frozen=True)
class Peer:
    """A library's tests.

    Attributes:
        modules: where its attacks are looked up.
        names: those that we have.
        arguments: of pytest.
        empty: packages that the tests import and do not use on PyTorch.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    arguments: tuple[str, ...]
    empty: tuple[str, ...] = ()


_FOOLBOX = ("LinfProjectedGradientDescentAttack", "LinfBasicIterativeAttack", "LinfFastGradientAttack")
_FOOLBOX += ("L2ProjectedGradientDescentAttack", "L2BasicIterativeAttack", "L2FastGradientAttack")
_ART = {
    "ProjectedGradientDescent": "projected_gradient_descent.projected_gradient_descent",
    "ProjectedGradientDescentPyTorch": "projected_gradient_descent.projected_gradient_descent_pytorch",
    "BasicIterativeMethod": "iterative_method",
    "FastGradientMethod": "fast_gradient",
    "AutoAttack": "auto_attack",
}
_ART_TESTS = ("test_projected_gradient_descent.py", "test_iterative_method.py")
_ART_TESTS += ("evasion/test_fast_gradient.py", "evasion/test_auto_attack.py")
_ONLY_MINUTES = "tests/attacks/evasion/test_auto_attack.py::test_generate_parallel"
PEERS = {
    "torchattacks": Peer(
        ("torchattacks",),
        ("FGSM", "FFGSM", "BIM", "RFGSM", "PGD", "PGDL2", "TPGD", "APGD", "APGDT", "FAB", "Square", "AutoAttack"),
        ("code_coverage/test_atks.py",),
    ),
    "foolbox": Peer(
        ("foolbox.attacks",),
        (*_FOOLBOX, "LinfPGD", "L2PGD", "PGD", "FGSM", "FGM"),
        (
            "--backend",
            "pytorch",
            "--skipslow",
            *(f"tests/test_{name}.py" for name in ("attacks", "eot_wrapper", "attacks_raise")),
        ),
    ),
    "art": Peer(
        ("art.attacks.evasion", *(f"art.attacks.evasion.{home}" for home in _ART.values())),
        tuple(_ART),
        ("--framework=pytorch", *(f"tests/attacks/{path}" for path in _ART_TESTS), "--deselect", _ONLY_MINUTES),
        ("tensorflow", "keras", "keras.backend", "multiprocess"),
    ),
    "adv_lib": Peer(("adv_lib.attacks",), ("pgd_linf", "apgd", "apgd_targeted"), ("tests/test_attacks.py",), ("visdom",)),
}


# ---- the plugin


def _replace() -> None:
    """Put our attacks in the place of the library's, before its tests, and what configures them, are imported."""
    peer = PEERS[os.environ[LIBRARY]]
    for name in peer.empty:
        if importlib.util.find_spec(name.split(".")[0]) is None or name.split(".")[0] in sys.modules:
            module = sys.modules[name] = ModuleType(name)
            module.__spec__, module.__dict__["__version__"] = ModuleSpec(name, None), "2"
            if "." in name:
                setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    if os.environ[LIBRARY] == "torchattacks":
        _stand_in_for_robustbench()
    if os.environ[WHOSE] == "ours":
        ours = importlib.import_module(f"spat_kernels.compat.{os.environ[LIBRARY]}")
        for module in map(importlib.import_module, peer.modules):
            for name in peer.names:
                if hasattr(module, name):
                    setattr(module, name, getattr(ours, name))


def _stand_in_for_robustbench() -> None:
    """torchattacks' tests fetch a network and images by it; here they are those of our tests."""
    from tests.helpers import photographs, robust

    utils, data, package = (ModuleType(f"robustbench{name}") for name in (".utils", ".data", ""))
    for module in (package, utils, data):
        sys.modules[module.__name__] = module
    found: Any = utils
    found.load_model = lambda *args, **kwargs: robust("madry")
    found.clean_accuracy = lambda model, x, y: float((model(x).argmax(1) == y).float().mean())
    found = data
    found.load_cifar10 = lambda n_examples, data_dir: tuple(t[:n_examples] for t in photographs())


def _concerned(item) -> bool:
    """Whether an attack that we have takes part in a test."""
    peer, parameters = PEERS[os.environ[LIBRARY]], getattr(getattr(item, "callspec", None), "params", {})
    attacks = [getattr(importlib.import_module(peer.modules[0]), name) for name in peer.names]
    if os.environ[LIBRARY] == "foolbox":
        concerned = isinstance(getattr(parameters.get("attack_test_target"), "attack", None), tuple(attacks))
        concerned |= item.originalname in ("test_fgsm_run_raises", "test_eot_wrapper")  # name them in their code
        return concerned and str(parameters.get("fmodel_and_data_ext_for_attacks", "")).startswith("pytorch")
    if os.environ[LIBRARY] == "adv_lib":
        return getattr(parameters.get("attack"), "func", None) in attacks
    return parameters.get("atk_class", peer.names[0]) in peer.names  # all tests in these files of ART use its attacks


def pytest_collection_modifyitems(config, items) -> None:
    for plugin in config.pluginmanager.get_plugins():
        if hasattr(plugin, "get_default_framework"):  # ART's tests for one framework run on PyTorch
            plugin.get_default_framework = lambda: "pytorch"
    items[:] = filter(_concerned, items)


_outcomes: dict[str, str] = {}


def pytest_runtest_logreport(report) -> None:
    if report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome
    elif report.when == "call":
        _outcomes.setdefault(report.nodeid, "passed")


def pytest_sessionfinish() -> None:
    Path(os.environ[REPORT]).write_text(json.dumps(_outcomes))


if LIBRARY in os.environ:
    _replace()


# ---- the command


@dataclass
class Arguments:
    """The tests of other libraries, on our attacks in the place of theirs."""

    out: Path
    """JSON file to write."""
    torchattacks: Path | None = None
    """A checkout of it."""
    foolbox: Path | None = None
    """A checkout of it."""
    art: Path | None = None
    """A checkout of it; MNIST is read from ~/.art/data/mnist.npz."""
    adv_lib: Path | None = None
    """A checkout of it."""


def outcomes(library: str, checkout: Path, whose: str) -> dict[str, str]:
    """The outcome of each test: "passed", "failed" or "skipped"."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        paths = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {LIBRARY: library, WHOSE: whose, REPORT: str(report), "PYTHONPATH": paths}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __spec__.name, "-W", "ignore"]
        done = subprocess.run([*command, *PEERS[library].arguments], cwd=checkout, env=environment, check=False)
        if done.returncode > 1:  # 1: tests have failed
            raise SystemExit(f"{library}: pytest ends with {done.returncode} in {checkout}: see above")
        return json.loads(report.read_text())


def compare(theirs: dict[str, str], ours: dict[str, str]) -> dict[str, Any]:
    """How many tests passed with ours, what failed with ours alone, and what with theirs alone."""
    counts = Counter(ours.values())
    failed = {name for name, outcome in ours.items() if outcome == "failed"}
    failed_theirs = {name for name, outcome in theirs.items() if outcome == "failed" and name in ours}
    return {
        "passed": counts["passed"],
        "skipped": counts["skipped"],
        "failed_on_both": len(failed & failed_theirs),
        "only_ours": sorted(failed - failed_theirs),
        "only_theirs": sorted(failed_theirs - failed),
    }


def table(results: dict) -> str:
    """The counts by library."""
    from benchmarks.tables import environment, markdown

    return markdown(
        results, results["peer_tests"],
        "tests of || passed on ours | failed on both | failed on ours alone | failed on theirs alone | skipped on both",
        "{library} {version} || {passed} | {failed_on_both} | {alone} | {alone_theirs} | {skipped}", environment,
        alone=lambda r: len(r["only_ours"]), alone_theirs=lambda r: len(r["only_theirs"]),
    )  # fmt: skip


def main(args: Arguments) -> None:
    from benchmarks import measure

    results = measure.begun("peer_tests", "cpu", peer_tests=[])
    for library in PEERS:
        if checkout := getattr(args, library):
            version = getattr(importlib.import_module(library), "__version__", "")
            found = compare(*(outcomes(library, checkout, whose) for whose in ("theirs", "ours")))
            results["peer_tests"].append({"library": library, "version": version} | found)
            measure.write(args.out, results)
    print(table(results))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Arguments))
