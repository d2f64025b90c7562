"""Named settings: every row of the thesis's Tables 6.1-6.4, its Figures 6.1 and 6.2, Madry's networks (arXiv 1706.06083), the
papers of the single-step methods, AWP (arXiv 2004.05884), ADT, rows of the FastAT benchmark (arXiv 2604.22853), and ImageNet
networks of Singh et al. (arXiv 2303.01870) and of ARES-Bench (arXiv 2302.14301).

The thesis attacks with PGD-10, eps 8/255, steps of eps/4 and a uniform start. Where it is silent, the public code decides.
"""

from dataclasses import replace
from typing import Any, Literal, cast

from .config import Config
from .objectives import METHODS, MethodName

# The thesis divides lr at epochs 75 and 90, "as MART", whose code ends with epoch 90.
_TABLE_61 = Config(data="cifar10", model="wrn-34-10", weight_decay=7e-4, epochs=90, milestones=(75, 90))
# "Same settings except for weight decay", which is each method's own: that of TRADES's code, and of MART's.
_TABLE_62 = replace(_TABLE_61, data="cifar100", weight_decay=2e-4)
_MART_62 = replace(_TABLE_61, data="cifar100")
# "Exact same settings in RST", whose code has epochs of 196 batches (all 50,000 images, so none is held out and the last weights
# count), each of 128 labelled and 128 pseudo-labelled images; eps 0.031 and steps of 0.007. Needs --extra.
_TABLE_63 = Config(
    data="cifar10", model="wrn-28-10", batch_size=256, epochs=200, schedule="cosine", nesterov=True, weight_decay=5e-4,
    eps=0.031 * 255, step_size=0.007 * 255, start="normal", holdout=0,
)  # fmt: skip
# A twentieth of the 5,000 training images is held out.
_TABLE_64 = replace(_TABLE_61, data="stl10", model="resnet-18", batch_size=32, epochs=200, pad=4, holdout=250)
# Madry's code: 100,000 steps of 50 images; 80,000 steps of 128, lr divided at 40,000 and 60,000. Without the held-out images
# there are 1,180 and 383 steps in an epoch.
_MNIST = Config(
    data="mnist", model="mnist-cnn", eps=76.5, steps=40, step_size=0.01 * 255, batch_size=50, epochs=85,
    optimizer="adam", lr=1e-4, schedule="constant", weight_decay=0.0,
)  # fmt: skip
# As in that code: five residual units in each of three groups of 160, 320 and 640 channels, as WRN-34-10 has them; crops after
# padding by 2; batch statistics in the attack; neither biases nor batch norm decayed. Its network differs in that it standardises
# each image, has leaky ReLUs of slope 0.1, and shortcuts without weights (average pooling, channels of zeros), and in the
# epsilon of batch norm, 1e-3. Forwards of the attack move its running statistics; here they do not.
_MADRY_CIFAR = Config(
    data="cifar10", model="wrn-34-10", steps=7, step_size=2.0, weight_decay=2e-4, decay_norm=False, epochs=209,
    milestones=(105, 158), pad=2, bn_mode="train",
)  # fmt: skip
# Fast AT and N-FGSM: cyclic rates, and images normalised by the statistics of CIFAR-10. In their code the attack's forward is in
# training mode, so that it moves the statistics of batch norm too. Here it has batch statistics (bn_mode), and moves none. They
# train on all 50,000 images. Here some are held out, to choose the best epoch and for the alarm.
_SINGLE_STEP = Config(
    data="cifar10", model="preactresnet-18", epochs=30, schedule="cyclic", lr=0.2, weight_decay=5e-4, bn_mode="train",
    mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616),
)  # fmt: skip
# Free AT: Madry's network and settings. 80,000 updates, 8 with each batch, are 26 passes; lr is divided after 40,000 and 60,000.
_FREE = replace(_MADRY_CIFAR, method="free", steps=None, step_size=None, bn_mode="eval", epochs=26, milestones=(14, 21))
# FastAT: lr changes from epoch to epoch there. With averaged weights, the better of the average and the model is kept there,
# here the average. The loss is smoothed by 0.4. 1,000 images are held out, as by default.
_FASTAT = Config(
    data="cifar10", model="resnet-18", epochs=100, schedule="one-cycle", weight_decay=5e-4, label_smoothing=0.4, ema=0.9995,
)  # fmt: skip
# Its single-step methods take their examples from the smoothed loss, which is SPAT with alpha = 0.4 (K - 1) / K, in training mode
# as above. Its PGD attacks in eval mode, on cross-entropy.
_FASTAT_STEP = replace(_FASTAT, bn_mode="train", alpha=0.36)
# AWP's code (csdongxian/AWP) for its WRN-34-10. AT attacks in train mode, normalises images, and divides lr at epochs 100 and 150
# counted from 0. TRADES counts from 1, and perturbs weights from epoch 10 on. MART's code is not there: it is taken to be that of
# TRADES with MART's loss and order, from the first epoch on. The code picks checkpoints by test images, we by held-out ones.
_AWP = Config(data="cifar10", model="wrn-34-10", weight_decay=5e-4, epochs=200, milestones=(100, 150), awp=0.005, start="normal")
_AWP_ROWS = {
    "madry": replace(
        _AWP, milestones=(101, 151), awp=0.01, start="uniform", bn_mode="train",
        mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616),
    ),
    "trades": replace(_AWP, method="trades", awp_warmup=9, forwards="adv-clean-clean"),
    "mart": replace(_AWP, method="mart"),
}  # fmt: skip
_AWP_ALPHAS = {"madry": 0.2, "trades": 0.1, "mart": 0.3}  # alpha in the rows with SPAT: as for MNIST and in Table 6.1
# ADT-EXP as in the authors' code (arXiv 2002.05999): lr is divided at epoch 75 of 76. Their code never zeroes the gradients of mu
# and rho, so its steps go along the sum of all so far; here along the mean over the five samples of the step. SPAT is ours.
_ADT = Config(
    data="cifar10", model="wrn-28-10", method="adt", batch_size=64, epochs=76, milestones=(75,), weight_decay=2e-4, holdout=0,
    inner_lr=0.3, entropy=0.01, inner_samples=5,
)  # fmt: skip
# ImageNet is the folder imagenet/ with train/ and val/, or --data. The last weights count in both codes: none is held out.
# Singh et al.: main.py and run_train.sh of nmndeep/revisiting-at, and its README for epochs (without the stem: 300 too). APGD-2
# from x, in eval mode; lr for 80 images on each GPU, whose number they leave open: 8 here; 20 epochs of warm-up, 10 of 50. The
# targets of the attack are smoothed too, by 0.1 over all 1,000 classes: SPAT with alpha = 0.0999. That of +spat is ours. What
# differs: they begin with weights of clean training (give --init), have Mixup 0.8, CutMix 1.0 and random erasing (0.25), draw the
# magnitude of RandAugment around 9 (deviation 0.5), decay LayerNorm's weights in ConvNeXts, and change lr linearly in an epoch.
_SINGH = Config(
    data="imagenet", image_size=224, epochs=300, batch_size=640, holdout=0, crop="resized", rand_augment=(2, 9),
    attack="apgd", steps=2, start="clean", eps=4.0, alpha=0.0999, label_smoothing=0.1,
    optimizer="adamw", lr=1e-3, beta2=0.95, weight_decay=0.05, decay_norm=False,
    schedule="warmup-cosine", warmup=20.0, ema=0.9999, precision="fp16",
)  # fmt: skip
# They leave normalisation to the network, but for ViT-S-ConvStem. timm's have one here otherwise.
_PIXELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_SINGH_ROWS: dict[str, dict[str, Any]] = {
    "convnext-t": {"model": "timm:convnext_tiny", **_PIXELS}, "convnext-t-convstem": {"model": "convnext-t-convstem"},
    "convnext-s-convstem": {"model": "convnext-s-convstem", "epochs": 50, "warmup": 10.0},
    "convnext-b-convstem": {"model": "convnext-b-convstem"},
    "vit-s": {"model": "timm:vit_small_patch16_224", **_PIXELS}, "vit-s-convstem": {"model": "vit-s-convstem", **_IMAGENET},
    "vit-b-convstem": {"model": "vit-b-convstem"},
}  # fmt: skip
# ARES-Bench: robust_training of thu-ml/ares, its train_configs and adv.py, with 8 GPUs. PGD-3 in steps of 8/3/255 from a uniform
# start, on smoothed targets as above. What differs: their steps grow from 0 to that in the first 5 epochs, the iterate of the
# highest loss is taken, lr ends at 1e-5 (here 0) and its cosine begins with the warm-up. They have Mixup, CutMix, RandAugment and
# random erasing as above, and colour jitter (0.4). Their Swins have no stochastic depth, those of timm 0.1.
_ARES = Config(
    data="imagenet", image_size=224, epochs=300, batch_size=512, holdout=0, crop="resized", rand_augment=(2, 9),
    steps=3, step_size=8 / 3, eps=4.0, alpha=0.0999, label_smoothing=0.1, optimizer="adamw", lr=5e-4, weight_decay=0.05,
    decay_norm=False, schedule="warmup-cosine", warmup=5.0, ema=0.9998, **_IMAGENET,  # for timm's ViT too
)  # fmt: skip
_LARGE = {"batch_size": 256, "lr": 2.5e-4}  # 32 on each GPU
_ARES_ROWS: dict[str, dict[str, Any]] = {
    "convnext-s": {"model": "timm:convnext_small"}, "convnext-b": {"model": "timm:convnext_base"},
    "convnext-l": {"model": "timm:convnext_large", **_LARGE},
    "vit-s": {"model": "timm:vit_small_patch16_224"}, "vit-b": {"model": "timm:vit_base_patch16_224"},
    "swin-s": {"model": "timm:swin_small_patch4_window7_224"}, "swin-b": {"model": "timm:swin_base_patch4_window7_224"},
    "swin-l": {"model": "timm:swin_large_patch4_window7_224", **_LARGE},
    # Here CutMix alone and less colour jitter (0.1), no RandAugment, no random erasing.
    "resnet-50": {
        "model": "timm:resnet50", "optimizer": "sgd", "nesterov": True, "lr": 0.2, "weight_decay": 1e-4, "epochs": 95,
        "schedule": "piecewise", "milestones": (31, 61, 91), "rand_augment": None,
    },
}  # fmt: skip

