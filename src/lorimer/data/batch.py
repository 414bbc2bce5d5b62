"""The stream of optimizer steps: which rows each one holds.

A step's rows are a function of (seed, step), so the position in the stream is one number and
resuming at it needs nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepStream:
    """`rows` rows in steps of `batch_size`, epoch after epoch; the last step of an epoch may be smaller.

    10 rows in steps of 4 give 3 steps an epoch, of 4, 4 and 2 rows; every row comes once an epoch.
    """

    rows: int
    batch_size: int
    epochs: float
    max_steps: int | None
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def total_steps(self) -> int:
        """`max_steps` where it is given, else what `epochs` come to."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-9))

    def step_rows(self, step: int) -> list[int]:
        """The rows of step 0, 1, 2, ..."""
        epoch, part = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        return [int(row) for row in order[part * self.batch_size : (part + 1) * self.batch_size]]

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        epoch, part = divmod(step, self.steps_per_epoch)
        return epoch + part * self.batch_size / self.rows

    def ends_epoch(self, step: int) -> bool:
        """Whether step number `step` (from 0) is the last of an epoch, or of the run."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.total_steps

    def _order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if not self.shuffle:
            return np.arange(self.rows)
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.rows)
