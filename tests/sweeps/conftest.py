"""What makes tests of sweeps quick: databases that are not flushed to the disk, no collection of garbage after each trial."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _quick(monkeypatch, one_thread):
    engine = pytest.importorskip("sqlalchemy.engine").Engine
    event = pytest.importorskip("sqlalchemy.event")

    def not_flushed(connection, record):
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(engine, "connect", not_flushed)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    yield
    event.remove(engine, "connect", not_flushed)
