"""Networks that look at tokens or keep their channels last: the plan against autograd, piece by piece and as a whole."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels.input_gradient import gradients, packed_linear
from spat_kernels.input_gradient.attention import Attend
from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.steps import Conv, Index, Linear, Local, Pointwise
from spat_kernels.input_gradient.token_steps import LayerNorm
from spat_kernels.input_gradient.weights import LinearWeights
from tests.input_gradient.models import EPS, assert_equals_autograd, images, logits_and_gradient, planned
from tests.input_gradient.test_windows import check


def shaken(model: nn.Module, dtype=torch.float64) -> nn.Module:
    """`model` in eval mode with all vectors at random: norms and layer scales matter then."""
    generator = torch.Generator().manual_seed(0)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if p.is_floating_point() and p.ndim <= 1 and p.numel() > 1:
            spread = 0.3 * torch.randn(p.shape, generator=generator)
            p.data.copy_(1 + spread.clamp(-0.9) if name.endswith(("weight", "gamma", "var")) else spread)
    return model.to(dtype).eval().requires_grad_(False)


class Piece(nn.Module):
    """A stem [B, 8, 4, 4], a part of the caller's on it, and a head on the mean over `last`, or on that of [B, 8, ...]."""

    def __init__(self, part, last=None, **children):
        super().__init__()
        self.stem, self.fc, self.part, self.last = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5), part, last
        self.gamma, self.table = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(7, 8))
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 16, 8))
        self.register_buffer("order", torch.randperm(16) % 7)
        for name, child in children.items():
            self.add_module(name, copy.deepcopy(child))

    def forward(self, x):
        y = self.part(self, self.stem(x))
        return self.fc(y.mean(self.last) if self.last else y.flatten(2).mean(2))


