"""`spat-train evaluate`: a checkpoint, a data set and the names of attacks in; tables, alarms and a report out."""

import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

from spat_kernels import losses

from ..config import Config, check_device
from ..data.datasets import load
from ..data.images import Dataset, Folder, Images
from ..errors import InputError, as_input_error, check_count, check_eps, first_line
from ..models.checkpoints import load_model, with_classes_of
from ..models.external import import_own
from ..models.hub import check_described, exported_config
from ..models.robustbench_names import network_name
from ..models.run_config import checkpoint_file, chosen_name, run_config
from ..models.weight_files import read_file
from ..models.wrapping import normalisation
from ..objectives import ClassifierName
from ..runtime.distributed import PATIENCE, PeerError, World, is_of_a_peer, world
from ..runtime.signals import interruptible
from . import attack_specs
from .alarms import Alarm, alarms, beyond_chance, rechecked
from .checks import check_class_names, check_numbers
from .evaluate import evaluate
from .record_log import has_records
from .report import hardware, summary, write_report
from .result import Evaluation, Options
from .robustbench import architecture_of, chosen_attack, read_entry, robustbench_entry, write_entry

Activation = Literal["relu", "silu", "gelu", "softplus"]


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `spat-train evaluate`."""

    model: tyro.conf.Positional[Path]
    """The folder of a run, or a checkpoint."""

    # ---- attack
    attacks: str = "fgsm,pgd-20,cw-30"
    """Names, split at commas (`spat-train attacks` lists them), or with settings of their own:
    pgd-40x20,cw-30:kappa=0,pgd:steps=50:step=1/20:loss=margin:restarts=5:eps=16/255. Clean images are always among them."""
    eps: float | None = None
    """Radius of the L-infinity ball, in 1/255. Default: that of the run, else 8."""
    eps_l2: float = 0.5
    """Radius of the L2 ball, for images in [0, 1]."""
    eps_l1: float = 12.0
    """Radius of the L1 ball, for images in [0, 1]."""
    attack_wrong: bool = False
    """Attack the images that the model gets wrong too, and count them by what that ends at. Else they count as broken."""
    budget: int | None = None
    """Forwards and backwards that an attack may spend on an image, over all its restarts and parts. Default: no limit."""
    alarms: bool = True
    """Look for signs of masked gradients, on 100 of the images. Clean accuracy is compared with chance in any case."""

    # ---- data
    data: str | None = None
    """As in `spat-train train`, but test images alone will do (x_test, y_test; test/ or val/). Default: that of the run."""
    limit: int | None = None
    """Maximum number of test images, drawn at random by --seed. Default: all."""
    root: Path = Path("data")
    """Where torchvision's data sets are, or go."""
    download: bool = False
    """Fetch them."""
    image_size: int | None = None
    """Side of the images of a folder or of shards. Default: that of the run."""
    skip_broken: bool = False
    """Leave out what `spat-train train` leaves out by it. Always on where the run had it on."""

    # ---- model
    model_name: str | None = None
    """The architecture, as --model in `spat-train train`. Default: that of the run. Where that is code, as
    package.module:factory, it has to be given again: it would run."""
    activation: Activation | None = None
    """What replaces every ReLU of the model, where it is no run's. The weights do not tell. Default: they stay."""
    classifier: ClassifierName | None = None
    """centres: the model ends in Max-Mahalanobis centres, as with --classifier in `spat-train train`, where it is no run's.
    Default: linear."""
    mean: tuple[float, ...] | None = None
    """Mean of the normalisation that the model was trained with, a number for each channel, for images in [0, 1]. Default: that
    of the run, or that in the file."""
    std: tuple[float, ...] | None = None
    """Its standard deviation. Default: as --mean."""

    # ---- source (black box)
    source: Path | None = None
    """Make the adversarial images on this run or checkpoint, and count what they do to the model. Default: on the model."""
    source_name: str | None = None
    """Its architecture. Default: that of its run."""
    source_activation: Activation | None = None
    """As --activation. Default: they stay."""
    source_classifier: ClassifierName | None = None
    """As --classifier. Default: linear."""
    source_mean: tuple[float, ...] | None = None
    """As --mean. Default: that of its run, or that in the file."""
    source_std: tuple[float, ...] | None = None
    """As --std. Default: as --source-mean."""

    # ---- arithmetic
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the attacks. Predictions are fp32."""
    input_gradient: Literal["auto", "plan", "compile", "autograd"] = "auto"
    """How attacks differentiate the model (`spat_kernels.explain`)."""
    graph: Literal["auto", "never"] = "auto"
    """Whether CUDA graphs replay attacks."""
    batch_size: int = 256
    """Images attacked at once; random starts depend on it."""
    device: str | None = None
    """Default: cuda where there is one, else cpu."""

    # ---- running
    seed: int = 0
    """Seed of the random starts, and of --limit."""
    save_images: bool = False
    """Write the adversarial images, rounded to 8 bits, to images/ATTACK/BATCH.npz: x_adv, uint8 [B, H, W, C], and y, predicted
    and rows, int64 [B]."""
    out: Path | None = None
    """Folder for evaluation.json (`help(spat_train.evaluate)` says what is in it), report.md, report.html and samples.jsonl.
    Default: evaluation/ in the run, or beside the checkpoint; with --source evaluation-from-NAME/."""

    robustbench: Path | None = None
    """Write an entry in the layout of RobustBench's leaderboards to this .json file, from --attacks autoattack. Fields that the
    file has already, such as authors and link, are kept: only the accuracies and eps are updated. Default: none."""

    @property
    def folder(self) -> Path:
        return self.out or default_folder(self.model, self.source)


def evaluate_command(options: EvaluateOptions) -> None:
    """Attack a trained model at the test images, and write a report.

    Interrupted or killed, the same command continues it. With other attacks it adds those to what the report has. Started by
    torchrun, its processes share the images (one process a GPU), in a folder that all see.
    """
    config = run_config(options.model)
    eps = options.eps if options.eps is not None else config.evaluation_eps if config else 8.0
    _check(options, config, eps)
    with world(options.device, PATIENCE) as processes:
        try:
            _evaluate(options, config, eps, processes)
        except RuntimeError as error:
            if isinstance(error, PeerError) or not is_of_a_peer(error):
                raise
            said = f"another process ended, and may say why ({first_line(error)})"
            raise PeerError(f"{said}: give the same command again") from error


def _evaluate(options: EvaluateOptions, config: Config | None, eps: float, processes: World) -> None:
    device = processes.device
    if device.type != "cuda" and options.precision == "tf32":
        raise InputError("--precision tf32: TF32 is for GPUs: use fp32 or bf16")
    dataset = processes.in_turn(lambda: load_data(options, config))
    network, about = _open(options, "model", dataset)
    dataset = with_classes_of(network, dataset)
    source, source_about = _open(options, "source", dataset) if options.source else (None, {})
    rows = torch.arange(len(dataset.test))
    if options.limit is not None and options.limit < len(rows):
        rows = torch.from_numpy(np.random.default_rng(options.seed).permutation(len(rows))[: options.limit])
    about |= {"data": options.data or (config.data if config else ""), "test images": f"{len(rows)} of {len(dataset.test)}"}
    about |= source_about | {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "hardware": hardware(device),
        "command": shlex.join(["spat-train", *sys.argv[1:]]),
    }  # fmt: skip
    settings: Options = {
        "eps": eps / 255, "rows": rows, "seed": options.seed, "batch_size": options.batch_size, "precision": options.precision,
        "input_gradient": options.input_gradient, "graph": "auto" if options.graph == "auto" else False,
        "memory_format": config.memory_format if config else torch.channels_last, "world": processes,
    }  # fmt: skip
    evaluation, found = _attack(options, network, source, dataset.test, device, settings)
    if not processes.main:
        return
    write_report(options.folder, evaluation, dataset.test, dataset.classes, found, about)
    entry = _entry(options, config, evaluation, about["network"], len(dataset.test)) if options.robustbench else {}
    print(f"{about['model']}{', of epoch ' + about['epoch'] if 'epoch' in about else ''}")
    print(summary(evaluation, found))
    if normalisation(network):
        print(f"the model normalises images: {normalisation(network)}")
    elif config is None:
        print("the model gets images in [0, 1] as they are: if it was trained on normalised ones, give --mean and --std")
    print(f"{options.folder / 'report.html'} written")
    if options.robustbench:
        print(write_entry(options.robustbench, entry))


def _data_name(options: EvaluateOptions, config: Config | None) -> str:
    return Path(options.data or (config.data if config else "")).stem


def _entry(options: EvaluateOptions, config: Config | None, evaluation: Evaluation, network: str, test_images: int) -> dict:
    """RobustBench's entry, with what `options.robustbench` has already."""
    assert options.robustbench
    dataset = _data_name(options, config)
    return robustbench_entry(
        evaluation, chosen_attack(attack_specs.parse_all(options.attacks), options.robustbench), test_images=test_images,
        name=options.model.resolve().name if options.model.is_dir() else options.model.stem,
        architecture=architecture_of(network), dataset=dataset, before=read_entry(options.robustbench, dataset),
        additional_data=config is not None and config.extra is not None,
    )  # fmt: skip


