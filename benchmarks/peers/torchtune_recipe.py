"""torchtune's own recipe for LoRA on one device, told to use the CPU.

The recipe is run as it is: its model, loss, loop and optimizer. What it is given are the rows as token
ids, a constant learning rate, and a log.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from .job import Job, StepLog, read_examples, read_job

HERE = "benchmarks.peers.torchtune_recipe"  # this module, as a config names it


def recipe_class() -> type[Any]:
    """torchtune installs its recipes as files beside its package, which are not to be imported by name."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_single_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice  # type: ignore[no-any-return]


class PadId:
    """All that the recipe asks of a tokenizer once the rows are ids."""

    pad_id = 0


class Rows(Dataset[dict[str, list[int]]]):
    def __init__(self, tokenizer: PadId, *, job: str) -> None:
        self.examples = read_examples(Job(**json.loads(job)))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self.examples[index]
        return {"tokens": ids, "labels": labels}


def constant(optimizer: Any, *, num_training_steps: int, last_epoch: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0, last_epoch)


def model(job: Job) -> dict[str, Any]:
    """SmolLM2 in torchtune's words: Llama 3.2 with its own sizes, and its rope scaled by 1."""
    config = json.loads((Path(job.folder) / "config.json").read_text(encoding="utf-8"))
    return {
        "_component_": "torchtune.models.llama3_2._component_builders.lora_llama3_2",
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": int(config["rope_parameters"]["rope_theta"]),
        "scale_factor": 1,
        "lora_rank": job.r,
        "lora_alpha": job.alpha,
    }


def settings(job: Job) -> dict[str, Any]:
    return {
        "model": model(job),
        "tokenizer": {"_component_": "benchmarks.peers.torchtune_recipe.PadId"},
        "dataset": {
            "_component_": "benchmarks.peers.torchtune_recipe.Rows",
            "job": json.dumps(asdict(job)),
        },
        "shuffle": False,
        "batch_size": job.micro_rows,
        "gradient_accumulation_steps": job.batch // job.micro_rows,
        "epochs": 1,
        "max_steps_per_epoch": job.steps,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "lr": job.learning_rate,
            "weight_decay": 0.0,
        },
        "lr_scheduler": {"_component_": f"{HERE}.constant"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "clip_grad_norm": 1.0,
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job.folder,
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": job.scratch,
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": job.scratch,
        },
        "output_dir": job.scratch,
        "seed": 0,
        "device": "cpu",
        "dtype": job.dtype,
        "compile": False,
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }


def logged(recipe: type[Any], log: StepLog) -> type[Any]:
    """The recipe, with its steps in the log and nothing saved at the end."""

    class Logged(recipe):  # type: ignore[misc]
        rows = tokens = trained = 0

        def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            log.begin()
            ids, labels = batch["tokens"], batch["labels"]
            self.rows += len(ids)
            # Rows are padded at the end, by id 0, which none of them holds.
            self.tokens += int((ids != PadId.pad_id).sum())
            self.trained += int((labels[:, 1:] != -100).sum())
            loss: torch.Tensor = super()._loss_step(batch)
            return loss

        def log_dict(self, values: dict[str, Any], step: int) -> None:
            log.end(
                loss=float(values["loss"]),
                rows=self.rows,
                tokens=self.tokens,
                trained_tokens=self.trained,
            )
            self.rows = self.tokens = self.trained = 0

        def save_checkpoint(self, epoch: int) -> None:
            """Not timed, and nobody reads it."""

    return Logged


def main() -> None:
    job = read_job()
    torch.set_num_threads(job.threads)
    if job.is_bf16:
        torch.set_float32_matmul_precision("medium")
    log = StepLog(job)
    config = OmegaConf.create(settings(job))
    recipe = logged(recipe_class(), log)(cfg=config)
    recipe.setup(cfg=config)
    recipe._metric_logger = recipe
    recipe.train()
    log.result().print()


if __name__ == "__main__":
    main()
