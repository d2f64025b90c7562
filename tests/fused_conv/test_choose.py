"""The choice of an engine: right ones by their time, wrong and failing ones never, and nothing left changed."""

import gc
import json
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

import spat_kernels as sk
from spat_kernels.attacks import pgd as attacks
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.fused_conv import choose
from spat_kernels.fused_conv.cache import Cache
from spat_kernels.fused_conv.judge import UNFIT, Judge
from spat_kernels.fused_conv.recipe import Epilogue, Recipe, apart
from spat_train.models.registry import create
from tests.cuda_graphs.fake_graph import FakeGraph
from tests.fused_conv.engines import EVERYTHING, Picky, Twin, Wrong, by_names, chooser, installed, recipes, tensors_for
from tests.input_gradient.models import EPS, images, randomized

RECIPE = Recipe("forward", torch.bfloat16, 4, (5, 9, 7), (6, 9, 7), (3, 3), padding=(1, 1), epilogue=EVERYTHING)
CPU = torch.device("cpu")


def ask(new: choose.Chooser, recipe=RECIPE, fuse="auto", seed=0) -> choose.Decision:
    """The decision on a recipe at its first use."""
    x, weight, tensors = tensors_for(recipe, seed)
    choice = new.choose(recipe, x, weight, tensors, fuse)
    decision = new.decision(recipe, CPU, fuse)
    assert decision is not None
    assert decision.choice is choice
    return decision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_takes_an_engine_that_is_right(dtype):
    for recipe in recipes(dtype):
        decision = ask(chooser(Twin()), recipe)
        assert str(decision.choice) == "twin plain", (str(recipe), decision)


def test_takes_the_fastest():
    new = chooser(Twin("a", "b", "c"), timer=by_names(a=0.5, b=0.4, c=0.6))
    decision = ask(new)
    assert str(decision.choice) == "twin b"
    assert decision.seconds == {"apart": 1.0, "twin a": 0.5, "twin b": 0.4, "twin c": 0.6}


@pytest.mark.parametrize(("seconds", "taken"), [(0.97, True), (0.985, False), (3.0, False)])
def test_a_gain_must_be_worth_it(seconds, taken):
    """Two percent; and fuse=True takes the fastest whatever it takes."""
    decision = ask(chooser(Twin("a"), timer=by_names(a=seconds)))
    assert (decision.choice is not None) == taken
    assert taken or decision.reason == choose.SLOWER
    assert str(ask(chooser(Twin("a", "b"), timer=by_names(a=seconds, b=9.0)), fuse=True).choice) == "twin a"


@pytest.mark.parametrize("way", ["one element", "unwritten", "larger", "total", "a bit", "unused bits", "raises"])
@pytest.mark.parametrize("fuse", ["auto", True])
def test_never_takes_a_wrong_one(way, fuse):
    decision = ask(chooser(Wrong(way), Twin("slow"), timer=by_names(slow=0.9, **{way: 0.1})), fuse=fuse)
    assert str(decision.choice) == "twin slow"
    problem = decision.problems[f"wrong {way}"]
    assert problem == "RuntimeError: no kernel image is available" if way == "raises" else "wrong: " in problem
    assert ask(chooser(Wrong(way)), fuse=fuse).choice is None


def test_what_is_masked_out_is_exact():
    """Errors there are as small as any, but ReLUs that are off let nothing through."""
    epilogue = Epilogue(("mask", "scale"))
    recipe = replace(RECIPE, way="gradient", epilogue=epilogue)
    decision = ask(chooser(Wrong("leaks"), Twin()), recipe)
    assert str(decision.choice) == "twin plain"
    assert "masked out" in decision.problems["wrong leaks"]


