"""Rows -> steps of token batches.

rows.py          files -> rows that know their file and line
conversation.py  a row -> a conversation, whatever its format
tokenizer.py     text -> ids
template.py      a conversation -> ids, and which of them are trained
rendering.py     a conversation -> its texts, up to each message
prepare.py       all of the above for a run's data settings
pack.py          examples -> packs without padding
batch.py         which rows each optimizer step holds
doctor.py        what is wrong with this data, row by row
"""
