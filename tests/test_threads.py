"""Several threads: the same bits as one, whose model may be shared, how many there are, errors."""

import importlib
import os
import subprocess
import sys
import threading
import time
import warnings
from _thread import interrupt_main
from functools import partial

import pytest
import torch
from conftest import balance, make_batch, make_small_cnn
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from advlab import attacks, forward, machine, models, training
from advlab.attacks import fgsm, pgd
from advlab.catalogue import ATTACKS
from advlab.forward import predict
from advlab.machine import in_threads, torch_threads
from advlab.recipes import Recipe

MAIN = threading.get_ident()


@pytest.fixture
def use(monkeypatch):
    """Return a function that lets torch and advlab have so many threads, until the test ends."""
    before = torch.get_num_threads()

    def set_threads(count):
        monkeypatch.setenv("ADVLAB_THREADS", str(count))
        torch.set_num_threads(count)

    yield set_threads
    torch.set_num_threads(before)


@pytest.fixture
def callers(monkeypatch):
    """The threads that called a `CNN`."""
    found, plain = set(), models.CNN.forward

    def seen(self, images):
        found.add(threading.get_ident())
        return plain(self, images)

    monkeypatch.setattr(models.CNN, "forward", seen)
    return found


# --- the same to the last bit


@pytest.mark.parametrize("arch", ["cnn", "cnn-lstm"])
def test_attacks_and_answers_have_the_bits_of_one_thread(arch, use, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK", 6)
    monkeypatch.setattr(forward, "HALVED", 4)
    model, (images, labels) = models.build(arch).eval(), make_batch(15)
    labels = balance(model, images)
    results = []
    for count in (1, 2, 3):
        use(count)
        made = [attack(model, images, labels, 2 / 255, seed=1) for attack in ATTACKS.values()]
        results.append([predict(model, images), *made])
        assert torch.get_num_threads() == count
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


def test_what_is_computed_beside_the_parts_has_one_thread(use, monkeypatch):
    # Else torch's others would wait for more of it on the cores that the parts need.
    use(2)
    seen = []
    for owner, name in [
        (torch, "cat"),
        (torch, "aminmax"),
        (torch, "arange"),
        (torch.Tensor, "sign"),
    ]:
        usual = getattr(owner, name)

        def looked(*args, usual=usual, name=name, **more):
            seen.append((name, torch.get_num_threads()))
            return usual(*args, **more)

        monkeypatch.setattr(owner, name, looked)
    model, (images, labels) = models.build("cnn").eval(), make_batch(20)
    predict(model, images)
    fgsm(model, images, labels, 0.1)
    pgd(model, images, labels, 0.1, alpha=0.1, steps=1)
    assert {name for name, _ in seen} == {"cat", "aminmax", "arange", "sign"}
    assert {count for _, count in seen} == {1}
    assert torch.get_num_threads() == 2


def test_the_threads_that_help_stay(use, callers):
    use(2)
    model, images = models.build("cnn").eval(), make_batch(60)[0]
    for _ in range(5):
        predict(model, images)
    assert len(callers) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_starts_threads_of_its_own():
    code = """if True:
        import os, threading, time
        from advlab.machine import in_threads
        def look(k):
            time.sleep(0.1)
            return threading.get_ident()
        assert len(set(in_threads(look, [(k,) for k in range(4)], 2))) == 2
        child = os.fork()
        found = len(set(in_threads(look, [(k,) for k in range(4)], 2)))
        if not child:
            os._exit(found)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2"], done.stderr


@pytest.mark.parametrize(("n", "size", "shared"), [(7, 32, 1), (8, 32, 2), (4, 224, 2)])
def test_a_small_batch_uses_several_threads_too(n, size, shared, use, callers):
    use(2)
    images = torch.rand(n, 3, size, size)
    predict(models.CNN(shape=(3, size, size)), images)
    assert len(callers) == shared


def test_torch_keeps_its_threads_for_one_large_image(use, monkeypatch):
    use(2)
    counts = []
    monkeypatch.setattr(models.CNN, "forward", lambda _, x: counts.append(
        torch.get_num_threads()) or x.flatten(1))  # fmt: skip
    for size in (32, 64):
        predict(models.CNN(shape=(3, size, size)), torch.rand(1, 3, size, size))
    assert counts == [1, 2]


@pytest.mark.parametrize("inference", [False, True])
def test_threads_take_over_the_modes_of_the_caller(inference, use):
    use(3)

    def work(_):
        time.sleep(0.02)
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads()

    with torch.inference_mode(inference), torch.no_grad():
        assert set(in_threads(work, [(k,) for k in range(9)])) == {(inference, False, 1)}


# --- models that several threads must not call at once


class Keeps(nn.Module):
    """Keeps something between two lines."""

    def forward(self, x):
        self.hidden = x.flatten(1)
        time.sleep(0.003)
        return self.hidden[:, :10]


class Draws(nn.Module):
    """Answers at random."""

    def forward(self, x):
        time.sleep(0.003)
        return x.flatten(1)[:, :10] + torch.randn(len(x), 10)


def plain():
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten())


def hooked(register):
    model = plain()
    getattr(model[0], register)(lambda *_: None)
    return model


def patched():
    model = plain()
    usual = model[0].forward
    model[0].forward = lambda x: usual(x)
    return model


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch would have it replaced
        return torch.jit.script(plain())


def compiled():
    model = plain()
    model.compile(backend="eager")
    return model


STRANGERS = {
    "keeps": Keeps,
    "draws": Draws,
    "inside": lambda: nn.Sequential(nn.Identity(), Keeps()),
    "pooling at random": lambda: nn.Sequential(nn.FractionalMaxPool2d(3, 4), nn.Flatten()),
    "forward hook": partial(hooked, "register_forward_hook"),
    "pre-hook": partial(hooked, "register_forward_pre_hook"),
    "backward hook": partial(hooked, "register_full_backward_hook"),
    "patched": patched,
    "scripted": scripted,
    "compiled": compiled,
    "function": lambda: lambda x: x.flatten(1)[:, :10],
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_strangers_model_is_called_part_after_part_as_before(kind, use, monkeypatch):
    images, labels = make_batch(250)
    model, ask, calls = STRANGERS[kind](), forward.ask, []

    def asked(model, x, *rest):
        calls.append((threading.get_ident() == MAIN, len(x), torch.get_num_threads()))
        return ask(model, x, *rest)

    for module in (forward, attacks):
        monkeypatch.setattr(module, "ask", asked)
    found = []
    for count in (1, 3):
        use(count)
        torch.manual_seed(0)
        found.append([predict(model, images), fgsm(model, images, labels, 0.1)])
        assert calls == [(True, n, count) for _ in range(2) for n in (100, 100, 50)]
        calls.clear()
    assert all(map(torch.equal, *found))


class Counting(TorchDispatchMode):
    """Counts operators, in the thread that enters it."""

    calls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += 1
        return operator(*args, **(kwargs or {}))


def test_who_watches_sees_every_call(use, callers):
    use(2)
    model, images = models.build("cnn").eval(), make_batch(60)[0]
    with Counting() as watch:
        predict(model, images)
    assert watch.calls > 20
    seen = []
    hook = register_module_forward_hook(lambda module, _, __: seen.append(module))
    try:
        predict(model, images)
    finally:
        hook.remove()
    assert seen.count(model) == 1
    with torch.profiler.profile():
        predict(model, images)
    assert callers == {MAIN}
    predict(model, images)
    assert len(callers) == 2


def test_models_of_known_modules_are_shared(use, monkeypatch):
    use(2)
    torchvision = importlib.import_module("torchvision")
    weighted = nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(3072, 10)))
    shared = []
    monkeypatch.setattr(forward, "in_threads", lambda work, parts, _: (
        shared.append(len(parts)), [work(*part) for part in parts])[1])  # fmt: skip
    for model in (torchvision.models.resnet18(num_classes=10), weighted):
        predict(model, make_batch(60)[0])
    assert shared == [2, 2]


# --- errors, Ctrl-C, several callers


def test_the_first_part_that_fails_ends_the_call(use):
    use(3)
    begun, at_work = [], [0]

    def work(number):
        begun.append(number)
        at_work.append(1)
        time.sleep(0.05 if number == 1 else 0.01)
        at_work.append(-1)
        if number in (1, 2):
            raise ValueError(f"part {number}")

    with pytest.raises(ValueError, match="part 1"):
        in_threads(work, [(k,) for k in range(50)])
    assert len(begun) < 12
    assert sum(at_work) == 0  # nobody is left at work
    assert torch.get_num_threads() == 3
    assert machine._helping == 0


def test_ctrl_c_leaves_no_thread_behind(use):
    use(2)
    begun, ended = [], []

    def work(number):
        begun.append(number)
        if threading.get_ident() != MAIN:
            time.sleep(0.02)
            interrupt_main()
        time.sleep(0.1)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        in_threads(work, [(k,) for k in range(100)])
    assert len(begun) < 6
    assert len(ended) >= len(begun) - 1  # the caller's own was interrupted; nobody is left at work
    assert torch.get_num_threads() == 2


def test_a_model_that_fails_is_left_as_it_was(use):
    use(2)
    model = models.build("cnn").train()
    with torch.no_grad():
        model.network[-1].bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        pgd(model, *make_batch(60), 0.1, alpha=0.1, steps=2)
    assert all(module.training for module in model.modules())
    assert torch.get_num_threads() == 2


def test_without_another_thread_of_the_system_the_caller_does_it_all(use, monkeypatch):
    use(2)

    def start(_):
        raise RuntimeError("can't start new thread")

    machine._executor.cache_clear()
    monkeypatch.setattr(threading.Thread, "start", start)
    assert in_threads(lambda k: k, [(k,) for k in range(4)]) == [0, 1, 2, 3]


def test_callers_at_once_share_the_cores(use):
    use(2)
    lock, at_work, most = threading.Lock(), 0, 0

    def work(number):
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.01)
        inner = in_threads(lambda k: k, [(number,), (number,)])  # nested: in this thread alone
        with lock:
            at_work -= 1
        return inner[0]

    found = []
    parts = [(k,) for k in range(20)]
    callers = [
        threading.Thread(target=lambda: found.append(in_threads(work, parts))) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert found == [list(range(20))] * 3
    assert most <= 3 + 1  # the callers, and one helper for all of them
    assert machine._helping == 0


# --- how many there are


@pytest.mark.parametrize("said", ["0", "-1", "1.5", "two", "\N{SUPERSCRIPT TWO}"])
def test_number_of_threads_must_be_one(monkeypatch, said):
    monkeypatch.setenv("ADVLAB_THREADS", said)
    with pytest.raises(ValueError, match=r"ADVLAB_THREADS is .*whole number from 1 on"):
        machine.threads()


@pytest.mark.parametrize(
    ("own", "limits", "granted"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a", {"a/cpu.max": "400000 100000", "cpu.max": "50000 100000"}, 0.5),
        ("0::/hidden", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "max 100000"}, float("inf")),
        (
            "9:memory:/x\n3:cpu,cpuacct:/docker/1",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1000"}, float("inf")),
        ("1:cpuset:/", {"cpuset/cpu.max": "1 1000"}, float("inf")),
        (None, {}, float("inf")),
    ],
)
def test_quota_of_control_groups_bounds_the_cores(own, limits, granted, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "LIMITS", tmp_path / "limits")
    monkeypatch.setattr(machine, "own_cores", lambda: set(range(8)))
    monkeypatch.delenv("ADVLAB_THREADS", raising=False)
    if own:
        (tmp_path / "own").write_text(own + "\n")
    for name, text in limits.items():
        path = tmp_path / "limits" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert machine.quota() == granted
    with torch_threads(9):
        assert (
            machine.threads() == machine.cores() == {0.5: 1, 1.5: 2, 2: 2, 2.5: 3}.get(granted, 8)
        )
    with torch_threads(1):
        assert machine.threads() == 1


@pytest.mark.parametrize(
    ("torchs", "said", "busy", "free"),
    [(4, "", 0.1, 4), (4, "", 1.0, 3), (4, "", 9.0, 1), (4, "3", 9.0, 3), (1, "3", 0.0, 1)],
)
def test_training_takes_the_cores_that_are_free(torchs, said, busy, free, use, monkeypatch):
    use(torchs)
    monkeypatch.setenv("ADVLAB_THREADS", said)
    monkeypatch.setattr(machine, "own_cores", lambda: set(range(4)))
    monkeypatch.setattr(machine, "busy_cores", lambda: busy)
    assert machine.free_threads() == free


def test_busy_cores_are_those_that_others_use(monkeypatch):
    monkeypatch.setattr(machine, "own_cores", lambda: {0, 2})

    def look(seconds, percpu):
        while time.process_time() < end:
            pass  # this process is busy half of the second that the look takes, by its clock
        return [50.0, 100.0, 75.0, 100.0]

    monkeypatch.setattr(machine.psutil, "cpu_percent", look)
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    end = time.process_time() + 0.5
    assert machine.busy_cores() == pytest.approx(1.25 - 0.5, abs=0.1)


@pytest.mark.parametrize("threads", [None, 3])
def test_fit_has_threads_of_its_own_for_its_time(threads, use, shapes, monkeypatch):
    use(2)
    monkeypatch.setattr(training, "free_threads", lambda: 1)
    seen = []

    def stop(_):
        seen.append(torch.get_num_threads())
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        training.fit(
            make_small_cnn(), shapes.train.first(32), Recipe("x", 1, 32), threads=threads,
            on_epoch=stop,
        )  # fmt: skip
    assert seen == [threads or 1]
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="threads is 0"):
        training.fit(make_small_cnn(), shapes.train, Recipe("x", 1, 32), threads=0)
