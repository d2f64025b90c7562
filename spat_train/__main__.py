"""`python -m spat_train`, and the `spat-train` command, which needs the packages of an extra."""

import errno
import faulthandler
import os
import sys

EXTRA = {"matplotlib", "scipy", "sklearn", "torchvision", "tqdm", "tyro"}


def main() -> None:
    for name in ("stdin", "stdout", "stderr"):  # a closed one is None, and its number would be that of the next file
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  (until the end)
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # what kills the process, such as a mapped file that is cut short, says so
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
        _write_no_more()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename:
            raise
        _write_no_more()
        sys.exit(f"spat-train: error: the output cannot be written ({error.strerror}): make room, or send it elsewhere")


def _write_no_more() -> None:
    """Python would try to write the rest of the output again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
