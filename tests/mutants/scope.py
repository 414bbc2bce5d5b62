"""Which modules are mutated, and which tests are run against each: fast ones that are about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the source, the tests that must notice, and which functions; None means all."""

    group: str
    file: str
    tests: tuple[str, ...]
    functions: frozenset[str] | None = None


# Of reading rows what decides which turns there are and whose: that is what the mask follows.
TURNS = frozenset(
    {
        "Conversation.asked", "to_conversation", "_read", "_messages_row", "_sharegpt_row", "_alpaca_row",
        "_completion_row", "_side", "_system", "_turns", "_numbered", "_message", "_content",
        "_refuse_untrained_mark",
    }
)  # fmt: skip

MODULES = (
    Module("loss", "model/loss.py", ("model/test_loss.py",)),
    Module("mask", "data/template.py", ("data/test_template.py", "data/test_template_asked.py")),
    Module("mask", "data/conversation.py", ("data/test_conversation.py",), TURNS),
    Module("mask", "data/batch.py", ("data/test_batch.py",)),
    Module("pack", "data/pack.py", ("data/test_pack.py",)),
    Module("checkpoint", "train/checkpoint.py", ("train/test_checkpoint.py",)),
    Module("checkpoint", "train/resume.py", ("train/test_resume.py",)),
    Module("checkpoint", "train/step.py", ("train/test_step.py",)),
    Module("checkpoint", "storage.py", ("test_storage.py",)),
    Module("merge", "lora/merge.py", ("lora/test_merge.py",)),
)
