"""A frozen weight -> a smaller frozen weight.

part.py         rows of a weight in one quantised storage
nf4.py          NF4 and FP4, with bitsandbytes' bytes
int8.py         eight bits, wild columns kept apart
gguf_blocks.py  the block types of GGUF files, decoded
gguf_encode.py  the same, written
bnb.py          the checkpoints of bitsandbytes, in and out
storage.py      one door to all kinds: numbers, quantise, keep
linear.py       FrozenLinear: a weight as layers, embedding and head use it
"""
