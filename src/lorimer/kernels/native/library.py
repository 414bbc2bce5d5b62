"""The compiled kernels: found, loaded, and called by name for one instruction set.

`LORIMER_ISA` forces an instruction set, or `reference` for none; otherwise the best that the
processor has is used. `LORIMER_KERNELS` names another library than the installed one. Without a
library everything runs on the references, and `status` says why.
"""

from __future__ import annotations

import ctypes
import logging
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorimer.errors import UserError
from lorimer.kernels import trace
from lorimer.kernels.native.build import HERE, LIBRARY, sources_hash

REFERENCE = "reference"
# Weakest first, with the bits of lorimer_processor that each needs.
NEEDS = {"portable": 0, "avx2": 1, "avx512": 3, "avx512_bf16": 7, "amx": 15}
TYPES = (torch.bfloat16, torch.float32)

log = logging.getLogger("lorimer.kernels")

_CODES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and in words why not."""
    given = os.environ.get("LORIMER_KERNELS")
    path = Path(given or HERE / LIBRARY)
    if not path.exists():
        return None, "not compiled: there was no C++ compiler at install, or it failed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    library.lorimer_sources.restype = ctypes.c_char_p
    if not given and library.lorimer_sources().decode() != sources_hash():
        return None, "compiled from other sources: run `python -m lorimer.kernels.native.build`"
    _share_threads(library)
    return library, ""


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the kernels run on PyTorch's own OpenMP threads where those are GNU's."""
    root = Path(torch.__file__).parent
    for path in [*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]:
        try:
            runtime = ctypes.CDLL(str(path))
            found = (runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
        except (OSError, AttributeError):
            continue
        library.lorimer_use_openmp(*(ctypes.cast(function, ctypes.c_void_p) for function in found))
        return


@cache
def available() -> tuple[str, ...]:
    """Instruction sets that this processor has and the library was compiled for, weakest first."""
    library, _ = _open()
    if library is None:
        return ()
    has = library.lorimer_processor()
    return tuple(
        isa
        for isa, needs in NEEDS.items()
        if has & needs == needs and hasattr(library, f"lorimer_matmul_{isa}")
    )


def status() -> str:
    """For people: which kernels run here, or why none do."""
    library, why = _open()
    if library is None:
        return why
    return f"native, {active()}" if active() != REFERENCE else "switched off by LORIMER_ISA=reference"


_forced: list[str] = []


def active() -> str:
    """The instruction set in use, or `reference`.

    Raises UserError if LORIMER_ISA names one that is not known or that is not here.
    """
    return _forced[-1] if _forced else _from_environment()


@cache
def _from_environment() -> str:
    """What the process began with: looking it up for every call would cost more than some calls."""
    wanted = os.environ.get("LORIMER_ISA", "")
    found = available()
    if not wanted:
        return found[-1] if found else REFERENCE
    if wanted == REFERENCE or wanted in found:
        return wanted
    choices = ", ".join([REFERENCE, *found])
    if wanted in NEEDS:
        why = _open()[1] or "this processor does not have it"
        raise UserError(f"LORIMER_ISA is {wanted!r}: {why}", fix=f"Here it can be: {choices}.")
    raise UserError(f"LORIMER_ISA is {wanted!r}, which is not known", fix=f"Here it can be: {choices}.")


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Run with this instruction set, or `reference`, for a while."""
    if isa != REFERENCE and isa not in available():
        raise UserError(f"the instruction set {isa!r} is not here", fix=f"Here: {', '.join(available())}.")
    _forced.append(isa)
    try:
        yield
    finally:
        _forced.pop()


def usable(*tensors: Tensor | None) -> bool:
    """Whether the native kernels take these: on the CPU, bf16 or fp32, and kernels are there."""
    return all(tensor is None or computes(tensor.device, tensor.dtype) for tensor in tensors)


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the native kernels compute there and in this type."""
    return device.type == "cpu" and dtype in TYPES and active() != REFERENCE


@cache
def note(kernel: str, why: str) -> None:
    """Say once, to the debug log, that a kernel's twin runs in its place."""
    log.debug("%s runs on its reference: %s", kernel, why)


def tapes() -> bool:
    """Whether there is a library that runs tapes."""
    return active() != REFERENCE


def run_tape(slots: array[int]) -> None:
    """Run the calls of a tape: for each the address from `on_tape`, how many slots follow, and those."""
    library, why = _open()
    assert library is not None, why
    address, length = slots.buffer_info()
    library.lorimer_run_tape(ctypes.c_void_p(address), ctypes.c_int64(length))


def on_tape(name: str) -> int | None:
    """The address by which a tape calls a kernel; None if it cannot be on one."""
    function = _variant(f"{name}_on_tape", active())
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


@cache
def _variant(name: str, isa: str) -> Any:
    """A function of the library for this instruction set, or for the best before it that it has."""
    library, why = _open()
    assert library is not None, why
    order = list(NEEDS)
    for weaker in reversed(order[: order.index(isa) + 1]):
        function = getattr(library, f"lorimer_{name}_{weaker}", None)
        if function is not None:
            return function
    return None


class Kernel:
    """A kernel by name. `signature` has a letter for each argument: p pointer (a tensor, an address or
    None), l int64, i int, f float. Call it with tensors that `usable` takes."""

    def __init__(self, name: str, signature: str) -> None:
        self.name = name
        self.types = [_CODES[letter] for letter in signature]
        self._found: dict[str, Callable[..., None]] = {}

    def __call__(self, *arguments: Tensor | float | None) -> None:
        isa = active()
        function = self._found.get(isa) or self._find(isa)
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        if trace.recorder is None:
            function(*values)
        else:
            trace.recorder.call(self.name, function, values, arguments)

    def _find(self, isa: str) -> Callable[..., None]:
        function = _variant(self.name, isa)
        assert function is not None, f"the library has no kernel {self.name!r}"
        function.argtypes, function.restype = self.types, None
        self._found[isa] = function
        return function  # type: ignore[no-any-return]
