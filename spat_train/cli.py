"""The `spat-train` command."""

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro

from .command_line import DEFAULT_IN_HELP, parse
from .config import Config
from .demo import demo
from .errors import InputError, lookup, one_line
from .evaluation.command import EvaluateOptions, attacks_command, evaluate_command
from .papers import figures, tables
from .papers.options import Extent, Options
from .presets import PRESETS
from .runtime.atomic_write import SaveError
from .runtime.distributed import PeerError, first_to_say, said_once
from .runtime.signals import Stopped
from .sharing.export import export_command
from .sweeps.command import sweep
from .training.curves import write_curves
from .training.trainer import TrainingError
from .training.trainer import train as run

OLD_NAMES = {"--tensorboard": "--track=auto", "--no-tensorboard": "--track=none"}


def training_config(arguments: list[str]) -> Config:
    """The options of `spat-train train`."""
    if (old := OLD_NAMES.keys() & {*arguments}) and any(word.split("=")[0] == "--track" for word in arguments):
        raise InputError(f"{min(old)}: it is {OLD_NAMES[min(old)]} now: give --track alone")
    arguments = [OLD_NAMES.get(word, word) for word in arguments]
    parser = argparse.ArgumentParser("spat-train train", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", const="", default="")  # without a value tyro says what is missing
    chosen = parser.parse_known_args(arguments)[0].preset
    default = lookup("--preset", chosen, PRESETS, remedy="see spat-train presets") if chosen else None
    return parse(Config, arguments, prog="spat-train train", description=train.__doc__, default=default)


def train(arguments: list[str]) -> None:
    """Train a robust model: attack, update, validate, save; with --resume go on after any interruption."""
    with said_once():
        config = training_config(arguments)
    result = run(config)
    if result.summary:
        print(result.summary)


def evaluate(arguments: list[str]) -> None:
    """Attack a trained model at the test images, and write a report. Interrupted, the same command continues."""
    with said_once():
        options = parse(EvaluateOptions, arguments, prog="spat-train evaluate", description=evaluate_command.__doc__)
    evaluate_command(options)


def presets() -> None:
    """List the presets: the thesis's tables and figures, Madry's networks, single-step methods, FastAT, AWP, ADT, ImageNet."""
    for name, config in PRESETS.items():
        spat = f" alpha {config.alpha:g}" if config.alpha else ""
        print(f"{name:33} {config.method}{spat}, {config.model} on {config.data}, eps {config.eps:g}/255, {config.epochs} epochs")


def plot(runs: Annotated[tuple[Path, ...], DEFAULT_IN_HELP], /, out: Path = Path("curves.png")) -> None:
    """Draw the loss, the learning rate and the held-out accuracies of runs against epochs.

    Args:
        runs: folders that `spat-train train` wrote.
        out: where the picture goes, a .png or .pdf file.
    """
    write_curves(out, runs)
    print(f"{out} written")


def figure(
    name: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(figures.FIGURES)}.")] = "",
    run: tuple[Path, ...] = (),
    /,
    out: Path = Path("figures"),
    options: Annotated[tyro.conf.OmitArgPrefixes[Options], tyro.conf.arg(name="runs and attacks")] = Options(),  # noqa: B008
    extent: Annotated[tyro.conf.OmitArgPrefixes[Extent], tyro.conf.arg(name="picture")] = Extent(),  # noqa: B008
) -> None:
    """Draw a figure of the papers from finished runs; without a name, list them all and what each needs.

    Args:
        run: folders of runs, instead of searching --runs.
        out: folder that figure-NAME.png, .pdf and .json go to.
    """
    if not name:
        print(figures.listing())
        return
    for path in figures.draw(name, run, options, extent, out):
        print(f"{path} written")


def table(
    name: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(tables.TABLES)}.")] = "",
    /,
    run: tuple[str, ...] = (),
    out: Path = Path("tables"),
    options: Annotated[tyro.conf.OmitArgPrefixes[Options], tyro.conf.arg(name="runs and attacks")] = Options(),  # noqa: B008
) -> None:
    """Fill a table of the papers from finished runs, ours beside theirs; without a name, list them all and their runs.

    Args:
        run: KEY=FOLDER, the run to take for KEY instead of searching --runs; several may follow.
        out: folder that table-NAME.md and .json go to.
    """
    if not name:
        print(tables.listing())
        return
    filled = tables.fill(name, options, tables.read_given(run), out)
    print(tables.markdown(filled))
    for path in tables.write(filled, out):
        print(f"{path} written")


COMMANDS: dict[str, dict[str, Callable]] = {  # by purpose, as --help lists them
    "training": {"train": train, "sweep": sweep},
    "evaluation": {"evaluate": evaluate, "attacks": attacks_command},
    "the papers": {"figure": figure, "table": table, "plot": plot},
    "to share": {"export": export_command},
    "to begin with": {"presets": presets, "demo": demo},
}
BY_NAME = {name: command for group in COMMANDS.values() for name, command in group.items()}


def listing() -> str:
    lines = ["usage: spat-train COMMAND [OPTIONS]", "       spat-train COMMAND --help", "       spat-train --version"]
    for purpose, commands in COMMANDS.items():
        lines += ["", purpose, *(f"  {name:10}{(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items())]
    return "\n".join(lines)


def main() -> None:
    """Exit codes: 0 done; 1 the run cannot go on; 2 an option, the data or a checkpoint does not fit; 128 + n: signal n."""
    name, *arguments = sys.argv[1:] or ["--help"]
    try:
        if name in ("--help", "-h"):
            print(listing())
        elif name == "--version":
            print(f"spat_kernels {version('spat_kernels')}, torch {torch.__version__}")
        else:
            command = lookup("command", name, BY_NAME)
            if command in (train, evaluate, sweep):
                command(arguments)
            else:
                tyro.cli(command, prog=f"spat-train {name}", args=arguments)
    except InputError as error:
        _leave(f"error: {error}", 2)
    except (TrainingError, SaveError, PeerError) as error:
        _leave(f"error: {error}", 1)
    except Stopped as stopped:
        _leave(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def _leave(message: str, code: int) -> None:
    if first_to_say(message):
        print(one_line(f"spat-train: {message}"), file=sys.stderr, flush=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()  # the threads of torch.distributed may not outlive Python: they would abort this process
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
