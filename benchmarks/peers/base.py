"""Make bases, as Hugging Face folders.

    python -m benchmarks.peers.base FILE.gguf FOLDER              the peers' copy of the base
    python -m benchmarks.peers.base FOLDER FOLDER WIDTH LAYERS    random weights of another size

transformers dequantises the GGUF file that lorimer trains on to float32, and it is saved so: the values
are those that lorimer reads from the file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path


def make_folder(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    staged = folder.with_name(folder.name + ".part")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(staged)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved, although it is dequantised: a plain one is not so.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(staged)
    os.replace(staged, folder)


def make_random(like: Path, folder: Path, width: int, layers: int) -> None:
    """A model of another size with the tokenizer of `like`: heads of 64, three for each key/value head,
    and an MLP of 8/3 the width, as SmolLM2-135M has them. Weights are drawn and kept in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": layers}
    config |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 192, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def main() -> None:
    source, folder, *sizes = sys.argv[1:]
    if sizes:
        width, layers = map(int, sizes)
        make_random(Path(source), Path(folder), width, layers)
    else:
        make_folder(Path(source), Path(folder))


if __name__ == "__main__":
    main()
