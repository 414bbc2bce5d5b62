"""Training: the settings and a base in, a run folder with an adapter out.

loop.py         train(): the spine, read it first
step.py         one optimizer step
schedule.py     the learning rate as a function of the step
deadline.py     a run that ends in time: the steps that fit
optimizer.py    optimizers over the flat buffer
checkpoint.py   the state of a run, whole or not at all
metrics.py      what a step reports, and where it is written
trackers.py     tensorboard, wandb, trackio and mlflow behind one seam

The room itself can be called: `lorimer.train(config)` is lorimer.api.train.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        from lorimer.api import train

        return train(*args, **settings)


sys.modules[__name__].__class__ = _Room
