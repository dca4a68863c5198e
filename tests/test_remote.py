"""Calls between tests and a student's code: plain data go over, networks stay at home."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import Line
from torch import Tensor, nn

from advlab.classroom import remote
from advlab.classroom.examining import Examiner
from advlab.classroom.remote import Peer, Remote, Student

SPACE = """
import numpy as np
import torch
from torch import nn

def same(*values, **named):
    return values[0] if len(values) == 1 else (values, named)

class Kept:
    def __init__(self, *values):
        self.values, self.first, self._last = list(values), values[0], values[-1]
    def __len__(self):
        return len(self.values)
    def __getitem__(self, index):
        return self.values[index]
    def __call__(self, more):
        return sum(self.values) + more
"""


@pytest.fixture
def line():
    """A student's side that knows `SPACE`."""
    space = {"__name__": "__main__"}
    exec(SPACE, space)
    line = Line(space)
    yield line
    line.close()


@pytest.fixture
def peer(line):
    return Peer(line.exchange)


def run(line, code):
    exec(code, line.peer.space)


def network(batch_norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(4) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(3, 4), middle, nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 10**30, 0.1, math.inf, "x\n\u00e4", (1, [2.0, None]), {"a": 1, 2: (3,)}, []],
)
def test_plain_values_come_back_as_they_are(peer, value):
    found = Student(peer, "same")(value)
    assert found == value
    assert type(found) is type(value)
    assert math.isnan(Student(peer, "same")(math.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8,
                                   torch.uint8, torch.int64, torch.bool])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_tensors_come_back_equal(peer, dtype, shape):
    value = (torch.rand(shape) * 3).to(dtype)
    found = Student(peer, "same")(value)
    assert type(found) is Tensor
    assert found.dtype == dtype
    assert torch.equal(found, value)
    assert Student(peer, "same")(dtype) == dtype


def test_what_comes_is_built_anew(line, peer):
    run(line, "class Text(str): __eq__ = lambda *_: True")
    run(line, "class Odd(torch.Tensor): __eq__ = lambda *_: True")
    run(line, "texts = lambda: Text('a')\nodd = lambda: torch.ones(2).as_subclass(Odd)")
    run(line, "numbers = lambda: (np.float64(0.5), np.int64(2), np.bool_(True))")
    text, tensor = Student(peer, "texts")(), Student(peer, "odd")()
    assert (type(text), text == "b") == (str, False)
    assert type(tensor) is Tensor
    assert [type(one) for one in Student(peer, "numbers")()] == [float, int, bool]
    assert isinstance(Student(peer, "Kept")(np.float64(2)), Remote)


def test_arguments_by_name_and_iterators_go_over(peer):
    assert Student(peer, "same")(1, 2, b=3) == ((1, 2), {"b": 3})
    walk = iter([1, 2, 3])
    assert list(Student(peer, "same")(walk)) == [1, 2, 3]
    assert list(walk) == []  # it can be gone through once


def test_arguments_are_copies(line, peer):
    run(line, "def spoil(x):\n    x += 1\n    x.requires_grad_()")
    x = torch.zeros(2)
    Student(peer, "spoil")(x)
    assert x.tolist() == [0, 0]
    assert not x.requires_grad
    peer.needs_told = True  # by a test that asks for it
    Student(peer, "spoil")(x)
    assert x.tolist() == [0, 0]
    assert x.requires_grad


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        ("raise ValueError('p is 2')", ValueError, "p is 2"),
        ("class Own(IndexError): pass\n    raise Own('end')", IndexError, "end"),
        ("raise SystemExit(3)", RuntimeError, "3"),
        ("return missing", NameError, "name 'missing' is not defined"),
        ("return {}['a']", KeyError, "'a'"),
    ],
)
def test_errors_are_told_by_kind(line, peer, code, kind, text):
    run(line, f"def fails():\n    {code}")
    with pytest.raises(kind, match=text):
        Student(peer, "fails")()
    with pytest.raises(NameError, match="'absent' is not defined"):
        Student(peer, "absent")()


