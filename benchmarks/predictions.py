"""Milliseconds that were predicted before there was a GPU, beside what attack.json and training.json of a card measured."""

from collections.abc import Callable

from benchmarks.tables import markdown

OURS, COMPILED, EPILOGUES = "spat plan+graph, fuse=False", "compiled autocast loop", "spat plan+graph"
PREDICTED = {  # ms a step in bf16 at batch 128 and 256
    "h100": {
        "wrn-34-10": {OURS: (9.0, 16.6), COMPILED: (9.4, 17.2), EPILOGUES: (7.5, 13.6)},
        "resnet-18": {OURS: (1.03, 1.82), COMPILED: (1.16, 1.99), EPILOGUES: (0.73, 1.25)},
        "resnet-50": {OURS: (3.4, 6.4), COMPILED: (3.8, 7.0), EPILOGUES: (1.9, 3.4)},
    },
    "h200": {
        "wrn-34-10": {OURS: (8.5, 15.6), COMPILED: (8.8, 16.1), EPILOGUES: (7.4, 13.5)},
        "resnet-18": {OURS: (0.94, 1.63), COMPILED: (1.06, 1.78), EPILOGUES: (0.72, 1.23)},
    },
}
# An update: attack steps, then forwards and backwards, each as long as 1.5 steps of the compiled loop because weights have
# gradients too. The half step of TRADES is a forward of the clean images.
UPDATE_PARTS = {"madry": (10, 1), "mart": (10, 2), "trades": (10.5, 2)}


def table(card: str, attacks: dict, trainings: dict) -> str:
    """Each prediction for the card beside what `attacks` and `trainings`, results of these benchmarks or {}, say."""
    rows = []
    for model, ways in PREDICTED[card].items():
        for way, both in ways.items():
            for batch, ms in zip((128, 256), both, strict=True):
                rows.append(measured({"model": model, "way": way, "batch": batch, "ms": ms}, attack_ms, attacks))
    ours, compiled = (PREDICTED[card]["wrn-34-10"][way][0] for way in (OURS, COMPILED))
    for method, (steps, passes) in UPDATE_PARTS.items():
        way = f"an update of {method}: {steps} x {ours} + {passes} x 1.5 x {compiled}"
        row = {"model": "wrn-34-10", "way": way, "method": method, "batch": 128, "ms": steps * ours + passes * 1.5 * compiled}
        rows.append(measured(row, update_ms, trainings))
    heads = "model | in bf16 || batch | predicted, ms | measured, ms | measured / predicted"
    return markdown({}, rows, heads, "{model} | {way} || {batch} | {ms:.3g} | {measured} | {ratio:.2f}")


def measured(row: dict, measure: Callable[[dict, dict], float], results: dict) -> dict:
    """The row with what the results have of it, and the ratio to the prediction."""
    try:
        ms = measure(row, results)
        return row | {"measured": f"{ms:.3g}", "ratio": ms / row["ms"]}
    except LookupError:
        return row | {"measured": "not yet"}


def attack_ms(row: dict, attacks: dict) -> float:
    """EPILOGUES was predicted with all pointwise work in convolutions: without fuse=False beside it, the plan had none there."""
    apart = any(cell["provider"] == OURS for cell in attacks["cells"])
    if not apart and row["way"] in (OURS, EPILOGUES):
        row = row | {"way": EPILOGUES if row["way"] == OURS else "not built"}
    which = {"model": row["model"], "provider": row["way"], "batch": row["batch"]}
    return median_ms(attacks["cells"], **which) / attacks["settings"]["steps"]


def update_ms(row: dict, trainings: dict) -> float:
    here = {"model": row["model"], "batch": row["batch"], "steps": 10}.items() <= trainings["settings"].items()
    return median_ms(trainings["steps"] if here else [], provider="spat_train", method=row["method"])


def median_ms(records: list[dict], **wanted: object) -> float:
    wanted["precision"] = "bf16"
    return [1e3 * r["median"] for r in records if wanted.items() <= r.items() and "median" in r][0]
