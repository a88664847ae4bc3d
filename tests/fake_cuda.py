"""Runs code on a simulated GPU and lists where the host would wait for it.

``trace`` runs a function under PyTorch's ``FakeTensorMode``: tensors on ``cuda:0`` have a shape, a type and a device,
but no values. An operation on tensors of two devices fails, as on a real GPU. Each operation that makes the host wait
for the device is recorded with the line of ``lib`` that it comes from: reading a value (``item()``, ``if tensor:``),
results whose size depends on values (``nonzero``, ``unique``, indexing by a mask), and copies that block.

Not covered: the backward pass of the autograd engine, which has its own threads (tests replace it by gradients of the
right shape); DistributedDataParallel; the types that autocast chooses; streams, events and the caching allocator; a
pageable source of a ``non_blocking`` copy, which CUDA stages; and the values.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda:0")
VALUES: dict[torch.dtype, Any] = {torch.float32: 1.0, torch.float64: 1.0, torch.bool: True}
"""The value of a scalar of each type when it is read; 1 for integers."""


@dataclass
class Trace:
    """The recorded operations.

    Attributes:
        waits: "operation at folder/file.py function" -> how often the host would wait there.
        kernels: number of operations that compute something on the device: all but views.
        result: what the function returned.
    """

    waits: Counter[str] = field(default_factory=Counter)
    kernels: int = 0
    result: Any = None

    def places(self) -> set[str]:
        """The functions of ``lib`` in which the host would wait, as "folder/file.py function"."""
        return {wait.split(" at ")[1] for wait in self.waits}


def trace(work: Callable[..., Any], given: Callable[[], Any] | None = None) -> Trace:
    """Records where the host would wait in ``work``.

    Args:
        work: the function to run. It makes its tensors on ``CUDA``.
        given: called first and not recorded; its return value is passed to ``work``.
    """
    watch = _Watch()
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        with _Watch():
            arguments = [given()] if given else []
        with watch:
            watch.trace.result = work(*arguments)
    return watch.trace


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        name = str(function)
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
            self.trace.kernels += 1
        if (what := _wait(name, arguments, options)) is not None:
            self.trace.waits[f"{what} at {_place()}"] += 1
        return _without_values(name, function, arguments, options)


def _wait(name: str, arguments: Any, options: dict[str, Any]) -> str | None:
    """Why the host waits for the GPU in this operation, or None."""
    first = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
    copy = "aten._to_copy" in name or "aten.copy_" in name
    if copy:
        source = first if "_to_copy" in name else arguments[1]
        target = options.get("device") if "_to_copy" in name else arguments[0].device
        blocks = not (options.get("non_blocking", False) or (len(arguments) > 2 and arguments[2] is True))
        if target is not None and source.device.type != torch.device(target).type and blocks:
            return f"{source.device.type} to {torch.device(target).type}"
        return None
    if first is None or first.device.type != "cuda":
        return None
    for operation in ("_local_scalar_dense", "nonzero", "bincount", "equal", "_unique2", "masked_select"):
        if f"aten.{operation}." in name:
            return operation
    is_indexing = any(f"aten.{operation}" in name for operation in ("index.", "index_put", "_index_put_impl_"))
    has_mask = is_indexing and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1])
    return "mask" if has_mask else None


def _place() -> str:
    """The innermost running function of the program."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT / "lib")]
    return f"{Path(frames[-1].filename).relative_to(ROOT / 'lib')} {frames[-1].name}" if frames else "the test"


def _without_values(name: str, function: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """The result of an operation. If its shape or value depends on values, a possible result is made up."""
    first = arguments[0] if arguments else None
    if "aten.nonzero." in name:
        return first.new_empty((first.numel(), first.dim()), dtype=torch.long)
    if "aten._local_scalar_dense." in name:
        return VALUES.get(first.dtype, 1)
    if "aten.equal." in name:
        return True
    if "aten._unique2." in name:
        return first.new_empty(first.shape), first.new_empty(first.shape, dtype=torch.long), first.new_empty(0)
    if "aten.bincount." in name:
        least = options.get("minlength", arguments[2] if len(arguments) > 2 else 0)
        return first.new_empty((max(least, 1),), dtype=torch.long)
    return function(*arguments, **options)