def test_objects_are_counted_indexed_called_and_looped_over(peer):
    kept = Student(peer, "Kept")(1.5, 2, torch.ones(2))
    assert len(kept) == 3
    assert kept[1] == 2
    assert kept.first == 1.5
    assert vars(kept)["first"] == 1.5
    assert torch.equal(vars(kept)["_last"], torch.ones(2))
    assert [type(one) for one in kept] == [float, int, Tensor]
    assert torch.equal(kept(1), torch.full((2,), 5.5))
    with pytest.raises(IndexError):
        kept[9]
    with pytest.raises(AttributeError):
        kept.nothing  # noqa: B018


def test_a_random_generator_draws_on(line, peer):
    run(line, "def draw(generator):\n    return torch.rand(3, generator=generator)")
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(2):
        found = Student(peer, "draw")(theirs)
        assert torch.equal(found, torch.rand(3, generator=ours))


GRADIENT = """
import torch.nn.functional as F
def gradient(model, x, y):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return x.grad, loss
"""


def test_a_network_answers_where_it_is_at_home(line, peer):
    run(line, GRADIENT)
    model, twin, x, y = network(), network(), torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 1])
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0])))
    model.eval()
    gradient, loss = Student(peer, "gradient")(model, x, y)
    at = x.clone().requires_grad_()
    expected = F.cross_entropy(twin(at), y)
    expected.backward()
    torch.testing.assert_close(gradient, at.grad)
    torch.testing.assert_close(loss, expected, check_stride=False)
    assert [training for training, _ in seen] == [False]
    assert torch.equal(seen[0][1], x)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)  # left there by `backward`


def test_modes_statistics_and_parameters_follow(line, peer):
    run(line, "def quiet(model, x):\n    model.eval()\n    return model(x)")
    run(line, "def inner(model, x):\n    model[1].eval()\n    return model[:2](x)")
    run(line, "def train(model, x):\n    return model(x)")
    model, x = network(batch_norm=True), torch.rand(5, 3)
    before = model[1].running_mean.clone()
    shown = Student(peer, "quiet")(model, x)
    assert not any(part.training for part in model.modules())
    assert torch.equal(model[1].running_mean, before)
    torch.testing.assert_close(shown, model(x))
    Student(peer, "train")(model.train(), x)
    assert not torch.equal(model[1].running_mean, before)
    part = Student(peer, "inner")(model, x)
    assert [one.training for one in model] == [True, False, True, True]
    torch.testing.assert_close(part, model[:2](x))


def test_a_copy_of_a_network_leaves_it_alone(line, peer):
    run(line, "import copy\ndef trial(model, x):\n    other = copy.deepcopy(model).train()\n"
              "    other[0].weight.data.zero_()\n    return other(x), model(x)")  # fmt: skip
    model, x = network(batch_norm=True).eval(), torch.rand(5, 3)
    state = copy.deepcopy(model.state_dict())
    changed, own = Student(peer, "trial")(model, x)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert not model.training
    torch.testing.assert_close(own, model(x))
    assert not torch.allclose(changed, own)


def test_who_changes_a_networks_parameters_fails(line, peer):
    run(line, "def cheat(model, x):\n    with torch.no_grad():\n"
              "        model[3].weight.zero_()\n    return model(x)")  # fmt: skip
    run(line, "def careful(model, x):\n    return model.double()(x.double()), model.float()(x)")
    model, x = network(), torch.rand(5, 3)
    exact, single = Student(peer, "careful")(model, x)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(single, model(x))
    with pytest.raises(AssertionError, match="cheat changed the parameters of a network"):
        Student(peer, "cheat")(model, x)


