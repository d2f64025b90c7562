"""Which finished runs a table or a figure takes: those that the user names, else those trained with the source's preset."""

import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path

from ..config import Config
from ..errors import InputError
from ..objectives import MethodName
from ..presets import PRESETS
from .options import Options
from .runs import Run, data_name, differences, find_runs, read_run

# Minutes on a CPU. The rate of the presets, for SGD on larger networks, would train nothing here.
SMALLER = "--limit 2000 --epochs 6 --milestones None --model small-cnn --optimizer adam --lr 0.002 --weight-decay 0 --no-test"


@dataclass(frozen=True)
class RunSpec:
    """A run of a source: a preset and, where the sources need a variant of it, what replaces its settings."""

    preset: str  # a name in `PRESETS`
    method: MethodName | None = None  # instead of the preset's
    model: str | None = None  # instead of the preset's
    copy_of: str = ""  # key of the run in the same table that it repeats from another seed (A' in Madry et al.)

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
        changes = {"--method": self.method, "--model": self.model, "--seed": "1" if self.copy_of else None}
        name = "-".join([self.preset.replace("/", "-"), *filter(None, changes.values())])
        changes["--data"] = data if data and data_name(data) != self.config.data else None
        changes["--extra"] = "PSEUDO_LABELS" if self.preset.startswith("table6.3/") else None
        options = {"--preset": self.preset, **changes, "--out": str((runs or Path("runs")) / name)}
        return shlex.join(["spat-train", "train", *chain(*((option, value) for option, value in options.items() if value))])


def training_hint(spec: RunSpec, folder: Path | None, data: str | None) -> str:
    """How to train `spec` into `folder` on `data`, for an error message."""
    return f"train it: {spec.command(folder, data)} (smaller: {SMALLER})"


def _search(specs: Collection[RunSpec], known: Sequence[Run], folder: Path | None, data: str | None) -> list[list[Run]]:
    """For each spec, the runs of `known` that fit, in the order of preference.

    All are on `data`, else on the source's data if there are runs on it, else on that of all runs.

    Raises:
        InputError: these are several.
    """
    fitting = [[run for run in known if spec.fits(run)] for spec in specs]
    names = {data_name(run.config.data) for run in chain(*fitting)}
    own = names & {spec.config.data for spec in specs}
    if data is None and len(names) > 1 and len(own) != 1:
        raise InputError(f"--data: --runs {folder} holds runs on {', '.join(sorted(names))}: say which")
    chosen = {data_name(data)} if data else own or names
    here = ([run for run in runs if data_name(run.config.data) in chosen] for runs in fitting)
    return [sorted(runs, key=spec.rank) for spec, runs in zip(specs, here, strict=True)]


def candidates(specs: dict[str, RunSpec], known: Sequence[Run], options: Options, given: dict[str, Path]) -> dict[str, list[Run]]:
    """The runs of a table that fit, by key: the one in `given`, else those of `known` (--runs), the best first."""
    named = {key: [read_run(folder)] for key, folder in given.items()}
    data = options.data or next((run.config.data for (run,) in named.values()), None)
    searched = _search(specs.values(), known, options.runs, data)
    found = dict(zip(specs, searched, strict=True)) | named
    for key, spec in specs.items():
        if spec.copy_of and key not in named:
            originals = [original.config for original in found[spec.copy_of][:1]]
            found[key] = [run for run in found[key] for c in originals if run.config.seed != c.seed and not differences(run, c)]
    return found


@dataclass(frozen=True)
class RunSelector:
    """The runs that a figure needs.

    Args:
        words: what it needs, as text.
        fits: whether runs are what it needs.
        specs: what is looked for in --runs, in order of preference.
        place: from --runs, one run is taken for each value of this. None: such a run is never taken. By default, one standard
            and one robust run.
        choose: which of these, and in what order. Runs that the user names stay as they are.
    """

    words: str
    fits: Callable[[Sequence[Run]], bool]
    specs: tuple[RunSpec, ...]
    place: Callable[[Run], object] = attrgetter("standard")
    choose: Callable[[list[Run]], list[Run]] = list

    def take(self, figure: str, given: Sequence[Path], options: Options) -> list[Run]:
        """The runs for `figure`: those in the folders `given`, else those found in --runs.

        Raises:
            InputError: they are not what it needs.
        """
        needs = f"figure {figure}: it needs {self.words}"
        if given:
            runs = [read_run(folder) for folder in given]
            robust = [run for run in runs if not run.standard]
            if not self.fits(runs) and self.fits(robust):
                print(f"figure {figure}: standard runs are left out, it needs {self.words}")
                runs = robust
            if not self.fits(runs):
                raise InputError(f"{needs}: {', '.join(map(str, runs))}: name others")
            return runs
        if options.runs is None:
            raise InputError(f"{needs}: name their folders, or give the folder that holds them by --runs")
        known = [run for run in find_runs(options.runs) if self.place(run) is not None]
        fitting = list(chain(*_search(self.specs, known, options.runs, options.data)))
        taken = self._one_for_each_place(fitting)
        if not self.fits(taken):
            raise InputError(f"{needs}: {self._remedy(figure, known, taken, options)}")
        if len(fitting) > len(taken):
            print(f"figure {figure}: {len(fitting)} runs in --runs fit: to choose others than these, name their folders")
        return taken

    def _one_for_each_place(self, runs: Iterable[Run]) -> list[Run]:
        taken: dict[object, Run] = {}
        for run in runs:
            taken.setdefault(self.place(run), run)
        return self.choose(list(taken.values()))

    def _remedy(self, figure: str, known: list[Run], taken: list[Run], options: Options) -> str:
        """Runs to name, where any would do, and the command that trains what is missing."""
        data = options.data or next((run.config.data for run in taken), None)
        places = set(map(self.place, taken))
        missing = [spec for spec in self.specs if self.place(Run(Path(), spec.config)) not in places]
        first = min(missing or self.specs, key=lambda spec: spec.config.data != data_name(data or ""))
        any_would_do = self._one_for_each_place(known)
        command = shlex.join(["spat-train", "figure", figure, *(str(run.folder) for run in any_would_do)])
        how = f"name them, such as {command}" if self.fits(any_would_do) else "name their folders"
        kind = f"--preset {first.preset}" + (f" --method {first.method}" if first.method else "")
        lacking = f"--runs {options.runs} has no run with {kind}" + (f" on {data_name(data)}" if data else "")
        return f"{lacking}: {how}, or {training_hint(first, options.runs, data)}"


_ROWS = [RunSpec("table6.1/madry", method="standard"), *(RunSpec(name) for name in PRESETS if not name.startswith("figure"))]
_ANY = tuple(sorted(_ROWS, key=lambda spec: spec.config.method != "standard"))  # standard ones first
_ROBUST = tuple(spec for spec in _ANY if spec.config.method != "standard")
STANDARD_AND_ROBUST = RunSelector(
    "one standard and one robust run", lambda runs: sorted(run.standard for run in runs) == [False, True], _ANY
)
ONE_ROBUST = RunSelector("one robust run", lambda runs: [run.standard for run in runs] == [False], _ROBUST)
ROBUST_RUNS = RunSelector(
    "robust runs, one or more", lambda runs: {run.standard for run in runs} == {False}, _ROBUST,
    lambda run: None if run.standard else run.folder,
)  # fmt: skip
ANY_RUNS = RunSelector("one run or more", bool, _ANY)
ALL_RUNS = replace(ANY_RUNS, specs=tuple(dict.fromkeys([*_ANY, *map(RunSpec, PRESETS)])), place=attrgetter("folder"))
