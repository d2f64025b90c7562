"""Updates with AWP against the authors' algorithm (csdongxian/AWP), written out in fp64: a proxy model and its step of SGD."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spat_train.config import Config
from spat_train.training.optim import perturbed_weights
from spat_train.training.step import TrainStep

GAMMA, BETA, LR, DECAY = 0.05, 3.0, 0.1, 0.01


class Network(nn.Module):
    """`token` has two dimensions and "weight" not in its name: it does not move."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.token = nn.Parameter(torch.randn(1, 6))

    def forward(self, x):
        return self.fc(F.softplus(self.bn(self.conv(x))).mean((2, 3)) * self.token)


def madry_loss(model, x, x_adv, y):
    return F.cross_entropy(model(x_adv), y)


def trades_loss(model, x, x_adv, y):
    robust = F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="batchmean")
    return F.cross_entropy(model(x), y) + BETA * robust


def mart_loss(model, x, x_adv, y):
    p, q, rows = model(x).softmax(1), model(x_adv).softmax(1), torch.arange(len(y))
    runner_up = q.clone().index_put((rows, y), torch.tensor(0.0).double()).amax(1)
    bce = -q[rows, y].log().mean() - (1.0001 - runner_up + 1e-12).log().mean()
    kl = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return bce + BETA * (kl * (1.0000001 - p[rows, y])).mean()


def published_update(model, optimizer, loss, *images):
    proxy = copy.deepcopy(model).train()
    (-loss(proxy, *images)).backward()
    torch.optim.SGD(proxy.parameters(), lr=0.01).step()
    moves = {}
    for (name, w), moved in zip(model.named_parameters(), proxy.parameters(), strict=True):
        if w.ndim > 1 and "weight" in name:
            difference = moved.detach() - w.detach()
            moves[name] = GAMMA * w.detach().norm() / (difference.norm() + 1e-20) * difference
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, move in moves.items():
            parameters[name] += move
    optimizer.zero_grad()
    loss(model, *images).backward()
    optimizer.step()
    with torch.no_grad():
        for name, move in moves.items():
            parameters[name] -= move


@pytest.mark.parametrize(
    ("method", "loss", "forwards"),
    [
        ("madry", madry_loss, "clean-adv"),
        ("trades", trades_loss, "adv-clean-clean"),
        ("mart", mart_loss, "clean-adv"),
    ],
)
def test_updates_are_those_of_the_published_algorithm(method, loss, forwards):
    """Two of them, for the momentum; weight decay reads the moved weights."""
    torch.manual_seed(0)
    theirs = Network().double()
    ours = copy.deepcopy(theirs)
    beta = None if method == "madry" else BETA
    config = Config(method=method, beta=beta, forwards=forwards, awp=GAMMA, lr=LR, weight_decay=DECAY, device="cpu")
    step = TrainStep(config, ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    start = copy.deepcopy(theirs)
    for _ in range(2):
        x, y = torch.rand(7, 3, 8, 8).double(), torch.randint(5, (7,))
        x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
        step.update(x, x_adv, y, perturb=True)
        published_update(theirs, optimizer, loss, x, x_adv, y)
    for (name, p), q, before in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(p, before) or name == "conv.bias"  # batch norm takes that away
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("fails", [False, True])
def test_without_a_step_the_weights_are_as_before(fails):
    model = Network()
    before = copy.deepcopy(model.state_dict())
    model(torch.rand(4, 3, 8, 8)).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    try:
        with perturbed_weights(model, 0.1):
            moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert moved == {"conv.weight", "fc.weight"}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(map(torch.equal, grads, [p.grad for p in model.parameters()]))


def test_weights_are_as_before_where_a_move_fails(monkeypatch):
    """As where memory runs out: the second of two weights has not moved yet."""
    model, norm = Network(), torch.Tensor.norm
    before = copy.deepcopy(model.state_dict())
    model(torch.rand(4, 3, 8, 8)).square().sum().backward()
    before |= {name: b.clone() for name, b in model.named_buffers()}
    monkeypatch.setattr(torch.Tensor, "norm", lambda t: 1 / 0 if t.shape == (5, 6) else norm(t))
    with pytest.raises(ZeroDivisionError), perturbed_weights(model, 0.1):
        pass
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
