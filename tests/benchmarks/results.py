"""Results as the benchmarks write them, of which tables and pages are made."""

import json
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMMITTED = sorted(f"{path.parent.name}/{path.stem}" for path in RESULTS.glob("*/*.json"))
H100 = {
    "device": "NVIDIA H100 80GB HBM3", "cpu": {"model": "Xeon", "cores": 16, "flags": ["avx512f"]}, "threads": 4, "torch": "2.11",
    "cuda": "13.0", "date": "2026-11-26T00:00:00+00:00", "commit": "c0ffee",
}  # fmt: skip


def record(provider: str, seconds: float | None, ours: bool = False, precision: str = "bf16", **more: object) -> dict:
    """The record of a provider that took `seconds`, or was not installed (None)."""
    end = {"status": "timed", "median": seconds} if seconds else {"status": "absent", "note": "no module"}
    return {"provider": provider, "precision": precision, "ours": ours, "note": "", **end, **more}


CELL = {"model": "wrn-34-10", "batch": 256, "limit": {"conv": 0.005, "roofline": 0.01}, "peak_mib": 10.0}
ATTACK = {
    "machine": H100, "settings": {"steps": 10}, "ceilings": {"copy_gbps": 3000.0, "tflops": {"bf16": 800.0}},
    "cells": [record("spat plan+graph", 0.166, True, **CELL), record("loop", 1.0, **CELL), record("ART", None, **CELL)],
}  # fmt: skip
TRAINING = {
    "machine": H100, "settings": {"model": "wrn-34-10", "batch": 128, "steps": 10}, "steps": [
        record("spat_train", 0.236, True, method="mart"), record("autocast", 0.3, method="mart"),
        record("authors", 1.0, precision="fp32", method="mart"), record("compiled", None, method="mart"),
    ],
}  # fmt: skip
BEST = {"plan": "eng2_k24=3", "ms": 0.1, "errors": {"out": 0.003}}
GRAPH = {"graph": "conv", "shape": "160@32", "batch": 256, "flops": 10**11, "conv_ms": 0.2, "now_ms": 0.25}
FUSED = {"machine": H100, "fused": [
    GRAPH | {"graph": "dgrad, act", "best": BEST, "tried": [BEST, {"plan": "eng2_k24=4", "failed": "no"}]},
    GRAPH | {"tried": [{"plan": "eng41", "failed": "no"}]}, GRAPH | {"tried": []},
]}  # fmt: skip


def committed(name: str) -> dict:
    """CARD/NAME, with the first six items of every list alone; of the kernels, with all of a case and the yardstick in memory."""
    results = json.loads((RESULTS / f"{name}.json").read_text())
    if name == "cpu/kernels":
        cases = {"lsce_grad 512x10 alpha=0", "copy_ 67108864"}
        runs = [r for r in results["benchmarks"] if r["group"] in cases and r["extra_info"]["pass"] == 0]
        return results | {"benchmarks": runs}
    return shortened(results)


def shortened(value, most: int = 6):
    if isinstance(value, dict):
        return {key: shortened(item, most) for key, item in value.items()}
    return [shortened(item, most) for item in value[:most]] if isinstance(value, list) else value


def cuts(value) -> Iterator:
    """`value`, cut after each part of each of its lists and dicts, and without each key."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield value[:n]
            yield from ([*value[:n], cut, *value[n + 1 :]] for cut in cuts(item))
    elif isinstance(value, dict):
        for n, (key, item) in enumerate(value.items()):
            yield dict(list(value.items())[:n])
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: cut} for cut in cuts(item))
