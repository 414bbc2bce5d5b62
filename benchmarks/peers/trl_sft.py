"""TRL's SFTTrainer with a PEFT adapter: at its defaults, tuned for a CPU, and packed."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from .counting import Clock, counted
from .job import Job, StepLog, read_job, read_rows, read_tokenizer


def settings(job: Job) -> dict[str, Any]:
    """What each variant sets beyond what all contestants share."""
    if job.variant == "trl-default":
        # TRL's own batch of 8 rows; fp32 weights under bf16 autocast and checkpointing are its defaults.
        return {"gradient_accumulation_steps": job.batch // 8, "bf16": None if job.is_bf16 else False}
    # bf16 weights under autocast: without autocast PEFT computes the adapters in float32, which is slower.
    tuned: dict[str, Any] = {
        "per_device_train_batch_size": job.micro_rows,
        "gradient_accumulation_steps": job.batch // job.micro_rows,
        "gradient_checkpointing": False,
        "bf16": job.is_bf16,
        "model_init_kwargs": {"dtype": "bfloat16" if job.is_bf16 else "float32"},
    }
    if job.variant == "trl-nf4":
        tuned["model_init_kwargs"]["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if job.is_bf16 else torch.float32,
        )
    if job.variant == "trl-packed":
        tuned |= {
            "packing": True,
            "max_length": job.pack_tokens,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": job.packs,
        }
    return tuned


def main() -> None:
    job = read_job()
    torch.set_num_threads(job.threads)
    if job.variant != "trl-default" and job.is_bf16:
        torch.set_float32_matmul_precision("medium")
    shared = {
        "output_dir": job.scratch,
        "assistant_only_loss": job.chat,
        "max_length": job.max_tokens,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    log = StepLog(job)
    clock = Clock(log)
    trainer = counted(SFTTrainer, clock)(
        model=job.folder,
        args=SFTConfig(**(shared | settings(job))),
        train_dataset=Dataset.from_list(read_rows(job)),
        processing_class=read_tokenizer(job),
        peft_config=LoraConfig(
            r=job.r, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    log.result().print()


if __name__ == "__main__":
    main()