def _check(options: EvaluateOptions, config: Config | None, eps: float) -> None:
    """Raise InputError for what does not fit, and ImportError without SciPy, before anything is loaded."""
    import scipy.stats  # noqa: F401  (for the intervals; it takes a second)

    name = chosen_name(options.model, config, options.model_name, "--model-name")
    with as_input_error(f"--model-name {name}"):
        import_own(name)  # it may register losses
    attacks = attack_specs.parse_all(options.attacks)
    if options.robustbench:
        if options.source or options.attack_wrong or options.budget:
            raise InputError(
                f"--robustbench {options.robustbench}: an entry is about the model itself, attacked where it is right, to the "
                "end: leave out --source, --attack-wrong and --budget"
            )
        chosen_attack(attacks, options.robustbench)
        read_entry(options.robustbench, _data_name(options, config))
    check_device(options.device)
    check_count("--limit", options.limit)
    check_eps("--eps", eps)
    check_numbers(eps / 255, options.eps_l2, options.eps_l1, options.seed, options.batch_size, options.budget)
    of_source = options.source_activation or options.source_classifier or options.source_mean or options.source_std
    if options.source is None and of_source:
        raise InputError(
            "--source-activation, --source-classifier, --source-mean, --source-std: give the --source that they are of, or leave "
            "them out"
        )


