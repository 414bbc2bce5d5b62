"""Make the peers' base once: the GGUF file that lorimer trains on, as a Hugging Face folder.

transformers dequantises the weights to float32 and they are saved so: the values are those that
lorimer reads from the file.
"""

from __future__ import annotations

import os
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


if __name__ == "__main__":
    make_folder(Path(sys.argv[1]), Path(sys.argv[2]))
