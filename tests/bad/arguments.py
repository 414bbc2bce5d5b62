# ruff: noqa: E501  (tables)
"""Command lines."""

from __future__ import annotations

from bad.case import Case, nothing

LONG = "x" * 5000


def line(what: str, command: str | list[str], *says: str, code: int = 2) -> Case:
    return Case(what, nothing, says, command.split() if isinstance(command, str) else command, code)


def name_of_a_run(what: str, name: str) -> Case:
    return line(
        what,
        ["train", "c.yaml", f"output.name={name}"],
        "output.name",
        "(wanted: ",
        "lorimer config explain output.name",
    )


CASES = [
    # commands and options
    line("a command misspelt", "trian c.yaml", "there is no command `trian`", "Did you mean `lorimer train`"),
    line("an option misspelt", "train c.yaml --resum x", "--resum", "--resume"),
    line("an option of another command", "ls --quant nf4", "--quant", "See: lorimer ls --help"),
    line("an option without its value", "train --resume", "--resume", "See: lorimer train --help"),
    line("an argument is missing", "show", "missing argument", "See: lorimer show --help"),
    line("an argument too many", "show base base", "unexpected extra argument", "See: lorimer show --help"),
    line("a command within a command misspelt", "data chekc train.jsonl", "chekc", "check"),
    line("a word for a number", "generate adapter a --max-tokens many", "--max-tokens", "valid integer", "See: lorimer generate"),
    line("a number out of range", "generate adapter a --max-tokens 0", "--max-tokens", "greater than or equal to 1", "See: lorimer generate"),
    line("a probability above 1", "generate adapter a --top-p 1.5", "top_p is 1.5 (wanted: above 0, at most 1)", "Leave it out"),
    line("a temperature of NaN", "generate adapter a --temperature nan", "temperature is nan (wanted: 0 or more)", "Leave it out"),
    line("a metric that is not known", "eval adapter --data train.jsonl --min-score smart=1", "smart", "exact_match"),
    line("a score without a number", "eval adapter --data train.jsonl --min-score loss", "`loss` is not a metric and a number", "Write METRIC=NUMBER"),
    line("a time that is none", "train c.yaml --finish-by 25:99", "25:99", "HH:MM"),
    line("a check that is not known", "train c.yaml --skip-preflight everything", "everything", "gradients"),
    line("a machine that is not known", "plan c.yaml --device toaster:8GB", "toaster", "cpu:8GB"),
    line("an export that is not known", "export adapter --to onnx", "onnx", "gguf-lora"),
    line("a type that is not known", "export base --to gguf --type q3_z --out x.gguf", "q3_z", "q4_k_m"),
    line("a precision that is not known", "merge adapter --out m --dtype fp8", "fp8", "bf16"),
    line("shares that leave nothing", "data split train.jsonl --out parts --test 0.9 --valid 0.9", "leave nothing to train on", "Give shares below 1"),
    line("a line that has no row", "data show train.jsonl --base base --row 99", "train.jsonl", "99", "9"),
    line("a setting that is not known", "config explain lora.rnak", "lora.rnak", "Its name here is `lora.r`"),
    # settings
    line("a setting without a value", "train c.yaml lora.r", "`lora.r`", "wanted: KEY=VALUE"),
    line("a setting without a name", "train c.yaml =8", "`=8`", "wanted: KEY=VALUE"),
    line("a wrong value", "train c.yaml lora.r=abc", "`lora.r=abc`", "the text 'abc'", "whole number"),
    line("a value that is no YAML", "train c.yaml data.train=[", "data.train=[", "Put quotes around"),
    line("a value too large for any machine", "train c.yaml train.threads=9999999999", "train.threads", "wanted"),
    line("a negative seed", "train c.yaml train.seed=-5", "`train.seed`", "-5", "wanted"),
    line("no room for a token", "train c.yaml data.max_tokens=1", "`data.max_tokens` is 1", "a whole number from 8"),
    line("a GPU that is not here", "train c.yaml train.device=cuda:7", "the device `cuda:7`", "`train.device`", "lorimer doctor"),
    # things that are not there, or are something else
    line("a config that is a base", "train base", "base", "Give"),
    line("a config that is not there", "train no.yaml", "no.yaml", "c.yaml"),
    line("a base that is a config", "train c.yaml base=c.yaml", "c.yaml: this is not a GGUF file", "a folder in Hugging Face layout"),
    line("a base that is a run", "train c.yaml base=runs/whole", "runs/whole: config.json is missing", "Hugging Face layout"),
    line("a base that is not there", "show smollm9", "`smollm9`", "Known to pull: smollm2-135m"),
    line("a base with a path longer than any", ["show", LONG], "there is no base", "Known to pull"),
    line("a run that is not there", "train --resume nope", "there is no run `nope`", "or `last`"),
    line("a run that is a file", "train --resume train.jsonl", "there is no run `train.jsonl`", "or `last`"),
    line("a run with a path longer than any", ["verify", LONG], "there is no run", "or `last`"),
    line("a run to verify that is not there", "verify nope", "there is no run `nope`", "or `last`"),
    line("an adapter that is a base", "merge base --out m", "there is nothing to merge", "folder of an adapter"),
    line("a file of prompts that is not there", "generate adapter --file none.txt", "none.txt", "Check the path"),
    line("no prompt", "generate adapter", "a prompt is empty", "Write something to answer"),
    line("something there already", "merge adapter --out base", "base: there is something there already", "Choose"),
    line("a place that cannot be written", "train c.yaml output.dir=/proc/x", "/proc", "output.dir", code=4),
    line("a place inside a file", "export base --to gguf --out c.yaml/x.gguf", "c.yaml: cannot write", "choose another folder", code=4),
    # names that would leave their folder, or are none
    name_of_a_run("a run that climbs out", "../x"),
    name_of_a_run("a run in another folder", "a/b"),
    name_of_a_run("a run at the root", "/tmp/x"),
    name_of_a_run("a run with a zero byte", "a\0b"),
    name_of_a_run("a run named like its link", "last"),
    name_of_a_run("a run named like a device", "con"),
    name_of_a_run("a run that is hidden", ".x"),
    name_of_a_run("a run with a backslash", "a\\b"),
    name_of_a_run("a run with the end of a line", '"a\\nb"'),
    name_of_a_run("a run with a name of 5,000 letters", LONG),
    line("a base to delete that climbs out", "rm ../../base -y", "`../../base` is not a name for a base", "letters"),
    line("a base to fetch that climbs out", "pull ../x", "`../x` is not a name for a base", "letters"),
    line("bytes that are no text", ["show", "\udcff"], "there is no base", "Known to pull"),
    line("a zero byte in a path", ["train", "c.yaml", "data.train=a\0.jsonl"], "`data.train`: there is no", "Check the path"),
]  # fmt: skip
