"""LLaMA-Factory's own training run, from its config to its trainer: bf16, no checkpointing."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch

from .counting import Clock, counted
from .job import Job, StepLog, read_job

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def stand_in_for_torchaudio() -> None:
    """LLaMA-Factory imports torchaudio whether or not rows have sound, and the one it installs needs
    CUDA's libraries."""
    sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))


def add_template() -> None:
    """SmolLM2's template as the base has it. LLaMA-Factory's own ends the system prompt with a full
    stop and trains the line end after each answer."""
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import register_template

    register_template(
        name="smollm2-base",
        format_user=StringFormatter(
            slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]
        ),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        format_system=StringFormatter(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]),
        stop_words=["<|im_end|>"],
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    )


def arguments(job: Job) -> dict[str, Any]:
    scratch = Path(job.scratch)
    about = {
        "rows": {
            "file_name": job.rows,
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": TAGS,
        }
    }
    (scratch / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.folder,
        "finetuning_type": "lora",
        "lora_rank": job.r,
        "lora_alpha": job.alpha,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(scratch),
        "template": "smollm2-base",
        "cutoff_len": job.max_tokens,
        "disable_shuffling": True,
        "output_dir": str(scratch / "out"),
        "per_device_train_batch_size": job.micro_rows,
        "gradient_accumulation_steps": job.batch // job.micro_rows,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": job.steps,
        "bf16": job.is_bf16,
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def main() -> None:
    job = read_job()
    torch.set_num_threads(job.threads)
    if job.is_bf16:
        torch.set_float32_matmul_precision("medium")
    stand_in_for_torchaudio()
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    add_template()
    log = StepLog(job)
    clock = Clock(log)
    workflow.CustomSeq2SeqTrainer = counted(workflow.CustomSeq2SeqTrainer, clock)
    run_exp(arguments(job), [clock])
    log.result().print()


if __name__ == "__main__":
    main()
