"""Results as the benchmarks write them, of which tables and pages are made."""

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
