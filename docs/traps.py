"""The table of docs/traps.md: classic silent bugs of fine-tuning, and the tests that prove each away.

A test names what it proves with `@pytest.mark.trap(number)`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"

HEAD = """\
# Traps

What goes wrong in fine-tuning without anybody noticing, and the tests that show that it cannot here.
`make plants` puts the bugs of the last column back into a copy of the source, one at a time, and each turns
its tests red.

`lorimer data check` names rows that fall into a trap of data (1 to 34), by the checks in its column, or the
column says why no row can. Rows for each are in `tests/data/trap_rows.py`.

| # | what goes wrong | proved by | `lorimer data check` | planted |
|---|---|---|---|---|
"""

TRAPS = {
    1: "pad is the end token, both are masked, and the model never learns to stop",
    2: "the end of a turn lies outside of what is trained",
    3: "two BOS tokens: the template writes one, the tokenizer another",
    4: "the prompt in training is not the prompt at inference",
    5: "a template drops parts of earlier turns, so the mask hits another span",
    6: "prompt and answer merge into one token at their seam",
    7: "the answer is found by searching for a string",
    8: "the prompt is trained although only the answer should be",
    9: "cutting a long row takes its answer away, and the row still counts",
    10: "nothing in a batch is trained: 0/0",
    11: "NaN is hidden from the log",
    12: "with accumulation the loss is a mean of means",
    13: "the denominator counts tokens that are not predicted",
    14: "the last, smaller step is scaled as a full one",
    15: "a layer in between divides by the accumulation once more, or not at all",
    16: "label smoothing on labels that are not shifted",
    17: "packed rows attend to each other",
    18: "positions in a pack do not begin anew, or labels cross from row to row",
    19: "packing is switched off in silence, and long rows are cut",
    20: "packs longer than the limit, rows that are lost in packing",
    21: "validation is packed otherwise than training, and its loss is another",
    22: "the validation loss is a mean of batch means",
    23: "rows of the test set, or nearly, are trained on",
    24: "grouping by length biases the order",
    25: "a stale cache of tokens made with another template",
    26: "text that spells a control token becomes one",
    27: "quotes or braces in a system prompt change the template",
    28: "a placeholder is left in the template",
    29: "a role is dropped in silence",
    30: "BOM, CRLF, UTF-16 or U+2028 split or change rows",
    31: "the system's encoding is another than UTF-8",
    32: "empty data, empty fields, a single row",
    33: "one very long row",
    34: "the tokenizer's own limit cuts rows",
    35: "target modules match nothing, or only some layers",
    36: "an adapter is reloaded on other modules than it was trained on",
    37: "a transposed weight (GPT-2): the update is transposed too",
    38: "the update goes to another part of a fused weight",
    39: "updates of experts are lost when merging",
    40: "the update's scale is wrong or applied twice",
    41: "tied embeddings: one of them trained, the other reloaded",
    42: "an embedding that is scaled, and an update that is not",
    43: "new tokens whose embeddings are not saved",
    44: "control tokens whose embeddings were never trained",
    45: "trained weights in 16 bits",
    46: "a value overflows, and nobody knows where",
    47: "recomputation without a gradient for the adapter",
    48: "training that goes on with the adapter frozen, or the base not",
    49: "keys that do not match: a silent adapter of zeros",
    50: "an adapter on another base",
    51: "merging into 4 bits quantises again",
    52: "merging into other weights than those trained on",
    53: "a merge in 16 bits rounds the update away",
    54: "merging changes the base",
    55: "dropout that is on in evaluation, or off in training",
    56: "scaled rotary positions are lost",
    57: "4-bit weights are decoded wrong",
    58: "answers in a batch differ from answers alone",
    59: "after a resume the rows come in another order",
    60: "after a resume dropout is another",
    61: "after a resume the learning rate is another",
    62: "changed settings on resume are taken or ignored in silence",
    63: "half a checkpoint is taken for the newest",
    64: "the good checkpoint is deleted before the new one is there",
    65: "the optimizer's state is missing or another's, and begins anew",
    66: "steps or epochs are counted off by one",
}
WITHOUT = {
    25: "does not apply: tokens are never cached",
}


def traps_page() -> str:
    """The page. Raises ValueError for a trap that has neither proof nor reason."""
    sys.path.insert(0, str(TESTS))
    from data.trap_rows import CANNOT, FOUND
    from plants import PLANTS

    found = proofs()
    lines = []
    for number, text in TRAPS.items():
        if number not in found and number not in WITHOUT:
            raise ValueError(f"trap {number} has no test")
        proof = ", ".join(f"`{name}`" for name in found.get(number, [])) or WITHOUT[number]
        planted = "; ".join(plant.what for plant in PLANTS if number in plant.traps)
        codes = dict.fromkeys(fall.check for fall in FOUND.get(number, ()))
        checks = ", ".join(f"`{code}`" for code in codes) or CANNOT.get(number, "")
        lines.append(f"| {number} | {text} | {proof} | {checks} | {planted} |\n")
    return HEAD + "".join(lines)


def proofs() -> dict[int, list[str]]:
    """Trap -> `file::test` of each that is marked with it."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.trap":
                    number = ast.literal_eval(mark.args[0])
                    found.setdefault(number, []).append(f"{path.relative_to(TESTS)}::{node.name}")
    return found
