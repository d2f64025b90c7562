"""What makes tests of sweeps quick: databases that are not flushed to the disk, whose migrations are listed once; coarse
pictures; no collection of garbage after each trial."""

import gc

import pytest

from spat_train import plotting

_scripts: list = []  # alembic's list of Optuna's migrations, the same for all databases


@pytest.fixture(autouse=True)
def _quick(monkeypatch, one_thread):
    engine = pytest.importorskip("sqlalchemy.engine").Engine
    event = pytest.importorskip("sqlalchemy.event")
    versions = pytest.importorskip("optuna.storages._rdb.storage")._VersionManager
    listed = versions._create_alembic_script

    def not_flushed(connection, record):
        connection.execute("PRAGMA synchronous=OFF")

    def listed_once(self):
        if not _scripts:
            _scripts.append(listed(self))
        return _scripts[0]

    event.listen(engine, "connect", not_flushed)
    monkeypatch.setattr(versions, "_create_alembic_script", listed_once)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(plotting, "DPI", 40)
    yield
    event.remove(engine, "connect", not_flushed)