def test_roundings_of_another_order_are_right():
    """An engine that never rounds the convolution is nearer to the exact result, and bits at 0 may differ."""

    class Exact(Twin):
        def run(self, variant, recipe, x, weight, out, **tensors):
            weight = weight.permute(3, 0, 1, 2).to(torch.float64, memory_format=torch.channels_last)
            wide = {n: t.double() if t.dtype != torch.uint8 else t for n, t in tensors.items() if n != "total"}
            total = {"total": torch.empty_like(out, dtype=torch.float64)} if "total" in tensors else {}
            exact = torch.empty_like(out, dtype=torch.float64)
            apart(replace(recipe, dtype=torch.float64), x.double(), weight, exact, **wide, **total)
            out.copy_(exact)
            if total:
                tensors["total"].copy_(total["total"])
            if "mask" in tensors and recipe.way == "forward":
                tensors["mask"].copy_(wide["mask"])

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for recipe in recipes(dtype, batch=5):
            decision = ask(chooser(Exact()), recipe)
            assert decision.choice is not None, (str(recipe), decision)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timer_that_lies_is_not_believed(seconds):
    decision = ask(chooser(Twin("liar", "honest"), timer=by_names(liar=seconds, honest=0.9)))
    assert str(decision.choice) == "twin honest"
    assert "its time" in decision.problems["twin liar"]
    lost = ask(chooser(Twin("a"), timer=by_names(apart=seconds)))
    assert lost.choice is None
    assert "could not be timed" in lost.reason
    assert ask(chooser(Twin("a"), timer=by_names(apart=seconds)), fuse=True).choice is not None


def test_what_raises_keeps_apart():
    def broken(function):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert "OutOfMemoryError" in ask(chooser(Twin(), timer=broken)).reason
    decision = ask(chooser(Picky()))
    assert decision.choice is None
    assert decision.reason == "no engine does it"
    assert decision.problems == {"picky": "LookupError: nobody home"}
    assert str(ask(chooser(Picky(), Twin())).choice) == "twin plain"

    class NoMemory(Twin):
        def prepare_weight(self, recipe, weight):
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert ask(chooser(NoMemory())).choice is None


@pytest.mark.parametrize("spoil", [lambda x: x.zero_(), lambda x: x[0, 0, 0, 0].fill_(torch.nan), lambda x: x.fill_(torch.inf)])
def test_values_that_show_nothing_choose_nothing(spoil):
    recipe = replace(RECIPE, epilogue=None)
    x, weight, tensors = tensors_for(recipe)
    spoil(x)
    new = chooser(Twin())
    for _ in range(3):
        assert new.choose(recipe, x, weight, tensors) is None
        assert new.decision(recipe, CPU) is None, "other values may show more"
    assert ask(new, recipe).choice is not None


def test_values_that_overflow_choose_nothing():
    """fp16: what PyTorch makes of them is infinite, so anything would be as right."""
    recipe = replace(RECIPE, dtype=torch.float16, epilogue=None)
    x, weight, tensors = tensors_for(recipe)
    x.fill_(100.0), weight.fill_(100.0)
    judge = Judge(recipe, x, weight, tensors)
    assert judge.expected["out"].isfinite().all()
    assert judge.unfit == UNFIT
    assert chooser(Twin()).choose(recipe, x, weight, tensors) is None


def test_the_budget_bounds_the_choosing():
    """What is met after it is spent stays apart; fuse=True measures on."""
    late = chooser(Twin(), budget=0.0)
    assert ask(late).reason == choose.SPENT
    assert ask(late, fuse=True).choice is not None
    new = chooser(Twin("a", "b"), budget=1e9)

    def timer(function):
        new.budget = 0.0  # after `apart` and one of the two
        return 1.0 if not any(isinstance(c.cell_contents, choose.Choice) for c in function.__closure__) else 0.5

    new.timer = timer
    assert ask(new).reason == choose.SPENT
    assert new.spent > 0
    assert chooser().budget == choose.BUDGET == 20


def test_asks_once_and_leaves_nothing_behind():
    engine = Twin("a", "b")
    new = chooser(engine)
    x, weight, tensors = tensors_for(RECIPE)
    before = [t.clone() for t in (x, weight, *tensors.values())]
    torch.manual_seed(3)
    state = torch.get_rng_state()

    def timer(function):
        torch.rand(3)
        function()
        return 1.0

    new.timer = timer
    with torch.enable_grad():
        new.choose(RECIPE, x.requires_grad_(), weight, tensors)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, *tensors.values()), strict=True))
    calls = len(engine.calls)
    new.choose(RECIPE, x, weight, tensors)
    assert len(engine.calls) == calls
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (Judge, choose._Trial)]


