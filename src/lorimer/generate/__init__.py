"""Answers from a base with or without an adapter.

sampling.py   logits -> the next token
engine.py     prompts as ids -> answers as ids, side by side
model.py      load() and Model: text in, text out
"""
