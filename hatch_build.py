"""The package's own build step: compile the native kernels where there is a C++ compiler.

Without one, or where it fails, the package installs as pure Python and `lorimer doctor` says so.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/lorimer/kernels/native")


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / NATIVE
        # By its path: what is being built is not installed yet.
        spec = importlib.util.spec_from_file_location("native_build", folder / "build.py")
        assert spec is not None
        assert spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        try:
            native.build(folder)
        except native.CannotBuild as error:
            self.app.display_warning(f"no native kernels: {error}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(f"/{NATIVE}/{native.LIBRARY}")
