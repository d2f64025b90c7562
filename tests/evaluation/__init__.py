import pytest

for package in ("sklearn", "tyro", "tqdm"):
    pytest.importorskip(package)
