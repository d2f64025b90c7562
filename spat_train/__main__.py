"""`python -m spat_train`, and the `spat-train` command, which needs the packages of an extra."""

import faulthandler
import os
import sys

EXTRA = {"matplotlib", "scipy", "sklearn", "torchvision", "tqdm", "tyro"}


def main() -> None:
    if sys.stderr:
        faulthandler.enable()  # what kills the process, such as a mapped file that is cut short, says so
    try:
        from .cli import main as command

        command()
        sys.stdout.flush()
    except ImportError as error:
        if error.name == "spat_kernels._C":
            sys.exit(f"spat-train: error: {error}")
        if error.name not in EXTRA:
            raise
        sys.exit(f"spat-train: error: {error.name} is not installed: pip install 'spat_kernels[train]'")
    except KeyboardInterrupt:  # before `command` is there to hear it
        print("spat-train: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whatever reads the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
