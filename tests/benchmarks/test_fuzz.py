import json

from hypothesis import strategies as st

from benchmarks import fuzz
from tests.fuzz.campaign import Target


def odd(number: int) -> str:
    assert number % 5
    return "held" if number % 2 else "refused"


def test_counts_how_inputs_end_and_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "TARGETS", {"sizes": Target(st.integers(0, 1000), odd)})
    monkeypatch.setattr(fuzz, "INPUTS", {"sizes": 700})
    out = tmp_path / "fuzz.json"
    fuzz.main(fuzz.Options(share=0.5, out=out))
    first = json.loads(out.read_text())["batches"]
    assert [batch["inputs"] for batch in first] == [500]
    fuzz.main(fuzz.Options(out=out))
    results = json.loads(out.read_text())
    assert results["batches"][:1] == first, "what is there is not tried again"
    assert sum(sum(batch["outcomes"].values()) for batch in results["batches"]) == 700
    assert all("AssertionError" in error for batch in results["batches"] for error in batch["finds"])
    assert first[0]["finds"]
    assert "| `--train-sizes` | 700 |" in fuzz.table(results)


def test_a_full_run_has_every_target():
    assert fuzz.INPUTS.keys() == fuzz.ABOUT.keys() == fuzz.TARGETS.keys()
    assert sum(fuzz.INPUTS.values()) >= 10**5
