"""What many tests attack: small models and batches; and how they compare what comes out."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

ASSETS = Path(__file__).parent / "assets"
EPS = 8 / 255
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # ours, and as torchattacks writes them


# ---- models and batches


def cnn(classes: int = 10, size: int = 8) -> nn.Module:
    """A small convolutional network with batch norm and dropout, away from its initial statistics."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Softplus(), nn.Flatten(), nn.Linear(8 * (size // 2) ** 2, classes),
    )  # fmt: skip
    for _ in range(3):
        model(torch.rand(16, 3, size, size))
    return model


def mixed_model() -> nn.Module:
    """Some modules in train mode, some not; some parameters frozen, some with gradients already."""
    model = cnn()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    return model


def sharp(size: int = 8) -> nn.Module:
    """A network on random images that knows more than one class, and changes its mind for less than 0.02."""
    model = cnn(size=size).double().eval()
    with torch.no_grad():
        model[-1].bias -= model(torch.rand(100, 3, size, size).double()).mean(0)
        model[-1].weight *= 20
        model[-1].bias *= 20
    return model


def linear(pixels: int = 48, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).eval()


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


class Recorder(nn.Module):
    """Counts forwards and remembers the layouts that came in."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inputs = model, []

    def forward(self, x):
        self.inputs.append((x.shape, x.stride(), x.dtype))
        return self.model(x)

    @property
    def sizes(self) -> list[int]:
        """The number of images in each forward."""
        return [shape[0] for shape, _, _ in self.inputs]


def batch(n: int = 6, classes: int = 10, size: int = 8):
    return torch.rand(n, 3, size, size), torch.randint(classes, (n,))


def attackable(n: int, size: int = 8):
    """`sharp`, n images, and the classes that it knows them as."""
    model, x = sharp(size), torch.rand(n, 3, size, size).double()
    return model, x, model(x).argmax(1)


def classified(net, n: int = 16, shape=(3, 4, 4)):
    """n images, and the classes that `net` gives them."""
    x = torch.rand(n, *shape)
    return x, net(x).argmax(1)


def correct(model, x, y, n):
    """The first n images that the model classifies correctly."""
    rows = (model(x).argmax(1) == y).nonzero()[:n, 0]
    return x[rows], y[rows]


def strange_layouts(x):
    yield "contiguous", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "every_other_pixel", x.repeat_interleave(2, -1)[..., ::2]
    yield "batch_inside", x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    yield "offset_view", torch.cat([x[:1], x])[1:]
    yield "expanded", x[:1].expand_as(x)
    yield "negated", torch._neg_view(-x)
    yield "flipped_memory", x.transpose(2, 3).contiguous().transpose(2, 3)


# ---- what attacks give, and what they leave


def distance(x_adv, x, norm):
    """How far each image has moved, fp64 [B]."""
    delta = (x_adv.double() - x.double()).flatten(1)
    return torch.linalg.vector_norm(delta, {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)


def moved(x_adv, x):
    """bool [B]: the images that are not as they were."""
    return (x_adv != x).flatten(1).any(1)


def assert_inside(x_adv, x, eps, norm, bounds=(0.0, 1.0), atol=0.0):
    """In x's dtype, inside the box exactly, and inside the ball up to `atol` and a rounding of x's dtype in each element."""
    lo, hi = (torch.tensor(b, dtype=torch.float64).to(x.dtype) for b in bounds)
    assert x_adv.dtype == x.dtype
    assert x_adv.isfinite().all()
    assert x_adv.min() >= lo
    assert x_adv.max() <= hi
    rounding = torch.finfo(x.dtype).eps * x[0].numel() ** {"linf": 0, "l2": 1 / 2, "l1": 1}[norm]
    assert (distance(x_adv, x, norm) <= torch.as_tensor(eps, dtype=torch.float64) + rounding + atol).all()


def nearest_in_l1(points, x, eps, lo=0.0, hi=1.0):
    """The points of L1 ball and box nearest to `points` [B, n], fp64: each element shrunk by what bisection finds."""
    moved = points - x
    size, room = moved.abs(), torch.where(moved > 0, hi - x, x - lo)

    def shrunk(by):
        return torch.minimum((size - by).clamp_min(0), room)

    too_little, enough = torch.zeros_like(size[:, :1]), size.amax(1, keepdim=True)
    for _ in range(200):
        middle = (too_little + enough) / 2
        far = shrunk(middle).sum(1, keepdim=True) > eps
        too_little, enough = torch.where(far, middle, too_little), torch.where(far, enough, middle)
    return x + moved.sign() * shrunk(torch.where(shrunk(0).sum(1, keepdim=True) > eps, enough, 0.0))


def snapshot(model, x, y):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "identities": {name: id(b) for name, b in model.named_buffers()},
        "versions": {name: b._version for name, b in (*model.named_buffers(), *model.named_parameters())},
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "x": (x.clone(), x._version, x.requires_grad, x.grad),
        "y": (y.clone(), y._version),
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for u, v in zip(*map(tree_leaves, (a, b)), strict=True):
        assert torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v


def margin(z, y):
    """max_{k != y} z_k - z_y, [B]: positive where misclassified."""
    return z.scatter(1, y[:, None], -torch.inf).amax(1) - z.gather(1, y[:, None])[:, 0]


def probability_margin(z, y):
    p = z.softmax(1)
    p_y = p.gather(1, y[:, None])[:, 0]
    return p.scatter(1, y[:, None], -1.0).amax(1) - p_y


def accuracy(model, x, y) -> float:
    """Share of the images that are classified as y; a NaN is no class."""
    logits = model(x)
    return (logits.argmax(1).eq(y) & ~logits.isnan().any(1)).float().mean().item()


# ---- files


def edit_json(path: Path, **changes) -> None:
    """Change entries of a file as a user does who means to: without its digest. ... removes an entry."""
    content = json.loads(path.read_bytes()) | {"digest": ...} | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


# ---- a network that is robust, and what it was made for


def robust(name: str) -> nn.Module:
    """WRN-10-2 from `python -m benchmarks.table61`: "madry" or "trades+spat", 80,000 images of CIFAR-10 in all. In eval mode."""
    from spat_train.models.registry import create  # not needed by tests of the kernels alone

    model = create("wrn-10-2")
    model.load_state_dict(torch.load(ASSETS / f"wrn-10-2-{name}.pt", weights_only=True))  # kept in fp16
    return model.eval()


def photographs() -> tuple[torch.Tensor, torch.Tensor]:
    """The first 100 test images of CIFAR-10 and their labels."""
    with np.load(ASSETS / "cifar10-test-100.npz") as kept:
        return torch.from_numpy(kept["x"]).permute(0, 3, 1, 2).float().div(255).contiguous(), torch.from_numpy(kept["y"])
