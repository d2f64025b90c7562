"""The plan on today's convolutional networks: activations, gates, dense blocks, pooling and norms of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels.input_gradient.steps import Cat, Index, Local, Multiply, Pointwise
from tests.input_gradient.models import EPS, assert_equals_autograd, images, logits_and_gradient, planned, randomized
from tests.input_gradient.test_windows import check as check_windows


class Net(nn.Module):
    """Two convolutions with BatchNorm, a function of the caller's on their two values, and a head."""

    def __init__(self, middle, head=None, channels=8, pooled=8):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.down, self.up, self.fc = nn.Linear(channels, 4), nn.Linear(4, channels), nn.Linear(pooled, 5)
        self.group, self.negative = nn.GroupNorm(2, channels), nn.Parameter(torch.rand(channels))
        self.middle, self.head = middle, head or (lambda m, x: x.mean((2, 3)))

    def forward(self, x):
        x = self.bn1(self.stem(x))
        return self.fc(self.head(self, self.middle(self, F.relu(x), self.bn2(self.conv(x)))))


def left(gradient):
    return sum(isinstance(step, Local) for step in gradient.plan.steps)


def check(model, size=8, left_to_autograd=0):
    """Equal to autograd in fp64, with as many functions left to it. Returns the plan."""
    torch.manual_seed(0)
    model, x = randomized(model), images(3, size)
    for m in model.modules():
        if isinstance(m, nn.GroupNorm):
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    gradient = planned(model, x)
    assert left(gradient) == left_to_autograd
    assert_equals_autograd(model, x, gradient)
    return gradient


# ---- activations ---------------------------------------------------------------------------------------------------------------

MODULES = [
    nn.SiLU(True), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(), nn.Mish(True), nn.Hardswish(True), nn.Hardsigmoid(True),
    nn.ReLU6(True), nn.Hardtanh(0, 6), nn.LeakyReLU(0.2, True), nn.LeakyReLU(-0.5), nn.PReLU(), nn.PReLU(8), nn.ELU(),
    nn.Softplus(),
]  # fmt: skip
FUNCTIONS = {
    "silu": lambda m, x: F.silu(x, inplace=True),
    "gelu": lambda m, x: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda m, x: x.sigmoid(),
    "sigmoid_": lambda m, x: x.sigmoid_(),
    "torch.tanh": lambda m, x: torch.tanh(x),
    "hardswish": lambda m, x: F.hardswish(x),
    "hardsigmoid": lambda m, x: F.hardsigmoid(x),
    "relu6": lambda m, x: F.relu6(x),
    "clamp": lambda m, x: x.clamp(0, 6),
    "leaky": lambda m, x: F.leaky_relu(x, 0.1, inplace=True),
    "leaky_": lambda m, x: F.leaky_relu_(x),
    "mish": lambda m, x: F.mish(x),
    "prelu": lambda m, x: F.prelu(x, m.negative),
    "swish": lambda m, x: x * x.sigmoid(),
    "elu": lambda m, x: F.elu(x),
    "softplus": lambda m, x: F.softplus(x),
}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_activation_modules_are_part_of_the_pass(module):
    if isinstance(module, nn.PReLU):
        nn.init.uniform_(module.weight, -0.5, 0.5)
    model = Net(lambda m, a, b: m.act(m.conv(m.act(b + a)) + m.bn2(b)))
    model.act = module
    gradient = check(model)
    assert sum(isinstance(s, Pointwise) and s.act is not None for s in gradient.plan.steps) == 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_functions_are_part_of_the_pass(name):
    gradient = check(Net(lambda m, a, b: FUNCTIONS[name](m, b) + a, lambda m, x: FUNCTIONS[name](m, x.mean((2, 3)))))
    assert [s.act is not None for s in gradient.plan.steps if isinstance(s, Pointwise)] == [False, True, False, True]


def test_other_parameters_of_an_activation_are_left_to_autograd():
    model = Net(lambda m, a, b: F.hardtanh(F.elu(b, 0.5)) + F.softplus(a, 2.0))
    check(model, left_to_autograd=3)