STYLES = {
    "torch.func": "torch.func.grad(lambda x: F.cross_entropy(model(x), y, reduction='sum'))(x)",
    "vjp": "torch.autograd.functional.vjp(lambda x: F.cross_entropy(model(x), y, reduction='sum'),"
           " x)[1]",
    "by name": "of(lambda x: model(input=x))",
    "layers": "of(lambda x: [x := layer(x) for layer in model][-1])",
    "a slice": "of(lambda x: model[2:](model[:2](x)))",
    "one by one": "torch.cat([of(model, i) for i in range(5)])",
    "functional": "of(lambda x: torch.func.functional_call(model, dict(model.named_parameters()),"
                  " x))",
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_a_gradient_may_be_taken_in_many_ways(line, peer, style):
    run(
        line,
        f"""
import torch.nn.functional as F
def gradient(model, x, y):
    def of(answer, i=slice(None)):
        at, labels = (x[[i]], y[[i]]) if isinstance(i, int) else (x, y)
        at = at.clone().requires_grad_()
        loss = F.cross_entropy(answer(at), labels, reduction="sum")
        return torch.autograd.grad(loss, at, create_graph=True)[0].detach()
    return {STYLES[style]}
""",
    )
    model, x, y = network().eval(), torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 1])
    at = x.clone().requires_grad_()
    F.cross_entropy(model(at), y, reduction="sum").backward()
    torch.testing.assert_close(Student(peer, "gradient")(model, x, y), at.grad)


def test_layers_that_are_used_twice_and_empty_ones_are_followed(line, peer):
    run(line, "def quiet(model, x):\n    before = model(x)\n    model.eval()\n    model.train()\n"
              "    return model.eval()(x), len(model[1])")  # fmt: skip
    shared = nn.Tanh()
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(), shared, nn.Linear(3, 3), shared)
    x = torch.rand(4, 3)
    out, empty = Student(peer, "quiet")(model, x)
    torch.testing.assert_close(out, model(x))
    assert empty == 0
    assert not model.training


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimiser_changes_the_network(line, peer, kind):
    run(line, GRADIENT + "def step(model, optimiser, x, y):\n    optimiser.zero_grad()\n"
              "    loss = gradient(model, x, y)[1]\n    optimiser.step()\n"
              "    return float(loss)")  # fmt: skip
    model, twin, x, y = network(), network(), torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 1])
    optimiser, own = (kind(m.parameters(), lr=0.1) for m in (model, twin))
    for _ in range(3):  # Adam remembers
        loss = Student(peer, "step")(model, optimiser, x, y)
        own.zero_grad()
        expected = F.cross_entropy(twin(x), y)
        expected.backward()
        own.step()
        assert loss == pytest.approx(float(expected), abs=1e-5)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_network_that_a_student_makes_can_be_used_here(line, peer):
    run(line, "class Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
              "        self.layer = nn.Linear(3, 2)\n    def forward(self, x):\n"
              "        return 2 * self.layer(x)\ndef build():\n    return Own()")  # fmt: skip
    model = Student(peer, "build")()
    assert [type(part).__name__ for part in model.modules()] == ["Own", "Linear"]
    assert sum(p.numel() for p in model.parameters()) == 8
    for values in model.state_dict().values():
        values.copy_(torch.ones_like(values))
    x = torch.rand(4, 3, requires_grad=True)
    out = model(x)
    torch.testing.assert_close(out, 2 * (x.sum(1, keepdim=True) + 1).expand(4, 2))
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((4, 3), 4.0))


# --- what a student's side may not do


def asked_by(line, peer, message):
    """Let the student's side ask the tests something while they wait for an answer."""
    told = []
    line.peer.space["cheat"] = lambda *_: told.append(line.peer._exchange(message)) or 1
    Student(peer, "cheat")(network(), lambda: 42)
    return told[0]


@pytest.mark.parametrize(
    "message",
    [
        {"do": "attribute", "number": 2, "name": "__globals__"},
        {"do": "item", "number": 1, "index": 0},
        {"do": "set", "name": "expected", "value": 1},
        {"do": "call", "name": "exit", "names": [], "given": [], "grad": True},
        {"do": "call", "number": 1, "names": [], "given": [], "grad": True},
        {"do": "backward", "number": 1, "gradient": None},
        {"do": "_reason", "number": 1},
    ],
)
def test_the_tests_tell_nothing(line, peer, message):
    assert "error" in asked_by(line, peer, message)


