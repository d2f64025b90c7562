"""The table of the kernels alone, from what `python -m pytest benchmarks --benchmark-json=kernels.json` (test_kernels.py) writes.

A time is the median of a pass's rounds, in the provider's best pass. GB/s counts the bytes that ours must move; `of copy` divides
that by what `copy_` of a working set of the same size moves in the same run (in the same cache, so it can be far above the speed
of memory).
"""

from benchmarks.tables import literal, markdown


def providers(results: dict) -> dict[str, dict[str, dict]]:
    """Case to provider to its extra_info and `us`."""
    cases: dict[str, dict[str, dict]] = {}
    for run in results["benchmarks"]:
        info, us = run["extra_info"], run["stats"]["median"] * 1e6 / run["extra_info"].get("calls", 1)
        entry = cases.setdefault(run["group"], {}).setdefault(info["provider"], info | {"us": us})
        entry["us"] = min(entry["us"], us)
    return cases


def table(results: dict) -> str:
    """Ours against each rival in each case, and the yardsticks."""
    rows, notes = [], []
    for case, found in providers(results).items():
        copy = next((p for p in found.values() if p["role"] == "yardstick"), None)
        if copy is None:  # it failed, or the run ended before it
            notes.append(literal(f"{case} has no yardstick."))
        elif ours := found.get("spat"):
            moved = ours["bytes_moved"]
            speeds = {"gbps": moved / ours["us"] / 1e3, "copy": copy} if moved else {}
            others = [p for p in found.values() if p["role"] == "rival" or (p is copy and not moved)]
            rows += [ours | {"case": case, "other": p, "ratio": p["us"] / ours["us"]} | speeds for p in others]
        else:
            held = copy["bytes_held"]
            notes.append(literal(f"`copy_` of {held >> 21} MiB: {held / copy['us'] / 1e3:.1f} GB/s."))
    device = "{machine_info[gpu]}" if "gpu" in results["machine_info"] else "{machine_info[cpu][model]}"
    return markdown(
        results, rows,
        "case | against || ours, µs | theirs, µs | ratio | GB/s | of copy",
        "{case} | {other[provider]} || {us:.1f} | {other[us]:.1f} | {ratio:.1f}x | {gbps:.1f} | {of_copy:.0%}",
        f"{device}, {{machine_info[threads]}} threads, torch {{machine_info[torch]}}.", *notes,
        of_copy=lambda r: 1e3 * r["gbps"] * r["copy"]["us"] / r["copy"]["bytes_held"],
    )  # fmt: skip
