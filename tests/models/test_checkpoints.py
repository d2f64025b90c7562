"""Every file that fits fills the model with its very weights; one that does not leaves the model alone and says why."""

import argparse
import copy
import os
from collections import OrderedDict

import pytest
import torch
from torch import nn

from spat_train.data.datasets import InputError
from spat_train.models.checkpoints import load_checkpoint
from spat_train.models.networks.wide_resnet import WideResNet
from spat_train.models.registry import create
from spat_train.models.weight_files import read_weights
from spat_train.models.wrapping import Normalize


def network(seed: int, depth: int = 10, width: int = 1, num_classes: int = 10) -> nn.Module:
    """WRN with every entry of the state dict at random."""
    torch.manual_seed(seed)
    model = WideResNet(depth, width, num_classes)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) * 100)
    return model


def saved(tmp_path, content, **options):
    path = tmp_path / "weights.pt"
    torch.save(content, path, **options)
    return path


def same(model: nn.Module, state: dict) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def refusal(model: nn.Module, path, **options) -> str:
    """The one-line message; the model is as before."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, path, **options)
    assert same(model, before)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path}: ")
    assert "\n" not in message
    return message


CONTENTS = {
    "bare": lambda state: state,
    "ours": lambda state: {"format": "spat_train", "config": {"model": "wrn-10-1"}, "model": state, "ema": None, "epoch": 3},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "model_state_dict": lambda state: {"model_state_dict": state, "model": "wrn-10-1"},
    "net": lambda state: {"net": state, "acc": 0.5},
    "RST": lambda state: {"num_classes": 10, "state_dict": with_prefix("module.", state), "normalize_input": False},
    "nested twice": lambda state: {"model": {"state_dict": state, "epoch": 1}},
    "DataParallel": lambda state: with_prefix("module.", state),
    "DataParallel twice": lambda state: with_prefix("module.module.", state),
    "compiled": lambda state: with_prefix("_orig_mod.", state),
    "compiled, parallel, wrapped": lambda state: with_prefix("module._orig_mod.model.", state),
    "sub_block1": lambda state: with_prefix("module.", state | {"sub_block1.layer.0.bn1.weight": torch.ones(16)}),
    "command line": lambda state: {"args": argparse.Namespace(lr=0.1), "state_dict": state},
    "ordered": lambda state: OrderedDict(state),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", CONTENTS)
def test_reads(tmp_path, kind, old_format):
    state, model = network(1).state_dict(), network(2)
    path = saved(tmp_path, CONTENTS[kind](state), _use_new_zipfile_serialization=not old_format)
    load_checkpoint(model, path)
    assert same(model, state)
    assert [value.tolist() for value in read_weights(path).values()][: len(state)] == [v.tolist() for v in state.values()]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.Sequential(OrderedDict(model=m))])
def test_wrapped_models(tmp_path, wrap):
    state, inner = network(1).state_dict(), network(2)
    load_checkpoint(wrap(inner), saved(tmp_path, state))
    assert same(inner.cpu(), state)  # nn.DataParallel moves it to the GPU, where there is one


def test_model_keeps_its_own(tmp_path):
    """dtype, device, mode, requires_grad, and the very tensors."""
    state, model = network(1).state_dict(), network(2).half().eval()
    model.conv1.requires_grad_(False)
    before = dict(model.named_parameters())
    load_checkpoint(model, saved(tmp_path, state))
    assert same(model, {name: v.half() if v.is_floating_point() else v for name, v in state.items()})
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not model.training
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad


def test_averaged_weights(tmp_path):
    state, averaged = network(1).state_dict(), network(2).state_dict()
    for content in ({"format": "spat_train", "model": state, "ema": averaged}, {"state_dict": state, "state_dict_ema": averaged}):
        path = saved(tmp_path, content)
        for weights, expected in {"auto": averaged, "ema": averaged, "model": state}.items():
            model = network(3)
            load_checkpoint(model, path, weights=weights)
            assert same(model, expected)
            assert read_weights(path, weights)["conv1.weight"].equal(expected["conv1.weight"])


@pytest.mark.parametrize("kind", ["bare", "ours", "RST"])
def test_no_averaged_weights(tmp_path, kind):
    path = saved(tmp_path, CONTENTS[kind](network(1).state_dict()))
    assert "no averaged weights: use weights='model'" in refusal(network(2), path, weights="ema")


def test_unknown_choice_of_weights(tmp_path):
    with pytest.raises(ValueError, match="weights='best': give 'auto', 'model' or 'ema'"):
        read_weights(saved(tmp_path, network(1).state_dict()), "best")


def test_batches_tracked_may_be_missing(tmp_path):
    state, model = network(1).state_dict(), network(2)
    tracked = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    load_checkpoint(model, saved(tmp_path, {name: value for name, value in state.items() if name not in tracked}))
    assert same(model, state | tracked)


def test_weights_outlive_the_file(tmp_path):
    """What was read can be written to the same file."""
    state = network(1).state_dict()
    path = saved(tmp_path, state)
    torch.save({"net": read_weights(path)}, path)
    model = network(2)
    load_checkpoint(model, path)
    assert same(model, state)


# ---- normalisation ----


def normalized(model: nn.Module, mean: float = 0.5) -> nn.Module:
    return nn.Sequential(OrderedDict(normalize=Normalize([mean] * 3, [0.25] * 3), model=model))


@pytest.mark.parametrize("content", [lambda s: s, lambda s: {"state_dict": s, "normalize_input": True}])
def test_normalisation_of_the_model_stays_where_the_file_has_none(tmp_path, content):
    state, inner = network(1).state_dict(), network(2)
    model = normalized(inner)
    load_checkpoint(model, saved(tmp_path, content(state)))
    assert same(inner, state)
    assert (model.normalize.mean == 0.5).all()


def test_normalisation_of_the_file_is_taken(tmp_path):
    model = normalized(network(2))
    other = normalized(network(1), 0.375)
    load_checkpoint(model, saved(tmp_path, with_prefix("module.", other.state_dict())))
    assert same(model, other.state_dict())


def test_normalisation_that_the_model_lacks(tmp_path):
    path = saved(tmp_path, normalized(network(1)).state_dict())
    message = refusal(network(2), path)
    assert "unexpected: normalize.mean, normalize.std: " in message
    assert "put a spat_train.models.Normalize" in message
    path = saved(tmp_path, {"num_classes": 10, "state_dict": network(1).state_dict(), "normalize_input": True})
    assert "normalize_input" in refusal(network(2), path)


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ({"num_classes": 100}, {}, ["shape: fc.weight [100, 64] (the model has [10, 64]), fc.bias [100]", "num_classes=100"]),
        ({"width": 3}, {"width": 2}, ["shape: block1.layer.0.conv1.weight [48, 16, 3, 3] (the model has [32, 16, 3, 3]), ",
                                      "another width:"]),
        ({"depth": 16}, {}, ["unexpected: module.block1.layer.1.bn1.weight, ", "and 28 more", "another depth:"]),
        ({}, {"depth": 16}, ["missing: block1.layer.1.bn1.weight, ", "and 22 more", "another depth:"]),
        ({"depth": 16, "width": 2}, {}, ["unexpected: ", "of another shape: ", "another depth or width"]),
    ],
    ids=str,
)  # fmt: skip
def test_another_size(tmp_path, theirs, ours, expected):
    message = refusal(network(2, **ours), saved(tmp_path, with_prefix("module.", network(1, **theirs).state_dict())))
    assert all(part in message for part in expected), message


def test_another_depth_of_a_wrapped_model(tmp_path):
    model = normalized(network(2))
    assert "another depth:" in refusal(model, saved(tmp_path, network(1, depth=16).state_dict()))


def test_another_architecture(tmp_path):
    path = saved(tmp_path, create("preactresnet-18").state_dict())
    message = refusal(network(2), path)
    assert "missing: block1." in message
    assert "unexpected: layer1." in message
    assert "another architecture" in message
    assert message.count(",") < 60


def test_another_image_shape(tmp_path):
    path = saved(tmp_path, create("mnist-cnn", image_shape=(1, 28, 28)).state_dict())
    assert "images of another shape" in refusal(create("mnist-cnn", image_shape=(1, 32, 32)), path)


def test_one_missing_and_one_too_many(tmp_path):
    state = network(1).state_dict()
    state["fc.scale"] = state.pop("fc.bias")
    message = refusal(network(2), saved(tmp_path, state))
    assert "missing: fc.bias; unexpected: fc.scale: " in message


def test_two_names_for_one(tmp_path):
    state = network(1).state_dict()
    message = refusal(network(2), saved(tmp_path, state | {"module.fc.bias": torch.zeros(10)}))
    assert "unexpected: module.fc.bias: " in message


# ---- what is no file of weights ----


class Payload:
    """Its unpickling would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


