"""What a sweep runs: a base, a grid of options, and how it is searched. A ready one by name (ready.py), or a YAML file:

about: which weight decay suits TRADES              # a line for people
base: {preset: table6.1/trades, epochs: 30}         # options of `spat-train train`; {alpha:g} in a preset is an option's value
grid:                                               # all combinations run
  weight_decay: [1e-4, 5e-4]
  batch:                                            # a name of yours: options that move together
    - {batch_size: 128, lr: 0.1}
    - {batch_size: 256, lr: 0.2}
search: halving                                     # or grid, the default, where every run goes to its end
min_epochs: 3                                       # halving: epochs before the first decision. Default: 1
reduction: 3                                        # halving: about 1 of this many runs goes on each time. Default: 3
maximise: pgd                                       # held-out accuracy, pgd or clean. Default: pgd, of standard training clean
seeds: 2                                            # repeats, with --seed and those after it. Default: 1
for_each: [batch]                                   # the best is sought for each of its values, and halving compares within them
hypotheses:                                         # what the report is to judge: higher, lower, or differs
  - {says: decay helps, factor: weight_decay, level: 5e-4, expects: higher}      # than the first value, or that of `than`
"""

import json
import math
import re
import shlex
from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..config import FREE_ON_RESUME, Config
from ..errors import InputError, did_you_mean, first_line, lookup
from ..models.run_config import is_a
from ..papers.runs import data_name
from ..presets import PRESETS
from ..training.check import check
from .ready import READY

KINDS = get_type_hints(Config)
MOST_BYTES, MOST_RUNS = 10**5, 10**4  # of a spec
FIELD = r"[^{}]|\{\w+(:\.?\d?[dfg]?)?\}"  # in the name of a preset: an option's value, as {alpha:g}
OWN = ("out", "resume", "seed")  # of the sweep, so not of its spec
Factors = dict[str, dict[Any, dict[str, Any]]]


@dataclass(frozen=True)
class Spec:
    """The keys of a spec file, as the docstring of this module has them, but for `grid`.

    Attributes:
        source: the name of a ready one, or the path of the file.
        factors: what is swept: by name its levels, which are options by the one value, or by a text where there are several.
        base: options, in the types of Config.
        hypotheses: with the `levels` that are compared with `than`, none where the factor is not swept.
    """

    source: str
    factors: Factors
    base: dict = field(default_factory=dict)
    about: str = ""
    search: Literal["grid", "halving"] = "grid"
    min_epochs: int | None = None
    reduction: int | None = None
    maximise: Literal["pgd", "clean"] | None = None
    seeds: int = 1
    for_each: tuple[str, ...] = ()
    hypotheses: tuple[dict, ...] = ()

    @property
    def name(self) -> str:
        return self.source if self.source in READY else Path(self.source).stem

    @property
    def runs(self) -> int:
        return self.seeds * math.prod(map(len, self.factors.values()))


KEYS = {name: kind for name, kind in get_type_hints(Spec).items() if name not in ("source", "factors")} | {"grid": dict}


@dataclass(frozen=True)
class Cell:
    """A run of the sweep. `params`: its level of each factor, and its seed."""

    params: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class Sweep:
    """A spec with its runs by the names of their folders, in the folder `out`. `maximise`: "pgd" or "clean"."""

    spec: Spec
    out: Path
    maximise: str
    cells: dict[str, Cell]

    def record(self) -> dict[str, Any]:
        """What may not change while the sweep goes on, by name, as JSON has it."""
        spec, base = self.spec, next(iter(self.cells.values())).config.to_dict()
        search = {name: getattr(spec, name) for name in ("search", "min_epochs", "reduction", "seeds", "for_each")}
        grid = {factor: list(levels) for factor, levels in spec.factors.items()}
        options = {name: value for name, value in base.items() if name not in FREE_ON_RESUME}
        options["data"] = data_name(base["data"])  # wherever it is
        return json.loads(json.dumps(search | {"maximise": self.maximise, "grid": grid} | options, default=str))


