"""The caller's world: whatever happens in an attack, nothing of it changes."""

import copy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import spat_kernels as sk
from spat_kernels.model_state.borrow import parts
from tests.helpers import EPS, Around, Recorder, assert_same, batch, cnn, linear, mixed_model, snapshot

MODES = ["eval", "train", "keep"]


def assert_nearly_same(got, expected):
    """Images by two ways of computing the gradient: equal but where it is so close to 0 that rounding decides its sign."""
    assert ((got - expected).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("bn_mode", MODES)
@pytest.mark.parametrize("fails_at", [0, 3])
def test_nothing_changes_when_the_model_raises(bn_mode, fails_at):
    class Fails(Recorder):
        def forward(self, x):
            if len(self.inputs) == fails_at:
                raise KeyError("in the middle")
            return super().forward(x)

    model, (x, y) = Fails(mixed_model()), batch()
    before = snapshot(model, x, y)
    with pytest.raises(KeyError, match="in the middle"):
        sk.pgd(model, x, y, EPS, bn_mode=bn_mode)
    assert_same(before, snapshot(model, x, y))
    assert torch.is_grad_enabled()


def test_models_that_work_in_place_do_not_reach_the_images():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.sub_(0.5).flatten(1)

    x, y = batch()
    before = x.clone()
    for loss in ("ce", "kl", "dlr"):
        with pytest.raises(ValueError, match="model changes its input in place.*x.clone()"):
            sk.pgd(InPlace(), x, y, EPS, loss=loss)
        assert torch.equal(x, before)


def test_models_made_in_inference_mode_are_refused_untouched():
    with torch.inference_mode():
        model = cnn()
    with pytest.raises(ValueError, match="model was made inside torch.inference_mode"):
        sk.pgd(model, *batch(), EPS)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


class Modes(Around):
    """Remembers the modes that its modules are run in."""

    def __init__(self, net):
        super().__init__(net)
        self.seen = set()

    def forward(self, x):
        self.seen.add(tuple(m.training for m in self.net.modules()))
        return self.net(x)


@pytest.mark.parametrize("bn_mode", MODES)
def test_bn_modes_are_what_they_say(bn_mode):
    model, (x, y) = Modes(cnn()), batch()
    model.net[1].eval()
    kept = tuple(m.training for m in model.net.modules())
    sk.pgd(model, x, y, EPS, bn_mode=bn_mode)
    assert model.seen == {{"eval": (False,) * len(kept), "train": (True,) * len(kept), "keep": kept}[bn_mode]}


def test_an_outer_graph_survives():
    """Between a forward and its backward, an attack must not touch what autograd saved."""
    model, (x, y) = cnn(), batch()
    for mode in MODES:
        model.eval()
        loss = F.cross_entropy(model(x), y)
        sk.pgd(model, x, y, EPS, bn_mode=mode)
        loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_weight_gradient_is_computed():
    """The graph that an attack differentiates has the images as its only leaf."""
    leaves = set()

    class Spy(Around):
        def forward(self, x):
            z = self.net(x)
            stack = [z.grad_fn]
            while stack:
                node = stack.pop()
                if hasattr(node, "variable"):
                    leaves.add(node.variable.shape)
                stack += [n for n, _ in node.next_functions if n is not None]
            return z

    x, y = batch()
    sk.pgd(Spy(cnn()), x, y, EPS, input_gradient="autograd")
    assert leaves == {x.shape}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_loss_of_the_callers_in_any_grad_mode(context):
    model, (x, y) = cnn().eval(), batch()
    attack = sk.PGD(EPS, random_start=False, loss=partial(F.cross_entropy, reduction="none"))
    expected = attack(model, x, y)
    with context():
        got = attack(model, x + 0, y + 0)  # inference tensors, in inference mode
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.equal(got, expected)
    (got * 1).requires_grad_()  # a normal tensor


def test_under_autocast():
    model, (x, y) = cnn().eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        x_adv = sk.pgd_ls(model, x, y, EPS, 0.1)
        assert x_adv.dtype == torch.float32
        assert (x_adv - x).abs().max() <= EPS + 1e-7
        loss = F.cross_entropy(model(x_adv), y)  # autocast's cached weights must still lead to the parameters
    loss.backward()
    assert before.dtype == torch.bfloat16
    assert all(p.grad is not None for p in model.parameters())


class Checkpointed(Around):
    def __init__(self, net, use_reentrant):
        super().__init__(net)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.net[2:](checkpoint(self.net[:2], x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda net: lambda x: net(x), id="callable"),
        pytest.param(nn.DataParallel, id="data parallel"),  # moves it to the GPU, where there is one
        pytest.param(partial(Checkpointed, use_reentrant=True), id="checkpointed, reentrant"),
        pytest.param(partial(Checkpointed, use_reentrant=False), id="checkpointed"),
        pytest.param(partial(torch.compile, backend="aot_eager"), id="compiled", marks=pytest.mark.slow),
    ],
)
def test_wrapped_models_are_attacked_alike_and_left_alone(wrap):
    net = cnn().eval()
    model = wrap(net)
    x, y = (t.to(next(net.parameters()).device) for t in batch())
    before = snapshot(net, x, y)
    for bn_mode in MODES:
        got, expected = (sk.pgd(m, x, y, EPS, random_start=False, bn_mode=bn_mode) for m in (model, net))
        assert_same(before, snapshot(net, x, y))
        if bn_mode != "train":  # dropout
            assert_nearly_same(got, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_distributed_data_parallel(tmp_path, nested):
    """Attack and training step in turn: DDP's reducer must not wait for the attack's backward."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model, (x, y) = cnn(), batch()
        ddp = nn.parallel.DistributedDataParallel(model)
        attacked = nn.Sequential(nn.Identity(), ddp) if nested else ddp
        for bn_mode in MODES:
            x_adv = sk.pgd(attacked, x, y, EPS, bn_mode=bn_mode)
            assert all(p.grad is None for p in model.parameters())
            F.cross_entropy(attacked(x_adv), y).backward()
            assert all(p.grad is not None for p in model.parameters())
            model.zero_grad()
        assert ddp.require_backward_grad_sync
        assert ddp.require_forward_param_sync
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_generator_on_the_other_device():
    model, (x, y) = cnn().eval().cuda(), (t.cuda() for t in batch())
    a, b = (sk.pgd(model, x, y, EPS, generator=torch.Generator("cpu").manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.gpu
def test_no_synchronisation_in_the_loop():
    model, (x, y) = cnn().eval().cuda(), (t.cuda() for t in batch())

    def syncs(steps):
        with torch.autograd.profiler.profile(use_device="cuda") as profile:
            sk.pgd(model, x, y, EPS, steps=steps, graph=False)
        return sum(e.count for e in profile.key_averages() if "Synchronize" in e.key or e.key == "aten::_local_scalar_dense")

    syncs(1)  # makes the plan, and compares it with the model
    assert syncs(2) == syncs(20)


# ---- what train() does beside the flags


class Merging(nn.Module):
    """Merges its low-rank update into the weight for evaluation, as LoRA layers do."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(4, inputs) * 0.02), nn.Parameter(torch.randn(outputs, 4) * 0.02)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight if self.merged else self.weight + self.b @ self.a)


@pytest.mark.parametrize("bn_mode", MODES)
@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False), (False, True)])
def test_what_train_does_is_undone_by_it(bn_mode, modes):
    model, (x, y) = nn.Sequential(nn.Flatten(), Merging(192, 20), nn.ReLU(), Merging(20, 10)), batch()
    for layer, mode in zip((model, model[3]), modes, strict=True):
        layer.train(mode)
    merged, before = [model[i].merged for i in (1, 3)], copy.deepcopy(model.state_dict())
    sk.pgd_ls(model, x, y, EPS, 0.1, bn_mode=bn_mode)
    assert [m.training for m in (model, model[1], model[3])] == [modes[0], modes[0], modes[1]]
    assert [model[i].merged for i in (1, 3)] == merged
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-6), name
    if modes == (True, True):
        F.cross_entropy(model(x), y).backward()
        assert model[1].a.grad is not None


