"""Sweeps that have a name. Each is what a spec file would hold (spec.py has the keys)."""

from typing import Any

_ALPHAS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
_BATCHES = [{"batch_size": 128, "lr": 0.1}, {"batch_size": 256, "lr": 0.1}, {"batch_size": 256, "lr": 0.2}]

READY: dict[str, dict[str, Any]] = {
    **{
        f"figure{number}": {
            "about": f"the thesis's Figure {number}, {data}: alpha of SPAT x eps of the training",
            "base": {"preset": f"figure{number}/eps{{eps:g}}-alpha{{alpha:g}}"},
            "grid": {"alpha": _ALPHAS, "eps": [4.0, 8.0, 16.0]},
        }
        for number, data in (("6.1", "CIFAR-10"), ("6.2", "CIFAR-100"))
    },
    # Settings, and values of the options, of Pang et al. (ICLR 2021); takeaways (i) to (v) as a survey of it counts them.
    "bag-of-tricks": {
        "about": "tricks of Pang et al. (arXiv 2010.00467): weight decay, batch norm, smoothing, activation, batch, steps",
        "base": {"data": "cifar10", "model": "resnet-18", "step_size": 2.0, "epochs": 110},
        "grid": {
            "weight_decay": [1e-4, 2e-4, 5e-4],
            "bn_mode": ["eval", "train"],
            "label_smoothing": [0.0, 0.1],
            "activation": ["relu", "silu"],
            "batch": _BATCHES,
            "steps": [10, 5],
        },
        "hypotheses": [
            {"says": "(i) other weight decays change robustness", "factor": "weight_decay", "expects": "differs"},
            {"says": "(ii) moderate label smoothing helps", "factor": "label_smoothing", "level": 0.1, "expects": "higher"},
            {"says": "(ii) scaling lr with the batch size helps", "factor": "batch", "level": "batch-size256-lr0.2",
             "than": "batch-size256-lr0.1", "expects": "higher"},
            {"says": "(iii) batch statistics in the attack (bn_mode train) harm", "factor": "bn_mode", "level": "train",
             "expects": "lower"},
            {"says": "(iv) fewer steps of the attack harm", "factor": "steps", "level": 5, "expects": "lower"},
            {"says": "(v) a smooth activation helps a small network", "factor": "activation", "level": "silu",
             "expects": "higher"},
        ],
    },
    "alpha-search": {
        "about": "the alpha of SPAT that suits an eps, which the thesis leaves to future work",
        "base": {"data": "cifar10", "model": "resnet-18", "epochs": 30, "schedule": "one-cycle"},
        "grid": {"alpha": [0.0, 0.1, 0.2, 0.3, 0.4, 0.6], "eps": [4.0, 8.0, 16.0]},
        "seeds": 3,
        "for_each": ["eps"],
    },
    "alpha-search-mnist": {
        "about": "the same on 2,000 MNIST images, eps 0.1, 0.2 and 0.3: half an hour on a CPU",
        "base": {
            "data": "mnist", "model": "small-cnn", "limit": 3000, "holdout": 1000, "epochs": 8, "val_every": 8, "test": False,
            "optimizer": "adam", "lr": 2e-3, "schedule": "one-cycle", "batch_size": 50, "weight_decay": 0.0,
        },
        "grid": {"alpha": [0.0, 0.1, 0.2, 0.3, 0.4, 0.6], "eps": [25.5, 51.0, 76.5]},
        "seeds": 3,
        "for_each": ["eps"],
    },
}  # fmt: skip
