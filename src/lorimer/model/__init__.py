"""ids -> hidden states -> logits: one decoder for every architecture.

spec.py       what differs between architectures, as data
families.py   config.json -> ModelSpec, one short function for each architecture
rope.py       rotary position frequencies and all their scalings
decoder.py    the one decoder
recompute.py  the memory ladder: what is kept of a layer, and what is computed again
cache.py      keys and values kept between generated tokens
random.py     a decoder of a shape, without files
load.py       weights streamed from a base into a decoder
"""