def read(source: str) -> Spec:
    """The ready spec of this name, else that in this file.

    Raises:
        InputError: there is none, or a key of it does not fit.
    """
    content: Any = READY.get(source)
    if content is None:
        if not Path(source).is_file():
            near = did_you_mean(source, READY)
            raise InputError(f"sweep {source}: there is none: {near}there are {', '.join(READY)}, or give a YAML file")
        try:
            with open(source, "rb") as file:
                if len(text := file.read(MOST_BYTES + 1)) > MOST_BYTES:
                    raise ValueError(f"it is longer than {MOST_BYTES:,} bytes")
            content = yaml.safe_load(text)
            if sum(1 for _ in islice(_values(content), MOST_BYTES + 1)) > MOST_BYTES:  # a few lines may name each other often
                raise ValueError("it has too many values")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            line, why = (f"line {mark.line + 1}: ", getattr(error, "problem", "")) if mark else ("", first_line(error))
            raise InputError(f"{source}: {line}it cannot be read as YAML ({why}): mend it") from error
    if not isinstance(content, dict):
        raise InputError(f"{source}: it holds no keys: give grid, with options and their values")
    kinds = {key: lookup(f"{source}: key", str(key), KEYS) for key in content}
    keys = {key: _fitting(f"{source}: {key}", value, kinds[key]) for key, value in content.items()}
    keys["base"] = {str(name): _option(f"{source}: base.{name}", name, one) for name, one in keys.get("base", {}).items()}
    if not (grid := keys.pop("grid", {})):
        raise InputError(f"{source}: grid: a spec needs it: give options with their values")
    factors = {str(factor): _levels(f"{source}: grid.{factor}", str(factor), values) for factor, values in grid.items()}
    hypotheses = enumerate(keys.pop("hypotheses", ()))
    judged = tuple(_hypothesis(f"{source}: hypotheses[{number}]", each, factors) for number, each in hypotheses)
    spec = Spec(source, factors, hypotheses=judged, **keys)
    _check(spec)
    return spec


def _values(value: Any) -> Iterator[Any]:
    """`value` and all in it."""
    yield value
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for each in inside:
        yield from _values(each)


def plan(spec: Spec, given: Mapping[str, Any]) -> Sweep:
    """The runs of `spec`, where the options `given` on the command line override its base. All are checked.

    Raises:
        InputError: an option does not fit, or is swept.
    """
    factors, cells = spec.factors, dict[str, Cell]()
    swept = {option for levels in factors.values() for options in levels.values() for option in options}
    if clash := swept & given.keys():
        raise InputError(
            f"--{min(clash).replace('_', '-')}: {spec.source} sweeps it: leave it out, or sweep by a file of your own"
        )
    out = Path(given.get("out") or Path("runs") / spec.name)
    for repeat, *levels in product(range(spec.seeds), *factors.values()):
        params = dict(zip(factors, levels, strict=True))
        options = {name: value for factor, level in params.items() for name, value in factors[factor][level].items()}
        config = _config(spec, spec.base | dict(given) | options)
        config = replace(config, seed=config.seed + repeat, resume=True)
        name = "-".join([*(_text(option, value) for option, value in options.items()), f"seed{config.seed}"])
        config = replace(config, out=out / name)
        at = f"{spec.source}: run {name}"
        try:
            check(config)
        except InputError as error:
            raise InputError(f"{at}: {error}") from error
        if config.holdout == 0:
            raise InputError(f"{at}: --holdout 0: runs are compared on held-out images: hold out some")
        if spec.search == "halving" and (first := max(spec.min_epochs or 1, config.val_every)) >= config.epochs:
            raise InputError(
                f"{at}: --epochs {config.epochs}: halving first decides after {first}: lower min_epochs or --val-every"
            )
        if name in cells:
            raise InputError(f"{at}: grid: two runs have this name: give values that differ in 6 digits, or in letters")
        cells[name] = Cell(params | {"seed": config.seed}, config)
    attacks = any(cell.config.objective.attacks for cell in cells.values())
    return Sweep(spec, out, spec.maximise or ("pgd" if attacks else "clean"), cells)


def command(config: Config) -> str:
    """The `spat-train train` command of this config."""
    preset, words = PRESETS.get(config.preset, Config()), ["spat-train", "train"]
    for f in fields(Config):
        value, option = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if f.name == "preset" and value:
            words += [option, value]
        elif value == getattr(preset, f.name):
            continue
        elif KINDS[f.name] is bool:
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def _config(spec: Spec, options: dict[str, Any]) -> Config:
    name = options.get("preset", "")
    try:
        if not re.fullmatch(f"({FIELD})*", name):
            raise ValueError("{} has an option and its format, such as {alpha:g}")
        name = name.format(**options)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{spec.source}: base.preset {name}: {error!r}: name options of the spec in it") from error
    preset = lookup(f"{spec.source}: preset", name, PRESETS, remedy="see spat-train presets") if name else Config()
    return replace(preset, **options | {"preset": name})


# ---- what the keys hold


NAMES = {tuple: "a list", dict: "keys with their values", bool: "true or false", int: "an integer", float: "a number",
         str: "a text", Path: "a path"}  # fmt: skip


def _fitting(where: str, value: Any, kind: Any) -> Any:
    """`value`, which the spec has at the key `where`, in the type `kind`. A number may be a text, as YAML takes 1e-4 for one."""
    kinds = {get_origin(k) or k: k for k in (kind, *get_args(kind))}
    plain: Any = next((k for k in kinds if k in NAMES), None)
    if plain is tuple and isinstance(value, list):
        value = tuple(_fitting(where, one, get_args(kinds[tuple])[0]) for one in value)
    elif plain in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # it is refused below
            value = plain(float(value)) if plain(float(value)) == float(value) else value
    elif (plain is Path and isinstance(value, str)) or (plain is bool and value in (0, 1)):
        value = plain(value)
    if not (is_a(value, kind) or (value is None and type(None) in kinds)):
        choices = ", ".join(map(str, get_args(kinds.get(Literal))))
        raise InputError(f"{where} {value!r}: {f'choose one of {choices}' if choices else f'give {NAMES[plain]}'}")
    return value


