# ruff: noqa: E501  (tables)
"""Config files. They lie in configs/; what an editor would not show is written out here."""

from __future__ import annotations

from bad.case import Case, kept, put

SOUND = "base: base\ndata: {train: train.jsonl}\n"


def file(what: str, name: str, *says: str) -> Case:
    return Case(what, kept(f"configs/{name}"), says, ("train", name))


def made(what: str, content: bytes | str, *says: str) -> Case:
    return Case(what, put("bad.yaml", content), says, ("train", "bad.yaml"))


CASES = [
    # YAML
    file("a tab", "tab.yaml", "tab.yaml:4: this is not YAML", "YAML has no tabs"),
    file("a bracket that stays open", "open-bracket.yaml", "open-bracket.yaml:", "this is not YAML", "Look at the indentation"),
    file("a key twice", "key-twice.yaml", "key-twice.yaml:5: `r` is given twice, first on line 4", "Keep one"),
    file("two documents", "two-documents.yaml", "two-documents.yaml:3: this is not YAML", "Look at"),
    file("an object of Python", "python-object.yaml", "python-object.yaml:3: the tag", "Write a plain value"),
    file("aliases that unfold without end", "billion-laughs.yaml", "billion-laughs.yaml:", "more settings here than any run has", "in place of aliases"),
    file("an alias of itself", "alias-of-itself.yaml", "alias-of-itself.yaml:3:", "Write values out in place of aliases"),
    file("an alias of nothing", "alias-of-nothing.yaml", "alias-of-nothing.yaml:3:", "undefined alias"),
    file("a merge key", "merge-key.yaml", "merge-key.yaml:4:", "`lora.<<`", "Known here: r, alpha"),
    file("a list as a key", "list-as-key.yaml", "list-as-key.yaml:3: a name of a setting must be text", "Write a name and a colon"),
    made("brackets without end", "base: " + "[" * 5000, "bad.yaml", "nested too deep", "Write them in blocks"),
    made("UTF-16", SOUND.encode("utf-16"), "bad.yaml: ", "not UTF-8", "Save it as UTF-8"),
    made("a zero byte", SOUND + "# \0\n", "bad.yaml:3: this is not YAML", "Look at"),
    made("a space that is none", "base: base\ndata:\n\u00a0\u00a0train: train.jsonl\n", "bad.yaml:3:", "there is no setting", "Write it as `data.train`"),
    file("nothing in it", "empty.yaml", "empty.yaml: ", "empty", "base:"),
    file("a list at the top", "a-list.yaml", "a-list.yaml: ", "a list", "base:"),
    file("TOML", "toml.yaml", "toml.yaml:", "YAML", ":"),
    file("JSON with a bracket too many", "json-broken.yaml", "json-broken.yaml:1: this is not YAML", "Look at"),
    # kinds of values
    file("yes for true", "yes-for-true.yaml", "yes-for-true.yaml:4: `lora.rslora` is the text 'yes'", "Write true or false"),
    file("a number in quotes", "number-in-quotes.yaml", "number-in-quotes.yaml:4: `lora.r` is the text '16'", "Take the quotes away"),
    file("a comma for thousands", "thousands-comma.yaml", "thousands-comma.yaml:4: `lora.r` is the text '1,024'", "whole number", "config explain lora.r"),
    file("a percentage", "percent.yaml", "percent.yaml:4: `train.warmup_ratio` is the text '3%'", "wanted: a number from 0.0 to below 1.0"),
    file("a rate of NaN", "rate-nan.yaml", "rate-nan.yaml:3: `train.learning_rate` is nan", "wanted: a number"),
    file("a negative rate", "rate-negative.yaml", "rate-negative.yaml:3: `train.learning_rate` is -0.0002", "wanted: a number"),
    file("a rate with two signs", "rate-two-signs.yaml", "rate-two-signs.yaml:3: `train.learning_rate` is the text '2e--4'", "wanted: a number"),
    file("rank 0", "rank-zero.yaml", "rank-zero.yaml:3: `lora.r` is 0", "from 1 to 4096"),
    file("a rank beyond any model", "rank-whole-model.yaml", "rank-whole-model.yaml:3: `lora.r` is 1000000000", "from 1 to 4096"),
    file("a fraction for a count", "fraction-for-count.yaml", "fraction-for-count.yaml:3: `lora.r` is 7.5", "a whole number"),
    file("a list for a block", "list-for-block.yaml", "list-for-block.yaml:3: `lora` is a list", "a block of settings"),
    file("no value", "empty-value.yaml", "empty-value.yaml:4: `lora.r` is empty", "whole number"),
    file("an object for a file", "object-for-file.yaml", "object-for-file.yaml:2: `data.train`", "wanted: text"),
    file("a list of no files", "no-files.yaml", "no-files.yaml:2: `data.train` is a list of no files", "Name at least one"),
    file("a fraction above 1", "fraction-above-one.yaml", "fraction-above-one.yaml:2: `data.valid_fraction` is 1.5", "below 1"),
    # names
    file("a setting misspelt", "misspelt.yaml", "misspelt.yaml:3: ", "`lora.rnak`", "Its name here is `lora.r`"),
    file("a block misspelt", "block-misspelt.yaml", "block-misspelt.yaml:3: ", "Did you mean `lora`"),
    file("another tool's name", "of-another-tool.yaml", "of-another-tool.yaml:3: ", "Its name here is `lora.alpha`"),
    file("a dot in a key", "dotted-key.yaml", "dotted-key.yaml:3: ", "Write `r` in the block `lora`"),
    file("a preset that is not known", "preset-unknown.yaml", "preset-unknown.yaml:2:", "fastest", "low-memory"),
    file("a storage that is not known", "quant-unknown.yaml", "quant-unknown.yaml:3: `quant", "'nf5'", "nf4"),
    file("a tracker that is not known", "tracker-unknown.yaml", "tracker-unknown.yaml:3: `output.trackers`", "tensorboard"),
    file("a device that is not known", "device-unknown.yaml", "`gpu`", "`train.device`", "cpu, cuda, cuda:1 or mps"),
    file("a time that is none", "budget-tomorrow.yaml", "budget-tomorrow.yaml:3: `train.budget`", "tomorrow", "a time as 3h, 1h30m or 120s"),
    # what is missing, and what does not go together
    file("no base", "no-base.yaml", "no-base.yaml:1: `base` is not given", "base: smollm2-135m"),
    file("no data", "no-data.yaml", "no-data.yaml:1: `data` is not given", "train: "),
    file("two ways to validate", "two-ways-to-validate.yaml", "two-ways-to-validate.yaml:2:", "exclude each other", "give one"),
    file("a file that is gone", "file-gone.yaml", "file-gone.yaml:2:", "gone.jsonl", "Check the path"),
    file("a template that is gone", "template-gone.yaml", "template-gone.yaml:2:", "gone.jinja", "Check the path"),
    file("a base that is an address", "base-is-an-address.yaml", "there is no base `https://huggingface.co/owner/name`", "lorimer pull owner/name"),
    file("a variable of the shell", "variable.yaml", "${HOME}/models/x", "Write the path out"),
    file("a name that climbs out", "name-climbs-out.yaml", "name-climbs-out.yaml:3: `output.name` is the text '../../outside'", "letters"),
    # what the base does not have
    file("a pattern that is none", "pattern-broken.yaml", "`lora.target_modules: (q_proj` is not a valid pattern", "Mend the pattern"),
    file("a module that is not there", "module-unknown.yaml", "`q_porj`", "Did you mean `q_proj`"),
    file("layers that are not there", "layers-beyond.yaml", "`lora.layers: last:99`", "It has layers 0 to 2"),
]  # fmt: skip