def test_the_tests_functions_can_be_called(line, peer):
    call = {"do": "call", "number": 2, "names": [], "given": [], "grad": True}
    assert asked_by(line, peer, call)["value"] == 42


DAMAGED = [
    {"is": "tensor", "kind": "float32", "shape": [2], "data": "AAAA", "needs": False},
    {"is": "tensor", "kind": "load", "shape": [], "data": "", "needs": False},
    {"is": "tensor", "kind": "float32", "shape": [-1], "data": "", "needs": False},
    {"is": "dtype", "name": "load"},
    {"is": "named", "name": "exit"},
    {"is": "optimiser", "number": 1, "class": "SGD", "groups": []},
    {"is": "anything"},
    {"is": "tensor", "kind": "qint8", "shape": [2], "data": "Bwc=", "needs": False},
    {"is": "tensor", "kind": "float32", "shape": [10**12, 0], "data": "", "needs": False},
    {"is": "object", "number": 9, "attributes": {"__torch_function__": 1}},
    {"is": "object", "number": 9, "attributes": {"__array_interface__": 1}},
    {
        "is": "object",
        "number": 9,
        "attributes": {"shape": {"is": "object", "number": 8, "attributes": {}}},
    },
    {},
    [1],
]


def test_no_more_is_held_for_the_other_side_than_a_test_needs(line, peer, monkeypatch):
    monkeypatch.setattr(remote, "THINGS", 50)
    run(
        line, "import copy\ndef hoard(model):\n    return [copy.deepcopy(model) for _ in range(99)]"
    )
    with pytest.raises(MemoryError, match="50 things"):
        Student(peer, "hoard")(network())


@pytest.mark.parametrize(
    "value",
    DAMAGED,
)
def test_damaged_messages_are_refused(line, peer, value):
    line.peer.encode = lambda _: value
    with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind: it is no value
        Student(peer, "same")(1)


# --- the examiner


def examined(line, tests, seed=0, names=("same",)):
    examiner = Examiner(line.exchange, seed)
    examiner.give("import random\nimport torch")
    examiner.answered(names, "SyntaxError: invalid syntax")
    return examiner.examine(tests)


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert same(1) == 1", ""),
        ("assert same(1) == 2, 'one is not two'", "AssertionError: one is not two"),
        ("same(None).abs()", "same returned None (AttributeError: 'NoneType' object has no"),
        ("same(1).shape", "same returned an int (AttributeError: 'int' object has no"),
        ("fails()", "ZeroDivisionError: division by zero"),
        ("mine()", "the cell with mine failed: SyntaxError: invalid syntax"),
    ],
)
def test_reasons_speak_of_the_students_function(line, tests, reason):
    run(line, "def fails():\n    return 1 / 0")
    found = examined(line, tests, names=("same", "fails", "mine"))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_seed_draws_the_same_again(line):
    tests = """
numbers = [random.random(), random.randrange(9**9), random.SystemRandom().randrange(9**9)]
assert False, numbers + [float(torch.rand(()))]"""
    first, again, other = (examined(line, tests, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_tests_can_replace_what_a_student_wrote(line):
    run(line, "def inner():\n    return 1\ndef outer():\n    return 10 + inner()")
    tests = """
own = inner
def inner():
    return 5
try:
    assert outer() == 15
finally:
    inner = own
assert outer() == 11"""
    assert examined(line, tests, names=("inner", "outer")) == ""


def test_a_replacement_ends_with_its_test(line):
    run(line, "def inner():\n    return 1\ndef outer():\n    return 10 + inner()")
    examiner = Examiner(line.exchange, 0)
    examiner.answered(("inner", "outer"), "")
    assert examiner.examine("def inner():\n    return 5\nassert outer() == 11")
    examiner.restore()
    assert examiner.examine("assert outer() == 11") == ""
