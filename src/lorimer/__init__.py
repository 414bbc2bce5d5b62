"""lorimer: fine-tune open language models with LoRA, prove the result, use it.

Train    train(config) -> RunResult     RunConfig, read_config
Use      load(path) -> Model            model.generate, model.stream
Errors   LorimerError and its family in lorimer.errors

Names are imported when they are first used, so that `import lorimer` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorimer.api import train as train
    from lorimer.config import RunConfig as RunConfig
    from lorimer.config import read_config as read_config
    from lorimer.errors import LorimerError as LorimerError
    from lorimer.generate.model import Model as Model
    from lorimer.generate.model import load as load
    from lorimer.train.loop import RunResult as RunResult

__version__ = "0.1.0"

# Where each public name is written. `train` is a room that can be called: see lorimer/train/__init__.py.
_HOMES = {
    "train": "lorimer.train",
    "load": "lorimer.generate.model",
    "Model": "lorimer.generate.model",
    "RunConfig": "lorimer.config",
    "RunResult": "lorimer.train.loop",
    "read_config": "lorimer.config",
    "LorimerError": "lorimer.errors",
}
__all__ = ["LorimerError", "Model", "RunConfig", "RunResult", "__version__", "load", "read_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorimer' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if name == "train" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
