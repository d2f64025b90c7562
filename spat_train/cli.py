"""The `spat-train` command."""

import sys

import tyro

from .data import InputError
from .demo import demo

COMMANDS = {"demo": demo}


def main() -> None:
    """Exit codes: 0 done, 2 an argument or the data does not fit."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="spat-train")
    except InputError as error:
        print(f"spat-train: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
