"""Which runs a figure takes: those named, those that fit best in a folder, or those that are trained for it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..presets import PRESETS
from .reported import ROBUST as ROBUST_SOURCE
from .reported import STANDARD as STANDARD_SOURCE
from .runs import Options, Run, Wanted, closest, completed, data_name, distance, family, find_runs, read_run, title, width

WIDTHS_OF = {"mnist-cnn": (1, 2, 4, 8, 16), "wrn": (1, 2, 5, 10)}  # what capacity trains: Madry et al., Figure 4


@dataclass(frozen=True)
class Role:
    """What a figure needs.

    Args:
        words: in words.
        fits: whether runs are what it needs.
        pick: from all runs on the data, and with --train from training what is missing: the ones to take.
        data: the data set without --data; None is that of the runs.
    """

    words: str
    fits: Callable[[Sequence[Run]], bool]
    pick: Callable[[list[Run], Options], list[Run]]
    data: str | None = None

    def take(self, figure: str, given: Sequence[Path], options: Options) -> list[Run]:
        """The runs for `figure`, `given` by their folders or looked for in --runs.

        Raises:
            InputError: they are not what it needs.
        """
        if given:
            if options.train:
                raise InputError(f"--train: figure {figure} has its runs named ({given[0]}, ...): leave out one or the other")
            runs = [read_run(folder) for folder in given]
            robust = [run for run in runs if not run.standard]
            if not self.fits(runs) and self.fits(robust):
                print(f"figure {figure}: standard runs are left out, it needs {self.words}")
                runs = robust
            where = ", ".join(f"{run.folder} ({title(run.config)}, {run.config.model})" for run in runs)
            remedy = "name others"
        else:
            if options.runs is None:
                raise InputError(
                    f"figure {figure}: it needs {self.words}: name their folders, or give the folder that holds them by --runs"
                )
            found = find_runs(options.runs)
            options = replace(options, data=options.data or self._data(found, options))
            here = [run for run in found if data_name(run.config.data) == options.data_name]
            if options.scale.model:
                here = [run for run in here if family(run.config.model) == family(options.scale.model)]
            runs = self.pick(here, options)
            kinds = ", ".join(sorted({f"{title(run.config)} {run.config.model}" for run in here})) or "nothing"
            where = f"--runs {options.runs} has {kinds} on {options.data_name}"
            remedy = "name folders, or add --train"
        if not runs or not self.fits(runs):
            raise InputError(f"figure {figure}: it needs {self.words}: {where}: {remedy}")
        return runs

    def _data(self, runs: Sequence[Run], options: Options) -> str:
        names = sorted({data_name(run.config.data) for run in runs})
        if self.data:
            return self.data
        if len(names) > 1:
            raise InputError(f"--data: --runs {options.runs} holds runs on {', '.join(names)}: say which")
        return runs[0].config.data if names else "cifar10"


# ---- one standard run, one robust run


def _nearest(runs: Sequence[Run], wanted: Wanted, options: Options, model: str | None = None) -> Run | None:
    """Of the same role; the robust one rather trained by the same method."""
    c = wanted.config
    model = model or wanted.model(options) or c.model

    def order(run: Run) -> tuple:
        return (run.config.method, run.config.alpha) != (c.method, c.alpha), *distance(run, c, model)

    run = min((run for run in runs if run.standard == (c.method == "standard")), key=order, default=None)
    return completed(run, wanted, None, options) if options.train else run


def _robust(runs: list[Run], options: Options) -> list[Run]:
    source = ROBUST_SOURCE.get(options.data_name, ROBUST_SOURCE["cifar10"])
    run = _nearest(runs, Wanted(source), options)
    return [run] if run else []


def _pair(runs: list[Run], options: Options) -> list[Run]:
    robust = _robust(runs, options)
    source = STANDARD_SOURCE.get(options.data_name, STANDARD_SOURCE["cifar10"])
    standard = _nearest(runs, Wanted(source), options, robust[0].config.model if robust else None)
    return [standard, *robust] if standard else robust


def _roles(runs: Sequence[Run]) -> tuple[int, int]:
    standard = sum(run.standard for run in runs)
    return standard, len(runs) - standard


PAIR = Role("one standard and one robust run", lambda runs: _roles(runs) == (1, 1), _pair)
ROBUST = Role("one robust run", lambda runs: _roles(runs) == (0, 1), _robust)
TRAININGS = Role("robust runs, one or more", lambda runs: _roles(runs)[0] == 0 < len(runs), _robust)
ANY = Role("one run or more", lambda runs: len(runs) > 0, _pair)


# ---- a grid of alphas and radii


def grid(figure: str, data: str) -> Role:
    """Madry and Madry+SPAT runs of one model with different alphas, a line for each radius."""
    sources = [config for name, config in PRESETS.items() if name.startswith(f"figure{figure}/")]

    def pick(runs: list[Run], options: Options) -> list[Run]:
        runs = [run for run in runs if run.config.method == "madry"]
        if options.train:
            share = (options.eps or 8.0) / 8.0  # --eps is what 8/255 is there
            options = replace(options, eps=None)
            wants = [Wanted(replace(c, eps=c.eps * share, eval_eps=c.evaluation_eps * share)) for c in sources]
            return [completed(closest(runs, want, options), want, None, options) for want in wants]
        runs = _largest(runs, lambda run: run.config.model)
        places = dict.fromkeys((run.config.eps, run.config.alpha) for run in runs)
        return [_best([r for r in runs if (r.config.eps, r.config.alpha) == place], sources[0]) for place in places]

    def fits(runs: Sequence[Run]) -> bool:
        places = {(run.config.eps, run.config.alpha) for run in runs}
        return all(run.config.method == "madry" for run in runs) and len(places) == len(runs) > 1

    return Role("Madry runs that differ in alpha, and in eps where that has several lines", fits, pick, data)


def _largest(runs: Sequence[Run], key: Callable[[Run], str]) -> list[Run]:
    """The runs of the `key` that most have."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return max(groups.values(), key=len, default=[])