def test_nothing_is_chosen_while_it_may_not_wait(monkeypatch):
    engine = Twin()
    new = chooser(engine)
    x, weight, tensors = tensors_for(RECIPE)
    monkeypatch.setattr(choose, "_may_not_wait", lambda x: True)
    with new._lock:
        found = []
        thread = threading.Thread(target=lambda: found.append(new.choose(RECIPE, x, weight, tensors)))
        thread.start()
        thread.join(10)
        assert found == [None], "a capture does not wait for a choice"
    assert new.decision(RECIPE, CPU) is None
    monkeypatch.undo()
    assert new.choose(RECIPE, x, weight, tensors) is not None
    monkeypatch.setattr(choose, "_may_not_wait", lambda x: True)
    assert new.choose(RECIPE, x, weight, tensors) is not None, "it is looked up"


def test_batches_up_to_the_next_power_of_two_share_a_decision():
    """65 to 128 do, in memory and on disk; 64 and 129 have their own, and so have the other options."""
    recipe = Recipe("forward", torch.bfloat16, 65, (8, 1, 1), (8, 1, 1), (1, 1), epilogue=Epilogue(relu=True))
    engine = Twin("a", "b")
    new = chooser(engine, timer=by_names(b=0.1))
    first = ask(new, recipe)
    assert str(first.choice) == "twin b"
    calls = len(engine.calls)
    for batch in (66, 96, 127, 128):
        assert new.decision(replace(recipe, batch=batch), CPU) is first
        assert ask(new, replace(recipe, batch=batch)) is first
        assert new.decision(replace(recipe, batch=batch), CPU, True) is None
    assert len(engine.calls) == calls
    for batch in (64, 129):
        assert new.decision(replace(recipe, batch=batch), CPU) is None
        assert ask(new, replace(recipe, batch=batch)) is not first
    assert {r.batch for _, r in engine.calls} == {64, 65, 129}, "an engine is asked for the batch that there is"

    new.give_up(replace(recipe, batch=100), CPU, "auto", RuntimeError("launch failed"))
    for batch, lost in ((64, False), (65, True), (128, True), (129, False)):
        decision = ask(new, replace(recipe, batch=batch))
        assert (decision.choice is None) == lost
        assert decision.reason == ("it failed: RuntimeError: launch failed" if lost else "")


def test_small_batches_share_with_none():
    """1 and 2 are powers of two; an empty batch, which shows nothing, must not decide for another."""
    recipe = replace(RECIPE, batch=0)
    new = chooser(Twin())
    assert new.choose(recipe, *tensors_for(recipe)) is None
    for batch in (1, 2):
        assert new.decision(replace(recipe, batch=batch), CPU) is None
        assert ask(new, replace(recipe, batch=batch)).choice is not None
    assert new.decision(recipe, CPU) is None


