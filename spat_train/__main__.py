"""`python -m spat_train`, and the `spat-train` command, which needs the packages of an extra."""

import sys

EXTRA = {"matplotlib", "sklearn", "torchvision", "tqdm", "tyro"}


def main() -> None:
    try:
        from .cli import main as command

        command()
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(f"spat-train: error: {error.name} is not installed: pip install 'spat_kernels[train]'")


if __name__ == "__main__":
    main()