def heads(m, x, scale=None):
    """Attention that is written out, or not."""
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    if scale is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias if hasattr(m, "bias") else None)
    else:
        y = (q * scale @ k.transpose(-2, -1) + m.table[m.order].mean(1)).softmax(-1) @ v
    return y.transpose(1, 2).reshape(b, n, 8)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def windows(m, x, merged):
    """[B, 4, 4, C] in windows of 2x2 that are merged with the batch, and back."""
    b, h, w, c = x.shape
    x = torch.roll(x, (-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, c)
    x = merged(m, x).view(-1, 2, 2, c).view(-1, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, c)
    return torch.roll(x, shifts=(1, 1), dims=(1, 2))


def masked(m, x):
    """As Swin does, with one mask for each window."""
    mask = m.table[:4, :4].view(1, 4, 1, 1, 4).expand(x.shape[0] // 4, -1, 2, 4, -1)
    q, k, v = m.qkv(x).reshape(x.shape[0], 4, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.reshape(-1, 2, 4, 4)).transpose(1, 2).reshape(x.shape[0], 4, 8)


def masked_by_hand(m, x):
    q, k, v = m.qkv(x).reshape(x.shape[0], 4, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    a = (q * 0.5) @ k.transpose(-2, -1) + m.table[:4, :4].unsqueeze(0)
    a = a.view(-1, 4, 2, 4, 4) + m.table[:4, 4:].view(4, 1, 4, 1).unsqueeze(0)
    return (a.view(-1, 2, 4, 4).softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], 4, -1)


def mixed_norms(m, x):
    """Sums that several read, around two norms of one value."""
    y = tokens(x)
    y = y + m.mlp(m.norm(y))
    z = y + m.mlp(m.norm2(y))
    return z + m.norm(z) * m.norm2(z) + y


def scaled(m, x):
    y = m.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x + y.mul(m.gamma.reshape(1, -1, 1, 1))


def scaled_convolution(m, x):
    """As XCiT does: the scale is of tokens, behind a convolution."""
    return tokens(x) + m.gamma * F.conv2d(x, m.table[:, :, None, None].expand(-1, -1, 3, 3)[m.order[:8]], padding=1).flatten(
        2
    ).transpose(1, 2)


def response_norm(m, x):
    g = x.norm(2, (2, 3), True)
    return x + torch.addcmul(m.gamma.view(1, -1, 1, 1), m.token.view(1, -1, 1, 1), x * g / (g.mean(1, True) + 1e-6))


def computed_weights(m, x):
    return F.conv2d(x, F.normalize(m.table[:, :, None, None].expand(-1, -1, 3, 3)[m.order[:8]]), padding=1)


def packed(m, x):
    return m.mlp(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2) + m.conv(x)


def norm_and_back(m, x):
    return F.layer_norm(x.permute(0, 2, 3, 1), (8,), m.gamma, None, 1e-3).permute(0, 3, 1, 2) + x


def activations(m, x):
    """Of tokens, behind layers, sums and norms, and of pixels."""
    y = F.gelu(m.mlp(tokens(x)), approximate="tanh")
    z = F.silu(m.norm(y + m.mlp(tokens(x))) * m.gamma + 1)
    return z + F.hardswish(m.norm2(m.mlp(x.permute(0, 2, 3, 1)).sigmoid()) * 3).flatten(1, 2)


def batch_norms(m, x):
    """Of [B, C, N], of [B, N, C] along N, and of tokens that are merged with the batch."""
    y = m.prelu(m.batch(x.flatten(2))).transpose(1, 2)
    return m.batch(F.leaky_relu(m.places_batch(y)).flatten(0, 1)).reshape_as(y)


QKV = {"qkv": nn.Linear(8, 24)}
NORMS = {"norm": nn.LayerNorm(8), "norm2": nn.LayerNorm(8, eps=0.1, bias=False), "mlp": nn.Linear(8, 8)}
PIECES = {  # the part, the dimensions to average, and modules
    "norm, channels last": (lambda m, x: m.norm(x.permute(0, 2, 3, 1)).relu(), (1, 2), NORMS),
    "norm, and back": (norm_and_back, None, {}),
    "norm without parameters": (lambda m, x: F.layer_norm(tokens(x), [8]), 1, {}),
    "norm of rows": (lambda m, x: m.norm(F.pad(x, (0, 4))), None, {"norm": nn.LayerNorm(8)}),
    "norms of sums": (mixed_norms, 1, NORMS),
    "layer scale": (scaled, None, NORMS),
    "layer scale of a convolution": (scaled_convolution, 1, {}),
    "layer scale of tokens": (lambda m, x: (y := tokens(x)) + (m.mlp(y) * m.gamma + 1).relu(), 1, NORMS),
    "scale that others pass by": (lambda m, x: (y := m.mlp(tokens(x))) * m.gamma + y, 1, NORMS),
    "pixels scaled": (lambda m, x: x * m.table[:4, :4] - m.places[0, :4, :4] / 2, None, {}),
    "divided": (lambda m, x: (1 - tokens(x)) / (m.places.square() + 1), 1, {}),
    "class token": (lambda m, x: torch.cat((m.token.expand(x.shape[0], -1, -1), tokens(x) + m.places), 1), 1, {}),
    "class token picked": (lambda m, x: m.norm(torch.cat((tokens(x), m.token.expand(x.shape[0], 1, 8)), 1))[:, 3:4], 1, NORMS),
    "parts": (lambda m, x: torch.cat((x[:, :, 1:], x[:, :, :1] * 2), 2)[..., None, ::2].squeeze(2), None, {}),
    "parts that overlap": (lambda m, x: x[:, :, :3] + x[:, :, 1:] * x.select(2, 0).unsqueeze(2), None, {}),
    "chunks": (lambda m, x: (p := m.mlp(tokens(x)).chunk(3, -1))[0] * p[1].sigmoid() @ m.mlp(tokens(x))[:, :3], 1, NORMS),
    "split": (lambda m, x: torch.cat(((p := x.split([1, 3, 4], 1))[2], p[0] * 2, p[1]), 1), None, {}),
    "attention": (lambda m, x: heads(m, tokens(x)), 1, QKV),
    "attention by hand": (lambda m, x: heads(m, tokens(x), scale=0.3), 1, QKV),
    "windows": (lambda m, x: windows(m, x.permute(0, 2, 3, 1), lambda m, x: m.mlp(m.norm(x)) + x * m.gamma), (1, 2), NORMS),
    "windows with masks": (lambda m, x: windows(m, x.permute(0, 2, 3, 1), masked), (1, 2), QKV),
    "windows with masks by hand": (lambda m, x: windows(m, x.permute(0, 2, 3, 1), masked_by_hand), (1, 2), QKV),
    "activations": (activations, 1, NORMS),
    "batch norms": (batch_norms, 1, {"batch": nn.BatchNorm1d(8), "places_batch": nn.BatchNorm1d(16), "prelu": nn.PReLU(8)}),
    "in place on a constant": (lambda m, x: tokens(x) * (m.table * 1.0).relu_()[0], 1, {}),
    "response norm": (response_norm, None, {}),
    "computed weights": (computed_weights, None, {}),
    "cross-covariance": (lambda m, x: (F.normalize(t := tokens(x), dim=1).transpose(1, 2) @ t).softmax(-1), 1, {}),
}  # fmt: skip


def piece(name, dtype=torch.float64):
    torch.manual_seed(0)
    part, last, children = PIECES[name]
    return shaken(Piece(part, last, **children), dtype)


@pytest.mark.parametrize("name", PIECES)
def test_pieces_equal_autograd(name):
    """Planned at one batch, run at others; with samples that are apart."""
    model, x = piece(name), images(3, 16)
    gradient = planned(model, x)
    assert_equals_autograd(model, x, gradient)
    more = torch.cat((images(7, 16), x))
    assert_equals_autograd(model, more, gradient)
    with torch.no_grad():
        torch.testing.assert_close(gradient.forward(more)[7:], gradient.forward(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", ["norms of sums", "layer scale", "class token picked", "windows with masks", "attention by hand", "response norm"]
)
def test_pieces_in_half_precision(name, precision):
    model, x = piece(name, torch.float32), images(3, 16, torch.float32)
    exact, half = (logits_and_gradient(planned(model, x, p), x) for p in ("fp32", precision))
    assert F.cosine_similarity(exact[1].flatten(1), half[1].float().flatten(1)).min() > (0.99 if precision == "bf16" else 0.9999)
    torch.testing.assert_close(half[0], exact[0], rtol=0.05, atol=0.05)


def steps_of(name, kind):
    return [s for s in planned(piece(name), images(2, 16)).plan.steps if isinstance(s, kind)]


def test_layer_scale_is_folded_through_the_permute():
    (linear, _), passes = steps_of("layer scale", Linear), steps_of("layer scale", Pointwise)
    assert len(linear.after) == 1
    assert [p.affine for p in passes] == [()]
    assert len(steps_of("layer scale of tokens", Linear)[0].after) == 2
    assert [len(s.after) for s in steps_of("layer scale of a convolution", Conv)] == [0, 1]
    assert steps_of("scale that others pass by", Linear)[0].after == ()


@torch.no_grad()
def test_a_scale_along_another_dimension_of_the_same_length_is_not_folded():
    """It was ones when the plan was made, as layer scales are, so that no comparison saw a difference."""
    model = Piece(lambda m, x: m.conv(x).permute(0, 2, 3, 1) * m.rows, last=(1, 2))  # 4 rows, 4 channels
    model.conv, model.rows, model.fc = nn.Conv2d(8, 4, 1), nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(4, 5)
    model = shaken(model)
    gradient = planned(model, images(2, 16))
    model.rows.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]).view(4, 1, 1))
    gradient.prepare()
    assert_equals_autograd(model, images(3, 16), gradient)


