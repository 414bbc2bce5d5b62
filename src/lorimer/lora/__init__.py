"""What is trained: low-rank updates of frozen linear layers (LoRA, arXiv 2106.09685).

targets.py    which linear layers get one
layers.py     the trained parameters, in one flat buffer, and how they sit in the decoder
adapter.py    a PEFT folder, in and out, with a manifest of what it belongs to
merge.py      the update added into the base's weights, as a Hugging Face folder
"""
