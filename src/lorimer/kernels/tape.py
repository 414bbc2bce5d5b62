"""Kernels' calls written down once and run again: a step of generation without Python between kernels.

The next token of a batch is computed by the same few hundred calls each time, on the same memory; only
what lies there changes. A tape is written while the step runs as usual, and afterwards the step is one
call of the library. What is not a kernel's call would be missed: so while a tape is written, any
operation of PyTorch that computes makes it void, and the step runs as usual from then on.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorimer.kernels import trace
from lorimer.kernels.native import library

log = logging.getLogger("lorimer.kernels")

Step = Callable[..., Tensor]

# They take memory and compute nothing.
_MAKING = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_writing = threading.Lock()


class Tape:
    """The calls of one step over tensors that stay where they are.

    Call it with the step and its inputs: tensors of the same shapes and types each time. The result
    lasts until the next call. The step must do the same for the same shapes, whatever their numbers.
    """

    def __init__(self) -> None:
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None
        self._slots = array("q")
        self._kept: list[Any] = []  # every tensor that a call has the address of
        self._thread = 0
        self._void = ""

    def __call__(self, step: Step, *inputs: Tensor) -> Tensor:
        if self._result is not None and trace.recorder is None:
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            library.run_tape(self._slots)
            return self._result
        if self._void or self._result is not None or trace.recorder is not None or not library.tapes():
            return step(*inputs)
        return self._write(step, inputs)

    def _write(self, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        if not _writing.acquire(blocking=False):  # another thread writes one: this step runs as usual
            return step(*inputs)
        try:
            self._thread = threading.get_ident()
            trace.recorder = self
            with _Watch(self):
                result = step(*inputs)
        except BaseException:
            self._void = "it failed"
            raise
        finally:
            trace.recorder = None
            _writing.release()
        if self._void:
            log.debug("a step cannot be kept on tape: %s", self._void)
            self._slots, self._kept = array("q"), []
        else:
            self._inputs, self._result = inputs, result
        return result

    def call(
        self, name: str, function: Callable[..., None], values: Sequence[Any], arguments: Sequence[Any]
    ) -> None:
        """A kernel's call, as `trace.recorder` gets it: run it, and write it down."""
        function(*values)
        if threading.get_ident() != self._thread or self._void:
            return
        address = library.on_tape(name)
        if address is None:
            self._void = f"the kernel {name} cannot be called from one"
            return
        self._slots.extend((address, len(values)))
        self._slots.extend(
            _slot(value, kind)
            for value, kind in zip(values, function.argtypes, strict=True)  # type: ignore[attr-defined]
        )
        self._kept.append(arguments)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Nothing: a tape has no stages."""
        return nullcontext()

    def void(self, why: str) -> None:
        self._void = self._void or why


def _slot(value: Any, kind: type) -> int:
    """An argument's 64 bits."""
    if kind is ctypes.c_float:
        return int.from_bytes(struct.pack("<f", value), "little")
    return 0 if value is None else int(value)


class _Watch(TorchDispatchMode):
    """Makes a tape void when PyTorch itself computes something."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func._schema.name not in _MAKING:
            self._tape.void(f"{func} computes between the kernels")
        return func(*args, **(kwargs or {}))
