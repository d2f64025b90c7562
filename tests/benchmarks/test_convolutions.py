"""Each convolution with its pass is timed, apart and by every kernel that does both."""

import json

import pytest
import torch

from benchmarks import convolutions
from spat_kernels.fused_conv import choose
from spat_kernels.fused_conv.recipe import apart


class Twin:
    """An engine that computes what PyTorch and ops do."""

    name = "twin"

    def runs_on(self, device):
        return True

    def variants(self, recipe, device):
        return ["a", "b"] if recipe.stride == (1, 1) else []

    def prepare_weight(self, recipe, weight):
        return None

    def run(self, variant, recipe, x, weight, out, **tensors):
        apart(recipe, x, weight, out, **tensors)


def test_convolutions_are_timed_apart_and_fused(tmp_path, monkeypatch, capsys):
    times = iter([2e-6, 1e-6, 4e-6] * 1000)  # apart, a, b

    def chooser(**options):
        return choose.Chooser((Twin(),), timer=lambda call: next(times), applies=lambda device: True, **options)

    monkeypatch.setattr(convolutions, "Chooser", chooser)
    monkeypatch.setattr(choose, "chooser", chooser())
    options = convolutions.Options(models=["wrn-10-1"], batches=[2], device="cpu", out=tmp_path / "out.json")
    convolutions.main(options)
    (cell,) = json.loads(options.out.read_text())["convolutions"]
    timed = [row for row in cell["recipes"] if row["seconds"]]
    assert all(row["choice"] == "twin a" and row["seconds"] == {"apart": 2e-6, "twin a": 1e-6, "twin b": 4e-6} for row in timed)
    assert any(row["reason"] == "no engine does it" for row in cell["recipes"])  # of stride 2
    line = "| wrn-10-1 | gradient bf16 2x64x8x8 -> 64, 3x3 + mask | twin a | 1 | 2.0 | 1.0 | 9 | 2.00x |"
    assert line in capsys.readouterr().out
    assert {row["flops"] for row in timed if "2x64x8x8 -> 64" in row["recipe"]} == {2 * 2 * 64 * 64 * 9 * 64}


def test_it_needs_a_gpu_with_kernels():
    if torch.cuda.is_available() and choose.chooser.applies(torch.device("cuda")):
        pytest.skip("there is one here")
    with pytest.raises(SystemExit, match="no kernel for fused convolutions runs there"):
        convolutions.main(convolutions.Options())
