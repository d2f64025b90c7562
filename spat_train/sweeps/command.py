"""`spat-train sweep`."""

import os
import re
from dataclasses import dataclass, fields
from textwrap import indent
from typing import Any

import tyro

from ..command_line import parse
from ..config import Config
from ..errors import InputError, check_count
from ..runtime.signals import Stopped, interrupts_kept
from . import spec
from .ready import READY
from .spec import Sweep, command, plan, read

ABOUT = """Train over a grid of options, with any number of workers, and report what each option changes.

SPEC is one of those that `spat-train sweep` lists, or a YAML file as below. Every option of `spat-train train` may
follow, and overrides the spec's base; --out is the folder of the sweep, by default runs/SPEC. Each run is an ordinary one, in
a folder there. The same command goes on after any interruption. Started several times at once, with
CUDA_VISIBLE_DEVICES or on machines that share --out, it is that many workers. Machines that share the storage alone share the
runs too, but begin those of a killed one again.

""" + indent(spec.__doc__ or "", "  ")  # without which the help would join the lines


@dataclass(frozen=True)
class Own:
    """Options of `spat-train sweep` itself."""

    storage: str | None = None
    """URL of a database: sqlite:///FILE, postgresql://... or mysql://... Default: OUT/sweep.db."""
    report: bool = False
    """Write the report of the runs so far, and run nothing."""
    dry_run: bool = False
    """Print the commands of the runs, and run nothing."""
    heartbeat: int = 30
    """Seconds between signs of life of a worker, which counts as killed after three times as long without one."""


def sweep(arguments: list[str]) -> None:
    """Train over a grid of options on Optuna, with any number of workers; without a name, list the sweeps that are ready."""
    if not arguments:
        print(
            "\n".join(f"{name:14} {each.runs:3} runs: {each.about}" for name, each in zip(READY, map(read, READY), strict=True))
        )
        return
    source = arguments[0]
    if source.startswith("-") and source not in ("-h", "--help"):
        raise InputError(f"sweep {source}: its spec comes first: give one of {', '.join(READY)}, or a YAML file")
    own, rest = tyro.cli(
        Own, args=arguments[source[0] != "-" :], prog="spat-train sweep SPEC", description=ABOUT, return_unknown_args=True
    )
    check_count("--heartbeat", own.heartbeat)
    planned = plan(read(source), given_options(rest))
    if own.dry_run:
        print("\n".join(command(cell.config) for cell in planned.cells.values()))
    else:
        run(planned, own.storage, heartbeat=own.heartbeat, report_only=own.report)


def run(planned: Sweep, storage: str | None = None, *, heartbeat: int = 30, report_only: bool = False) -> None:
    """Work on the sweep until all its runs are finished, and write its report.

    Args:
        storage: URL of a database. None: SQLite in the folder of the sweep.
        heartbeat: seconds between signs of life, as `search.open_study` has them.
        report_only: write the report alone, of the runs so far.

    Raises:
        InputError: Optuna is not installed, or the storage, an option or the data do not fit.
        Stopped: by SIGTERM or Ctrl-C, after saving.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("sweep: torchrun makes one run of several processes: start a worker for each GPU instead")
    try:
        from . import search  # imports Optuna
    except ImportError as error:
        if not re.match(r"optuna|sqlalchemy|alembic", error.name or ""):
            raise
        raise InputError(f"sweep: {error.name}, 4.9 or later of Optuna, is not there: pip install '.[sweep]'") from error
    from . import report

    with search.quiet():
        study = search.open_study(planned, storage, heartbeat, create=not report_only)
        if not report_only:
            try:
                with interrupts_kept() as look:
                    search.Worker(planned, study).work(look)
            except (Stopped, KeyboardInterrupt) as stop:
                said = f"{str(stop) or 'interrupted'}; the same command goes on with the sweep"
                raise Stopped(getattr(stop, "exit_code", 130) - 128, said) from stop
        for path in report.write(planned, search.latest(study)):
            print(f"{path} written")


def given_options(arguments: list[str]) -> dict[str, Any]:
    """The options of `spat-train train` among `arguments`, with their values. Exits where one does not parse, as that does."""
    config = parse(Config, arguments, prog="spat-train train", description=None)  # whose help has them
    words = {word.split("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    named = {f.name: "-" + f.name.replace("_", "-") for f in fields(Config)}
    return {name: getattr(config, name) for name, option in named.items() if {f"-{option}", f"--no{option}"} & words}
