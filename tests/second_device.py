"""A GPU for machines without one: tensors that claim to lie on it are computed by the CPU.

Under `SecondDevice("cuda")`, ``device=``, ``.to()`` and ``.device`` answer as if it were there, and
an operator that is given tensors of both devices raises `MixedDevicesError`, as on a real GPU.
A tensor lies where its storage was said to lie, so views, parameters and in-place operators need
nothing of their own. It holds for one thread.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Weak references, which keep no memory but the address: no other storage can get the same.
SECOND: set[StorageWeakRef] = set()


class MixedDevicesError(RuntimeError):
    """An operator was given tensors of two devices."""


def is_second(tensor: Tensor) -> bool:
    """Tell whether a tensor lies on the second device."""
    return StorageWeakRef(tensor.untyped_storage()) in SECOND


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _mark(value: Any) -> None:
    SECOND.update(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors_in(value))


class _Operators(TorchDispatchMode):
    """Sees every operator, below autograd: checks what it is given, marks what it returns."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.moving = device, False
        self.inside = False  # a call from Python with tensors of the second device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if self.moving or func.overloadpacket is torch.ops.aten.copy_:
            return found
        given = tensors_in((args, kwargs))
        far = [tensor for tensor in given if is_second(tensor)]
        # What is made of no tensor, inside of such a call, belongs where that call's tensors are.
        if far or (self.inside and not given):
            # As on CUDA, a CPU tensor of one number may be read beside others, not written to.
            read = 1 if func._schema.is_mutable else 0
            if any(not is_second(t) and (t.ndim or k < read) for k, t in enumerate(given)):
                raise MixedDevicesError(f"{func} got tensors of cpu and {self.device}")
            _mark(found)
            doubles = [t for t in tensors_in(found) if t.dtype == torch.float64]
            if self.device.type == "mps" and doubles:
                raise TypeError(f"{func} returns float64, which mps does not have")
        return found


class SecondDevice(TorchFunctionMode):
    """Lets a device of this name, "cuda" or "mps", be there; sees every call from Python."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.device = torch.device(name, 0)
        self.operators = _Operators(self.device)

    def __enter__(self) -> "SecondDevice":
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.operators.__exit__(*error)
        SECOND.clear()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, asked = kwargs or {}, [False] if func is Tensor.cpu else []

        def on_cpu(value: Any) -> Any:
            kind = str(value).partition(":")[0] if isinstance(value, str | torch.device) else ""
            if kind not in ("cpu", self.device.type):
                return value
            asked.append(kind != "cpu")
            return torch.device("cpu")

        if func in (torch.device, torch._C._nn._parse_to):  # these only name one
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return self.device if is_second(args[0]) else torch.device("cpu")
        if func in (Tensor.numpy, Tensor.__array__) and is_second(args[0]):
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        args, kwargs = tree_map(on_cpu, (args, kwargs))
        self.operators.inside = any(map(is_second, tensors_in((args, kwargs))))
        found = func(*args, **kwargs)
        if func is Tensor.__deepcopy__ and is_second(args[0]):  # by way of its storage
            _mark(found)
        return tree_map(lambda value: self._move(value, asked[0]), found) if asked else found

    def _move(self, value: Any, there: bool) -> Any:
        if not isinstance(value, Tensor) or is_second(value) == there:
            return value
        self.operators.moving = True
        moved = value.clone()
        self.operators.moving = False
        if there:
            _mark(moved)
        return moved