# As in the authors' code. MART's order is the default.
_FORWARDS: dict[str, Literal["clean-adv-clean", "adv-clean"]] = {"trades": "clean-adv-clean", "rst": "adv-clean"}
_TABLES = {  # settings, and alpha of each row
    "table6.1": (_TABLE_61, {"madry": 0.0, "trades": 0.0, "mart": 0.0, "trades+spat": 0.1, "mart+spat": 0.3}),
    "table6.2": (_TABLE_62, {"madry": 0.0, "trades": 0.0, "mart": 0.0, "trades+spat": 0.1, "mart+spat": 0.2}),
    "table6.3": (_TABLE_63, {"rst": 0.0, "mart": 0.0, "rst+spat": 0.1, "mart+spat": 0.1}),
    "table6.4": (_TABLE_64, {"trades": 0.0, "mart": 0.0, "trades+spat": 0.1, "mart+spat": 0.2}),
    "madry-mnist": (_MNIST, {"natural": 0.0, "madry": 0.0, "madry+spat": 0.2}),
    "madry-cifar10": (_MADRY_CIFAR, {"natural": 0.0, "madry": 0.0}),
}


def _row(table: str, key: str, alpha: float) -> Config:
    method = cast(MethodName, key.removesuffix("+spat").replace("natural", "standard"))
    base = _MART_62 if (table, method) == ("table6.2", "mart") else _TABLES[table][0]
    row = replace(base, method=method, alpha=alpha, forwards=_FORWARDS.get(method, base.forwards))
    return replace(row, **{option: getattr(Config, option) for option in METHODS[method].idle})