def test_layers_that_stay_frozen_in_training_mode_do():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    model = Modes(nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4).eval(), nn.Flatten(), nn.Linear(144, 10)))
    sk.pgd(model, *batch(), EPS, bn_mode="train")
    assert model.seen == {(True, True, False, True, True)}
    assert not model.net[1].training
    assert model.training


def test_modules_that_refuse_train_are_attacked_as_they_are_if_asked():
    x, y = batch(4)
    fixed = torch.export.export(nn.Linear(192, 10).eval(), (x.flatten(1),)).module()
    model = nn.Sequential(nn.Flatten(), Merging(192, 192), fixed)  # its train() fails at the last one
    with pytest.raises(ValueError, match="bn_mode='eval', but Sequential refuses to change its mode.*use bn_mode='keep'"):
        sk.pgd(model, x, y, EPS)
    assert (sk.pgd(model, x, y, EPS, bn_mode="keep") != x).any()
    assert all(m.training for m in (model, *model))
    assert not model[1].merged
    for m in model.modules():
        m.training = False  # they need not change
    assert (sk.pgd(model, x, y, EPS) != x).any()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("bn_mode", MODES)
def test_weights_that_are_computed_keep_their_graph(norm, bn_mode):
    model, (x, y) = nn.Sequential(nn.Flatten(), norm(nn.Linear(192, 10))), batch()
    model(x)
    before, weight = snapshot(model, x, y), model[1].weight
    sk.pgd(model, x, y, EPS, bn_mode=bn_mode)
    assert_same(before, snapshot(model, x, y))
    assert model[1].weight.requires_grad
    assert model[1].weight is weight or "weight" not in vars(model[1])
    model[1].weight.sum().backward()  # a penalty
    assert any(p.grad is not None for p in model[1].parameters())


