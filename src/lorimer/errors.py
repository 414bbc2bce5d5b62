"""Every error that lorimer raises on purpose, and the exit code each one means.

    LorimerError                 1   something failed
    ├── UserError                2   something the user gave is wrong
    │   ├── ConfigError              a setting
    │   ├── DataError                a row or a data file
    │   ├── BaseError                the files of a base model
    │   ├── TemplateError            a chat template
    │   ├── PreflightError           what is checked before the first step
    │   └── AdapterError             an adapter folder, or its fit to a base
    ├── GateError                3   a result below what was asked for
    ├── StorageError             4   a disk, a permission, a path that cannot be written
    ├── DivergenceError          1   a loss or gradient that is not finite
    └── Interrupted            130   Ctrl-C, after the state was saved
        └── Terminated         143   the same on SIGTERM

A message names the thing, what was found, what was wanted and what to do. The command line
prints it as it is and exits with the code; a traceback means a bug in lorimer.
"""

from __future__ import annotations

import re
from pathlib import Path

# A login in an address: https://user:token@host.
CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
HIDDEN = "***"


class LorimerError(Exception):
    """The root. `fix` says in one sentence what the user can do about it."""

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        fix: str | None = None,
        path: str | Path | None = None,
        line: int | None = None,
    ) -> None:
        self.problem = problem
        self.fix = fix
        self.path = None if path is None else str(path)
        self.line = line
        super().__init__(str(self))

    def __str__(self) -> str:
        """`file:line: problem. fix` with the parts that there are."""
        place = ""
        if self.path is not None:
            place = self.path if self.line is None else f"{self.path}:{self.line}"
            place += ": "
        fix = f"\n  {self.fix}" if self.fix else ""
        # A name out of a damaged file may hold what no terminal can print.
        text = f"{place}{self.problem}{fix}".encode("utf-8", "backslashreplace").decode("utf-8")
        return CREDENTIALS.sub(HIDDEN, text)


class UserError(LorimerError):
    exit_code = 2


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class BaseError(UserError):
    pass


class TemplateError(UserError):
    pass


class AdapterError(UserError):
    pass


class PreflightError(UserError):
    pass


class GateError(LorimerError):
    exit_code = 3


class StorageError(LorimerError):
    exit_code = 4


class DivergenceError(LorimerError):
    exit_code = 1


class Interrupted(LorimerError):
    exit_code = 130


class Terminated(Interrupted):
    exit_code = 143
