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
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import product
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
OWN = ("out", "resume", "seed")  # of the sweep, so not of its spec
EXPECTED = ("higher", "lower", "differs")


@dataclass(frozen=True)
class Spec:
    """The keys of a spec file, as the docstring of this module has them, but for `grid`.

    Attributes:
        source: the name of a ready one, or the path of the file.
        base: options, in the types of Config.
        factors: what is swept: by name its levels, which are options by the one value, or by a text where there are several.
    """

    source: str
    base: dict
    factors: dict[str, dict[Any, dict[str, Any]]]
    about: str = ""
    search: Literal["grid", "halving"] = "grid"
    min_epochs: int | None = None
    reduction: int | None = None
    maximise: Literal["pgd", "clean"] | None = None
    seeds: int = 1
    for_each: tuple[str, ...] = ()
    hypotheses: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.source if self.source in READY else Path(self.source).stem

    @property
    def runs(self) -> int:
        return self.seeds * math.prod(map(len, self.factors.values()))


SETTINGS = {name: kind for name, kind in get_type_hints(Spec).items() if name not in ("source", "base", "factors", "hypotheses")}


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
            content = yaml.safe_load(Path(source).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{source}: it cannot be read as YAML ({first_line(error)}): mend it") from error
    if not isinstance(content, dict) or not isinstance(content.get("grid"), dict) or not content["grid"]:
        raise InputError(f"{source}: grid: a spec needs it: give options with their values")
    settings, known = {}, SETTINGS | dict.fromkeys(("base", "grid", "hypotheses"))
    for key, value in content.items():
        if kind := lookup(f"{source}: key", str(key), known):
            settings[key] = _fitting(f"{source}: {key}", value, kind)
    base = _fitting(f"{source}: base", content.get("base", {}), dict)
    hypotheses = _fitting(f"{source}: hypotheses", content.get("hypotheses", []), tuple[dict, ...])
    spec = Spec(
        source,
        {option: _option(f"{source}: base.{option}", option, value) for option, value in base.items()},
        {str(factor): _levels(f"{source}: grid.{factor}", str(factor), values) for factor, values in content["grid"].items()},
        hypotheses=hypotheses,
        **settings,
    )
    for holds, key, remedy in _relations(spec):
        if not holds:
            raise InputError(f"{source}: {key}: {remedy}")
    return spec


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
        parts = [_text(option, value) for option, value in options.items()]
        config = _config(spec, spec.base | dict(given) | options)
        config = replace(config, seed=config.seed + repeat, resume=True)
        name = "-".join([*parts, f"seed{config.seed}"])
        config = replace(config, out=out / name)
        try:
            check(config)
        except InputError as error:
            raise InputError(f"{spec.source}: run {name}: {error}") from error
        if config.holdout == 0:
            raise InputError(f"{spec.source}: run {name}: --holdout 0: runs are compared on held-out images: hold out some")
        cells[name] = Cell(params | {"seed": config.seed}, config)
    if len(cells) < spec.runs:
        raise InputError(f"{spec.source}: grid: values are alike to 6 digits: give ones that differ")
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
        name = name.format(**options)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{spec.source}: base.preset {name}: {error!r}: name options of the spec in it") from error
    preset = lookup(f"{spec.source}: preset", name, PRESETS, remedy="see spat-train presets") if name else Config()
    return replace(preset, **options | {"preset": name})


def _option(where: str, option: str, value: Any) -> Any:
    """`value`, which the spec has at the key `where`, as one of `option`."""
    known = {name: kind for name, kind in KINDS.items() if name not in OWN}
    remedy = "of a sweep it is given on the command line" if option in OWN else "spat-train train --help lists all"
    return _fitting(where, value, lookup(f"{where}: option", option, known, remedy))


def _fitting(where: str, value: Any, kind: Any) -> Any:
    """`value` as YAML gives it in the type `kind`: lists become tuples, numbers floats, and so does 1e-4, a text in YAML."""
    value = tuple(value) if isinstance(value, list) else value
    if float in (kind, *get_args(kind)) and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError):  # it is refused below
            value = float(value)
    paths = Path in (kind, *get_args(kind)) and isinstance(value, str)
    if not (paths or is_a(value, kind)):
        choices = next((get_args(k) for k in (kind, *get_args(kind)) if get_origin(k) is Literal), ())
        wanted = f"choose one of {', '.join(map(str, choices))}" if choices else f"give {getattr(kind, '__name__', kind)}"
        raise InputError(f"{where} {value!r}: {wanted}")
    return Path(value) if paths else value


def _levels(where: str, factor: str, values: Any) -> dict[Any, dict[str, Any]]:
    """The levels of a factor, as `Spec` has them; `where` is its key."""
    found: dict[Any, dict[str, Any]] = {}
    if not isinstance(values, list) or not values:
        raise InputError(f"{where} {values!r}: give a list of values")
    for value in values:
        group = {factor: value} if factor in KINDS else value
        if not isinstance(group, dict) or not group:
            near = did_you_mean(factor, KINDS)
            raise InputError(f"{where}: it is no option of spat-train train ({near}or list options that move together)")
        options = {name: _option(where, name, one) for name, one in group.items()}
        level = options.get(factor)
        if list(options) != [factor] or isinstance(level, (tuple, Path)):  # Optuna stores no such values
            level = "-".join(_text(name, one) for name, one in options.items())
        if level in found:
            raise InputError(f"{where}: {level} is there twice: leave one out")
        found[level] = options
    return found


def _relations(spec: Spec) -> list[tuple[bool, str, str]]:
    """What must hold: (whether it does, the key that does not fit, remedy)."""
    factors, plain_grid = spec.factors, spec.search == "grid" and (spec.min_epochs, spec.reduction) != (None, None)
    swept = [option for levels in factors.values() for option in {o for options in levels.values() for o in options}]
    found = [
        (len(set(swept)) == len(swept), "grid", "an option is in two factors: give it to one"),
        (not plain_grid, "search", "min_epochs and reduction are for halving: give search: halving, or leave them out"),
        (spec.min_epochs is None or spec.min_epochs >= 1, "min_epochs", "give at least 1"),
        (spec.reduction is None or spec.reduction >= 2, "reduction", "give at least 2"),
        (spec.seeds >= 1, "seeds", "give at least 1"),
        (not spec.for_each or {*spec.for_each} < {*factors}, "for_each", "name factors of the grid, but not all of them"),
    ]
    for number, each in enumerate(spec.hypotheses):
        keys = {"says", "factor", "expects"} <= {*each} <= {"says", "factor", "expects", "level", "than"}
        levels = factors.get(str(each.get("factor")), {})
        known = not levels or all(each[key] in levels for key in ("level", "than") if key in each)
        one = each.get("expects") == "differs" or "level" in each or len(levels) < 3
        found += [
            (keys, f"hypotheses[{number}]", "give says, factor and expects, and perhaps level and than"),
            (each.get("expects") in EXPECTED, f"hypotheses[{number}].expects", f"choose one of {', '.join(EXPECTED)}"),
            (known, f"hypotheses[{number}].level", f"choose among {', '.join(map(str, levels))}"),
            (one, f"hypotheses[{number}].level", "the factor has several: say which is expected to be higher or lower"),
        ]
    return found


def _text(option: str, value: Any) -> str:
    """An option and its value in the name of a folder: alpha0.2, bn-mode-eval, milestones-75-90."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    words = f"{value:g}" if number else "-" + "-".join(map(str, value if isinstance(value, tuple) else [value]))
    return "".join(c if c.isalnum() or c in "-+._" else "-" for c in option.replace("_", "-") + words)
