"""Small sweeps, real ones on the digits and ones whose training is a formula."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import yaml

from spat_train.config import Config
from spat_train.sweeps import search
from spat_train.sweeps.spec import Sweep, plan, read
from spat_train.training.run import Result
from tests.training.helpers import settings

SMALL = {name: value for name, value in settings().to_dict().items() if value != getattr(Config(), name)}


def planned(tmp_path: Path, grid: dict, given: dict | None = None, **keys) -> Sweep:
    """A sweep of runs that take well under a second, in tmp_path/out."""
    file = tmp_path / "spec.yaml"
    swept = {
        option
        for factor, levels in grid.items()
        for level in levels
        for option in (level if isinstance(level, dict) else [factor])
    }
    base = {option: value for option, value in SMALL.items() if option not in swept}
    file.write_text(yaml.safe_dump({"base": base, "grid": grid} | keys, sort_keys=False))
    return plan(read(str(file)), {"out": tmp_path / "out"} | (given or {}))


def study_of(sweep: Sweep, heartbeat: int = 30) -> optuna.Study:
    with search.quiet():
        return search.open_study(sweep, None, heartbeat)


def work(sweep: Sweep) -> optuna.Study:
    study = study_of(sweep)
    with search.quiet():
        search.Worker(sweep, study).work(lambda: None)
    return study


def formula(accuracy: Callable[[Config, int], float], calls: list[str] | None = None) -> Callable[..., Result]:
    """Stands in for `train`: its PGD accuracy after an epoch is `accuracy`, the clean one 10 points more, of 200 images."""

    def train(config: Config, on_validation) -> Result:
        records = []
        if calls is not None:
            calls.append(config.out.name)
        for epoch in range(1, config.epochs + 1):
            pgd = accuracy(config, epoch)
            records.append({"epoch": epoch, "clean": pgd + 10, "pgd": pgd})
            best = max(records, key=lambda record: record["pgd"])
            run = SimpleNamespace(progress=SimpleNamespace(best=best), held_out=range(200), finished=epoch == config.epochs)
            on_validation(run, records[-1])
        return Result(None, best, None, config.out, "", 200)

    return train
