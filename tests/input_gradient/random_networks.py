"""Random small networks of everything that a plan knows, from a seed: a walk through images, pixels, tokens and features.

Sizes coincide on purpose (8 channels, 8 tokens, 8 pixels in a row), so that what confuses dimensions finds shapes that fit.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = (
    nn.ReLU, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Mish, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Softplus,
    nn.ReLU6, nn.CELU,
)  # fmt: skip


class Walk(nn.Module):
    """Each step makes a value of the last one, or of the last two that are alike; the end makes 5 logits of it."""

    def __init__(self, seed: int, steps: int = 9):
        super().__init__()
        self.random, self.modules_, self.vectors = random.Random(seed), nn.ModuleList(), nn.ParameterList()
        torch.manual_seed(seed)
        self.channels, self.size, self.kind, self.names = 8, self.random.choice((4, 8)), "images", list[str]()
        self.steps = [self._layer(nn.Conv2d(3, 8, 3, padding=1, bias=self._coin()))] if self._coin(0.9) else [self._stem()]
        for _ in range(steps):
            self.steps.append(self._step())
        self.steps += self._end()

    def forward(self, x):
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return values[-1]

    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.pixels, self.pixels

    # ---- helpers

    def _coin(self, p=0.5) -> bool:
        return self.random.random() < p

    def _own(self, module: nn.Module) -> nn.Module:
        self.modules_.append(module)
        return module

    def _layer(self, module: nn.Module):
        self._own(module)
        return lambda values: module(values[-1])

    def _vector(self, *shape: int) -> int:
        """A parameter that is ones at first, as layer scales are: what confuses its dimension shows later."""
        self.vectors.append(nn.Parameter(torch.ones(shape)))
        return len(self.vectors) - 1

    def _stem(self):
        """A convolution and a norm of the images in front."""
        a, b = self._own(nn.BatchNorm2d(3)), self._own(nn.Conv2d(3, 8, 1))
        return lambda values: b(a(values[-1] * 2 - 1))

    # ---- steps

    def _step(self):
        if len(self.names) == 0:
            self.pixels = self.size
        name = self.random.choice(STEPS[self.kind])
        self.names.append(name)
        return getattr(self, "_" + name)()

    def _act(self):
        kind = self.random.choice(ACTIVATIONS)
        return self._layer(nn.PReLU(self.channels) if kind is nn.PReLU and self.kind == "images" and self._coin() else kind())

    def _relu(self):
        inplace = self._coin(0.1)
        return lambda values: F.relu(values[-1], inplace=inplace)

    def _residual(self):
        """x + f(x), or x f(x), or both ways round, where f keeps the shape."""
        kept, count = (self.kind, self.channels, self.size), self.random.randint(1, 4)
        inner = []
        while len(inner) < count:
            name = self.random.choice([s for s in STEPS[self.kind] if s in KEEPING])
            self.names.append(name)
            inner.append(getattr(self, "_" + name)())
        assert kept == (self.kind, self.channels, self.size)
        how = self.random.choice(("sum", "sum", "turned", "twice", "product", "scaled", "cat"))
        scale = self._vector(*self._vector_shape())

        def run(values):
            own = [values[-1]]
            for f in inner:
                own.append(f(own))
            x, y = own[0], own[-1]
            if how == "sum":
                return x + y
            if how == "turned":
                return y + x
            if how == "twice":
                return (x + y) + own[len(own) // 2]
            if how == "product":
                return x * torch.sigmoid(y)
            if how == "cat":
                dim = 1 if self_kind in ("images", "features") else -1
                a, b = torch.cat((x, y), dim).split(x.shape[dim], dim)
                return a - b
            return x + self.vectors[scale] * y

        self_kind = self.kind
        return run

    def _vector_shape(self) -> tuple[int, ...]:
        if self.kind == "images":
            return self.random.choice(((self.channels, 1, 1), (1, self.channels, 1, 1), (self.size,), (1,), (self.size, 1)))
        if self.kind == "pixels":
            return self.random.choice(((self.channels,), (1, 1, self.channels), (self.size, 1, 1), (self.size, self.channels)))
        if self.kind == "tokens":
            return self.random.choice(((self.channels,), (self.size**2, 1), (1, self.size**2, self.channels), (1, 1, 1)))
        return self.random.choice(((self.channels,), (1, self.channels), (1,)))

    def _scale(self):
        i, kind = self._vector(*self._vector_shape()), self.random.choice(("mul", "add", "sub", "rsub", "div"))
        return lambda values: {
            "mul": lambda x, v: x * v, "add": lambda x, v: v + x, "sub": lambda x, v: x - v, "rsub": lambda x, v: v - x,
            "div": lambda x, v: x / v,
        }[kind](values[-1], self.vectors[i])  # fmt: skip

    def _conv(self):
        kernel, groups = self.random.choice((1, 3, 3, 5)), self.random.choice((1, 1, self.channels))
        padding, dilation = kernel // 2, 1
        if kernel == 3 and self._coin(0.2) and self.size >= 4:
            padding = dilation = 2
        return self._layer(nn.Conv2d(self.channels, self.channels, kernel, 1, padding, dilation, groups, bias=self._coin()))

    def _wider(self):
        channels, self.channels = self.channels, self.random.choice((4, 6, 8, 11, 16))
        return self._layer(nn.Conv2d(channels, self.channels, self.random.choice((1, 3)), padding="same"))

    def _batch_norm(self):
        if self.kind == "images":
            return self._layer(nn.BatchNorm2d(self.channels, affine=self._coin(0.8)))
        if self.kind == "features":
            return self._layer(nn.BatchNorm1d(self.channels))
        return self._layer(nn.BatchNorm1d(self.size**2))  # of tokens: their number counts as channels

    def _group_norm(self):
        groups = self.random.choice([g for g in (1, 2, self.channels) if self.channels % g == 0])
        return self._layer(nn.GroupNorm(groups, self.channels))

    def _layer_norm(self):
        norm = self._own(nn.LayerNorm(self.channels, elementwise_affine=self._coin(0.8)))
        if self.kind != "images":
            return lambda values: norm(values[-1])
        return lambda values: norm(values[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _down(self):
        if self.size < 4:
            return self._relu()
        self.size //= 2
        pool = self.random.choice(("max", "avg", "conv", "adaptive", "adaptive max", "slices"))
        if pool == "conv":
            return self._layer(nn.Conv2d(self.channels, self.channels, 2, 2))
        if pool == "slices":
            channels, self.channels = self.channels, 8
            conv = self._own(nn.Conv2d(4 * channels, 8, 1))
            return lambda v: conv(torch.cat([v[-1][:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1))
        return self._layer(
            {
                "max": nn.MaxPool2d(3, 2, 1), "avg": nn.AvgPool2d(2), "adaptive": nn.AdaptiveAvgPool2d(self.size),
                "adaptive max": nn.AdaptiveMaxPool2d(self.size),
            }[pool]
        )  # fmt: skip

    def _up(self):
        if self.size > 4:
            return self._relu()
        self.size *= 2
        return self._layer(nn.Upsample(scale_factor=2, mode=self.random.choice(("nearest", "bilinear"))))

    def _blur(self):
        return self._layer(self.random.choice((nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1))))

    def _pad(self):
        sides = self.random.choice(((1, 1, 1, 1), (0, 2, 2, 0), (1, 0, 0, 1)))
        conv = self._own(nn.Conv2d(self.channels, self.channels, (1 + sides[2] + sides[3], 1 + sides[0] + sides[1])))
        return lambda v: conv(F.pad(v[-1], sides))

    def _gate(self):
        gate = self._own(nn.Conv2d(self.channels, self.channels, 1))
        turned, act = self._coin(), self.random.choice((torch.sigmoid, torch.tanh))

        def run(v):
            g = act(gate(v[-1].mean((2, 3), keepdim=True)))
            return g * v[-1] if turned else v[-1] * g

        return run

    def _split(self):
        """Channels in parts, some of which are changed and read twice."""
        dim = 1 if self.kind in ("images", "features") else -1
        if self.channels % 2:
            return self._relu()
        half, how = self.channels // 2, self.random.choice(("chunk", "split", "slices", "overlap"))
        layer = self._own(nn.Conv2d(half, half, 3, padding=1) if self.kind == "images" else nn.Linear(half, half))
        order, again = self.random.sample((0, 1, 2), 3), self._coin()

        def run(v):
            x = v[-1]
            if how == "chunk":
                a, b = x.chunk(2, dim)
            elif how == "split":
                a, b = torch.split(x, [half, half], dim=dim)
            elif how == "slices":
                a, b = (x[:, :half], x[:, half:]) if dim == 1 else (x[..., :half], x[..., half:])
            else:
                a, b = x.narrow(dim, 0, half), x.narrow(dim, 1, half)
            c = layer(a)
            y = torch.cat([(a, b, c)[i] for i in order[:2]], dim)
            return y + x if again else y

        return run

    def _dense(self):
        """Each layer reads all before it."""
        channels, growth, count = self.channels, 3, self.random.randint(2, 4)
        convs = [self._own(nn.Conv2d(channels + i * growth, growth, 1)) for i in range(count)]
        last = self._own(nn.Conv2d(channels + count * growth, channels, 1))

        def run(v):
            found = [v[-1]]
            for conv in convs:
                found.append(conv(F.relu(torch.cat(found, 1))))
            return last(torch.cat(found, 1))

        return run

    def _to_pixels(self):
        self.kind = "pixels"
        return lambda v: v[-1].permute(0, 2, 3, 1)

    def _to_images(self):
        if self.kind == "pixels":
            self.kind = "images"
            return lambda v: v[-1].permute(0, 3, 1, 2)
        self.kind, size, contiguous = "images", self.size, self._coin()

        def run(v):
            x = v[-1].transpose(1, 2)
            return (x.contiguous() if contiguous else x).reshape(x.shape[0], x.shape[1], size, size)

        return run

    def _to_tokens(self):
        if self.kind == "pixels":
            self.kind = "tokens"
            return lambda v: v[-1].flatten(1, 2)
        self.kind = "tokens"
        return lambda v: v[-1].flatten(2).transpose(1, 2)

    def _linear(self):
        channels, keep = self.channels, self._coin()
        if keep:
            return self._layer(nn.Linear(channels, channels, bias=self._coin()))
        a, b = self._own(nn.Linear(channels, 12)), self._own(nn.Linear(12, channels))
        return lambda v: b(F.gelu(a(v[-1])))

    def _mix(self):
        """A linear layer along the tokens, or the rows."""
        size = self.size**2 if self.kind == "tokens" else self.size
        layer = self._own(nn.Linear(size, size))
        if self.kind == "tokens":
            return lambda v: layer(v[-1].transpose(1, 2)).transpose(1, 2)
        return lambda v: layer(v[-1].permute(0, 3, 2, 1)).permute(0, 3, 2, 1)

    def _roll(self):
        shift = self.random.choice((1, -1))
        return lambda v: torch.roll(v[-1], (shift, -shift), (1, 2))

    def _windows(self):
        """Windows of 2 x 2, merged with the batch, mixed by attention or a linear layer."""
        if self.size % 2:
            return self._relu()
        size, channels = self.size, self.channels
        layer, norm, shift = self._own(nn.Linear(channels, channels)), self._own(nn.LayerNorm(channels)), self._coin()
        bias = self._vector(4, 4)

        def run(v):
            x = v[-1]
            x = torch.roll(x, (-1, -1), (1, 2)) if shift else x
            w = x.view(x.shape[0], size // 2, 2, size // 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, channels)
            q = norm(layer(w))
            w = w + F.scaled_dot_product_attention(q, q, w, attn_mask=self.vectors[bias])
            x = w.view(-1, size // 2, size // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, size, size, channels)
            return torch.roll(x, (1, 1), (1, 2)) if shift else x

        return run

    def _attention(self):
        channels, written_out, how = self.channels, self._coin(), self.random.choice(("unbind", "index", "chunk"))
        heads = self.random.choice([h for h in (1, 2) if channels % h == 0])
        qkv, project = self._own(nn.Linear(channels, 3 * channels)), self._own(nn.Linear(channels, channels))
        norm, normalize, class_token = self._own(nn.LayerNorm(channels // heads)), self._coin(0.3), self._coin(0.3)
        token = self._vector(1, 1, channels)

        def run(v):
            x = v[-1]
            if class_token:
                x = torch.cat((self.vectors[token].expand(x.shape[0], -1, -1), x), 1)
            b, n, c = x.shape
            if how == "chunk":
                q, k, w = (t.reshape(b, n, heads, c // heads).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            else:
                parts = qkv(x).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
                q, k, w = parts.unbind(0) if how == "unbind" else (parts[0], parts[1], parts[2])
            if normalize:
                q, k = F.normalize(norm(q), dim=-1), F.normalize(k, dim=-1)
            if written_out:
                y = ((q * (c // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ w
            else:
                y = F.scaled_dot_product_attention(q, k, w)
            y = project(y.transpose(1, 2).reshape(b, n, c))
            return y[:, 1:] if class_token else y

        return run

    def _class_token(self):
        """The features of a token that attends to all others, as they go on in the others."""
        token, norm = self._vector(1, 1, self.channels), self._own(nn.LayerNorm(self.channels))

        def run(v):
            x = torch.cat((self.vectors[token].expand(v[-1].shape[0], -1, -1), v[-1]), dim=1)
            q = norm(x)
            x = x + F.scaled_dot_product_attention(q, q, q)
            return x[:, 1:] * x[:, :1].sigmoid()

        return run

    # ---- the end

    def _end(self) -> list:
        end, dims = [], {"images": (2, 3), "pixels": (1, 2), "tokens": (1,)}.get(self.kind)
        classes = self._own(nn.Linear(self.channels, 5))
        how = self.random.choice(("mean", "mean", "flat", "max", "first", "both"))
        if self.kind == "features":
            return [lambda v: classes(v[-1])]
        if how == "flat":
            flat = self._own(nn.Linear(self.channels * self.size**2, 5))
            return [lambda v: flat(v[-1].flatten(1))]
        norm = self._own(nn.LayerNorm(self.channels))
        kind = self.kind

        def run(v):
            x = v[-1]
            first = {"images": lambda: x[:, :, 0, 0], "pixels": lambda: x[:, 0, 0], "tokens": lambda: x[:, 0]}[kind]
            if how == "max":
                return classes(x.amax(dims))
            if how == "first":
                return classes(norm(first()))
            if how == "both":
                return classes(x.mean(dims)) + classes(first())
            return classes(x.mean(dims))

        return [*end, run]


SHARED = ["act", "relu", "residual", "residual", "scale", "split", "layer_norm"]
STEPS = {
    "images": [
        *SHARED, "conv", "conv", "wider", "batch_norm", "batch_norm", "group_norm", "down", "up", "blur", "pad", "gate", "dense",
        "to_pixels", "to_tokens",
    ],
    "pixels": [*SHARED, "linear", "linear", "mix", "roll", "windows", "windows", "to_images", "to_tokens"],
    "tokens": [*SHARED, "linear", "attention", "attention", "mix", "batch_norm", "class_token", "to_images"],
}  # fmt: skip
KEEPING = (
    "act", "relu", "residual", "scale", "split", "layer_norm", "conv", "batch_norm", "group_norm", "blur", "pad", "gate", "dense",
    "linear", "mix", "roll", "windows", "attention", "class_token",
)  # fmt: skip


def network(seed: int, steps: int = 9) -> tuple[Walk, tuple[int, int, int]]:
    """A network in fp64, in eval mode, and the shape of its images."""
    walk = Walk(seed, steps)
    return walk.double().eval().requires_grad_(False), walk.image_shape()


def shuffle(model: nn.Module, seed: int) -> None:
    """Other weights and statistics, in place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor, mean=0.0, std=0.3):
        t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64) * std + mean)

    with torch.no_grad():
        for m in model.modules():
            for name, t in m.named_parameters(recurse=False):
                if t.ndim > 1 and isinstance(m, (nn.Conv2d, nn.Linear)):
                    normal(t, 0, 1.2 / t[0].numel() ** 0.5)
                else:
                    normal(t, 0.0 if name == "bias" else 1.0)
            for name, t in m.named_buffers(recurse=False):
                if name == "running_mean":
                    normal(t)
                elif name == "running_var":
                    t.copy_(torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5)
