"""Text that a user writes: the grammar of attacks and the options of commands. It is read, or refused in one line."""

import contextlib
import io
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from spat_train.cli import training_config
from spat_train.command_line import parse as parse_options
from spat_train.config import Config
from spat_train.data.sizes import parse_sizes
from spat_train.errors import InputError
from spat_train.evaluation.attack_specs import ALIASES, parse, parse_all
from spat_train.evaluation.attack_specs.families import FAMILIES, NAMED, TARGETS
from spat_train.evaluation.command import EvaluateOptions
from spat_train.models.run_config import is_a
from spat_train.presets import PRESETS
from spat_train.training.check import check
from tests.fuzz.campaign import Target

ODD = st.sampled_from(
    [
        "",
        " ",
        "0",
        "-1",
        "1/0",
        "1/255",
        "nan",
        "inf",
        "1e999",
        "9" * 400,
        "9" * 5000,
        "²",
        "٣",
        "=",
        ":",
        ",",
        "ce",
        "linf",
        "L2",
        "yes",
        "all",
        "0.1",
        "8/255",
        "pgd-20",
        "x2",
        "none",
        "--",
        "None",
        "[]",
        "128",
        "224",
        "41",
        "ı",
        "K",
        "1_000",
        "+1",
        "0x10",
        "success",
    ]
) | st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=6)


def _refused(call, *args) -> str:
    """Whether a call refuses its arguments, by an error of one line."""
    try:
        call(*args)
    except InputError as error:
        assert "\n" not in str(error), f"more than one line: {str(error)[:200]!r}"
        return "refused"
    return "held"


def _literals(kind) -> tuple:
    """The words that a type allows."""
    inner = get_args(kind)
    return inner if get_origin(kind) is Literal else tuple(word for each in inner for word in _literals(each))


# ---- attacks

KEYS = sorted({key for kind in FAMILIES.values() for key in kind.readers()})
NAMES = st.sampled_from([*NAMED, *FAMILIES, *ALIASES])
SETTINGS = st.tuples(st.sampled_from(KEYS) | ODD, st.sampled_from(["=", "=", "=", "", "=="]), ODD).map("".join)


@st.composite
def specs(draw):
    name = draw(NAMES | NAMES | ODD)
    if draw(st.booleans()):
        name += draw(st.sampled_from(["", *(f"-{t}" for t in TARGETS), "x2", "x0", "x" + "9" * 30, "x", "-", "x2x3"]))
    return ":".join([name, *draw(st.lists(SETTINGS, max_size=3))])


def attack_trial(spec: str) -> str:
    outcome = _refused(parse, spec)
    if outcome == "held":
        attack = parse(spec)
        assert "\n" not in attack.describe() + attack.spec
        again = parse(attack.spec)
        assert again.spec == attack.spec, f"{attack.spec} is read as {again.spec}"
        assert "\n" not in attack.name, "a name of more than one line"
    _refused(parse_all, f"{spec},fgsm")
    return outcome


# ---- commands

WORDS = ["train", "evaluate"]
VALUES = ODD | st.sampled_from(
    [*PRESETS, "resnet-18", "digits", "mnist", "trades", "madry", "8", "1000000", "1e400", "cpu", "cuda:99", "bf16"]
)


def _options(command: str) -> list[str]:
    """The names of all its options."""
    kind = {"train": Config, "evaluate": EvaluateOptions}[command]
    return [f"--{f.name.replace('_', '-')}" for f in fields(kind)]


@st.composite
def commands(draw):
    command = draw(st.sampled_from(WORDS))
    names = st.sampled_from(_options(command)) | ODD
    words = draw(st.lists(st.tuples(names, st.lists(VALUES, max_size=2)), max_size=4))
    return [command, *(word for name, values in words for word in (name, *values))]


def command_trial(words: list[str]) -> str:
    command, *arguments = words
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if command == "train":
                return _refused(lambda: check(training_config(arguments)))
            return _refused(lambda: parse_options(EvaluateOptions, arguments, prog="spat-train evaluate", description=""))
    except SystemExit as error:  # tyro's
        assert error.code in (0, 2), f"exit code {error.code}"
        return "refused"


# ---- options, as values

POOL = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**70,
    0.0,
    0.1,
    1.0,
    -1.0,
    8.0,
    1e300,
    5e-324,
    float("inf"),
    float("nan"),
    "",
    "x",
    "mlp",
    "small-cnn",
    "digits",
    "128@1,224@41",
    "x" * 300,
    ":",
    "a.b:c",
    "tensorboard",
    "cpu",
    "cuda:99",
    (),
    (0.5,),
    (0.1, 0.2, 0.3),
    (2, 9),
)
KINDS = get_type_hints(Config)
CHOICES = {name: [value for value in (*POOL, *_literals(kind)) if is_a(value, kind)] for name, kind in KINDS.items()}
VALUE_OF = {name: st.sampled_from(values) for name, values in CHOICES.items() if values}


@st.composite
def configs(draw):
    names = draw(st.lists(st.sampled_from(sorted(VALUE_OF)), max_size=6, unique=True))
    return {name: draw(VALUE_OF[name]) for name in names}


# ---- sizes

NUMBER = ODD | st.integers(1, 300).map(str)
SIZES = st.lists(st.tuples(NUMBER, st.sampled_from(["@", "@", ""]), NUMBER).map("".join), max_size=3).map(",".join)
RIGHT = st.lists(st.integers(8, 300), min_size=1, max_size=4).map(
    lambda sizes: ",".join(f"{size}@{1 + 7 * i}" for i, size in enumerate(sizes))
)

ATTACKS = Target(specs(), attack_trial)
COMMANDS = Target(commands(), command_trial)
OPTIONS = Target(configs(), lambda given: _refused(lambda: check(Config(**given))))
TRAIN_SIZES = Target(SIZES | RIGHT, lambda text: _refused(parse_sizes, text))