def _best(runs: Sequence[Run], source) -> Run:
    return min(runs, key=lambda run: distance(run, source, run.config.model))


# ---- widths


def _narrowed(model: str, to: int) -> str:
    return f"mnist-cnn/{to}" if family(model) == "mnist-cnn" else re.sub(r"\d+$", str(to), model)


def _without_width(model: str) -> str:
    return _narrowed(model, 0)


def _widths(runs: list[Run], options: Options) -> list[Run]:
    data = options.data_name
    standard, robust = (s.get(data, s["cifar10"]) for s in (STANDARD_SOURCE, ROBUST_SOURCE))
    plain = [r for r in runs if width(r.config.model) and r.config.method in ("standard", "madry") and not r.config.alpha]
    if options.train:
        model = options.scale.model or robust.model
        if width(model) is None:
            raise InputError(f"--model {model}: it has no width: give wrn-DEPTH-WIDTH or mnist-cnn/WIDTH")
        taken = []
        for source in (standard, robust):
            for to in WIDTHS_OF[family(model)]:
                want = Wanted(replace(source, model=_narrowed(model, to), preset=""), fixed=True)
                same = [
                    r for r in plain if width(r.config.model) == to and _without_width(r.config.model) == _without_width(model)
                ]
                taken.append(completed(closest(same, want, options), want, None, options))
        return taken
    plain = _largest(plain, lambda run: _without_width(run.config.model))
    places = dict.fromkeys((run.standard, width(run.config.model)) for run in plain)
    of_place = ([r for r in plain if (r.standard, width(r.config.model)) == place] for place in places)
    return [_best(found, standard if found[0].standard else robust) for found in of_place]


def _differ_in_width(runs: Sequence[Run]) -> bool:
    known = all(width(run.config.model) for run in runs)
    return (
        known
        and len({_without_width(run.config.model) for run in runs}) == 1
        and len({width(run.config.model) for run in runs}) > 1
    )


WIDTHS = Role("runs of wrn-DEPTH-WIDTH or mnist-cnn/WIDTH of different widths", _differ_in_width, _widths)