@torch.no_grad()
def test_bounds_that_are_parameters_are_read_each_time():
    """They were those of ReLU6 when the plan was made."""
    model = Piece(lambda m, x: torch.clamp(10 * x, m.low, m.high))
    model.low, model.high = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(6.0))
    model = shaken(model)
    gradient = planned(model, images(2, 16))
    model.low.fill_(-1)
    model.high.fill_(1)
    gradient.prepare()
    assert_equals_autograd(model, images(3, 16), gradient)


def test_group_norm_of_one_image_made_of_tokens():
    model = Piece(lambda m, x: m.norm(m.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(-1, 8, 4, 4)))
    model.mix, model.norm = nn.Linear(8, 8), nn.GroupNorm(2, 8)
    model = shaken(model)
    gradient = planned(model, images(2, 16))
    assert_equals_autograd(model, images(1, 16), gradient)


@pytest.mark.parametrize("stride", [1, 7, 128])
def test_rows_of_one_image_have_the_strides_of_several(stride):
    x = torch.rand(128).as_strided((1, 8, 4, 4), (stride, 1, 32, 8))
    assert gradients.rows(x).stride() == (128, 1, 32, 8)
    assert torch.equal(gradients.rows(x), x)


def test_activations_of_tokens_are_part_of_passes():
    acts = [s.act.name for s in steps_of("activations", Pointwise) if s.act]
    assert sorted(acts) == ["gelu_tanh", "hardswish", "sigmoid", "silu"]
    assert steps_of("activations", Local) == []
    assert len(steps_of("batch norms", Pointwise)) == 3