def test_timm_activations_by_class():
    activations = [
        getattr(pytest.importorskip("timm", exc_type=Exception).layers.activations, name)
        for name in ("Swish", "HardSwish", "GELUTanh", "Mish")
    ]
    memory = pytest.importorskip("timm.layers.activations_me", exc_type=Exception)
    activations += [memory.SwishMe, memory.HardSwishMe, memory.HardSigmoidMe]
    for activation in activations:
        model = Net(lambda m, a, b: m.act(b) + a)
        model.act = activation(inplace=True)
        check(model)


def test_slopes_are_kept_in_half_precision():
    model, x = randomized(Net(lambda m, a, b: F.silu(b)), torch.float32), images(2, 8, torch.float32)
    for precision, itemsize in (("fp32", 4), ("bf16", 2)):
        gradient = planned(model, x, precision)
        with torch.no_grad():
            gradient.forward(x)
        derivatives = gradient.plan.summary()["derivatives per image"]
        assert derivatives == 8 * 64
        assert gradient.kept_bytes() == len(x) * itemsize * derivatives


# ---- products ------------------------------------------------------------------------------------------------------------------

GATES = {  # whether the gradient waits for that of the mean
    "convolutions": (lambda m, a, b: a * torch.sigmoid(m.expand(F.silu(m.reduce(a.mean((2, 3), keepdim=True))))), True),
    "hard": (lambda m, a, b: F.hardsigmoid(m.expand(F.relu(m.reduce(F.adaptive_avg_pool2d(a, 1))))) * a, True),
    "linear": (lambda m, a, b: a * m.up(F.relu(m.down(a.mean((2, 3))))).sigmoid().view(-1, 8, 1, 1), True),
    "relu6": (lambda m, a, b: a * (F.relu6(m.expand(m.reduce(a.mean((2, 3), True))) + 3.0) / 6), True),
    "another's mean": (lambda m, a, b: b * torch.sigmoid(m.expand(m.reduce(a.mean((2, 3), keepdim=True)))), False),
    "read otherwise": (lambda m, a, b: (a * m.expand(m.reduce(a.mean((2, 3), True))).sigmoid() + a) * b, True),
    "pixels": (lambda m, a, b: a * b[:, :1].sigmoid(), False),
    "both": (lambda m, a, b: a * b * (a * a), False),
    "twice": (lambda m, a, b: (a * m.expand(s := m.reduce(a.mean((2, 3), True))).sigmoid()) + a * m.expand(s).tanh(), True),
}  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
def test_squeeze_and_excitation(gate):
    gate, waits = GATES[gate]
    gradient = check(Net(gate))
    assert any(isinstance(s, Multiply) and s.pooled for s in gradient.plan.steps) == waits
    check(Net(lambda m, a, b: m.conv(gate(m, a, b))))  # with a convolution behind: none of it is the head


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("gate", ["convolutions", "linear", "hard"])
def test_gates_in_half_precision(gate, precision):
    """A gate of linear layers in front of the head is not taken for the head."""
    torch.manual_seed(0)
    model, x = randomized(Net(GATES[gate][0]), torch.float32), images(3, 8, torch.float32)
    exact, half = (logits_and_gradient(planned(model, x, p), x)[1].double().flatten(1) for p in ("fp32", precision))
    assert F.cosine_similarity(exact, half, eps=0).min() > (0.99 if precision == "bf16" else 0.999)


# ---- joints --------------------------------------------------------------------------------------------------------------------


def dense(m, a, b):
    """Each layer reads all values before it, as in Huang et al. (2017)."""
    values = [a, b]
    for _ in range(4):
        values.append(m.conv(F.relu(m.mix(torch.cat(values, 1)[:, -8:]))))
    return torch.cat(values, 1)


def ghost(m, a, b):
    return torch.cat([a, b], 1)[:, :8] * 2 + b


def shuffled(m, a, b):
    first, second = b.chunk(2, 1)
    return torch.cat([second, F.silu(first) + a[:, 2:6]], dim=1)


def scales(m, a, b):
    parts = torch.split(b, [2, 3, 3], 1)
    return torch.cat([p * (i + 1) for i, p in enumerate(parts)] + [a], 1)[:, 3:11]


