"""`spat-train evaluate`: a checkpoint, a data set and the names of attacks in; tables, alarms and a report out."""

import re
import shlex
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from spat_kernels import losses

from ..config import check_device
from ..data.datasets import load
from ..errors import InputError
from ..models.checkpoints import checkpoint_file, chosen_name, load_model, normalisation, run_config, with_classes_of
from ..models.registry import import_own
from .alarms import alarms as look_for_alarms
from .alarms import beyond_chance, rechecked
from .attack_specs import NAMED, parse_all
from .checks import check_numbers
from .evaluate import evaluate
from .interruptible import interruptible
from .report import hardware, summary, write_report
from .result import Options

Activation = Literal["relu", "silu", "gelu", "softplus"]


def evaluate_command(
    model: Path,
    /,
    data: str | None = None,
    attacks: str = "fgsm,pgd-20,cw-30",
    eps: float | None = None,
    eps_l2: float = 0.5,
    limit: int | None = None,
    model_name: str | None = None,
    activation: Activation | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    source: Path | None = None,
    source_name: str | None = None,
    source_activation: Activation | None = None,
    source_mean: tuple[float, ...] | None = None,
    source_std: tuple[float, ...] | None = None,
    attack_wrong: bool = False,
    root: Path = Path("data"),
    download: bool = False,
    image_size: int | None = None,
    skip_broken: bool = False,
    batch_size: int = 256,
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32",
    input_gradient: Literal["auto", "plan", "autograd"] = "auto",
    graph: Literal["auto", "never"] = "auto",
    device: str | None = None,
    seed: int = 0,
    alarms: bool = True,
    save_images: bool = False,
    out: Path | None = None,
) -> None:
    """Attack a trained model at the test images and report what became of each.

    Interrupted or killed, the same command goes on. With other attacks it adds those to what the report has.

    Args:
        model: the folder of a run, or a checkpoint.
        data: as in `spat-train train`, but test images alone will do (x_test, y_test; test/). Default: that of the run.
        attacks: names, split at commas (`spat-train attacks` lists them), or with settings of their own:
            pgd-40x20,cw-30:kappa=0,pgd:steps=50:step=1/20:loss=margin:restarts=5:eps=16/255. Clean images are always among them.
        eps: radius of the L-infinity ball, in 1/255. Default: that of the run, else 8.
        eps_l2: radius of the L2 ball, for images in [0, 1].
        limit: maximum number of test images, drawn at random by --seed. Default: all.
        model_name: the architecture, as --model in `spat-train train`. Default: that of the run. Where that is code, as
            package.module:factory, it has to be given again: it would run.
        activation: what replaces every ReLU of the model, where it is no run's. The weights do not tell.
        mean: of the normalisation that the model was trained with, a number for each channel, for images in [0, 1]. Default:
            that of the run, or that in the file.
        std: see --mean.
        source: make the adversarial images on this run or checkpoint, and count what they do to the model (black box).
        source_name: its architecture. Default: that of its run.
        source_activation, source_mean, source_std: as --activation, --mean and --std, of the source.
        attack_wrong: attack the images that the model gets wrong too, and count what that ends at. Else they count as broken.
        root: where torchvision's data sets are, or go.
        download: fetch them.
        image_size: side of the images of a folder. Default: that of the run.
        skip_broken: leave out pictures of a folder that cannot be decoded: all are decoded once first. Default: as the run.
        batch_size: images attacked at once; random starts depend on it.
        precision: of the attacks. Predictions are fp32.
        input_gradient: how attacks differentiate the model (`spat_kernels.explain`).
        graph: whether CUDA graphs replay attacks.
        device: default: cuda where there is one, else cpu.
        seed: of the random starts, and of --limit.
        alarms: look for signs of masked gradients, on 100 of the images. Clean accuracy is compared with chance in any case.
        save_images: write the adversarial images, rounded to 8 bits, to images/ATTACK/BATCH.npz: x_adv, uint8 [B, H, W, C], and
            y, predicted and rows, int64 [B].
        out: folder for evaluation.json (`help(spat_train.evaluate)` says what is in it), report.md, report.html and
            samples.jsonl. Default: evaluation/ in the run, or beside the checkpoint; with --source evaluation-from-NAME/.
    """
    config = run_config(model)
    name = chosen_name(model, config, model_name, "--model-name")
    try:
        import_own(name)  # it may register losses
    except ValueError as error:
        raise InputError(f"--model-name {name}: {error}") from error
    parse_all(attacks)
    check_device(device)
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give at least 1 image, or leave it out for all")
    given, data = data is not None, data or (config.data if config else None)
    if data is None:
        raise InputError(f"--data: {model} does not tell which it was trained on: give cifar10, an .npz file, ...")
    eps = eps if eps is not None else config.evaluation_eps if config else 8.0
    if not 0.5 <= eps <= 255:
        raise InputError(f"--eps {eps:g}: it is in 1/255, from 0.5 to 255 (8 means 8/255, and 76.5 is 0.3)")
    check_numbers(eps / 255, eps_l2, seed, batch_size)
    image_size = image_size or (config.image_size if config else None)
    skip_broken = skip_broken or (config is not None and config.skip_broken)
    try:
        dataset = load(data, root=root, download=download, image_size=image_size, skip_broken=skip_broken, test_only=True)
    except InputError as error:
        if given:
            raise
        raise InputError(f"{model} was trained on --data {data}; give --data where that is now ({error})") from error
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type != "cuda" and precision == "tf32":
        raise InputError("--precision tf32: TF32 is for GPUs: use fp32 or bf16")
    network, _ = load_model(model, dataset, model_name, activation=activation, mean=mean, std=std)
    dataset = with_classes_of(network, dataset)
    other, of_source = None, {}
    if source:
        try:
            other, its_config = load_model(
                source, dataset, source_name,
                activation=source_activation, mean=source_mean, std=source_std, option="--source-name",
            )  # fmt: skip
        except InputError as error:
            raise InputError(re.sub("--(activation|mean|std)", r"--source-\1", str(error))) from error
        its_name = chosen_name(source, its_config, source_name, "--source-name")
        of_source = {
            "source": str(checkpoint_file(source)),
            "source's network": f"{its_name} with {source_activation}" if source_activation else its_name,
            "source's normalisation": normalisation(other) or "none",
        }
    elif source_activation or source_mean or source_std:
        raise InputError(
            "--source-activation, --source-mean, --source-std: give the --source that they are of, or leave them out"
        )
    out = out or default_folder(model, source)
    count = len(dataset.test)
    rows = torch.arange(count)
    if limit is not None and limit < count:
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(count)[:limit])
    about = {
        "model": str(checkpoint_file(model)), "network": f"{name} with {activation}" if activation else name,
        "normalisation": normalisation(network) or "none", "data": data, "test images": f"{len(rows)} of {count}",
    }  # fmt: skip
    about |= of_source | {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "hardware": hardware(where),
        "command": shlex.join(["spat-train", *sys.argv[1:]]),
    }  # fmt: skip

    def too_large() -> str:
        begun = ", in another --out" if (out / "samples.jsonl").exists() else ""
        return f"--batch-size {batch_size}: out of memory on {where}: lower it{begun}"

    with interruptible(f"the same command goes on where {out} ends", too_large) as on_progress:
        how: Options = {
            "eps": eps / 255, "rows": rows, "seed": seed, "batch_size": batch_size, "on_progress": on_progress,
            "precision": precision, "input_gradient": input_gradient, "graph": "auto" if graph == "auto" else False,
            "memory_format": config.memory_format if config else torch.channels_last,
        }  # fmt: skip
        network.to(where)
        other = other and other.to(where)
        evaluation = evaluate(
            network, dataset.test, attacks, source=other, eps_l2=eps_l2, attack_wrong=attack_wrong, folder=out,
            save_images=save_images, **how,
        )  # fmt: skip
        found = [beyond_chance(evaluation), rechecked(evaluation)]
        if other:
            own = evaluate(other, dataset.test, "clean", folder=out / "source", bar="source", **how)
            found.insert(1, beyond_chance(own, source=True))
        if alarms:
            found[1:1] = look_for_alarms(network, dataset.test, folder=out / "alarms", source=other, **how)
    write_report(out, evaluation, dataset.test, dataset.classes, found, about)
    print(summary(evaluation, found))
    if normalisation(network):
        print(f"the model normalises images: {normalisation(network)}")
    print(f"{out / 'report.html'} written")


def default_folder(model: Path, source: Path | None) -> Path:
    name = "evaluation"
    if source:
        name += f"-from-{source.resolve().name if source.is_dir() else source.stem}"
    return model / name if model.is_dir() else model.with_name(f"{model.stem}-{name}")


def attacks_command() -> None:
    """List the named attacks with their settings and sources, and how to write others."""
    from .attack_specs import __doc__ as grammar

    print(grammar)
    for name, (spec, source) in NAMED.items():
        print(f"{name:18}{spec:50}{source}")
    print("\nlosses, and their settings:")
    for name, kind in losses.LOSSES.items():
        print(f"{name:18}{', '.join(losses.settings_of(kind)):44}{kind.title or name}")
    for name, other in losses.ALIASES.items():
        print(f"{name:18}{', '.join(losses.settings_of(losses.LOSSES[other])):44}{other}, with every setting given")
