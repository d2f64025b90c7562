"""The registry: op, shape, bytes, and the providers that race on it: ours, its rivals, and a yardstick.

A rival computes what ours does, and `verify` compares them before anything is timed. It runs in its own favour: its
logits already require a gradient, and its scalars are Python numbers. A yardstick does other work: `copy_` between two
buffers that together hold as many bytes as the case's tensors (so that both sit in the same cache), or `add_` of one
element.

The `host` cases run on one element or one row, straight through `torch.ops.spat.*.default`. What they time is the
dispatcher, unboxing and the argument checks: the part of a call's cost that CPU and CUDA tensors share. The device
guard, the stream lookup and the launch are in it on the GPU alone.

Tensors are on `DEVICE` ("cpu", or "cuda" by `pytest benchmarks --device cuda`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from spat_kernels import ops
from spat_kernels.ops.crop_flip import crops_ref

DEVICE = "cpu"
EPS, STEP = 8 / 255, 2 / 255
IMAGES, SMALL_IMAGES = (128, 3, 32, 32), (4, 3, 32, 32)
ROWS, SMALL_ROWS = ((512, 10), (128, 1000)), (5, 10)
ACTIVATIONS, SMALL_ACTIVATIONS = (64, 64, 32, 32), (4, 16, 8, 8)
FEATURES = ((128, 512, 4, 4), (128, 640, 8, 8))  # ResNet-18 and WRN-34-10 before their pooling
COPY_MIB = 256


@dataclass(frozen=True)
class Work:
    """One case's tensors, closed over by its providers; each `build` makes fresh ones with the same values."""

    ours: Callable[[], Tensor]
    rivals: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    view: Callable[[Tensor], Tensor] = lambda t: t  # what of a result must agree
    atol: float = 1e-6
    reset: Callable[[], object] | None = None  # before each call, outside the clock
    synchronise: tuple[str, ...] = ()  # rivals that wait for the GPU, so that no CUDA graph can hold them


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    variant: str
    build: Callable[[tuple[int, ...]], Work] | None  # None: the yardstick alone
    small: tuple[int, ...] = ()  # the shape on which the tests compare the providers
    moved: float = 0  # bytes an element that a perfect cache would move
    held: float = 0  # bytes an element of the tensors in use
    yardstick: str = "copy_"

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.variant}".strip()

    @property
    def bytes_moved(self) -> int:
        return round(self.moved * math.prod(self.shape))

    @property
    def bytes_held(self) -> int:
        return round(self.held * math.prod(self.shape))

    def work(self, shape: tuple[int, ...]) -> Work:
        with torch.device(DEVICE):
            return self.build(shape)

    def roles(self) -> dict[str, str]:
        """Provider name to its role."""
        named = {self.yardstick: "yardstick"}
        if self.build:
            named = {"spat": "ours"} | dict.fromkeys(self.work(self.small).rivals, "rival") | named
        return named

    def provider(self, name: str) -> tuple[Callable[[], object], Callable[[], object] | None]:
        """A function to time, and what to call before each call of it."""
        if name == self.yardstick:
            return yardstick(name, self.bytes_held), None
        work = self.work(self.shape)
        return ({"spat": work.ours} | work.rivals)[name], work.reset

    def verify(self, shape: tuple[int, ...] | None = None) -> None:
        """Raise AssertionError unless every rival agrees with ours on its own copy of the inputs."""
        if not self.build:
            return
        shape = shape or self.shape
        expected = self.work(shape)
        ours = expected.view(expected.ours().clone())
        for name in expected.rivals:
            work = self.work(shape)
            theirs = work.view(work.rivals[name]())
            label = f"{self.name} against {name}: "
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=work.atol, msg=label.__add__)


def yardstick(name: str, held: int) -> Callable[[], object]:
    n = 1 if name == "add_" else held // 8
    a, b = torch.ones(n, device=DEVICE), torch.zeros(n, device=DEVICE)
    return (lambda: a.add_(b)) if name == "add_" else (lambda: a.copy_(b))


# --- images ---