def test_two_threads_choose_once():
    engine = Twin()
    new = chooser(engine)
    x, weight, tensors = tensors_for(RECIPE)
    start, found = threading.Barrier(4), []

    def choosing():
        start.wait()
        found.append(new.choose(RECIPE, x, weight, tensors))

    threads = [threading.Thread(target=choosing) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 4
    assert len({*found}) == 1
    assert len(engine.calls) == 2  # checked, and timed


def test_applies_to_gpus_where_an_engine_runs():
    class Elsewhere(Twin):
        def runs_on(self, device):
            return device.index == 1

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert not choose.chooser.applies(CPU)
    assert not choose.Chooser((Twin(),)).applies(CPU)
    assert not choose.Chooser(()).applies(first)
    assert choose.Chooser((Twin(),)).applies(first)
    assert [choose.Chooser((Elsewhere(),)).applies(device) for device in (first, second)] == [False, True]


# ---- on disk


def entries(folder):
    stored = json.loads((folder / "choices.json").read_text())
    (known,) = stored["choices"].values()
    return known


def test_a_kept_choice_is_for_batches_alike(tmp_path):
    """It is checked on the batch that there is, and not timed."""
    recipe = replace(RECIPE, batch=5)
    assert ask(chooser(Twin("a", "b"), timer=by_names(b=0.1), cache=Cache(tmp_path)), recipe).choice is not None
    assert set(entries(tmp_path)) == {str(replace(recipe, batch=8))}
    engine = Twin("a", "b")
    new = chooser(engine, cache=Cache(tmp_path))
    new.timer = None  # calling it would fail
    assert str(ask(new, replace(recipe, batch=7)).choice) == "twin b"
    assert [(variant, of.batch) for variant, of in engine.calls] == [("b", 7)]


def test_choices_are_kept_and_checked_but_not_timed_again(tmp_path):
    folder = tmp_path / "made" / "late"
    assert ask(chooser(Twin("a", "b"), timer=by_names(b=0.1), cache=Cache(folder))).choice is not None
    assert entries(folder)[str(RECIPE)]["choice"] == "twin b"
    engine = Twin("a", "b")
    new = chooser(engine, timer=None, cache=Cache(folder))
    new.timer = None  # calling it would fail
    assert str(ask(new).choice) == "twin b"
    assert [variant for variant, _ in engine.calls] == ["b"]
    assert [p.name for p in folder.iterdir() if p.name.startswith("choices.json")] == ["choices.json"]

    other = replace(RECIPE, batch=5)
    ask(chooser(Twin("a"), timer=by_names(a=2.0), cache=Cache(folder)), other)
    kept = str(replace(other, batch=8))  # batches of 5 to 8 share it
    assert entries(folder)[kept]["choice"] == "apart"
    assert set(entries(folder)) == {str(RECIPE), kept}
    engine = Twin("a")
    assert ask(chooser(engine, cache=Cache(folder)), other).reason == choose.SLOWER
    assert not engine.calls


def test_a_kept_choice_that_is_wrong_now_or_has_new_rivals_is_made_again(tmp_path):
    class Aged(Twin):
        def spoil(self, variant, recipe, out, **tensors):
            out *= 2 if variant == "a" else 1

    ask(chooser(Twin("a", "b"), timer=by_names(a=0.1), cache=Cache(tmp_path)))
    assert str(ask(chooser(Aged("a", "b"), cache=Cache(tmp_path))).choice) == "twin b"
    new = ask(chooser(Twin("a", "b", "c"), timer=by_names(c=0.1), cache=Cache(tmp_path)))
    assert str(new.choice) == "twin c"


def test_what_was_not_measured_is_not_kept(tmp_path):
    ask(chooser(Twin(), cache=Cache(tmp_path)), fuse=True)
    ask(chooser(Twin(), budget=0.0, cache=Cache(tmp_path)))
    ask(chooser(cache=Cache(tmp_path)))
    ask(chooser(Twin(), timer=by_names(apart=-1.0), cache=Cache(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '{"version": 0, "choices": {}}', '{"version": 1, "choices": 3}', '{"version": 1}', "\udce4",
    '{"version": 1, "choices": {"a": 3}}',
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_replaced(tmp_path, text):
    (tmp_path / "choices.json").write_bytes(text.encode(errors="surrogateescape"))
    cache = Cache(tmp_path)
    assert ask(chooser(Twin(), cache=cache)).choice is not None
    assert "choices.json cannot be used" in cache.problem
    assert entries(tmp_path)[str(RECIPE)]["choice"] == "twin plain"


def test_entries_that_make_no_sense_are_ignored(tmp_path):
    ask(chooser(Twin(), cache=Cache(tmp_path)))
    path = tmp_path / "choices.json"
    for bad in ({"choice": 3}, {"choice": "gone", "candidates": ["twin plain"], "seconds": {}}, []):
        stored = json.loads(path.read_text())
        next(iter(stored["choices"].values()))[str(RECIPE)] = bad
        path.write_text(json.dumps(stored))
        assert ask(chooser(Twin(), cache=Cache(tmp_path))).choice is not None
        assert entries(tmp_path)[str(RECIPE)]["choice"] == "twin plain"


def test_a_folder_that_cannot_be_written_to_is_explained(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = Cache(blocked / "folder")
    new = chooser(Twin(), cache=cache)
    assert ask(new).choice is not None
    assert "choices are not kept" in cache.problem
    if os.getuid():
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        cache = Cache(tmp_path)
        assert ask(chooser(Twin(), cache=cache)).choice is not None
        assert "choices are not kept" in cache.problem


def test_the_folder_is_the_callers(tmp_path, monkeypatch):
    monkeypatch.setenv("SPAT_KERNELS_CACHE", str(tmp_path / "here"))
    assert Cache().path == tmp_path / "here" / "choices.json"
    monkeypatch.delenv("SPAT_KERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().path == tmp_path / ".cache" / "spat_kernels" / "choices.json"
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, torch
from pathlib import Path
from spat_kernels.fused_conv.cache import Cache
cache = Cache(Path(sys.argv[1]))
for i in range(20):
    cache.put(torch.device("cpu"), f"{sys.argv[2]} {i}", {"choice": "apart", "candidates": [], "seconds": {}})
assert not cache.problem, cache.problem
"""


def test_processes_keep_what_others_wrote(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(i)]) for i in range(3)]
    assert [w.wait() for w in writers] == [0, 0, 0]
    assert len(entries(tmp_path)) == 60


# ---- in attacks


@pytest.mark.parametrize("fuse", ["auto", True])
def test_attacks_ask_and_explain_tells(fuse, tmp_path):
    torch.manual_seed(0)
    model, x, y = randomized(create("wrn-10-1"), torch.float32), images(4, dtype=torch.float32), torch.arange(4)
    settings = {"steps": 2, "random_start": False, "precision": "bf16"}
    expected = sk.pgd(model, x, y, EPS, **settings)
    plain = str(sk.explain(model, x, precision="bf16"))
    assert "ride" not in plain
    engine = Twin("128x160")
    with installed(chooser(engine)):
        assert torch.equal(sk.pgd(model, x, y, EPS, fuse=False, **settings), expected)
        assert not engine.calls
        assert torch.equal(sk.pgd(model, x, y, EPS, fuse=fuse, **settings), expected)
        assert engine.calls
        assert torch.equal(sk.pgd_ls(model, x, y, EPS, 0.0, fuse=fuse, **settings), expected)
        explained = str(sk.explain(model, x, precision="bf16", fuse=fuse))
        assert explained.startswith(plain)
        assert "forward 7 of 7 passes ride in convolutions (7 twin 128x160)" in explained
        assert "gradient 6 of 7 passes ride in convolutions (6 twin 128x160), 1 do not (1 the head does it)" in explained
        assert str(sk.explain(model, x, precision="bf16", fuse=False)) == plain
    with installed(chooser(Twin(), cache=Cache(tmp_path / "file"))):
        (tmp_path / "file").write_text("")
        assert str(sk.explain(model, x, precision="bf16", fuse=fuse)).count("choices are not kept") == (fuse == "auto")
    with installed(chooser(Twin(), timer=by_names(plain=5.0))):
        assert f"7 do not (7 {choose.SLOWER})" in str(sk.explain(model, x, precision="bf16"))


def test_smaller_batches_ask_nothing_and_explain_tells_the_same():
    """As in attacks that drop images while they run."""
    torch.manual_seed(0)
    model, x, y, engine = randomized(create("wrn-10-1")), images(4), torch.arange(4), Twin()
    with installed(chooser(engine)) as new:
        sk.pgd(model, x, y, EPS, steps=1)
        spent, explained = new.spent, str(sk.explain(model, x))
        sk.pgd(model, x[:3], y[:3], EPS, steps=1)
        assert new.spent == spent, "nothing was chosen"
        engine.calls.clear()
        assert str(sk.explain(model, x[:3])) == explained
        assert {recipe.batch for _, recipe in engine.calls} <= {3}
        sk.pgd(model, x[:2], y[:2], EPS, steps=1)
        assert new.spent > spent


def test_two_attacks_in_two_threads():
    torch.manual_seed(0)
    model, x, y = randomized(create("wrn-10-1")), images(4), torch.arange(4)
    expected = sk.pgd(model, x, y, EPS, steps=2, random_start=False)
    found = []
    with installed(chooser(Twin("a", "b"))):
        attack = lambda: found.append(sk.pgd(model, x, y, EPS, steps=2, random_start=False))  # noqa: E731
        threads = [threading.Thread(target=attack) for _ in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(found) == 2
    assert all(torch.equal(each, expected) for each in found)


def test_replays_run_what_was_chosen_on_the_weights_as_they_are(monkeypatch):
    """In captures that work on the CPU. The weights that engines get are prepared in each."""
    torch.manual_seed(0)
    model, x, y, engine = randomized(create("wrn-10-1")), images(4), torch.arange(4), Twin()
    graphs = Graphs(graph=FakeGraph)
    monkeypatch.setattr(attacks, "graphs", graphs)
    settings = {"steps": 2, "random_start": False}
    with installed(chooser(engine)):
        for sign in (1, 1, -1, 1):
            model.conv1.weight.mul_(sign)
            engine.calls.clear()
            found = sk.pgd(model, x, y, EPS, graph=True, **settings)
            assert torch.equal(found, sk.pgd(model, x, y, EPS, graph=False, fuse=False, **settings))
            assert len(graphs) == 1
        assert not engine.calls, "a replay runs no Python"


def test_an_engine_that_fails_later_is_given_up():
    class Tired(Twin):
        tired = False

        def run(self, variant, recipe, x, weight, out, **tensors):
            if self.tired:
                raise RuntimeError("launch failed")
            super().run(variant, recipe, x, weight, out, **tensors)

    torch.manual_seed(0)
    model, x, y, engine = randomized(create("wrn-10-1")), images(4), torch.arange(4), Tired()
    expected = sk.pgd(model, x, y, EPS, steps=2, random_start=False)
    with installed(chooser(engine)):
        assert torch.equal(sk.pgd(model, x, y, EPS, steps=2, random_start=False), expected)
        engine.tired = True
        assert torch.equal(sk.pgd(model, x, y, EPS, steps=2, random_start=False), expected)
        assert "launch failed" in str(sk.explain(model, x))


def test_out_of_memory_is_the_attacks():
    class Hungry(Twin):
        hungry = False

        def run(self, variant, recipe, x, weight, out, **tensors):
            if self.hungry:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().run(variant, recipe, x, weight, out, **tensors)

    model, x, y, engine = randomized(create("wrn-10-1")), images(4), torch.arange(4), Hungry()
    with installed(chooser(engine)):
        sk.pgd(model, x, y, EPS, steps=1)
        engine.hungry = True
        with pytest.raises(torch.OutOfMemoryError):
            sk.pgd(model, x, y, EPS, steps=1)


# ---- on a GPU


@pytest.mark.gpu
def test_the_timer_times():
    x = torch.rand(2**24, device="cuda")
    once, twice = choose.graph_seconds(lambda: x.add_(1)), choose.graph_seconds(lambda: x.add_(1).add_(1))
    assert 1e-6 < once < 1e-3
    assert 1.5 < twice / once < 2.5


@pytest.mark.gpu
def test_chooses_on_the_gpu_and_leaves_nothing_behind():
    """With the default timer: the same choice for every recipe, random numbers and switches as before, memory freed."""
    for recipe in recipes():
        x, weight, tensors = tensors_for(recipe)
        x, weight, tensors = x.cuda(), weight.cuda(), {name: t.cuda() for name, t in tensors.items()}
        new = choose.Chooser((Twin(), Wrong("larger")))
        torch.cuda.synchronize()
        before = torch.cuda.get_rng_state(), torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        assert str(new.choose(recipe, x, weight, tensors, True)) == "twin plain", new.decision(recipe, x.device, True)
        after = torch.cuda.get_rng_state(), torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        assert "wrong" in new.decision(recipe, x.device, True).problems["wrong larger"]
    gc.collect()
    allocated = torch.cuda.memory_allocated()
    larger = replace(recipe, batch=recipe.batch + 1)
    x, weight, tensors = tensors_for(larger)
    new.choose(larger, x.cuda(), weight.cuda(), {name: t.cuda() for name, t in tensors.items()}, "auto")
    gc.collect()
    assert torch.cuda.memory_allocated() <= allocated + 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_captures_run_what_was_chosen(precision):
    torch.manual_seed(0)
    model, x, y = (
        randomized(create("wrn-10-2"), torch.float32).cuda(),
        images(8, dtype=torch.float32).cuda(),
        torch.arange(8).cuda(),
    )
    settings = {"steps": 3, "random_start": False, "precision": precision}
    expected = sk.pgd(model, x, y, EPS, fuse=False, graph=False, **settings)
    engine = Twin()
    with installed(choose.Chooser((engine,))):
        eager = sk.pgd(model, x, y, EPS, fuse=True, graph=False, **settings)
        captured = [sk.pgd(model, x, y, EPS, fuse=True, graph=True, **settings) for _ in range(3)]
        engine.calls.clear()
        captured.append(sk.pgd(model, x, y, EPS, fuse=True, graph=True, **settings))
        assert not engine.calls, "a replay runs no Python"
    sk.graphs.free(model)
    for found in (eager, *captured):
        assert (found == expected).float().mean() > 0.9  # cuDNN may take another algorithm
