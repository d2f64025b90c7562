"""cuDNN's fused graphs are built, compared rightly, and measured once."""

import ctypes
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import fused, measure
from tests.benchmarks.results import FUSED, H100


@pytest.mark.parametrize("name", fused.GRAPHS)
def test_the_plans_own_way_computes_the_graph(name):
    v = fused.inputs(name, 2, "24@8", "cpu")
    expected = fused.reference(name, v)
    convolution, both = fused.planned(name, v)
    assert convolution().shape == v["x" if "x" in v else "dy"].shape
    assert expected.keys() == ({"out", "total"} if "total" in name else {"out"})
    assert fused.agree(fused.errors(both(), expected))
    for key in v.keys() - {"x", "dy"}:  # each input matters
        wrong = fused.reference(name, v | {key: torch.zeros_like(v[key])})
        assert not fused.agree(fused.errors(wrong, expected))


@pytest.mark.slow
def test_fused_plans_are_built(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend", exc_type=ImportError)
    if torch.cuda.is_available() and not any(card in torch.cuda.get_device_name().lower() for card in fused.CARDS):
        pytest.skip("the GPU is neither an H100 nor an H200")
    monkeypatch.setattr(fused, "TILES", (3,))
    monkeypatch.setattr(fused, "PROPOSED", range(1))
    graphs = {"conv, bias, relu": None, "dgrad, residual, act": 2}
    monkeypatch.setattr(fused, "SHAPES", ["64@32"])
    monkeypatch.setattr(fused, "GRAPHS", graphs)
    fused.main(fused.Options("build", plans=tmp_path))
    assert capsys.readouterr().out == "".join(f"64@32 {name}: 1 built\n" for name in graphs)
    plans = {path: path.read_bytes().split(b"\n")[0].split(b"_")[0] for path in tmp_path.rglob("*.plan")}
    assert sorted(plans.values()) == [b"eng2", b"eng41"]
    assert {fused.build("conv", 256, "64@32", "h100", 0, path) for path in plans} == {"there"}


def test_fused_options(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        fused.main(fused.Options("both"))
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(SystemExit, match="pip install --no-deps nvidia-cudnn-frontend==1.15.0"):
        fused.main(fused.Options("build", plans=tmp_path))


def test_plans_that_are_wrong_or_fail_are_not_timed(tmp_path, monkeypatch):
    name = "conv, residual, total, scale, shift, relu"
    v = fused.inputs(name, 2, "24@8", "cpu")
    expected = fused.reference(name, v)

    class Graph:
        def __init__(self, handle):
            assert handle == "handle"

        def deserialize(self, handle, plan):
            self.plan = bytes(plan)

        def get_workspace_size(self):
            return 0

        def execute(self, pointers, work, handle):
            if self.plan == b"fails":
                raise RuntimeError("no such engine")
            assert {key: pointers[fused.UIDS[key]] for key in v} == {key: value.data_ptr() for key, value in v.items()}
            for key in ("out",) if self.plan == b"half" else ("out", "total"):
                result = expected[key].bfloat16()
                ctypes.memmove(pointers[fused.UIDS[key]], result.data_ptr(), 2 * result.numel())

    monkeypatch.setattr(fused, "cudnn", lambda: SimpleNamespace(pygraph=Graph))
    monkeypatch.setattr(fused, "ms", lambda call: 0.5)
    found = {}
    for plan in (b"right", b"half", b"fails"):
        (tmp_path / "a.plan").write_bytes(b"eng2_k24=3\n" + plan)
        found[plan] = fused.timed("handle", tmp_path / "a.plan", v, expected)
    assert found[b"right"]["ms"] == 0.5
    assert found[b"right"]["errors"].keys() == {"out", "total"}
    assert found[b"half"]["failed"] == "differs from the reference"
    assert "ms" not in found[b"half"]
    assert found[b"fails"] == {"plan": "eng2_k24=3", "failed": "RuntimeError: no such engine"}


def test_rows_without_plans_are_measured_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(fused, "cudnn", lambda: SimpleNamespace(create_handle=lambda: "handle", set_stream=lambda *_: None))
    monkeypatch.setattr(measure, "describe", lambda device: H100)
    monkeypatch.setattr(fused, "measured", lambda *_: FUSED["fused"][0])
    monkeypatch.setattr(fused, "PROPOSED", ())  # nothing is built
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(fused, "SHAPES", ["160@32"])
    monkeypatch.setattr(fused, "GRAPHS", dict.fromkeys(("conv", "dgrad")))
    options = fused.Options("both", tmp_path / "fused.json", tmp_path)
    rows = [FUSED["fused"][2] | {"graph": "conv"}, FUSED["fused"][1] | {"graph": "dgrad"}]  # the second was tried
    measure.write(options.out, measure.begun("fused", "cuda", fused=rows))
    fused.main(options)
    assert (tmp_path / "h200").is_dir()
    assert [bool(row["tried"]) for row in json.loads(options.out.read_text())["fused"]] == [True, True]
    assert capsys.readouterr().out.startswith("160@32 conv: \n| graph |")