class Other:
    pass


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(("extra", "refused"), [(Payload(), "mkdir"), (Other(), "Other"), (nn.Linear(2, 2), "Linear")])
def test_unsafe_pickles(tmp_path, monkeypatch, extra, refused, old_format):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": network(1).state_dict(), "extra": extra}
    message = refusal(network(2), saved(tmp_path, content, _use_new_zipfile_serialization=not old_format))
    assert f"{refused}, which was refused" in message
    assert "only weights are read" in message
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated(tmp_path, kept, old_format):
    path = saved(tmp_path, network(1).state_dict(), _use_new_zipfile_serialization=not old_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    reason = "it is empty" if kept == 0 else "cannot be read" if old_format else "it is cut short or damaged"
    assert reason in refusal(network(2), path)


@pytest.mark.parametrize("content", [b"not weights at all", b"\x80\x02]q\x00."])
def test_not_written_by_torch(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert "cannot be read" in refusal(network(2), path)


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere.pt", "there is no such file"), ("x" * 300, "no such file"), (".", "it is a folder")]
)
def test_no_such_file(tmp_path, name, reason):
    assert reason in refusal(network(2), tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "optimizer": {"state": {}}}, "no weights (its entries: epoch, optimizer): save model.state_dict()"),
        ({}, "no weights (its entries: )"),
        ({"state_dict": {}}, "no weights (its entries: state_dict)"),
        ([1, 2], "no weights (a list)"),
        (torch.ones(3), "no weights (a Tensor)"),
    ],
)
def test_no_weights(tmp_path, content, message):
    assert message in refusal(network(2), saved(tmp_path, content))