def test_sums_are_done_with_the_norm_behind_them():
    norms = steps_of("norms of sums", LayerNorm)
    assert sorted(len(s.inputs) for s in norms) == [1, 1, 2, 2]
    assert [s.total is not None for s in norms if len(s.inputs) == 2] == [True, True]


def test_parts_share_one_gradient():
    assert [s.group for s in steps_of("attention", Index)] == [3, 3, 3]
    assert {s.group for s in steps_of("parts that overlap", Index)} == {1}


@pytest.mark.parametrize(
    "name", ["norm, channels last", "layer scale", "pixels scaled", "parts", "windows with masks", "response norm"]
)
def test_squares_in_windows_are_right(name):
    check(piece(name), images(4, 16), [(1, 1), (3, 2), (16, 16)])


def test_constants_are_computed_at_every_prepare():
    model, x = piece("computed weights"), images(2, 16)
    gradient = planned(model, x)
    model.table.mul_(-0.5).add_(1)
    with torch.no_grad():
        gradient.prepare()
    assert_equals_autograd(model, x, gradient)


def test_plans_with_constants_keep_no_model_alive():
    model, x = piece("windows with masks", torch.float32), images(2, 16, torch.float32)
    sk.pgd(model, x, torch.tensor([0, 1]), EPS, steps=1, input_gradient="plan")
    alive = [weakref.ref(model), weakref.ref(model.table)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


REFUSED = {
    "softmax works along the batch": lambda m, x: tokens(x).softmax(0),
    "permute_1 has shape|whose batch": lambda m, x: tokens(x).permute(1, 0, 2).relu().permute(1, 0, 2),
    "getitem works along the batch": lambda m, x: x[1:2] + x,
    "not the same for every sample": lambda m, x: tokens(x) * torch.arange(x.shape[0], dtype=x.dtype).view(-1, 1, 1),
    "normalises over several dimensions": lambda m, x: F.layer_norm(x, (8, 4, 4)),
    "samples may mix": lambda m, x: x.flatten(0, 1).unflatten(0, (8, -1)).transpose(0, 1),
    "changes a tensor of the model": lambda m, x: tokens(x) * m.table[0].relu_(),
    "8320 channels, more than 8192": lambda m, x: F.layer_norm(torch.cat([x.flatten(1)] * 65, 1), (65 * 128,)),
    "roll works along the batch": lambda m, x: torch.roll(tokens(x), 1, 0),
    "whose batch is moved": lambda m, x: F.scaled_dot_product_attention(*(tokens(x).transpose(0, 1),) * 3).transpose(0, 1),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_what_mixes_samples(reason):
    model, x = shaken(Piece(REFUSED[reason], last=1)), images(3, 16)
    explanation = sk.explain(model, x)
    assert explanation.path == "autograd"
    assert any(part in explanation.reason for part in reason.split("|")), explanation.reason


# ---- packed weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not packed_linear.applies(torch.ones(1), 10**9, torch.float32), reason="needs a CPU with AVX-512 and oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same(dtype, monkeypatch):
    torch.manual_seed(0)
    weight, bias, x, grad = torch.randn(24, 40), torch.randn(24), torch.randn(4, 80, 40), torch.randn(4, 80, 24)
    weight, bias, x, grad = (t.to(dtype) for t in (weight, bias, x, grad))
    packed, rounding = packed_linear.PackedLinear(weight), 1e-5 if dtype == torch.float32 else 2e-2
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(packed.forward(x, bias).double(), expected, rtol=rounding, atol=10 * rounding)
    torch.testing.assert_close(packed.gradient(grad).double(), grad.double() @ weight.double(), rtol=rounding, atol=10 * rounding)
    assert not packed_linear.applies(weight, packed_linear.ROWS, dtype)  # too few products
    monkeypatch.setitem(packed_linear.PRODUCTS, dtype, packed_linear.ROWS * weight.numel())
    assert packed_linear.applies(weight, packed_linear.ROWS, dtype)
    assert not packed_linear.applies(weight, packed_linear.ROWS - 1, dtype)
    assert not packed_linear.applies(weight.double(), packed_linear.ROWS, torch.float64)


def test_tokens_and_pixels_by_packed_weights_in_fp32(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(packed_linear.PRODUCTS, torch.float32, 0)
    model = shaken(Piece(packed, **NORMS, conv=nn.Conv2d(8, 8, 1)))
    x = images(16, 16)
    exact = logits_and_gradient(InputGradient(model), x)
    model, x = model.float(), x.float()
    for rows, packs in ((packed_linear.ROWS, True), (257, False)):
        monkeypatch.setattr(packed_linear, "ROWS", rows)
        gradient = planned(model, x)
        bound = [b.dense if isinstance(s, Conv) else b for s, b in zip(gradient.plan.steps, gradient.bound, strict=True)]
        found = [isinstance(b, LinearWeights) and b.packed is not None for b in bound]
        assert sum(found) == (2 if packs and packed_linear.applies(model.gamma, rows, x.dtype) else 0)
        for ours, theirs in zip(logits_and_gradient(gradient, x), exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


# ---- timm's networks ----------------------------------------------------------------------------------------------------------

VIT = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 3}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
SWIN = {"img_size": 32, "window_size": 4, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4)}
NETWORKS = {  # the name, its settings, the size of the images
    "convnext": ("convnext_tiny", CONVNEXT | {"drop_path_rate": 0.1, "ls_init_value": 0.5}, 32),
    "convnext, 1x1 convolutions": ("convnext_atto", CONVNEXT | {"ls_init_value": 0.5}, 32),
    "convnext, ConvStem": ("convnext_tiny", CONVNEXT | {"stem_type": "overlap_act"}, 32),
    "convnextv2": ("convnextv2_tiny", CONVNEXT, 32),
    "convnextv2, 1x1 convolutions": ("convnextv2_atto", CONVNEXT, 32),
    "vit": ("vit_tiny_patch16_224", VIT | {"init_values": 0.3, "qk_norm": True}, 16),
    "vit, averaged": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}, 16),
    "deit3": ("deit3_small_patch16_224", VIT, 16),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", VIT, 16),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, 32),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}, 32),
    "resnetv2": ("resnetv2_50", {"layers": (1, 1), "channels": (16, 32), "stem_chs": 8}, 32),
}  # fmt: skip