def load_data(options: EvaluateOptions, config: Config | None) -> Dataset:
    """The test images of `options.data`; by default, of the data of the run with `config`.

    Raises:
        InputError: they are not known, or not there any more.
    """
    data = options.data or (config.data if config else None)
    if data is None:
        raise InputError(f"--data: {options.model} does not tell which it was trained on: give cifar10, an .npz file, ...")
    image_size = options.image_size or (config.image_size if config else None)
    skip_broken = options.skip_broken or (config is not None and config.skip_broken)
    try:
        return load(
            data, root=options.root, download=options.download, image_size=image_size, skip_broken=skip_broken, test_only=True
        )
    except InputError as error:
        if options.data is not None:
            raise
        where = f"{options.model} was trained on --data {data}; give --data where that is now"
        raise InputError(f"{where} ({error})") from error


def _open(options: EvaluateOptions, kind: Literal["model", "source"], dataset: Dataset) -> tuple[nn.Module, dict[str, str]]:
    """The model or the source, and what a report says of it."""
    prefix, whose = ("source_", "source's ") if kind == "source" else ("", "")
    path, given, option = getattr(options, kind), getattr(options, f"{kind}_name"), f"--{kind}-name"
    content = _content(path)
    check_class_names(content.get("classes", []), dataset, options.data or dataset.name, path)
    changes = {name: getattr(options, prefix + name) for name in ("activation", "classifier", "mean", "std")}
    try:
        network, config = load_model(path, dataset, given, option=option, **changes)
    except InputError as error:
        if kind == "model":
            raise
        raise InputError(re.sub("--(activation|classifier|mean|std)", r"--source-\1", str(error))) from error
    name = network_name(chosen_name(path, config, given, option), dataset.num_classes)
    changed = [changes[what] for what in ("activation", "classifier") if changes[what]]
    about = {kind: str(checkpoint_file(path)), f"{whose}network": f"{name} with {' and '.join(changed)}" if changed else name}
    if (record := content.get("validation") or content.get("progress")) and config:  # in best.pt, or in last.pt
        about[f"{whose}epoch"] = f"{record['epoch']} of {config.epochs}"
    return network, about | {f"{whose}normalisation": normalisation(network) or "none"}