_ROWS = {f"{table}/{key}": _row(table, key, alpha) for table, (_, alphas) in _TABLES.items() for key, alpha in alphas.items()} | {
    f"{figure}/eps{eps}-alpha{alpha:g}": replace(
        _TABLE_61, data=data, model="resnet-50", eps=float(eps), eval_eps=8.0, alpha=alpha
    )
    for figure, data in (("figure6.1", "cifar10"), ("figure6.2", "cifar100"))
    for eps in (4, 8, 16)
    for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
}
_ROWS |= {f"awp/{method}": row for method, row in _AWP_ROWS.items()}
_ROWS |= {f"awp/{method}+spat": replace(row, alpha=_AWP_ALPHAS[method]) for method, row in _AWP_ROWS.items()}

_ROWS |= {
    "single-step/fast": replace(_SINGLE_STEP, method="fast"),
    "single-step/n-fgsm": replace(_SINGLE_STEP, method="n-fgsm"),
    "single-step/free": _FREE,
    "fastat/fgsm-rs": replace(_FASTAT_STEP, method="fast"),
    "fastat/n-fgsm": replace(_FASTAT_STEP, method="n-fgsm"),
    # 200 epochs' worth of updates in 50 passes. There, a batch starts from clean images, and the rate still rises when training
    # ends (one cycle of 200 steps, of which 50 are taken). Here delta stays from batch to batch, and the cycle is a whole one.
    "fastat/free": replace(_FASTAT, method="free", replays=4, epochs=50),
    # The last weights are evaluated there: here the one validation is at the end.
    "fastat/pgd-at": replace(_FASTAT, ema=0.0, val_every=100),
    "fastat/pgd-at-wa": _FASTAT,
    "fastat/pgd-at-wa+spat": replace(_FASTAT, alpha=0.2),  # ours: it is no row of the benchmark
}
_ROWS |= {"adt/exp": _ADT, "adt/exp+spat": replace(_ADT, alpha=0.1)}
_ROWS |= {f"imagenet/{name}": replace(_SINGH, **own) for name, own in _SINGH_ROWS.items()}
_ROWS |= {f"imagenet/{name}+spat": replace(_SINGH, **own | {"alpha": 0.2}) for name, own in _SINGH_ROWS.items()}
_ROWS |= {f"ares/{name}": replace(_ARES, **own) for name, own in _ARES_ROWS.items()}

PRESETS = {name: replace(row, preset=name) for name, row in _ROWS.items()}
