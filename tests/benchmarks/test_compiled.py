"""The race of compiled attacks: what is checked before it, and its table."""

import torch

from benchmarks import compiled


def test_steps_against_the_gradient_are_weighed():
    x, gradient = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[4.0, -3.0], [2.0, -1.0]]]])
    moved = x + compiled.STEP * gradient.sign()
    assert compiled.against(moved, x, gradient) == 0
    moved[0, 0, 1, 0] -= 2 * compiled.STEP
    assert compiled.against(moved, x, gradient) == 0.2
    assert compiled.against(x, x, gradient) == 1


def test_table():
    cell = {"model": "vit", "size": 64, "batch": 4, "precision": "bf16", "compile": "autograd", "auto": "plan"}
    medians = {"spat compile": 0.2, "spat auto": 0.1, "loop": 0.4, "compiled loop": None}
    records = [
        {"provider": name, "ours": name in compiled.OURS, "status": "timed" if median else "failed"}
        | ({"median": median} if median else {})
        for name, median in medians.items()
    ]
    machine = {"device": "CPU", "cuda": None, "cpu": {"flags": []}, "threads": 1, "torch": "2.11", "date": "2026-01-01"}
    text = compiled.table({"machine": machine, "settings": {"steps": 10}, "cells": [cell | {"records": records}]})
    assert "| vit | 64 | 4 | bf16 | autograd | plan | loop | 20 | 10 | 40 | failed | 2.00x | 4.00x |" in text
