"""Large bases on a small machine: a random base of a true shape, in NF4, trained for a few steps.

    python benchmarks/large.py 1.1B --tokens 2048 --steps 2 train.recompute=layers
    python benchmarks/large.py 7B --tokens 512 --steps 1 train.recompute=layers   writes 14 GB

The base is written layer by layer as bf16 safetensors, with SmolLM2's tokenizer, and trained through the
command line. Prints the peak memory of that process beside what `lorimer plan` said, and seconds a token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import process
import workloads

MAIN = "from lorimer.cli.app import main; main()"
# layers, hidden, inner, heads, key/value heads
SIZES = {
    "1.1B": (22, 2048, 5632, 32, 4),
    "7B": (32, 4096, 11008, 32, 32),
    # for memory.py: shapes unlike each other
    "wide-few": (4, 2048, 5632, 32, 4),
    "deep-thin": (48, 256, 768, 8, 2),
    "long-heads": (10, 1024, 3072, 16, 8),
}


def config_of(size: str, vocabulary: int) -> dict[str, Any]:
    layers, hidden, inner, heads, kv_heads = SIZES[size]
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def write_base(folder: Path, size: str) -> None:
    """A shard for each layer, and one for the rest."""
    import torch
    from safetensors.torch import save_file

    from lorimer.bases.open import open_base
    from lorimer.bases.store import resolve_base
    from lorimer.data.tokenizer import Tokenizer
    from lorimer.model.families import read_spec
    from lorimer.model.load import skeleton

    source = open_base(resolve_base("smollm2-135m"))
    tokenizer = Tokenizer.from_base(source)
    config = config_of(size, int(source.config["vocab_size"]))
    folder.mkdir(parents=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    decoder = skeleton(read_spec(config, path=size), torch.bfloat16)
    shapes: list[dict[str, tuple[int, ...]]] = []
    for layer in decoder.layers:
        shard: dict[str, tuple[int, ...]] = {}
        for group in layer.projections():
            for part, rows in zip(group.names, group.rows, strict=True):
                shard[f"{group.path}.{part}.weight"] = (rows, group.inputs)
        shapes.append(shard | {f"{slot.path}.weight": tuple(slot.weight_H.shape) for slot in layer.norms()})
    table = (config["vocab_size"], config["hidden_size"])
    shapes.append(
        {
            "model.embed_tokens.weight": table,
            "lm_head.weight": table,
            "model.norm.weight": (config["hidden_size"],),
        }
    )
    places: dict[str, str] = {}
    for number, shard in enumerate(shapes):
        name = f"model-{number + 1:05d}-of-{len(shapes):05d}.safetensors"
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
            for key, shape in shard.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="A large random base in NF4.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--tokens", type=int, default=2048, help="of a row, which is a step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the base is written; a temporary one if not given"
    )
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="key=value for lorimer train")
    args = parser.parse_intermixed_args()
    if args.write:
        write_base(args.write, args.size)
        return
    with tempfile.TemporaryDirectory(prefix="lorimer-large-", dir=args.folder) as scratch:
        base = Path(scratch) / "base"
        began = time.perf_counter()
        # A process of its own: what it held would count as ours.
        subprocess.run([sys.executable, __file__, args.size, "--write", str(base)], check=True)
        print(f"written in {time.perf_counter() - began:.0f} s", flush=True)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        rows = workloads.text_rows(args.tokens)(process.ROWS, tokenizer, args.steps)
        (Path(scratch) / "rows.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        config = {
            "base": str(base),
            "quant": "nf4",
            "data": {"train": str(Path(scratch) / "rows.jsonl"), "max_tokens": args.tokens},
            "lora": {"r": 16, "alpha": 32},
            "train": {"batch_size": 1, "max_steps": args.steps, "eval_every": "never"},
            "output": {"dir": str(Path(scratch) / "runs"), "name": "large", "save_every": "never"},
        }
        path = Path(scratch) / "config.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-c", MAIN, "train", str(path), *args.settings]
        child = subprocess.Popen(command)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"the run ended with {status}")
        run = Path(scratch) / "runs" / "large"
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        seconds = min(step["seconds"] / step["tokens"] for step in steps)
        peak, planned = usage.ru_maxrss * 1024 / 1e9, record["planned_memory"]["peak"] / 1e9
        print(
            f"{args.size}, {args.tokens:,} tokens a step, recompute {record['info']['recompute']}: "
            f"peak {peak:.2f} GB (planned {planned:.2f}), "
            f"{1000 * seconds:.1f} ms a token, loaded in {record['load_seconds']:.0f} s, "
            f"losses {', '.join(format(step['loss'], '.3f') for step in steps)}"
        )


if __name__ == "__main__":
    main()
