"""Which path attacks take through networks of timm, and how fast: `python -m benchmarks.networks --out networks.json`.

An attack of ours with its default settings, and the loops of rivals.py, take as many steps on the same images, in turns. The best
rival is the fastest of the eager loop, that in channels_last, and the compiled one (--compiled: a minute for each network and
precision).
Networks have random weights, since only time is measured; images are 96x96, or of the least size that a network takes.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

import spat_kernels
from benchmarks import measure
from benchmarks.judge import photographs
from benchmarks.rivals import EPS, STEP, autocast_loop, plain_loop, spat_pgd
from benchmarks.tables import environment, markdown

NETWORKS = (
    "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "seresnet50", "resnetv2_50", "resnetv2_50x1_bit", "regnetx_008",
    "regnety_008", "densenet121", "vgg11", "vgg16_bn", "inception_v3", "inception_v4", "dla34", "hrnet_w18_small", "repvgg_a0",
    "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "mnasnet_100", "ghostnet_100",
    "efficientnet_b0", "efficientnet_b2", "tf_efficientnetv2_b0", "convnext_atto", "convnext_nano", "convnext_tiny",
    "convnextv2_atto", "convnextv2_tiny", "inception_next_tiny", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "vit_tiny_patch16_224", "vit_small_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "xcit_nano_12_p16_224",
    "mixer_s32_224",
)  # fmt: skip
TOKENS = ("swin", "vit", "deit", "xcit", "mixer")  # these are made for one size of images
AGREE = 0.98  # of the pixels, after one step from the image in fp64: in fp32 random networks turn the signs of a fourth


@dataclass
class Options:
    """Which path attacks take through networks of timm, and how fast."""

    networks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = NETWORKS
    size: int = 96
    batch: int = 16
    steps: int = 2
    precisions: tuple[str, ...] = ("fp32", "bf16")
    compiled: bool = False
    """Time the compiled loop too."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 4.0
    """To time each attack for."""
    out: Path | None = None
    """Write the results here, after every network and precision. What is there already is not measured again."""


def network(name: str, size: int) -> nn.Module:
    import timm

    torch.manual_seed(0)
    sized = {"img_size": size} if name.startswith(TOKENS) else {}
    return timm.create_model(name, num_classes=100, **sized).eval()


def calls_of(model: nn.Module, precision: str, options: Options) -> dict:
    """Ours and the rivals: name -> attack (x, y) -> x_adv."""
    loop = partial(autocast_loop, model, options.steps, precision)
    calls = {"ours": spat_pgd(model, options.steps, precision, "auto", "auto"), "channels_last": loop()}
    if precision == "fp32":
        calls["eager"] = plain_loop(model, options.steps)
    if options.compiled:
        calls["compiled"] = loop(compile_mode="default")
    return calls


def compare(cell: dict, options: Options) -> dict:
    model = network(cell["network"], options.size).to(options.device).requires_grad_(False)
    x = photographs(options.batch, options.size).to(options.device)
    y = model(x).argmax(1)
    if cell["precision"] == "fp32":
        check(cell["network"], copy.deepcopy(model).double(), x.double(), y)
    explanation = spat_kernels.explain(model, x, precision=cell["precision"])
    calls = {way: partial(call, x, y) for way, call in calls_of(model, cell["precision"], options).items()}
    for call in [*calls.values()] * 2:
        call()
    seconds, errors = measure.race(calls, options.device, options.seconds)
    if "ours" in errors or len(seconds) < 2:
        raise SystemExit(f"{cell['network']}: {errors}")
    found = {"path": explanation.path, "reason": explanation.reason, "plan": explanation.plan}
    return found | {"size": options.size, "seconds": seconds, "errors": errors}


def check(name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """That ours and the eager loop step alike."""
    ours = spat_kernels.pgd(model, x, y, EPS, steps=1, step_size=STEP, random_start=False)
    theirs = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(theirs), y, reduction="sum"), theirs)
    agree = ((ours - (x + STEP * grad.sign()).clamp(0, 1)).abs() < 1e-6).double().mean()
    if agree < AGREE:
        raise SystemExit(f"{name}: only {agree:.2%} of the pixels are those of the eager loop")


def table(results: dict) -> str:
    """For each network, the ratio of the best rival's time to ours: the median over the rounds."""
    rows: dict[str, dict] = {}
    for record in results["attacks"]:
        row = rows.setdefault(record["network"], {"network": record["network"], "path": record["path"], "left": ""})
        row["left"] = record["plan"].get("left to autograd", "all")
        row[record["precision"]] = speedup(record)
    precisions = results["settings"]["precisions"]
    return markdown(
        results, rows.values(),
        "network | path || left to autograd | " + " | ".join(precisions),
        "{network} | {path} || {left} | " + " | ".join(f"{{{p}}}" for p in precisions),
        "The time of the best rival over ours.",
        "Batch {settings[batch]}, {settings[size]}x{settings[size]}, PGD-{settings[steps]}.",
        environment,
    )  # fmt: skip


def speedup(record: dict) -> str:
    """The time of the best rival over ours, and which rival that is where there was a choice."""
    ours, rivals = record["seconds"]["ours"], {way: s for way, s in record["seconds"].items() if way != "ours"}
    best = min(rivals, key=lambda way: median(rivals[way]))
    ratio = median(theirs / mine for theirs, mine in zip(rivals[best], ours, strict=True))
    return f"{ratio:.2f}x" + f" ({best})" * (len(rivals) > 1)


def main(options: Options) -> None:
    names = "size", "batch", "steps", "precisions", "compiled"
    fresh = measure.begun("networks", options.device, settings={name: getattr(options, name) for name in names}, attacks=[])
    results = measure.continued(options.out, fresh)
    cells = [{"network": name, "precision": precision} for name in options.networks for precision in options.precisions]
    measure.complete(options.out, results, "attacks", cells, lambda cell: compare(cell, options))
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
