"""A bare loop: transformers and PEFT without a trainer, padded to the longest row of each step."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from peers.job import Job, StepLog, read_job, read_messages, read_tokenizer

# Letters: B rows of a step, S tokens of its longest row.


def read_rows(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row; what is not trained has label -100."""
    rows = []
    for messages in read_messages(job):
        encoded: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        rows.append((ids[: job.max_tokens], labels[: job.max_tokens]))
    return rows


def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def main() -> None:
    job = read_job()
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    if job.is_bf16:
        torch.set_float32_matmul_precision("medium")
    tokenizer = read_tokenizer(job)
    rows = read_rows(job, tokenizer)
    dtype = torch.bfloat16 if job.is_bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype)
    model = get_peft_model(
        base,
        LoraConfig(r=job.r, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)

    log = StepLog(job)
    for step in range(job.steps):
        log.begin()
        batch = rows[step * job.batch : (step + 1) * job.batch]
        lengths = torch.tensor([len(ids) for ids, _ in batch])
        ids_BS = pad([ids for ids, _ in batch], tokenizer.pad_token_id)
        labels_BS = pad([labels for _, labels in batch], -100)
        mask_BS = torch.arange(ids_BS.shape[1]) < lengths[:, None]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.is_bf16):
            loss = model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.end(
            loss=loss.item(),
            rows=len(batch),
            tokens=int(lengths.sum()),
            trained_tokens=int((labels_BS != -100).sum()),
        )
    log.result().print()


if __name__ == "__main__":
    main()