@pytest.mark.parametrize(("middle", "pooled"), [(dense, 48), (ghost, 8), (shuffled, 8), (scales, 8)])
def test_joined_and_split_channels(middle, pooled):
    model = Net(middle, pooled=pooled)
    model.mix = nn.BatchNorm2d(8)
    gradient = check(model)
    assert any(isinstance(s, (Cat, Index)) for s in gradient.plan.steps)


def test_a_dense_block_reads_each_value_twice_at_most():
    """What is joined before is a part of what is joined next: else there would be 2 + 3 + ... + n gradients to add."""
    model = Net(dense, pooled=48)
    model.mix = nn.BatchNorm2d(8)
    cats = [s for s in check(model).plan.steps if isinstance(s, Cat)]
    assert [len(s.inputs) for s in cats] == [2, 2, 2, 2, 2]


def test_features_are_joined_and_split_too():
    check(Net(lambda m, a, b: a, lambda m, x: torch.cat([(f := x.mean((2, 3)))[:, 4:], f.chunk(2, -1)[0].relu()], 1)))


# ---- pooling, padding, norms ---------------------------------------------------------------------------------------------------

POOLS = {
    "max": lambda m, a, b: F.max_pool2d(a, 3, 2, 1),
    "max same": lambda m, a, b: F.max_pool2d(F.pad(a, (0, 1, 0, 1), value=-1e9), 3, 2),
    "max ceil": lambda m, a, b: F.max_pool2d(b, (3, 2), 2, ceil_mode=True),
    "dilated": lambda m, a, b: F.max_pool2d(b, 3, 1, 1, 2),
    "average": lambda m, a, b: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False),
    "average ceil": lambda m, a, b: F.avg_pool2d(a, 3, 2, 0, True),
    "adaptive": lambda m, a, b: F.adaptive_avg_pool2d(a, (3, 2)),
    "larger": lambda m, a, b: F.adaptive_avg_pool2d(b, 11),
    "adaptive max": lambda m, a, b: F.adaptive_max_pool2d(b, 3),
    "one max": lambda m, a, b: F.adaptive_max_pool2d(b, 1),
    "nearest": lambda m, a, b: F.interpolate(m.conv(a), scale_factor=2),
    "bilinear": lambda m, a, b: F.interpolate(b, 11, mode="bilinear"),
    "corners": lambda m, a, b: F.interpolate(a, size=(5, 12), mode="bilinear", align_corners=True),
    "pad": lambda m, a, b: m.conv(F.pad(a, (1, 2, 0, 1))),
    "crop": lambda m, a, b: F.pad(a, (-1, 2)),
    "group": lambda m, a, b: F.relu(m.group(b)) + a,
    "group gelu": lambda m, a, b: F.gelu(F.group_norm(a + b, 4)),
    "group sum": lambda m, a, b: m.group(b) + m.group(a),
}
POOL_MODULES = (
    nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 0, True), nn.AdaptiveAvgPool2d((3, 2)), nn.AdaptiveMaxPool2d(1),
    nn.Upsample(11, mode="bilinear"), nn.UpsamplingNearest2d(scale_factor=2), nn.ZeroPad2d((0, 1, 2, 0)),
)  # fmt: skip


@pytest.mark.parametrize("module", POOL_MODULES, ids=str)
def test_pooling_modules(module):
    model = Net(lambda m, a, b: m.pool(a) + m.pool(b))
    model.pool = module
    check(model)


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_padding_and_group_norms(pool):
    check(Net(POOLS[pool]))
    check(Net(lambda m, a, b: m.conv(POOLS[pool](m, a, b))))


@pytest.mark.parametrize("tracks", [True, False])
def test_instance_norm(tracks):
    model = Net(lambda m, a, b: F.relu(m.norm(b)) + a)
    model.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=tracks)
    nn.init.normal_(model.norm.weight)
    if tracks:
        model.norm.running_mean.normal_(), model.norm.running_var.uniform_(0.5, 2)
    check(model)


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "catavgmax", "fast", "fastmax"])
def test_timm_global_pooling(kind):
    layers = pytest.importorskip("timm", exc_type=Exception).layers
    model = Net(lambda m, a, b: b, lambda m, x: m.pool(x), pooled=16 if "cat" in kind else 8)
    model.pool = layers.SelectAdaptivePool2d(pool_type=kind, flatten=True)
    check(model, left_to_autograd=int(kind == "fastmax"))


