"""Table 6.1 in minutes: stopped, continued, never repeated."""

import json
import os
import shutil
import signal

import pytest

from benchmarks import table61


@pytest.mark.slow
def test_table61(tmp_path, tiny_npz, monkeypatch):
    """A row is trained and tested, another is stopped; a later command adds to the file, and repeats nothing."""
    out = tmp_path / "table61.json"

    def run(*rows: str, **options) -> list[dict]:
        small = {"model": "small-cnn", "epochs": 1, "precision": "fp32"}
        table61.main(table61.Arguments(tiny_npz, out, tmp_path / "runs", list(rows), **small | options))
        return json.loads(out.read_text())["thesis"]

    (row,) = run("mart+spat")
    assert row["title"] == "MART+SPAT(.3)"
    assert "epochs 1 (90)" in row["differs"]
    assert len(row["validations"]) == 1
    assert {name: e["images"] for name, e in row["evaluation"].items()} == dict.fromkeys(row["thesis"], 20)
    assert row["evaluation"]["PGD-20"]["accuracy"] <= row["evaluation"]["natural"]["accuracy"]
    assert row["thesis"]["natural"] == 81.93
    (tmp_path / "runs" / "small-cnn-mart+spat").rename(tmp_path / "runs" / "of others")
    config = tmp_path / "runs" / "of others" / "config.json"
    config.write_text(config.read_text().replace('"mart"', '"standard"'))
    assert run("mart+spat") == [row]
    assert len(list((tmp_path / "runs").iterdir())) == 1
    shutil.rmtree(tmp_path / "runs")
    saved = tmp_path / "runs" / "small-cnn-trades" / "last.pt"
    train = table61.train
    stop = lambda run: saved.exists() and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(table61, "train", lambda config: train(config, on_step=stop))
    with pytest.raises(SystemExit, match="143"):
        run("trades", epochs=1000)
    rows = json.loads(out.read_text())["thesis"]
    assert [r["row"] for r in rows] == ["trades", "mart+spat"]
    assert rows[1] == row
    assert not rows[0]["evaluation"]
    assert rows[0]["trained"] < 1000
    table = table61.table(json.loads(out.read_text()))
    assert "| MART+SPAT(.3) | small-cnn | 1 |" in table
    assert " of 1000 |" in table
    monkeypatch.setattr(table61, "train", lambda config: 1 / 0)
    with pytest.raises(SystemExit, match="not done yet: madry, mart; what failed has said why"):
        run("madry", "mart")
    for wrong, options in (("--rows spat: choose from madry", {}), ("--epochs 0", {"epochs": 0})):
        with pytest.raises(SystemExit, match=wrong):
            run("spat" if not options else "madry", **options)
