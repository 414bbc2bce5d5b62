"""A frozen weight -> a smaller frozen weight.

gguf_blocks.py  the block types of GGUF files, decoded
linear.py       FrozenLinear: one storage kind each
"""
