"""A bare loop: transformers and PEFT without a trainer, padded to the longest row computed at once."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from .job import Job, StepLog, read_examples, read_job

# Letters: B rows computed at once, S tokens of the longest of them.
Example = tuple[list[int], list[int]]


def load(job: Job) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model with its adapter, and the trained parameters."""
    dtype = torch.bfloat16 if job.is_bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype)
    model = get_peft_model(
        base,
        LoraConfig(r=job.r, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.compile(model) if job.variant == "peft-compiled" else model, trained


def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def trained_tokens(rows: list[Example]) -> int:
    """A row's first token is never predicted."""
    return sum(label != -100 for _, labels in rows for label in labels[1:])


def micro_loss(model: Any, rows: list[Example], *, bf16: bool) -> torch.Tensor:
    """The mean loss over the trained tokens of these rows."""
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    ids_BS, labels_BS = pad([ids for ids, _ in rows], 0), pad([labels for _, labels in rows], -100)
    # Rows of one length need no mask, and attention is faster without.
    mask_BS = torch.arange(ids_BS.shape[1]) < lengths[:, None] if len(set(lengths.tolist())) > 1 else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss: torch.Tensor = model(
            input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS, use_cache=False
        ).loss
    return loss


def main() -> None:
    job = read_job()
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    if job.is_bf16:
        torch.set_float32_matmul_precision("medium")
    rows = read_examples(job)
    model, trained = load(job)
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)
    log = StepLog(job)
    for step in range(job.steps):
        log.begin()
        batch = rows[step * job.batch : (step + 1) * job.batch]
        count = trained_tokens(batch)
        total = 0.0
        for start in range(0, len(batch), job.micro_rows):
            part = batch[start : start + job.micro_rows]
            loss = micro_loss(model, part, bf16=job.is_bf16) * (trained_tokens(part) / count)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(ids) for ids, _ in batch)
        log.end(loss=total, rows=len(batch), tokens=tokens, trained_tokens=count)
    log.result().print()


if __name__ == "__main__":
    main()