# ---- modules that are not registered


class Holder:
    def __init__(self, held):
        self.held = held


class Members(nn.Module):
    """Its members are where nn.Module does not look."""

    def __init__(self, kind: str, members):
        super().__init__()
        self.kind, (a, b) = kind, members
        self.held = {
            "list": [a, b],
            "tuple": (a, (b,)),
            "dict": {"a": a, "b": [b]},
            "object": Holder({"a": a, "b": Holder(b)}),
            "method": [a.forward, b.forward],
        }[kind]
        self.members = self.held if kind == "method" else lambda x: [m(x) for m in members]

    def forward(self, x):
        return sum(m(x) for m in self.members) if self.kind == "method" else sum(self.members(x))


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "object", "method"])
@pytest.mark.parametrize("bn_mode", MODES)
def test_modules_that_are_not_registered_are_borrowed_too(kind, bn_mode):
    def member():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 10))

    torch.manual_seed(0)
    members, (x, y) = [member().train(), member().train()], batch(16)
    members[1][1].eval()
    registered = nn.ModuleList(members)
    model, before = Members(kind, members).eval(), snapshot(registered, x, y)
    torch.manual_seed(1)
    x_adv = sk.pgd(model, x, y, EPS, bn_mode=bn_mode)
    assert_same(before, snapshot(registered, x, y))

    known = Around(registered)
    known.forward = lambda x: sum(m(x) for m in registered)
    torch.manual_seed(1)
    expected = "eval" if bn_mode == "eval" else "keep"  # `train()` would not reach them
    assert_nearly_same(x_adv, sk.pgd(known, x, y, EPS, bn_mode=expected, input_gradient="autograd"))


