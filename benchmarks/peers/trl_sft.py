"""TRL's SFTTrainer with a PEFT adapter: at its defaults, tuned for a CPU, and packed."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from peers.job import Job, StepLog, read_job, read_messages, read_tokenizer


def settings(job: Job) -> dict[str, Any]:
    """What each variant sets beyond what all contestants share."""
    if job.variant == "trl-default":
        # TRL's own batch of 8 rows; fp32 weights under bf16 autocast and checkpointing are its defaults.
        return {"gradient_accumulation_steps": job.batch // 8, "bf16": None if job.is_bf16 else False}
    # bf16 weights under autocast: without autocast PEFT computes the adapters in float32, which is slower.
    tuned: dict[str, Any] = {
        "per_device_train_batch_size": job.batch,
        "gradient_checkpointing": False,
        "bf16": job.is_bf16,
        "model_init_kwargs": {"dtype": "bfloat16" if job.is_bf16 else "float32"},
    }
    if job.variant == "trl-packed":
        # A pack of 1024 tokens holds about as many `home` rows as an optimizer step (16 x 62 tokens).
        tuned |= {"packing": True, "per_device_train_batch_size": 1}
    return tuned


class Clock(TrainerCallback):
    """Ends a step of the log with the sums that the trainer gathered over its micro-batches."""

    def __init__(self, log: StepLog) -> None:
        self.log = log
        self.clear()

    def clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.rows = self.tokens = self.trained = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.log.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        loss = float(sum(self.losses))
        self.log.end(loss=loss, rows=self.rows, tokens=self.tokens, trained_tokens=self.trained)
        self.clear()


class CountingTrainer(SFTTrainer):
    clock: Clock

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the exact loss (the log's is averaged) and count rows and real tokens."""
        if "attention_mask" in inputs:
            self.clock.rows += inputs["input_ids"].shape[0]
            self.clock.tokens += int(inputs["attention_mask"].sum())
        else:  # packed: every row starts again at position 0
            self.clock.rows += int((inputs["position_ids"] == 0).sum())
            self.clock.tokens += inputs["position_ids"].numel()
        self.clock.trained += int((inputs["labels"] != -100).sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.clock.losses.append(loss)
        return loss


def main() -> None:
    job = read_job()
    torch.set_num_threads(job.threads)
    if job.variant != "trl-default" and job.is_bf16:
        torch.set_float32_matmul_precision("medium")
    config = SFTConfig(
        output_dir=job.scratch,
        assistant_only_loss=True,
        max_length=job.max_tokens,
        max_steps=job.steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings(job),
    )
    log = StepLog(job)
    clock = Clock(log)
    trainer = CountingTrainer(
        model=job.folder,
        args=config,
        train_dataset=Dataset.from_list([{"messages": messages} for messages in read_messages(job)]),
        processing_class=read_tokenizer(job),
        peft_config=LoraConfig(
            r=job.r, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.clock = clock
    trainer.train()
    log.result().print()


if __name__ == "__main__":
    main()
