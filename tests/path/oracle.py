"""What TRL with PEFT computes, and what a loop written out by hand does: the losses to be equal to.

Every function takes the same `Oracle`: base model, tokenizer, initial adapter, rows, settings. Rows are
chats; the answer and its end-of-turn token are trained.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

# Letters: S tokens of one row, V vocabulary.

# A ChatML message as templates write it, and the same with the answer marked for TRL.
MESSAGES = {
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n",
}
MARKED = (
    "{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)


@dataclass(frozen=True, slots=True)
class Oracle:
    model: Any  # transformers, float32; each function puts its own adapter on and takes it off
    tokenizer: Any
    adapter: Path  # written by PEFT
    rows: Path
    steps: int
    micro_batch: int
    accumulate: int
    learning_rate: float

    @property
    def batch_size(self) -> int:
        return self.micro_batch * self.accumulate

    def messages(self) -> list[list[dict[str, str]]]:
        lines = self.rows.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]


@contextmanager
def quiet() -> Iterator[None]:
    """What other libraries warn about in their own code is not an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def mark_answers(tokenizer: Any) -> None:
    """Give the template generation marks. It must still render the same text."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    original = tokenizer.apply_chat_template(chat, tokenize=False)
    (message,) = [text for text in MESSAGES if text in tokenizer.chat_template]
    tokenizer.chat_template = tokenizer.chat_template.replace(message, MARKED)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == original


def write_adapter(model: Any, folder: Path, *, r: int, alpha: int, seed: int = 0) -> None:
    """An adapter by PEFT on all linear layers. B is not zero, so the first loss already feels it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet():
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.02)
        adapted.save_pretrained(folder)
        adapted.unload()


@contextmanager
def adapted(oracle: Oracle) -> Iterator[Any]:
    """The model with a fresh copy of the initial adapter."""
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(oracle.model, str(oracle.adapter), is_trainable=True)
        try:
            yield model
        finally:
            model.unload()


def trl_losses(oracle: Oracle, folder: Path, **changes: Any) -> list[float]:
    """The exact loss of each optimizer step of SFTTrainer: the sum over its micro-batches, which TRL
    has divided by the trained tokens of the whole step."""
    with quiet():
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class Exact(SFTTrainer):  # type: ignore[misc]
            parts: list[float]

            def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                loss: torch.Tensor = super().training_step(*args, **kwargs)
                self.parts.append(loss.item())
                return loss

        settings = {
            "per_device_train_batch_size": oracle.micro_batch,
            "gradient_accumulation_steps": oracle.accumulate,
            "max_steps": oracle.steps,
            "learning_rate": oracle.learning_rate,
            "lr_scheduler_type": "cosine",
            "assistant_only_loss": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        rows = Dataset.from_list([{"messages": messages} for messages in oracle.messages()])
        with adapted(oracle) as model:
            trainer = Exact(
                model=model,
                args=SFTConfig(output_dir=str(folder), **(settings | changes)),
                train_dataset=rows,
                processing_class=oracle.tokenizer,
            )
            trainer.parts = []
            trainer.train()
    parts = trainer.parts
    return [sum(parts[i : i + oracle.accumulate]) for i in range(0, len(parts), oracle.accumulate)]


def plain_losses(oracle: Oracle) -> list[float]:
    """The same by hand: one row at a time, no padding, no trainer. This checks the oracle itself."""
    rows = [_encode(oracle.tokenizer, messages) for messages in oracle.messages()]
    losses = []
    with adapted(oracle) as model:
        model.train()
        trained = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        for step in range(oracle.steps):
            first = step * oracle.batch_size % len(rows)
            batch = rows[first : first + oracle.batch_size]
            count = sum(int((labels != -100).sum()) for _, labels in batch)
            total = 0.0
            for ids_S, labels_S in batch:
                logits_SV = model(ids_S[None], use_cache=False).logits[0]
                loss = cross_entropy(logits_SV[:-1], labels_S[1:], reduction="sum") / count
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.param_groups[0]["lr"] = (
                oracle.learning_rate * 0.5 * (1 + math.cos(math.pi * step / oracle.steps))
            )
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a row, from the text around its one answer rather than from marks."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt)] == prompt
    end = len(whole) - whole[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    labels = [token if len(prompt) <= i < end else -100 for i, token in enumerate(whole)]
    return torch.tensor(whole), torch.tensor(labels)
