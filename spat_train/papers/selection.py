"""Which finished runs a table or a figure takes: those that the user names, else those trained with the source's preset."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import Config
from ..errors import InputError
from ..objectives import MethodName
from ..presets import PRESETS
from .differences import differences
from .options import Options
from .runs import Run, data_name, find_runs, read_run


@dataclass(frozen=True)
class RunSpec:
    """A run of a source: a preset and, where the sources need a variant of it, what replaces its settings.

    Args:
        preset: a name in `PRESETS`.
        method, model: instead of the preset's.
        copy_of: key of the run in the same table that this one is a copy of, trained from another seed (A' in Madry et al.).
    """

    preset: str
    method: MethodName | None = None
    model: str | None = None
    copy_of: str = ""

    @property
    def config(self) -> Config:
        preset = PRESETS[self.preset]
        return replace(preset, method=self.method or preset.method, model=self.model or preset.model)

    def fits(self, run: Run) -> bool:
        """Whether `run` was trained with this preset (and its method and alpha), at any scale and on any data."""
        ours, theirs = run.config, self.config
        same = (ours.preset, ours.method, ours.alpha) == (theirs.preset, theirs.method, theirs.alpha)
        return same and self.model in (None, ours.model)

    def rank(self, run: Run) -> tuple:
        """Sorts runs that fit: finished ones first, then those with the source's model, then those with the lowest seed."""
        return not run.finished, run.config.model != self.config.model, run.config.seed, run.folder.name

    def command(self, runs: Path | None, data: str | None = None) -> str:
        """The command that trains it into the folder `runs`, on `data` instead of the source's if given."""
        changes = {"method": self.method, "model": self.model, "seed": "1" if self.copy_of else None}
        name = "-".join([self.preset.replace("/", "-"), *(value for value in changes.values() if value)])
        if data and data_name(data) != self.config.data:
            changes["data"] = data
        if self.preset.startswith("table6.3/"):
            changes["extra"] = "PSEUDO_LABELS"
        words = [word for option, value in changes.items() if value for word in (f"--{option}", value)]
        out = str((runs or Path("runs")) / name)
        return shlex.join(["spat-train", "train", "--preset", self.preset, *words, "--out", out])


def training_hint(spec: RunSpec, runs: Sequence[Run], options: Options) -> str:
    """How to train `spec`, for an error message: on the data of `runs`, the others of its table or figure."""
    data = options.data or next((run.config.data for run in runs), None)
    return f"train it: {spec.command(options.runs, data)} (smaller: --limit 2000 --epochs 6 --milestones None --model small-cnn)"


def _data(runs: Iterable[Run], specs: Iterable[RunSpec], options: Options) -> str:
    """Name of the data set to search for: --data, else the source's if there are runs on it, else that of all runs.

    Raises:
        InputError: there are several.
    """
    if options.data is not None:
        return data_name(options.data)
    names = sorted({data_name(run.config.data) for run in runs})
    own = [name for name in names if name in {spec.config.data for spec in specs}]
    if len(names) > 1 and len(own) != 1:
        raise InputError(f"--data: --runs {options.runs} holds runs on {', '.join(names)}: say which")
    return next(iter(own or names), "")


# ---- the runs of a table


def candidates(specs: dict[str, RunSpec], options: Options, given: dict[str, Path]) -> dict[str, list[Run]]:
    """By key, the runs that fit: the one in `given`, else those in --runs, the one to take first."""
    found = {key: [read_run(given[key])] for key in specs if key in given}
    known = find_runs(options.runs)
    fitting = [run for key, spec in specs.items() if key not in given for run in known if spec.fits(run)]
    data = _data(next(iter(found.values()), fitting), specs.values(), options)
    here = [run for run in known if data_name(run.config.data) == data]
    for key, spec in specs.items():
        if key not in given:
            found[key] = sorted(filter(spec.fits, here), key=spec.rank)
            if spec.copy_of:
                originals = found[spec.copy_of][:1]
                found[key] = [run for run in found[key] for original in originals if _is_copy(run, original)]
    return {key: found[key] for key in specs}


def _is_copy(run: Run, original: Run) -> bool:
    return run.config.seed != original.config.seed and not differences(run, original.config)


# ---- the runs of a figure


@dataclass(frozen=True)
class RunSelector:
    """The runs that a figure needs.

    Args:
        words: what it needs, as text.
        fits: whether runs are what it needs.
        specs: what is looked for in --runs, in order of preference.
        place: from --runs, one run is taken for each value of this. None: such a run is never taken.
    """

    words: str
    fits: Callable[[Sequence[Run]], bool]
    specs: tuple[RunSpec, ...]
    place: Callable[[Run], object]

    def take(self, figure: str, given: Sequence[Path], options: Options) -> list[Run]:
        """The runs for `figure`: those in the folders `given`, else those found in --runs.

        Raises:
            InputError: they are not what it needs.
        """
        if options.runs is None and not given:
            raise InputError(
                f"figure {figure}: it needs {self.words}: name their folders, or give the folder that holds them by --runs"
            )
        return self._named(figure, given) if given else self._found(figure, options)

    def _named(self, figure: str, given: Sequence[Path]) -> list[Run]:
        runs = [read_run(folder) for folder in given]
        robust = [run for run in runs if not run.standard]
        if not self.fits(runs) and self.fits(robust):
            print(f"figure {figure}: standard runs are left out, it needs {self.words}")
            runs = robust
        if not self.fits(runs):
            raise InputError(f"figure {figure}: it needs {self.words}: {', '.join(map(str, runs))}: name others")
        return runs

    def _found(self, figure: str, options: Options) -> list[Run]:
        known = find_runs(options.runs)
        fitting = sorted((run for run in known if self._rank(run) and self.place(run) is not None), key=self._rank)
        data = _data(fitting, self.specs, options)
        fitting = [run for run in fitting if data_name(run.config.data) == data]
        taken: dict[object, Run] = {}
        for run in fitting:
            taken.setdefault(self.place(run), run)
        runs = list(taken.values())
        if not self.fits(runs):
            raise InputError(f"figure {figure}: it needs {self.words}: {self._remedy(figure, known, taken, data, options)}")
        if len(fitting) > len(runs):
            print(f"figure {figure}: {len(fitting)} runs in --runs fit: to choose others than these, name their folders")
        return runs

    def _rank(self, run: Run) -> tuple:
        """For sorting, by the first spec that fits; () where none does."""
        return next(((number, *spec.rank(run)) for number, spec in enumerate(self.specs) if spec.fits(run)), ())

    def _remedy(self, figure: str, known: list[Run], taken: dict[object, Run], data: str, options: Options) -> str:
        """Runs to name, where any would do, and the command that trains what is missing."""
        missing = [spec for spec in self.specs if self.place(Run(Path(), spec.config)) not in taken]
        first = min(missing or self.specs, key=lambda spec: spec.config.data != data)
        usable = list({self.place(run): run for run in reversed(known)}.values())
        named = shlex.join(["spat-train", "figure", figure, *(str(run.folder) for run in usable)])
        how = f"name them, such as {named}" if self.fits(usable) else "name their folders"
        lacking = f"--runs {options.runs} has no run with --preset {first.preset}" + (f" on {data}" if data else "")
        return f"{lacking}: {how}, or {training_hint(first, list(taken.values()), options)}"


def roles(runs: Sequence[Run]) -> tuple[int, int]:
    """How many standard and how many robust runs."""
    standard = sum(run.standard for run in runs)
    return standard, len(runs) - standard


_ROWS = {name: config for name, config in PRESETS.items() if not name.startswith("figure")}
_STANDARD = (
    RunSpec("table6.1/madry", method="standard"),
    *(RunSpec(name) for name, config in _ROWS.items() if config.method == "standard"),
)
_ROBUST = tuple(RunSpec(name) for name, config in _ROWS.items() if config.method != "standard")


def _role(run: Run) -> bool:
    return run.standard


STANDARD_AND_ROBUST = RunSelector(
    "one standard and one robust run", lambda runs: roles(runs) == (1, 1), _STANDARD + _ROBUST, _role
)
ONE_ROBUST = RunSelector("one robust run", lambda runs: roles(runs) == (0, 1), _ROBUST, _role)
ROBUST_RUNS = RunSelector("robust runs, one or more", lambda runs: roles(runs)[0] == 0 < len(runs), _ROBUST, _role)
ANY_RUNS = RunSelector("one run or more", lambda runs: len(runs) > 0, _STANDARD + _ROBUST, _role)
