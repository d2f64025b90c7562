import json

import pytest

from benchmarks import networks

pytest.importorskip("timm")


def test_measures_a_network_and_tabulates_it(tmp_path):
    options = networks.Options(
        ("resnet10t",), size=32, batch=2, steps=1, precisions=("fp32",), seconds=0.0, out=tmp_path / "n.json"
    )
    networks.main(options)
    results = json.loads(options.out.read_text())
    (record,) = results["attacks"]
    assert record["path"] == "plan"
    assert set(record["seconds"]) == {"ours", "eager", "channels_last"}
    assert "| resnet10t | plan |" in networks.table(results)
    before = options.out.read_text()
    networks.main(options)
    assert options.out.read_text() == before, "what is there is not measured again"


def test_a_row_names_the_best_rival():
    seconds = {"ours": [1.0, 1.0, 2.0], "eager": [3.0, 3.0, 3.0], "compiled": [2.0, 2.0, 2.0]}
    assert networks.speedup({"seconds": seconds}) == "2.00x (compiled)"


def test_other_gradients_than_those_of_the_loop_end_it(monkeypatch):
    model = networks.network("resnet10t", 32)
    x = networks.photographs(2, 32)
    y = model(x).argmax(1)
    networks.check("resnet10t", model, x, y)
    monkeypatch.setattr(networks.spat_kernels, "pgd", lambda model, x, *args, **kwargs: x)
    with pytest.raises(SystemExit, match="resnet10t: only"):
        networks.check("resnet10t", model, x, y)