def images(shape, dtype=torch.float32, memory_format=torch.contiguous_format) -> list[Tensor]:
    """x, an x_adv in its ball, and a gradient."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    x = torch.rand(shape, generator=generator)
    x_adv = (x + EPS * (2 * torch.rand(shape, generator=generator) - 1)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator)
    return [t.to(dtype).contiguous(memory_format=memory_format) for t in (x, x_adv, grad)]


def linf_step(shape, dtype=torch.float32, memory_format=torch.contiguous_format, op=ops.linf_step_) -> Work:
    x, x_adv, grad = images(shape, dtype, memory_format)
    eps, step = torch.tensor([EPS]), torch.tensor([STEP])

    def ours():
        op(x_adv, x, grad, eps, step, 0.0, 1.0, None)
        return x_adv

    def eager():
        adv = x_adv + STEP * grad.sign()
        adv = torch.min(torch.max(adv, x - EPS), x + EPS)
        return adv.clamp_(0, 1)

    def torchattacks():  # PGD.forward
        adv = x_adv.detach() + STEP * grad.sign()
        delta = torch.clamp(adv - x, min=-EPS, max=EPS)
        return torch.clamp(x + delta, min=0, max=1).detach()

    # eager bf16 rounds after every operation, ours once: a few ulp of values below 1
    return Work(ours, {"eager": eager, "torchattacks": torchattacks}, atol=2**-7 if dtype == torch.bfloat16 else 1e-6)


def linf_random_start(shape) -> Work:
    x, x_adv, _ = images(shape)
    eps, seed = torch.tensor([EPS]), torch.tensor([1, 2])

    def eager():
        return (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp_(0, 1)

    def moments(adv):  # the two draw other numbers from one distribution
        assert (adv - x).abs().max() <= EPS + 1e-6
        return torch.stack([(adv - x).mean(), (adv - x).std()])

    return Work(lambda: ops.linf_random_start_(x_adv, x, eps, seed), {"eager": eager}, moments, atol=5e-4)


def l2_step(shape) -> Work:
    x, x_adv, grad = images(shape)
    eps, step = torch.tensor([0.5]), torch.tensor([0.1])

    def torchattacks():  # PGDL2.forward
        norms = torch.norm(grad.view(len(x), -1), p=2, dim=1) + 1e-10
        adv = x_adv.detach() + 0.1 * (grad / norms.view(-1, 1, 1, 1))
        delta = adv - x
        norms = torch.norm(delta.view(len(x), -1), p=2, dim=1)
        factor = torch.min(0.5 / norms, torch.ones_like(norms))
        return torch.clamp(x + delta * factor.view(-1, 1, 1, 1), min=0, max=1).detach()

    return Work(lambda: ops.l2_step_(x_adv, x, grad, eps, step), {"torchattacks": torchattacks})


def adt_step(shape) -> Work:
    """The rivals take their noise from `randn`, so all go on from parameters at which it does not count: sigma is 1e-9."""
    x, x_adv, grad = images(shape)
    eps, one, seed = torch.tensor([EPS]), torch.ones(1), torch.tensor([1, 2])
    mu, rho = torch.zeros_like(x), torch.full_like(x, -20.0)

    def ours():
        return ops.adt_step_(x_adv, mu, rho, x, grad, eps, one, seed, 0, lr=0.3, entropy=1e-9)

    def eager():  # the gradients written out, Adam without averages
        r, sigma = torch.randn_like(x), F.softplus(rho)
        tanh = (mu + sigma * r).tanh()
        slope = 1 - tanh * tanh
        moved = x + EPS * tanh
        g_mu = torch.where((moved >= 0) & (moved <= 1), grad * EPS * slope, 0) - 2e-9 * tanh * slope / (slope + 1e-8)
        g_rho = (g_mu * r + 1e-9 / (sigma + 1e-8)) * rho.sigmoid()
        mu.add_(g_mu / (g_mu.abs() + 1e-8), alpha=0.3)
        rho.add_(g_rho / (g_rho.abs() + 1e-8), alpha=0.3)
        return (x + EPS * (mu + F.softplus(rho) * torch.randn_like(x)).tanh()).clamp_(0, 1)

    def autograd():
        m, p = mu.detach().requires_grad_(), rho.detach().requires_grad_()
        r, sigma = torch.randn_like(x), F.softplus(p)
        tanh = (m + sigma * r).tanh()
        h = (sigma + 1e-8).log() + (1 - tanh * tanh + 1e-8).log()
        g_mu, g_rho = torch.autograd.grad(((x + EPS * tanh).clamp(0, 1) * grad + 1e-9 * h).sum(), (m, p))
        mu.add_(g_mu / (g_mu.abs() + 1e-8), alpha=0.3)
        rho.add_(g_rho / (g_rho.abs() + 1e-8), alpha=0.3)
        return (x + EPS * (mu + F.softplus(rho) * torch.randn_like(x)).tanh()).clamp_(0, 1)

    return Work(ours, {"eager": eager, "autograd": autograd}, reset=lambda: (mu.zero_(), rho.fill_(-20.0)))


def keep_best(shape) -> Work:
    """Every other sample is better. Goes by loss alone, the form with the fewest eager operations."""
    best, x_adv, _ = images(shape)
    loss, best_loss = torch.arange(len(best)) % 2.0, torch.full((len(best),), 0.5)

    def where():
        better = loss > best_loss
        new_loss = torch.where(better, loss, best_loss)  # noqa: F841  part of the work
        return torch.where(better.view(-1, 1, 1, 1), x_adv, best)

    def index():
        better = (loss > best_loss).nonzero()[:, 0]
        best_loss[better] = loss[better]
        best[better] = x_adv[better]
        return best

    def ours():
        return ops.keep_best_(best, best_loss, None, x_adv, loss)

    return Work(ours, {"torch.where": where, "index": index}, reset=lambda: best_loss.fill_(0.5), synchronise=("index",))


# --- between convolutions ---


def activations(shape, dtype) -> list[Tensor]:
    """Two images, a scale and a shift a channel (shaped for eager in the images' dtype, and as ours wants them), and bits."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    a, b = (torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    scale, shift = (torch.rand(shape[1], generator=generator).to(dtype) for _ in range(2))
    mask = torch.zeros(a.numel() // shape[1], -(-shape[1] // 8), dtype=torch.uint8)
    wide = [t[:, None, None] for t in (scale, shift)]
    return [a, b, scale.float(), shift.float(), *wide, mask]


def rounding(dtype) -> float:
    """Eager bf16 rounds after every operation, ours once: two ulp of values below 8."""
    return 2**-4 if dtype == torch.bfloat16 else 1e-6


def forward(shape, dtype=torch.float32) -> Work:
    """BatchNorm and ReLU, and what each keeps for the way back: ours the bits, eager its result."""
    a, _, scale, shift, wide_scale, wide_shift, mask = activations(shape, dtype)
    out, mean, var = torch.empty_like(a), torch.zeros(shape[1]), torch.ones(shape[1])

    def eager():
        return a.mul(wide_scale).add_(wide_shift).relu_()

    def batch_norm():
        return F.batch_norm(a, mean, var, scale, shift, eps=1e-12).relu_()

    ours = partial(ops.scale_shift_relu, a, out, scale=scale, shift=shift, mask=mask)
    return Work(ours, {"eager": eager, "batch_norm + relu": batch_norm}, atol=rounding(dtype))


def backward(shape, dtype=torch.float32) -> Work:
    grad, a, scale, _, wide_scale, _, mask = activations(shape, dtype)
    activation, dx = torch.empty_like(a), torch.empty_like(grad)
    ops.scale_shift_relu(a, activation, mask=mask)

    def eager():
        return torch.ops.aten.threshold_backward(grad, activation, 0).mul_(wide_scale)

    ours = partial(ops.scale_shift_relu_grad, grad, dx, mask=mask, scale=scale)
    return Work(ours, {"eager": eager}, atol=rounding(dtype))


def act_forward(act: str, eager_of: Callable) -> Callable[..., Work]:
    """An activation of an affine map, and what each keeps for the way back: ours the derivative, eager what it has computed."""

    def build(shape, dtype=torch.float32) -> Work:
        a, _, scale, shift, wide_scale, wide_shift, _ = activations(shape, dtype)
        out, slope = torch.empty_like(a), torch.empty_like(a)

        def eager():
            return eager_of(a.mul(wide_scale).add_(wide_shift))

        ours = partial(ops.scale_shift_act, a, out, act=act, scale=scale, shift=shift, slope=slope)
        return Work(ours, {"eager": eager}, atol=rounding(dtype))

    return build


def act_backward(act: str, eager_of: Callable) -> Callable[..., Work]:
    """The way back: eager computes the derivative again."""

    def build(shape, dtype=torch.float32) -> Work:
        grad, a, scale, shift, wide_scale, wide_shift, _ = activations(shape, dtype)
        v, slope, dx = a.mul(wide_scale).add_(wide_shift), torch.empty_like(a), torch.empty_like(a)
        ops.scale_shift_act(a, torch.empty_like(a), act=act, scale=scale, shift=shift, slope=slope)

        def eager():
            return eager_of(grad, v).mul_(wide_scale)

        return Work(partial(ops.scale_shift_act_grad, grad, slope, dx), {"eager": eager}, atol=rounding(dtype))

    return build


def split(shape) -> Work:
    x, *_ = images(shape, memory_format=torch.channels_last)
    out = x.new_empty(len(x), 8, *shape[2:], dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    zeros = torch.zeros_like(out[:, :2])

    def eager():
        hi = x.bfloat16()
        return torch.cat([hi, (x - hi).bfloat16(), zeros], 1)

    return Work(lambda: ops.split_image(x, out), {"eager": eager})


def head(shape, classes) -> list[Tensor]:
    """Weights, biases and gradients of logits as the plan has them, in fp32."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    return [torch.randn(size, generator=generator) for size in ((classes, shape[1]), (classes,), (shape[0], classes))]


def head_forward(shape, dtype=torch.float32, classes=10) -> Work:
    x, *_ = activations(shape, dtype)
    weight, bias, logits = head(shape, classes)

    def eager():
        return F.linear(x.mean((2, 3), dtype=torch.float32), weight, bias)

    return Work(lambda: ops.pool_linear(x, weight, logits, bias=bias), {"eager": eager}, atol=1e-4)


def head_backward(shape, dtype=torch.float32, classes=10) -> Work:
    """Through the BatchNorm and ReLU in front of the pooling; in bf16 each sample is scaled."""
    a, dx, scale, _, wide_scale, _, mask = activations(shape, dtype)
    weight, _, dlogits = head(shape, classes)
    activation = ops.scale_shift_relu(a, torch.empty_like(a), mask=mask)
    factor = torch.empty(shape[0]) if dtype == torch.bfloat16 else None

    def eager():
        g = dlogits @ weight
        if dtype == torch.bfloat16:
            largest = g.abs().amax(1).clamp_min(torch.finfo(g.dtype).tiny)
            factor.copy_(largest / math.prod(shape[2:]))
            g = (g / largest[:, None]).to(dtype)
        else:
            g = g / math.prod(shape[2:])
        g = g[:, :, None, None].expand_as(a).contiguous(memory_format=torch.channels_last)
        return torch.ops.aten.threshold_backward(g, activation, 0).mul_(wide_scale)

    ours = partial(ops.pool_linear_grad, dlogits, weight, dx, mask=mask, scale=scale, factor=factor)
    return Work(ours, {"eager": eager}, atol=2**-7 if dtype == torch.bfloat16 else 1e-6)


# --- training images ---


def crops(shape, dtype=torch.float32, memory_format=torch.contiguous_format) -> Work:
    """A batch as training takes it: other images, each cropped and mirrored in its own way. The rivals are given the draws."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    batch, channels, height, width = shape
    pad, seed = 4, torch.tensor([1, 2])
    pool = torch.randint(256, (batch, height, width, channels), dtype=torch.uint8, generator=generator)
    rows = torch.randperm(batch, generator=generator)
    out = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    dy, dx, flipped = crops_ref(rows, seed, pad, True)
    down, across, samples = (torch.arange(n) for n in (height, width, batch))
    draws = list(zip(rows.tolist(), dy.tolist(), dx.tolist(), flipped.tolist(), strict=True))

    def index():
        y = down + dy[:, None]
        x = torch.where(flipped[:, None], width - 1 - across, across) + dx[:, None]
        padded = F.pad(pool[rows], (0, 0, pad, pad, pad, pad))
        pixels = padded[samples[:, None, None], y[:, :, None], x[:, None, :]]
        return pixels.movedim(-1, 1).to(dtype, memory_format=memory_format).div_(255)

    def one_by_one():  # torchvision's RandomCrop and RandomHorizontalFlip, then a collate
        crops = []
        for row, top, left, mirrored in draws:
            image = F.pad(pool[row], (0, 0, pad, pad, pad, pad))[top : top + height, left : left + width]
            crops.append(image.flip(1) if mirrored else image)
        return torch.stack(crops).movedim(-1, 1).to(dtype, memory_format=memory_format).div_(255)

    ours = partial(ops.crop_flip, pool, rows, rows, seed, out, pad=pad, flip=True)
    return Work(ours, {"index": index, "one by one": one_by_one})


# --- rows of logits ---


def rows(ours_of: Callable, eager_of: Callable) -> Callable[[tuple[int, int]], Work]:
    """A row op as an attack calls it in every step, without the value, and the loss whose sum autograd differentiates."""

    def build(shape):
        generator = torch.Generator(DEVICE).manual_seed(7)
        z = 3 * torch.randn(shape, generator=generator)
        labels = torch.randint(shape[1], shape[:1], generator=generator)
        probs = torch.randn(shape, generator=generator).softmax(1)
        dlogits, leaf = torch.empty_like(z), z.clone().requires_grad_()

        def ours():
            ours_of(z, labels, probs, dlogits)
            return dlogits

        def eager():
            return torch.autograd.grad(eager_of(leaf, labels, probs), leaf)[0]

        return Work(ours, {"eager + autograd": eager}, atol=1e-5)

    return build


def lsce(alpha: float):
    def eager(z, y, q):
        classes = z.shape[1]
        return F.cross_entropy(z, y, label_smoothing=alpha * classes / (classes - 1), reduction="sum")

    return rows(lambda z, y, q, g: ops.lsce_grad(z, y, g, alpha=alpha), eager)


def lsce_normalized(shape) -> Work:
    """Both go from the logits alone: no graph, so eager has no autograd to pay for."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    z, labels = 3 * torch.randn(shape, generator=generator), torch.randint(shape[1], shape[:1], generator=generator)
    dlogits = torch.empty_like(z)

    def eager():
        y = labels[:, None]
        return z.scatter(1, y, -torch.inf).softmax(1).scatter_(1, y, -1.0)

    return Work(lambda: ops.lsce_grad(z, labels, dlogits, normalize=True), {"eager": eager})


def lsce_host(shape) -> Work:
    z, y, g, loss = torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64), torch.empty(shape), torch.empty(shape[0])
    op = torch.ops.spat.lsce_grad.default
    return Work(lambda: (op(z, y, g, loss, 0.1, False, 1.0, False), g)[1])


kl = rows(lambda z, y, q, g: ops.kl_grad(z, q, g), lambda z, y, q: F.kl_div(F.log_softmax(z, 1), q, reduction="sum"))


def margin_eager(z, y, q):  # Madry et al.'s CW loss
    one_hot = F.one_hot(y, z.shape[1])
    return (torch.max(z - 1e4 * one_hot, 1)[0] - z.gather(1, y[:, None])[:, 0]).clamp(max=50).sum()


margin = rows(lambda z, y, q, g: ops.margin_grad(z, y, g, kappa=50.0), margin_eager)


def pma_eager(z, y, q):
    p = z.softmax(1)
    return (p.scatter(1, y[:, None], -1.0).amax(1) - p.gather(1, y[:, None])[:, 0]).sum()


pma = rows(lambda z, y, q, g: ops.pma_grad(z, y, g), pma_eager)


def dlr_eager(z, y, q):  # AutoAttack's dlr_loss
    top, index = z.sort(dim=1)
    is_top = (index[:, -1] == y).float()
    z_y = z[torch.arange(len(z), device=z.device), y]
    return (-(z_y - top[:, -2] * is_top - top[:, -1] * (1.0 - is_top)) / (top[:, -1] - top[:, -3] + 1e-12)).sum()


dlr = rows(lambda z, y, q, g: ops.dlr_grad(z, y, g), dlr_eager)

# --- the registry ---


def _cases():
    yield Case("linf_step_", IMAGES, "fp32", linf_step, SMALL_IMAGES, moved=16, held=12)
    bf16, nhwc = partial(linf_step, dtype=torch.bfloat16), partial(linf_step, memory_format=torch.channels_last)
    yield Case("linf_step_", IMAGES, "bf16", bf16, SMALL_IMAGES, moved=8, held=6)
    yield Case("linf_step_", IMAGES, "fp32 channels_last", nhwc, SMALL_IMAGES, moved=16, held=12)
    yield Case("linf_random_start_", IMAGES, "fp32", linf_random_start, (32, 3, 32, 32), moved=8, held=8)
    yield Case("l2_step_", IMAGES, "fp32", l2_step, SMALL_IMAGES, moved=16, held=12)
    yield Case("adt_step_", IMAGES, "fp32", adt_step, SMALL_IMAGES, moved=28, held=20)
    # half of the samples change: 8 bytes an element of those
    yield Case("keep_best_", IMAGES, "fp32", keep_best, SMALL_IMAGES, moved=4, held=4)
    # and 1/8 byte of bits
    fp32, bf16 = {"moved": 8 + 1 / 8, "held": 8 + 1 / 8}, {"moved": 4 + 1 / 8, "held": 4 + 1 / 8}
    for op, build in (("scale_shift_relu", forward), ("scale_shift_relu_grad", backward)):
        yield Case(op, ACTIVATIONS, "fp32", build, SMALL_ACTIVATIONS, **fp32)
        yield Case(op, ACTIVATIONS, "bf16", partial(build, dtype=torch.bfloat16), SMALL_ACTIVATIONS, **bf16)
    aten = torch.ops.aten
    for act, forth, back in (("gelu", F.gelu, aten.gelu_backward), ("silu", F.silu, aten.silu_backward)):
        for op, build in (("scale_shift_act", act_forward(act, forth)), ("scale_shift_act_grad", act_backward(act, back))):
            bf16 = partial(build, dtype=torch.bfloat16)
            yield Case(op, ACTIVATIONS, f"{act} fp32", build, SMALL_ACTIVATIONS, moved=12, held=12)
            yield Case(op, ACTIVATIONS, f"{act} bf16", bf16, SMALL_ACTIVATIONS, moved=6, held=6)
    for op, build, bits in (("pool_linear", head_forward, 0), ("pool_linear_grad", head_backward, 1 / 8)):
        fp32, bf16 = ({"moved": size + bits, "held": size + bits} for size in (4, 2))
        for shape in FEATURES:
            yield Case(op, shape, "fp32", build, SMALL_ACTIVATIONS, **fp32)
            yield Case(op, shape, "fp32 K=100", partial(build, classes=100), SMALL_ACTIVATIONS, **fp32)
            yield Case(op, shape, "bf16", partial(build, dtype=torch.bfloat16), SMALL_ACTIVATIONS, **bf16)
    yield Case("split_image", IMAGES, "bf16", split, SMALL_IMAGES, moved=4 + 16 / 3, held=4 + 16 / 3)
    yield Case("crop_flip", IMAGES, "fp32", crops, SMALL_IMAGES, moved=1 + 4, held=1 + 4)
    bf16_nhwc = partial(crops, dtype=torch.bfloat16, memory_format=torch.channels_last)
    yield Case("crop_flip", IMAGES, "bf16 channels_last", bf16_nhwc, SMALL_IMAGES, moved=1 + 2, held=1 + 2)
    for shape in ROWS:
        yield Case("lsce_grad", shape, "alpha=0", lsce(0.0), SMALL_ROWS, moved=8, held=8)
        yield Case("lsce_grad", shape, "alpha=0.1", lsce(0.1), SMALL_ROWS, moved=8, held=8)
        yield Case("lsce_grad", shape, "normalize", lsce_normalized, SMALL_ROWS, moved=8, held=8)
        yield Case("kl_grad", shape, "", kl, SMALL_ROWS, moved=12, held=12)
        yield Case("margin_grad", shape, "", margin, SMALL_ROWS, moved=8, held=8)
        yield Case("pma_grad", shape, "", pma, SMALL_ROWS, moved=8, held=8)
        yield Case("dlr_grad", shape, "", dlr, SMALL_ROWS, moved=8, held=8)
    host = partial(linf_step, op=torch.ops.spat.linf_step_.default)
    yield Case("linf_step_", (1, 1), "host", host, (1, 1), yardstick="add_")
    yield Case("lsce_grad", (1, 10), "host", lsce_host, (1, 10), yardstick="add_")
    yield Case("copy_", (COPY_MIB * 2**18,), "", None, held=8)


CASES = list(_cases())