# ---- shapes --------------------------------------------------------------------------------------------------------------------


def small_is_enlarged(m, a, b):
    batch, channels, height, width = a.shape
    if height < 9 and a.size(-1) == width and a.ndim == b.dim() == 4:
        a = F.adaptive_avg_pool2d(a, (max(9, height), 10))
    return a.reshape(batch, channels // 2, 2, *a.shape[2:]).flatten(1, 2)


def test_a_model_may_look_at_the_shapes_of_its_values():
    assert check(Net(small_is_enlarged)).plan.nodes[-3].shape == (8, 9, 10)


@pytest.mark.parametrize("condition", [lambda x: x.shape[0] > 1, lambda x: x.flatten(0, 1).shape[0] > 1, lambda x: x.size(0) % 2])
def test_nothing_branches_on_the_batch(condition):
    model = randomized(Net(lambda m, a, b: b if condition(a) else a))
    assert "control flow" in sk.explain(model, images(3, 8)).reason


def test_shapes_leave_the_model_as_it_was():
    """They are found by running modules without data: nothing is counted, and no statistic moves."""
    model = Net(small_is_enlarged).double().requires_grad_(False)  # in training mode
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert "statistics of the batch" in sk.explain(model, images(3, 8), bn_mode="train").reason
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("training", [False, True])
def test_dropped_paths_are_kept_in_evaluation(training):
    operations = pytest.importorskip("torchvision.ops", exc_type=Exception)
    drop = pytest.importorskip("timm.layers", exc_type=Exception).DropPath(0.3)
    model = Net(lambda m, a, b: m.drop(a) + operations.stochastic_depth(b, 0.3, "row", training))
    model.drop = drop
    if training:
        assert sk.explain(randomized(model), images(3, 8)).path == "autograd"
    else:
        check(model)


# ---- windows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("middle", [
    lambda m, a, b: F.silu(b + a) + F.gelu(a), GATES["convolutions"][0], GATES["pixels"][0], ghost, shuffled, POOLS["group"],
    lambda m, a, b: F.max_pool2d(torch.cat([F.hardswish(a), b], 1)[:, 4:12], 2), POOLS["pad"], POOLS["nearest"], POOLS["max"],
], ids=range(10))  # fmt: skip
def test_square_computes_windows_of_it(middle):
    torch.manual_seed(0)
    check_windows(randomized(Net(lambda m, a, b: m.conv(middle(m, a, b)))), images(4, 9), [(1, 1), (3, 2), (9, 9)])


# ---- whole models --------------------------------------------------------------------------------------------------------------

TIMM = {
    "efficientnet_lite0": 0, "tf_mobilenetv3_small_075": 0, "mobilenetv3_small_050": 0, "regnety_002": 0, "ghostnet_050": 0,
    "lcnet_050": 0, "resnet10t": 0, "dla46_c": 0, "hardcorenas_a": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name):
    timm = pytest.importorskip("timm", exc_type=Exception)
    torch.manual_seed(0)
    model, x = randomized(timm.create_model(name, num_classes=6)), images(2, 32)
    gradient = planned(model, x)
    assert left(gradient) == TIMM[name]
    assert_equals_autograd(model, x, gradient)


def test_attack_on_a_model_of_timm_is_the_attack_through_autograd():
    timm = pytest.importorskip("timm", exc_type=Exception)
    torch.manual_seed(0)
    model, x, y = randomized(timm.create_model("mobilenetv3_small_050", num_classes=6)), images(3, 32), torch.tensor([0, 1, 2])
    results = [sk.pgd(model, x, y, EPS, steps=3, random_start=False, input_gradient=how) for how in ("autograd", "plan")]
    assert ((results[0] - results[1]).abs() < 1e-8).double().mean() > 0.999