def network(name, dtype=torch.float64):
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    architecture, settings, size = NETWORKS[name]
    return shaken(timm.create_model(architecture, num_classes=5, **settings), dtype), size


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_networks_equal_autograd(name):
    model, size = network(name)
    x = images(3, size)
    gradient = planned(model, x)
    expected = assert_equals_autograd(model, x, gradient)
    assert not any(type(s) is Local for s in gradient.plan.steps)
    model, x = model.float(), x.float()
    for ours, exact in zip(logits_and_gradient(planned(model, x, "fp32"), x), expected, strict=True):
        assert (ours - exact).norm() < 1e-4 * exact.norm()
    half = logits_and_gradient(planned(model, x, "bf16"), x)
    assert F.cosine_similarity(half[1].flatten(1).double(), expected[1].flatten(1)).min() > 0.97


@pytest.mark.parametrize("name", ["convnext", "swin"])
def test_attacks_on_timm_networks_through_the_plan(name):
    model, size = network(name, torch.float32)
    x, y = images(4, size, torch.float32), torch.tensor([0, 1, 2, 3])
    results = [sk.pgd(model, x, y, EPS, steps=3, random_start=False, input_gradient=how) for how in ("auto", "autograd")]
    assert sk.explain(model, x).path == "plan"
    assert ((results[0] - results[1]).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.skipif(not packed_linear.is_fast(torch.bfloat16), reason="needs a CPU with fast bf16")
@pytest.mark.parametrize("masked", ["", "bool", "added"])
@pytest.mark.parametrize("merged", [False, True])
def test_attention_that_is_written_out_in_bf16(merged, masked):
    torch.manual_seed(0)
    shape = (2, 3) if merged else (6,)
    qkv = torch.randn(*shape, 11, 3, 4, 16, dtype=torch.bfloat16)  # samples, tokens, which, heads, channels
    q, k, v = (t.transpose(-2, -3) for t in qkv.unbind(-3))
    grad = torch.randn(*shape, 11, 4, 16, dtype=torch.bfloat16).transpose(-2, -3)
    mask = () if not masked else ((torch.rand(11, 11) < 0.7).logical_or(torch.eye(11) > 0),)
    if masked == "added":
        mask = (torch.randn(4, 11, 11).masked_fill(~mask[0], -torch.inf),)
    attend = Attend(merged, {"scale": 0.3})
    assert attend.is_written_out(k)
    assert not attend.is_written_out(k.float())
    assert not Attend(merged, {"is_causal": True}).is_written_out(k)
    out, kept = attend.forward(q, k, v, *mask)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    expected = attend(*leaves, *(m.double() if masked == "added" else m for m in mask))
    expected_grads = torch.autograd.grad(expected, leaves, grad.double())
    for ours, theirs in zip((out, *attend.backward(grad, *kept)), (expected, *expected_grads), strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(("kernel", "size"), [(2, 8), (4, 16), (4, 18)])
def test_patches(kernel, size):
    """Convolutions whose patches do not overlap, one of which leaves pixels out."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, kernel, kernel), nn.ReLU(), nn.Conv2d(8, 6, 2, 2)
    model = shaken(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(6 * (size // kernel // 2) ** 2, 5)))
    x = images(3, size)
    gradient = planned(model, x)
    found = [b.patches is not None for s, b in zip(gradient.plan.steps, gradient.bound, strict=True) if isinstance(s, Conv)]
    assert found == [size % kernel == 0, True]
    for ours, theirs in zip(logits_and_gradient(gradient, x), logits_and_gradient(InputGradient(model), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def test_weights_as_large_as_the_images():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 4), nn.BatchNorm2d(6), nn.ReLU()
    model = shaken(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(6, 5)))
    x = images(3, 8)
    gradient = planned(model, x)
    assert [b.whole is not None for s, b in zip(gradient.plan.steps, gradient.bound, strict=True) if isinstance(s, Conv)] == [
        False,
        True,
    ]
    for ours, theirs in zip(logits_and_gradient(gradient, x), logits_and_gradient(InputGradient(model), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
