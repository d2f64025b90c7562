"""What makes a model another one for a trace or a capture, and what does not."""

import copy
import gc
import math
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spat_kernels.model_state.borrow import borrowed
from spat_kernels.model_state.structure import Structure, freeze
from spat_kernels.settings import BN_MODES


class Net(nn.Module):
    """One of everything that a module can carry."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))
        self.missing = None
        self.register_parameter("none", None)
        self.hidden = [nn.Linear(4, 4)]
        self.scale, self.count, self.name, self.nan = 0.5, 1, "net", math.nan
        self.shape, self.nested = (1, 2), [1, {"a": [2.0]}, {3}]
        self.mean, self.tensors = torch.zeros(3), [torch.ones(2), {"t": torch.ones(3)}]
        self.act, self.method = F.relu, self.forward
        self.dtype, self.other = torch.float32, Other()

    def forward(self, x):
        return x


class Other:
    scale = 1.0


@pytest.fixture(params=[True, False], ids=["addresses", "objects"])
def addresses(request):
    return request.param


def train_step(net):
    net.conv(torch.rand(1, 3, 4, 4)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def write_in_place(net):
    with torch.no_grad():
        net.conv.weight.add_(1)
        net.mean.fill_(3.0)
    net.bn(torch.rand(2, 4, 3, 3))


def attack(net):
    for mode in BN_MODES:
        with borrowed(net, mode):
            net(torch.rand(2, 3, 8, 8))


def assign_equal_values(net):
    net.scale, net.nested, net.shape, net.name = 0.25 * 2, [1, {"a": [2.0]}, {3}], (0 + 1, 2), "".join(["n", "et"])


def freeze_and_hook_for_saving(net):
    net.requires_grad_(False)
    net.register_state_dict_pre_hook(lambda *_: None)


@pytest.mark.parametrize("change", [train_step, write_in_place, attack, assign_equal_values, freeze_and_hook_for_saving])
def test_the_same_model(change, addresses):
    net = Net()
    structure = Structure(net, addresses=addresses)
    assert structure.matches(net)
    change(net)
    assert structure.difference(net) is None


def set_attribute(name, value):
    return lambda net: setattr(net, name, value)


DIFFERENT = {
    "scale": set_attribute("scale", 0.6),
    "type_of_scale": set_attribute("scale", torch.tensor(0.5)),
    "type_of_count": set_attribute("count", True),
    "shape": set_attribute("shape", (1, 3)),
    "type_in_shape": set_attribute("shape", (1.0, 2)),
    "tensor_in_shape": set_attribute("shape", (1, torch.ones(3))),
    "list": lambda net: net.nested.append(4),
    "type_of_list": lambda net: setattr(net, "nested", tuple(net.nested)),
    "in_a_list": lambda net: net.nested[1]["a"].append(1.0),
    "in_a_set": lambda net: net.nested[2].add(5),
    "tensor": set_attribute("mean", torch.zeros(3)),
    "tensor_deeper": lambda net: net.tensors[1].__setitem__("t", torch.ones(3)),
    "function": set_attribute("act", F.gelu),
    "object": set_attribute("other", Other()),
    "new_attribute": set_attribute("extra", 1),
    "removed_attribute": lambda net: delattr(net, "scale"),
    "renamed_attribute": lambda net: (delattr(net, "scale"), setattr(net, "scale_", 0.5)),
    "parameter": lambda net: setattr(net.conv, "weight", nn.Parameter(torch.rand(4, 3, 3, 3))),
    "parameter_from_none": lambda net: setattr(net.conv, "bias", nn.Parameter(torch.rand(4))),
    "parameter_to_none": lambda net: setattr(net.bn, "bias", None),
    "buffer": lambda net: setattr(net.bn, "running_var", torch.ones(4)),
    "dtype_of_parameters": lambda net: net.half(),
    "shape_of_data": lambda net: setattr(net.conv.weight, "data", net.conv.weight.data.view(3, 4, 3, 3)),
    "strides_of_data": lambda net: setattr(net.conv.weight, "data", net.conv.weight.data.transpose(2, 3)),
    "hidden_module": lambda net: setattr(net.hidden[0], "weight", nn.Parameter(torch.rand(4, 4))),
    "other_hidden_module": lambda net: net.hidden.__setitem__(0, nn.Linear(4, 4)),
    "module": lambda net: setattr(net, "bn", nn.BatchNorm2d(4)),
    "module_added": lambda net: net.blocks.append(nn.ReLU()),
    "modules_swapped": lambda net: setattr(net, "blocks", nn.Sequential(*reversed(net.blocks))),
    "module_from_none": lambda net: setattr(net, "missing", nn.ReLU()),
    "mode": lambda net: net.bn.eval(),
    "class": lambda net: setattr(net.blocks[0], "__class__", nn.Tanh),
    "own_forward": lambda net: setattr(net, "forward", lambda x: x),
    "forward_hook": lambda net: net.conv.register_forward_hook(lambda *_: None),
    "forward_pre_hook": lambda net: net.conv.register_forward_pre_hook(lambda *_: None),
    "backward_hook": lambda net: net.conv.register_full_backward_hook(lambda *_: None),
    "backward_pre_hook": lambda net: net.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_model(name, addresses):
    net = Net()
    structure = Structure(net, addresses=addresses)
    DIFFERENT[name](net)
    if not addresses and name in ("parameter", "buffer", "hidden_module"):
        return  # another tensor of the same kind is no difference then: see below
    assert structure.difference(net)
    assert not structure.matches(net)
    assert Structure(net, addresses=addresses).matches(net)


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (lambda net: setattr(net.mean, "data", torch.rand(3)), True),
        (lambda net: setattr(net.conv.weight, "data", torch.rand_like(net.conv.weight)), True),
        (lambda net: setattr(net.conv, "weight", nn.Parameter(torch.rand_like(net.conv.weight))), True),
        (lambda net: setattr(net.conv, "weight", nn.Parameter(net.conv.weight.data)), False),
    ],
    ids=["attribute", "data", "parameter", "parameter at the same address"],
)
def test_an_address_is_all_that_a_capture_knows_and_a_trace_does_not(change, noticed):
    net = Net()
    by_address, without = Structure(net), Structure(net, addresses=False)
    change(net)
    assert by_address.matches(net) != noticed
    assert without.matches(net)


def test_modes_can_be_left_out():
    net = Net()
    without, structure = Structure(net, training=False), Structure(net)
    assert without.matches(net.eval())
    assert structure.difference(net) == "Net: its mode (train, eval) changed"


def test_differences_have_names():
    net = Net()
    structure = Structure(net)
    net.bn.running_mean = torch.ones(4)
    assert structure.difference(net) == "Net.bn.running_mean: its address changed"
    structure = Structure(net)
    net.blocks[1].p = 0.3
    assert structure.difference(net) == "Net.blocks.1: an attribute changed"
    net.nested.append(1)
    assert Structure(net).hooked is None
    net.blocks[0].register_forward_hook(lambda *_: None)
    assert Structure(net).hooked == "Net.blocks.0"


def test_global_hooks_count():
    net = Net()
    structure = Structure(net)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not structure.matches(net)
        assert Structure(net).hooked == "every module"
    finally:
        handle.remove()
    assert structure.matches(net)


def test_forward_of_a_class_counts(monkeypatch):
    net = Net()
    structure = Structure(net)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x)
    assert structure.difference(net) == "Net: its forwards of classes changed"


def test_copies_and_other_models_differ():
    net = Net()
    structure = Structure(net)
    assert not structure.matches(copy.deepcopy(net))
    assert not structure.matches(nn.ReLU())


def test_shared_and_cyclic_modules():
    relu = nn.ReLU()
    net = nn.Sequential(relu, nn.Linear(2, 2), relu)
    object.__setattr__(net[1], "parent", net)
    structure = Structure(net)
    assert structure.matches(net)
    net[2] = nn.ReLU()
    assert not structure.matches(net)


def test_nothing_is_kept_alive():
    net = Net()
    structure = Structure(net), Structure(net, addresses=False)
    parts = [*net.modules(), *net.parameters(), *net.buffers(), net.mean, net.tensors[0], net.tensors[1]["t"], net.hidden[0]]
    parts = list(map(weakref.ref, [*parts, net.other]))
    del net
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)
    assert not any(s.matches(nn.ReLU()) for s in structure)


def test_what_cannot_be_seen_is_refused():
    scripted = torch.jit.trace(nn.ReLU(), torch.ones(1))
    with pytest.raises(TypeError, match="TorchScript"):
        Structure(nn.Sequential(scripted))
    net = Net()
    structure = Structure(net)
    net.bn.running_mean = torch.eye(4).to_sparse()
    assert "has no address" in structure.difference(net)
    with pytest.raises(TypeError, match="has no address"):
        Structure(net)


def test_devices():
    net = Net()
    assert Structure(net).devices == {torch.device("cpu")}
    net.tensors.append(torch.ones(1, device="meta"))
    assert torch.device("meta") in Structure(net).devices


def test_an_object_that_is_gone_is_no_other_one():
    gone = freeze(Other())
    assert gone != freeze(Other())


def test_checking_costs_little():
    """Before each replay: C code goes through the modules, so a larger model makes no more calls of Python functions."""

    def calls(blocks: int) -> int:
        layers = [layer for _ in range(blocks) for layer in (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout())]
        net = nn.Sequential(*layers)
        structure, seen = Structure(net), []
        gc.disable()  # finalisers are Python functions too
        sys.setprofile(lambda frame, event, _: seen.append(frame) if event == "call" else None)
        try:
            same = structure.matches(net)
        finally:
            sys.setprofile(None)
            gc.enable()
        assert same
        return len(seen)

    assert 0 < calls(2) == calls(30)
