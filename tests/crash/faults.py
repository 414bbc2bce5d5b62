"""Every call by which a save reaches the disk, counted, and something done at one of them.

The calls are Python's: opening for writing, fsync, rename, replace, unlink, mkdir, rmdir, and the tensors'
library as one. Armed in a process of its own that does one run and ends.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")
ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT", "EMFILE")


class Faults:
    """Counts the calls; at number `at` (from 1) and, if `stays`, at all that follow, does `what`:
    kill, or the name of an error. `only` limits it to calls on paths that hold this text."""

    def __init__(
        self, what: str | None = None, at: int = 0, *, stays: bool = False, only: str = ""
    ) -> None:
        self.what, self.at, self.stays, self.only = what, at, stays, only
        self.names: list[str] = []

    def _count(self, name: str, path: object) -> None:
        if self.only and self.only not in str(path):
            return
        self.names.append(f"{name} {os.path.basename(str(path))}")
        number = len(self.names)
        if self.what is None or not (number == self.at or (self.stays and number > self.at)):
            return
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.what)
        raise OSError(code, os.strerror(code), str(path))

    def arm(self) -> Faults:
        """Put the counting in place of the calls, until the process ends."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        opens = self._counted_open(io.open)
        io.open = builtins.open = opens  # type: ignore[assignment]
        import safetensors.torch as tensors

        tensors.save_file = self._counted_save(tensors.save_file)
        return self

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *given: Any, **named: Any) -> Any:
            shown = path
            if name == "fsync":
                shown = os.readlink(f"/proc/self/fd/{path}") if os.path.exists("/proc/self/fd") else path
            self._count(name, shown)
            return call(path, *given, **named)

        return counted

    def _counted_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            if isinstance(file, str | os.PathLike) and set(mode) & set("wax+"):
                self._count("open", file)
            return call(file, mode, *given, **named)

        return counted

    def _counted_save(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensors: Any, filename: Any, *given: Any, **named: Any) -> Any:
            try:
                self._count("save", filename)
            except OSError as error:
                # As the library does: half of the file, and an error of its own.
                from safetensors import SafetensorError

                call(tensors, filename, *given, **named)
                with io.FileIO(filename, "r+") as file:
                    file.truncate(os.path.getsize(filename) // 2)
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error
            return call(tensors, filename, *given, **named)

        return counted
