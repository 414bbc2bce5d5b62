# ruff: noqa: E501  (tables)
"""60 names that would leave their folder or are none: no run, and no base, is ever called so."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorimer.bases.store import folder_of, kept_path, remove_base
from lorimer.config import config_from
from lorimer.errors import BaseError, ConfigError

NAMES = [
    # upwards, and elsewhere
    "..", ".", "../x", "../../x", "x/../../y", "./x", "x/./y/z", "../../../../../../etc/passwd", "/", "//", "/etc/passwd",
    "/tmp/x", "//server/share", "~", "~/x", "~root/x", "$HOME/x", "file:///etc/passwd", "-", "--", "-rf", "--help",
    # the same written otherwise
    "%2e%2e", "%2e%2e%2fx", "..%2fx", "%252e%252e", "..%c0%afx", "%00", "\\..\\x", "..\\x", "x\\y", "C:\\x", "C:x", "\\\\server\\x",
    "\uff0e\uff0e", "\u2024\u2024/x", "\u2025/x", "..\u2215x", "\uff0fetc", "x\u202ey", "\u200bx",
    # no name at all
    "", " ", "x y", " x", "x ", "\t", "x\ny", "x\r", "\0", "x\0y", "x\x1b[31m", "x\x7f", "*", "x?", "x|y", "x;y", "`x`", "$(x)",
    ".hidden", "...", "_x", "ä", "\U0001f600", "\udcff", "x" * 129, "x" * 5000,
]  # fmt: skip


@pytest.mark.trap("S6")
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "bases").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    settings = {"base": "x", "data": {"train": "owner/rows"}, "output": {"name": name}}
    with pytest.raises(ConfigError, match=r"output\.name"):
        config_from(settings)
    for use in (folder_of, remove_base):
        with pytest.raises(BaseError, match=r"is not a name for a base|no base"):
            use(name)
    assert kept_path(name) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_60_of_them() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 60