def _option(where: str, option: object, value: Any) -> Any:
    """`value`, which the spec has at the key `where`, as one of `option`."""
    known = {name: kind for name, kind in KINDS.items() if name not in OWN}
    remedy = "of a sweep it is given on the command line" if option in OWN else "spat-train train --help lists all"
    return _fitting(where, value, lookup(f"{where}: option", str(option), known, remedy))


def _level(where: str, factor: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """A value of a factor as `Spec.factors` have it: the level, and its options."""
    group = {factor: value} if factor in KINDS else value
    if not isinstance(group, dict) or not group:
        near = did_you_mean(factor, KINDS)
        raise InputError(f"{where}: it is no option of spat-train train ({near}or list options that move together)")
    options = {str(name): _option(where, name, one) for name, one in group.items()}
    level = options.get(factor)
    if list(options) != [factor] or isinstance(level, (tuple, Path)):  # Optuna stores no such values
        level = "-".join(_text(name, one) for name, one in options.items())
    return level, options


def _levels(where: str, factor: str, values: Any) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    if not isinstance(values, list) or not values:
        raise InputError(f"{where} {values!r}: give a list of values")
    for value in values:
        level, options = _level(where, factor, value)
        if level in found:
            raise InputError(f"{where}: {level} is there twice: leave one out")
        found[level] = options
    return found


def _hypothesis(where: str, given: dict, factors: Factors) -> dict[str, Any]:
    """A hypothesis as `Spec.hypotheses` has it."""
    if not {"says", "factor", "expects"} <= given.keys() <= {"says", "factor", "expects", "level", "than"}:
        raise InputError(f"{where}: give says, factor and expects, and perhaps level and than")
    expects = _fitting(f"{where}.expects", given["expects"], Literal["higher", "lower", "differs"])
    factor = str(given["factor"])
    lookup(f"{where}.factor", factor, KINDS | factors, "name one of the grid, or an option")
    levels = factors.get(factor, {})
    chosen: dict[str, Any] = {}
    for key in ("level", "than") if levels else ():
        if key in given:
            value = given[key]
            known = isinstance(value, Hashable) and value in levels
            chosen[key] = value if known else _level(f"{where}.{key}", factor, value)[0]
            if chosen[key] not in levels:
                raise InputError(f"{where}.{key} {value}: choose among {', '.join(map(str, levels))}")
    than = chosen.get("than", next(iter(levels), None))
    others = [level for level in levels if level != than and level == chosen.get("level", level)]
    if levels and not others:
        raise InputError(f"{where}.level: it is compared with {than} itself: name two values of {factor} by level and than")
    if len(others) > 1 and expects != "differs":
        raise InputError(f"{where}.level: {factor} has several values: say which is expected to be {expects}")
    return {"says": given["says"], "factor": factor, "expects": expects, "levels": others, "than": than}


def _check(spec: Spec) -> None:
    """Raise InputError where keys do not fit together."""
    for name, least in (("min_epochs", 1), ("reduction", 2), ("seeds", 1)):
        if (value := getattr(spec, name)) is not None and value < least:
            raise InputError(f"{spec.source}: {name} {value}: give at least {least}")
    if spec.runs > MOST_RUNS:
        raise InputError(f"{spec.source}: grid: it has {spec.runs:,} runs: give one of at most {MOST_RUNS:,}")
    swept = [option for levels in spec.factors.values() for option in {o for options in levels.values() for o in options}]
    if len({*swept}) < len(swept):
        raise InputError(f"{spec.source}: grid: an option is in two factors: give it to one")
    if both := spec.base.keys() & swept:
        raise InputError(f"{spec.source}: base.{min(both)}: the grid has it too: leave it out of one of them")
    if spec.search == "grid" and (spec.min_epochs, spec.reduction) != (None, None):
        raise InputError(
            f"{spec.source}: search: min_epochs and reduction are for halving: give search: halving, or leave them out"
        )
    if spec.for_each and not {*spec.for_each} < {*spec.factors}:
        raise InputError(f"{spec.source}: for_each: name factors of the grid, but not all of them")


def _text(option: str, value: Any) -> str:
    """An option and its value in the name of a folder: alpha0.2, bn-mode-eval, milestones-75-90."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    words = f"{value:g}" if number else "-" + "-".join(map(str, value if isinstance(value, tuple) else [value]))
    return "".join(c if c.isalnum() or c in "-+._" else "-" for c in option.replace("_", "-") + words)
