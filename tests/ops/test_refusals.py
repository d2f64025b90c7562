"""What is refused: for every tensor of every op the usual mistakes, and what is special to one op."""

import itertools

import pytest
import torch

from spat_kernels.ops.layer_norm import MAX_CHANNELS as MAX_NORMED
from spat_kernels.ops.pool_linear import MAX_CHANNELS
from spat_kernels.ops.scale_shift_act import LEAKY
from tests.ops.helpers import OPS, all_samples, channels_last, reference

MISTAKES = {
    "integer": lambda t: t.int(),
    "float64": lambda t: t.double(),
    "shorter": lambda t: t[:-1],
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "channels first": lambda t: t.contiguous(),
    "one more dimension": lambda t: t[None],
}
RELATIVE = ("float64", "shorter", "one more dimension")  # of these the message may name another tensor, which then does not fit
ALLOWED = {("crop_flip", "images", "shorter"), ("crop_flip", "out", "float64")}


def right_arguments(op, device):
    """By name, with all the optional ones."""
    given = max((a for name, a in all_samples(device=device) if name == op), key=lambda a: sum(v is not None for v in a))
    names = [argument.name for argument in getattr(torch.ops.spat, op).default._schema.arguments]
    return dict(zip(names, given, strict=True))


def is_mistake(op, name, t, mistake):
    """Whether the op must refuse the changed `t`."""
    if mistake == "one more dimension":
        return name not in ("eps", "step_size", "factor")  # values of samples have any shape
    changes = {"transposed": t.ndim > 1, "channels first": not t.is_contiguous(), "strided": t.numel() > 1}
    return changes.get(mistake, True) and (op, name, mistake) not in ALLOWED


@pytest.mark.parametrize("op", OPS)
def test_wrong_tensors_are_refused_by_name(impl, op):
    right = right_arguments(op, impl.device)
    tensors = {name: t for name, t in right.items() if isinstance(t, torch.Tensor)}
    for call in (impl(op), reference(op)):
        call(*right.values())
        for (name, t), mistake in itertools.product(tensors.items(), MISTAKES):
            if is_mistake(op, name, t, mistake):
                names = tensors if mistake in RELATIVE else [name]
                with pytest.raises(RuntimeError, match=rf"\b({'|'.join(names)})\b"):
                    call(*(right | {name: MISTAKES[mistake](t)}).values())
    if (impl.kind, impl.device) == ("compiled", "cuda"):
        for name, t in tensors.items():
            with pytest.raises(RuntimeError, match="is on another device than the first argument"):
                impl(op)(*(right | {name: t.cpu()}).values())


TWO, ALSO_TWO, ONE, ALSO_ONE = torch.rand(16, 2), torch.rand(16, 2), torch.rand(16, 1), torch.rand(16, 1)
REFUSED = [  # op, wrong arguments, the message
    ("linf_step_", {"eps": torch.ones(1, dtype=torch.float16)}, "eps"),
    ("linf_step_", {"eps": torch.ones(3)}, "eps"),
    ("adt_step_", {"factor": torch.ones(3)}, "factor"),
    ("adt_step_", {"sum_rho": None}, "go together"),
    ("adt_step_", {"sum_mu": None, "sum_rho": None}, "needs sum_mu and sum_rho"),
    ("keep_best_", {"success": None}, "go together"),
    ("lsce_grad", {"logits": ONE, "dlogits": ALSO_ONE}, "at least 2 classes, got 1"),
    ("lsce_grad", {"alpha": 0.1, "normalize": True}, "normalize goes with alpha = 0"),
    ("dlr_grad", {"logits": TWO, "dlogits": ALSO_TWO, "targets": None}, "at least 3 classes, got 2"),
    ("dlr_grad", {"logits": TWO, "dlogits": ALSO_TWO}, "at least 4 classes, got 2"),
    ("scale_shift_relu", {"relu": False}, "mask goes with relu"),
    ("scale_shift_act", {"act": 0, "negative": torch.ones(1)}, "negative goes with leaky_relu"),
    ("scale_shift_act", {"act": LEAKY, "negative": None}, "negative goes with leaky_relu"),
    ("scale_shift_act", {"act": LEAKY, "negative": torch.ones(3)}, "negative must"),
    ("scale_shift_act", {"act": -1}, "act must be the index of one of ACTIVATIONS, got -1"),
    ("scale_shift_act", {"act": 12}, "act must be the index of one of ACTIVATIONS, got 12"),
    ("split_image", {"out": torch.empty(4, 5, 8, 8, dtype=torch.float16)}, "at least 6"),
    ("split_image", {"out": torch.empty(4, 8, 8, 4, dtype=torch.float16)}, "out must be"),
    ("split_image", {"out": torch.empty(4, 8, 8, 8)}, "out must be"),
    ("pool_linear", {"x": torch.empty(4, 64, 4, 0)}, "at least one channel and one pixel"),
    ("pool_linear", {"x": torch.empty(4, MAX_CHANNELS + 1, 1, 1)}, f"at most {MAX_CHANNELS} channels, got {MAX_CHANNELS + 1}"),
    ("pool_linear_grad", {"dx": torch.empty(4, 64, 4, 0)}, "at least one channel and one pixel"),
    ("layer_norm", {"channels": 2}, "channels must be -1 .* or 1 .*, got 2"),
    ("layer_norm", {"a": torch.empty(4, 0, 8, 8)}, f"a must have 1 to {MAX_NORMED} channels, got 0"),
    ("layer_norm", {"a": torch.empty(1, MAX_NORMED + 1, 1, 1)}, f"1 to {MAX_NORMED} channels, got {MAX_NORMED + 1}"),
    ("layer_norm", {"a": torch.empty(64)}, "a must have at least two dimensions"),
    ("layer_norm_grad", {"mean": torch.empty(255)}, "mean must be"),
    ("layer_norm_grad", {"channels": 0}, "channels must be -1"),
    ("crop_flip", {"images": torch.empty(0, 32, 32, 3, dtype=torch.uint8)}, "at least one"),
    ("crop_flip", {"images": torch.empty(1, 2**15, 2**15, 1, dtype=torch.uint8)}, r"fewer than 2\^30"),
    ("crop_flip", {"out": torch.empty(4, 2, 32, 32)}, "out must be"),
    ("crop_flip", {"pad": -1}, "pad must be"),
    ("crop_flip", {"pad": 2**30}, "pad must be"),
]


@pytest.mark.parametrize(("op", "wrong", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(impl, op, wrong, message):
    right = right_arguments(op, impl.device)
    for name, value in wrong.items():
        if isinstance(value, torch.Tensor):
            value = value.to(impl.device)
            value = (
                channels_last(value) if value.ndim == 4 and op.startswith(("split_image", "pool_linear", "layer_norm")) else value
            )
        right[name] = value
    for call in (impl(op), reference(op)):
        with pytest.raises(RuntimeError, match=message):
            call(*right.values())