def _content(path: Path) -> dict:
    """What the run or export that made the model in `path` wrote beside its weights; {} where none did."""
    content = (exported_config(path) if path.is_dir() else None) or read_file(checkpoint_file(path))
    if not isinstance(content, dict) or not str(content.get("format")).startswith("spat_train "):
        return {}
    if "classes" in content:
        check_described(content, path)
    for name in ("validation", "progress"):
        record = content.get(name)
        if record and not (isinstance(record, dict) and isinstance(record.get("epoch"), int)):
            raise InputError(f"{path}: no run writes such a {name}: restore it")
    return content


def _attack(
    options: EvaluateOptions,
    model: nn.Module,
    source: nn.Module | None,
    images: Images | Folder,
    device: torch.device,
    how: Options,
) -> tuple[Evaluation, list[Alarm]]:
    """The evaluation, and every check for alarms."""
    folder = options.folder

    def too_large() -> str:
        begun = ", in another --out" if has_records(folder) else ""
        return f"--batch-size {options.batch_size}: out of memory on {device}: lower it{begun}"

    with interruptible(f"the same command continues {folder}", too_large) as on_progress:
        how["on_progress"] = on_progress
        model.to(device)
        source = source and source.to(device)
        evaluation = evaluate(
            model, images, options.attacks, source=source, eps_l2=options.eps_l2, eps_l1=options.eps_l1, budget=options.budget,
            attack_wrong=options.attack_wrong, folder=folder, save_images=options.save_images, **how,
        )  # fmt: skip
        found = [beyond_chance(evaluation)]
        if options.alarms:
            found += alarms(model, images, folder=folder / "alarms", source=source, **how)
        if source:
            own = evaluate(source, images, "clean", folder=folder / "source", bar="source", **how)
            found.append(beyond_chance(own, source=True))
    return evaluation, [*found, rechecked(evaluation)]


def default_folder(model: Path, source: Path | None) -> Path:
    name = "evaluation"
    if source:
        name += f"-from-{source.resolve().name if source.is_dir() else source.stem}"
    return model / name if model.is_dir() else model.with_name(f"{model.stem}-{name}")


def attacks_command() -> None:
    """List the named attacks with their settings and sources, and how to write others."""
    print(attack_specs.__doc__)
    for name, (spec, source) in attack_specs.NAMED.items():
        print(f"{name:18}{spec:50}{source}")
    print("\nlosses, and their settings:")
    for name, kind in losses.LOSSES.items():
        print(f"{name:18}{', '.join(losses.settings_of(kind)):44}{kind.title or name}")
    for other in dict.fromkeys(losses.ALIASES.values()):
        names = ", ".join(name for name, its in losses.ALIASES.items() if its == other)
        print(f"{names:18}{', '.join(losses.settings_of(losses.LOSSES[other])):44}{other}, whose settings must all be given")
