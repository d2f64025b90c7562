"""Named settings: every row of the thesis's Tables 6.1-6.4, its Figures 6.1 and 6.2, and Madry's networks (arXiv 1706.06083).

The thesis attacks with PGD-10, eps 8/255, steps of eps/4 and a uniform start. Where it is silent, the public code decides.
"""

from dataclasses import replace

from .config import Config

# The thesis divides lr at epochs 75 and 90, "as MART", whose code ends with epoch 90.
_TABLE_61 = Config(data="cifar10", model="wrn-34-10", weight_decay=7e-4, epochs=90, milestones=(75, 90))
# "As each method's own code": TRADES' ends one epoch after its drop.
_TRADES_62 = replace(_TABLE_61, data="cifar100", weight_decay=2e-4, epochs=76, milestones=(75,))
_MART_62 = replace(_TABLE_61, data="cifar100")
# RST's code: 196 batches an epoch (192 without the held-out images) of 128 labelled and 128 pseudo-labelled images; eps 0.031 and
# steps of 0.007. Needs --extra.
_TABLE_63 = Config(
    data="cifar10", model="wrn-28-10", batch_size=256, epochs=200, schedule="cosine", nesterov=True, weight_decay=5e-4,
    eps=0.031 * 255, step_size=0.007 * 255,
)  # fmt: skip
_TABLE_64 = replace(_TABLE_61, data="stl10", model="resnet-18", batch_size=32, epochs=200)
# Madry's code: 100,000 steps of 50 images; 80,000 steps of 128, lr divided at 40,000 and 60,000.
_MNIST = Config(
    data="mnist", model="mnist-cnn", eps=76.5, steps=40, step_size=0.01 * 255, batch_size=50, epochs=84,
    optimizer="adam", lr=1e-4, schedule="constant", weight_decay=0.0,
)  # fmt: skip
_MADRY_CIFAR = Config(data="cifar10", steps=7, step_size=2.0, weight_decay=2e-4, epochs=205, milestones=(103, 154))

_ROWS = {
    "table6.1/madry": _TABLE_61,
    "table6.1/trades": replace(_TABLE_61, method="trades"),
    "table6.1/mart": replace(_TABLE_61, method="mart"),
    "table6.1/trades+spat": replace(_TABLE_61, method="trades", alpha=0.1),
    "table6.1/mart+spat": replace(_TABLE_61, method="mart", alpha=0.3),
    "table6.2/madry": _TRADES_62,
    "table6.2/trades": replace(_TRADES_62, method="trades"),
    "table6.2/mart": replace(_MART_62, method="mart"),
    "table6.2/trades+spat": replace(_TRADES_62, method="trades", alpha=0.1),
    "table6.2/mart+spat": replace(_MART_62, method="mart", alpha=0.2),
    "table6.3/rst": replace(_TABLE_63, method="rst"),
    "table6.3/mart": replace(_TABLE_63, method="mart"),
    "table6.3/rst+spat": replace(_TABLE_63, method="rst", alpha=0.1),
    "table6.3/mart+spat": replace(_TABLE_63, method="mart", alpha=0.1),
    "table6.4/trades": replace(_TABLE_64, method="trades"),
    "table6.4/mart": replace(_TABLE_64, method="mart"),
    "table6.4/trades+spat": replace(_TABLE_64, method="trades", alpha=0.1),
    "table6.4/mart+spat": replace(_TABLE_64, method="mart", alpha=0.2),
    "madry-mnist/natural": replace(_MNIST, method="standard"),
    "madry-mnist/madry": _MNIST,
    "madry-mnist/madry+spat": replace(_MNIST, alpha=0.2),
    "madry-cifar10/natural": replace(_MADRY_CIFAR, method="standard"),
    "madry-cifar10/madry": _MADRY_CIFAR,
}
for _figure, _data in (("figure6.1", "cifar10"), ("figure6.2", "cifar100")):
    for _eps in (4, 8, 16):
        for _alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            _name = f"{_figure}/eps{_eps}-alpha{_alpha:g}"
            _ROWS[_name] = replace(_TABLE_61, data=_data, model="resnet-50", eps=float(_eps), eval_eps=8.0, alpha=_alpha)

PRESETS = {name: replace(row, preset=name) for name, row in _ROWS.items()}