def test_parts_of_a_model():
    model, first, second, third, fourth = nn.Module(), nn.Identity(), nn.Softplus(), nn.Sigmoid(), nn.Sequential(nn.ReLU())
    model.layer = nn.Linear(2, 2)
    model.again, model.itself = [model.layer], [model]
    model.loop = {"numbers": [1, 2.0, "three"], "none": None}
    model.loop["loop"] = model.loop
    model.bound, model.partial = first.forward, partial(map, second)
    shared = Holder(third)
    model.far, model.near = Holder(Holder(shared)), shared  # first too deep to look into, then not
    model.hidden, model.too_deep = Holder(Holder([fourth])), Holder(Holder(Holder(nn.Tanh())))
    model.data, model.deep = [(i,) for i in range(100_000)], []
    for _ in range(5000):
        model.deep = [model.deep]
    registered, *others = parts(type("Of its own", (nn.Module,), {})())
    assert len(registered) == 1
    assert not others
    model.__class__ = type("Model", (nn.Module,), {})
    registered, *others = parts(model)
    assert registered == [model, model.layer]
    assert {tuple(tree) for tree in others} == {(first,), (second,), (third,), (fourth, fourth[0])}


def test_modes_of_modules_that_are_shared_or_refuse():
    """In eval mode all but those that refuse, in training mode what `train()` reaches; afterwards as they were."""
    x, y = batch(4)
    fixed = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval(), (x,)).module()
    shared = Merging(192, 192)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Flatten(), shared), nn.Sequential(nn.Flatten(), shared)
            self.teacher, self.dropout = [fixed], [nn.Dropout().eval()]
            self.seen = set()

        def forward(self, x):
            self.seen.add((self.a.training, shared.training, self.dropout[0].training))
            return self.teacher[0](self.dropout[0](self.a(x) + self.b(x)).view_as(x))

    for before in ((True, True, False), (False, True, True), (True, False, True)):  # of a, b and what they share
        model = Model()
        for m, training in zip((model.a, model.b, shared), before, strict=True):
            m.train(training)
        merged, modes = shared.merged, [m.training for m in (*model.modules(), *fixed.modules())]
        for bn_mode, seen in (("eval", {(False, False, False)}), ("train", {(True, True, False)})):
            model.seen.clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sk.pgd(model, x, y, EPS, bn_mode=bn_mode)
            said = "GraphModule, which the model holds without registering it, is attacked in its own mode: Calling train()"
            assert [str(w.message).startswith(said) for w in caught] == [True] * (bn_mode == "eval")
            assert model.seen == seen
            assert shared.merged == merged
            assert [m.training for m in (*model.modules(), *fixed.modules())] == modes


def test_an_attack_is_not_lost_where_train_fails_on_the_way_back():
    class ForInference(Around):
        def train(self, mode=True):
            if mode:
                raise RuntimeError("this model is for inference")
            return super().train(mode)

        def forward(self, x):
            return self.net(x)

    model, (x, y) = ForInference(nn.Sequential(nn.Flatten(), nn.Linear(192, 10))), batch()
    with pytest.warns(RuntimeWarning, match="ForInference changed its mode.*fails on the way back: this model is for inference"):
        x_adv = sk.pgd(model, x, y, EPS)
    assert (x_adv != x).any()
    assert all(m.training for m in model.modules())


def test_threads_attack_a_model_that_writes_on_itself():
    class Caching(Around):
        def forward(self, x):
            self.cache[len(self.cache) % 50] = [x.sum()]
            self.cache.pop(len(self.cache) // 2, None)
            return self.net(x)

    model, (x, y) = Caching(linear(192).train()), batch()
    model.cache = {}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            attacks = [pool.submit(sk.pgd, model, x, y, EPS, steps=3, input_gradient="autograd") for _ in range(40)]
            assert all(a.result().shape == x.shape for a in attacks)
    finally:
        sys.setswitchinterval(interval)
