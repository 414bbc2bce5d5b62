"""Results in other tools' formats.

source.py      a run, adapter or base opened for export: files and update, no model in memory
mix.py         which type each tensor of a GGUF file gets
vocabulary.py  a tokenizer as GGUF metadata, checked by reading it back
stacks.py      which tensors a GGUF file has, and which weights each holds
metadata.py    the model's settings as GGUF metadata, checked by reading it back
gguf.py        base and update merged into one GGUF file, tensor by tensor
gguf_lora.py   the update alone, as the adapter file of llama.cpp and Ollama
"""
