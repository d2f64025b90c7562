"""What type checkers know: wrong arguments are found, and the hints are those of the code."""

import subprocess
import sys
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path
from typing import get_type_hints

import pytest

import spat_kernels as sk
from spat_kernels import balls, settings
from spat_kernels.attacks import pgd as attacks
from spat_kernels.attacks.autoattack import VERSIONS

ROOT = Path(__file__).parents[1]

# Each call with the error that mypy has to find on its line, or None.
CALLS = [
    ("sk.pgd(model, x, y, 0.1, steps=20, norm='l2', graph=False, precision='half', bn_mode='keep')", None),
    ("sk.pgd(model, x, None, 0.1, loss='kl', step_size=torch.ones(3))", None),
    ("sk.pgd(model, x, y, 0.1, loss=lambda z, y: z[:, 0], generator=torch.Generator())", None),
    ("sk.pgd(model, x, y, 0.1, loss='a registered one')", None),
    ("sk.pgd_ls(model, x, y, 0.1, 0.2, steps=5, norm='linf')", None),
    ("sk.pgd_kl(model, x, None, 0.1, steps=5, start=x)", None),
    ("sk.fgsm(model, x, y, 0.1, norm='l2', loss='dlr', targeted=True)", None),
    ("sk.APGD(12.0, norm='l1', multi_eps=False)", None),
    ("sk.cw_linf(model, x, y, 0.1, kappa=0.0, steps=5, select='loss')", None),
    ("sk.PGD(0.1, loss=sk.losses.Margin(3.0), restarts=2).launch(model, x, y)", None),
    ("sk.APGD(0.1, loss='dlr', targets=9)(model, x, y)", None),
    ("sk.AutoAttack(0.1, version='rand').run(model, x, y).robust", None),
    ("sk.AutoAttack(0.1, version=('apgd-ce', 'square'))", None),
    ("evaluate(model, (x, y), 'pgd-20', eps=0.1, precision=None, graph='auto').table()", None),
    ("sk.pgd(model, x, y, 0.1, stpes=20)", "call-arg"),
    ("sk.pgd_kl(model, x, y, 0.1, stpes=20)", "call-arg"),
    ("sk.fgsm(model, x, y, 0.1, steps=20)", "call-arg"),
    ("sk.cw_linf(model, x, y, 0.1, loss='ce')", "call-arg"),
    ("sk.pgd_ls(model, x, y, 0.1, 0.2, stpes=20)", "call-arg"),
    ("sk.pgd(model, x, y, 0.1, norm='l3')", "arg-type"),
    ("sk.fgsm(model, x, y, 0.1, norm='l3')", "arg-type"),
    ("sk.pgd_ls(model, x, y, 0.1, 0.2, norm='l3')", "arg-type"),
    ("sk.PGD(0.1, precision='fp8')", "arg-type"),
    ("sk.PGD(0.1, graph='always')", "arg-type"),
    ("sk.PGD(0.1, bn_mode='test')", "arg-type"),
    ("sk.PGD(0.1, fuse='never')", "arg-type"),
    ("sk.PGD(0.1, select='best')", "arg-type"),
    ("sk.APGD(0.1, input_gradient='fast')", "arg-type"),
    ("sk.AutoAttack(0.1, version='standrd')", "arg-type"),
    ("sk.explain(model, x, precision='fp8')", "arg-type"),
    ("evaluate(model, (x, y), 'pgd-20', eps=0.1, precision='fp8')", "arg-type"),
]


@pytest.mark.slow
def test_mypy_finds_wrong_arguments(tmp_path):
    """One process, which reads torch's hints once: calls that are right pass, each wrong one is an error of its kind."""
    pytest.importorskip("mypy")
    head = "import torch\nimport spat_kernels as sk\nfrom spat_train.evaluation.evaluate import evaluate\n"
    head += "model, x, y = torch.nn.Flatten(), torch.rand(2, 3), torch.zeros(2, dtype=torch.int64)\n"
    script = tmp_path / "calls.py"
    script.write_text(head + "".join(f"{call}\n" for call, _ in CALLS))
    options = ["--config-file", ROOT / "pyproject.toml", "--no-error-summary", "--hide-error-context"]
    checked = subprocess.run([sys.executable, "-m", "mypy", *options, script], cwd=ROOT, capture_output=True, text=True)
    assert not checked.stderr, checked.stderr
    found = {}
    for line in checked.stdout.splitlines():
        if ": error: " in line:
            where, message = line.split(": error: ")
            found[int(where.rsplit(":", 1)[1]) - head.count("\n") - 1] = message.rsplit("[", 1)[-1].rstrip("]")
    assert found == {i: code for i, (_, code) in enumerate(CALLS) if code}, checked.stdout


def hints(of) -> dict[str, object]:
    return {name: hint for name, hint in get_type_hints(of).items() if name not in ("return", "model", "x", "y", "settings")}


def test_settings_are_those_of_the_attacks():
    """Names and types of the TypedDicts, and what the functions add, are the fields of PGD."""
    pgd = {f.name: hint for f in fields(sk.PGD) if (hint := get_type_hints(sk.PGD)[f.name])}
    assert get_type_hints(settings.PGDSettings) == {name: pgd[name] for name in pgd if name not in ("eps", "loss")}
    for attack in (sk.PGD, sk.APGD, sk.FAB, sk.Square):
        own = get_type_hints(attack)
        assert {name: own[name] for name in get_type_hints(settings.AttackSettings)} == get_type_hints(settings.AttackSettings)
    call = {"start": get_type_hints(sk.PGD.__call__)["start"], "alpha": float, "kappa": float}
    for function, shared in [
        (sk.pgd, settings.PGDSettings),
        (sk.pgd_kl, settings.PGDSettings),
        (sk.fgsm, settings.CommonSettings),
        (sk.cw_linf, settings.CommonSettings),
    ]:
        assert function.__annotations__["settings"].__args__ == (shared,)
        assert not hints(function).keys() & get_type_hints(shared).keys()
        assert all((pgd | call)[name] == hint for name, hint in hints(function).items()), function
    assert hints(sk.pgd_ls) == {name: hint for name, hint in (pgd | call).items() if name not in ("loss", "kappa")}
    defaults = {f.name: f.default for f in fields(sk.PGD) if f.default is not MISSING}
    given = {name: p.default for name, p in signature(sk.pgd_ls).parameters.items() if name in defaults}
    assert given == {name: defaults[name] for name in given}
    assert len(given) == len(pgd) - 2


def test_choices_are_those_at_run_time():
    assert tuple(balls.BALLS) == settings.NORMS
    assert tuple(VERSIONS) == settings.Version.__args__
    assert attacks.SELECT == ("success", "loss")
    assert settings.BN_MODES == ("eval", "train", "keep")
    for package in ("spat_kernels", "spat_train"):
        assert (ROOT / package / "py.typed").exists()
