"""What half precision, the plan and CUDA graphs cost an attack: PGD-20 accuracy and the share of zero gradients under each.

    python -m benchmarks.precision --data cifar10.npz --out precision.json

Trains WRN-10-2 on `train_images` of the data twice, as usual and against PGD-10 (eps 8/255, in bf16), then attacks both on test
images: eps 8/255, 20 steps of eps/10, the same random starts for all. A gradient that is exactly 0 moves nothing, which
looks like robustness: its share is counted over pixels, and over samples without any other, at the random start. The standard
model is the one, confident and far from robust, on which gradients underflow: a tenth of the images tells, also of autocast.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.tables import environment, markdown
from spat_kernels import pgd
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.losses import CrossEntropy
from spat_kernels.model_state.borrow import borrowed
from spat_train.config import Config
from spat_train.data.datasets import load_npz
from spat_train.data.images import Dataset, floats
from spat_train.training.trainer import train

EPS, BATCH = 8 / 255, 250
WAYS = [("autograd", "fp32"), ("plan", "fp32"), ("plan", "bf16"), ("plan", "fp16")]  # the plain one first
GRAPHS = [("plan+graph", precision) for precision in ("fp32", "tf32", "bf16", "fp16")]  # on a GPU
AUTOCAST = [("autograd", "bf16"), ("autograd", "fp16")]  # for the standard model alone


@dataclass
class Arguments:
    """What half precision costs an attack.

    Args:
        data: .npz with x_train, y_train, x_test, y_test.
        out: JSON file to write, after every row.
        model: name of a model.
        train_images, test_images: how many; a tenth of the latter for the standard model.
        epochs: passes over the training images.
        device: cpu or cuda.
    """

    data: Path
    out: Path
    model: str = "wrn-10-2"
    train_images: int = 10_000
    test_images: int = 10_000
    epochs: int = 8
    device: str = "cpu"


def table(results: dict) -> str:
    return markdown(
        results, results["rows"],
        "model | path | precision || images | PGD-20 accuracy, % | loss there | zero pixels, % | zero samples, %",
        "{model} | {path} | {precision} || {images} | {accuracy:.2f} | {loss:.4f} | {zero pixels:.4f} | {zero samples:.2f}",
        "{model}.", environment,
    )  # fmt: skip


def main(args: Arguments) -> None:
    data = load_npz(args.data)
    models = {name: trained(args, data, name) for name in ("standard", "robust")}
    result = measure.begun("precision", args.device, model=args.model, epochs=args.epochs, rows=[])
    for name, model in models.items():
        images = args.test_images // (10 if name == "standard" else 1)
        x, y = floats(data.test, torch.arange(min(images, len(data.test))), args.device)
        for path, precision in WAYS + GRAPHS * args.device.startswith("cuda") + AUTOCAST * (name == "standard"):
            row = {"model": name, "images": len(x), "path": path, "precision": precision}
            row |= evaluate(model.eval(), x, y, path, precision)
            print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            result["rows"].append(row)
            measure.write(args.out, result)


def trained(args: Arguments, data: Dataset, name: str) -> nn.Module:
    config = Config(
        method="madry" if name == "robust" else "standard", model=args.model, epochs=args.epochs, lr=0.2, schedule="one-cycle",
        nesterov=True, holdout=0, attack_precision="bf16", device=args.device, test=False,
    )  # fmt: skip
    return train(config, data.limited(args.train_images, seed=0), save=False).model


def evaluate(model: nn.Module, x: Tensor, y: Tensor, path: str, precision: str) -> dict[str, float]:
    """Accuracy under PGD-20 in percent, the loss there, and the shares of zero gradients."""
    correct, loss, zero_pixels, zero_samples, started = 0, 0.0, 0, 0, time.perf_counter()
    torch.manual_seed(1)
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        settings = {"precision": precision, "input_gradient": path.removesuffix("+graph"), "graph": path.endswith("+graph")}
        x_adv = pgd(model, images, labels, EPS, steps=20, step_size=EPS / 10, **settings)
        with torch.no_grad(), measure.numerics("fp32"):
            logits = model(x_adv)
        correct += int((logits.argmax(1) == labels).sum())
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        start = pgd(model, images, labels, EPS, steps=0)
        zero = first_gradient(model, start, labels, settings["input_gradient"], precision) == 0
        zero_pixels += int(zero.sum())
        zero_samples += int(zero.flatten(1).all(1).sum())
    shares = {"accuracy": correct / len(x), "zero pixels": zero_pixels / x.numel(), "zero samples": zero_samples / len(x)}
    percent = {key: 100 * share for key, share in shares.items()}
    return percent | {"loss": loss / len(x), "seconds": time.perf_counter() - started}


def first_gradient(model: nn.Module, x: Tensor, y: Tensor, path: str, precision: str) -> Tensor:
    """The input gradient of cross-entropy as the attack takes it."""
    with torch.no_grad(), borrowed(model, "eval"):
        gradient = input_gradient(model, x, path, precision)
        with gradient.arithmetic(x.device.type):
            gradient.prepare()
            logits = gradient.forward(x)
            scale = 128.0 if logits.dtype == torch.float16 else 1.0
            dlogits = torch.empty_like(logits)
            CrossEntropy().gradient(logits, y, dlogits, None, targeted=False, scale=scale)
            return gradient.backward(dlogits)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
