"""Write docs/config.md, commands.md, traps.md from the settings, the commands' help, the tests' marks.

python docs/generate.py            write them
python docs/generate.py --check    end with 1 if they are not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from traps import traps_page

from lorimer.cli.app import COMMANDS, load_command, overview
from lorimer.config import BLOCKS, SETTINGS, Setting
from lorimer.config.yaml_text import write_yaml

HERE = Path(__file__).parent
WIDTH = 76
NOTE = "<!-- Made by docs/generate.py; do not edit. -->\n\n"
EXIT_CODES = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | something failed, or the reader of a pipe went away |
| 2 | the command line, a setting, a row or a file given is wrong |
| 3 | a score is below what `--min-score` asked for |
| 4 | a disk, a permission, a path that cannot be written |
| 130 | Ctrl-C; what was trained is saved |
| 143 | the same on SIGTERM |

Messages go to stderr. `LORIMER_DEBUG=1` adds the traceback of an unexpected error, `NO_COLOR=1` takes
colours away, `LORIMER_HOME` says where bases are kept.
"""
CONFIG_HEAD = """\
# Settings

One YAML file holds the settings of a run; `key=value` on the command line goes over it:

```
lorimer train home.yaml train.epochs=3 data.train=[a.jsonl,b.jsonl] lora.layers=null
```

A path is taken from the folder of the config file if it exists there, else from the current folder. A
path on the command line is taken from the current folder. Scalars are those of YAML 1.2: `2e-4` is a
number, `yes` is text. Names from other tools (`lora_alpha`, `micro_batch_size`, `num_train_epochs`) are
refused with the name here; `lorimer config explain NAME` says the same.

`lorimer config schema` prints the JSON Schema for editors.
"""


def config_page() -> str:
    parts = [NOTE + CONFIG_HEAD]
    parts.append(_table("Top of the file", [SETTINGS["base"]]))
    for block in BLOCKS:
        settings = [s for s in SETTINGS.values() if s.key.startswith(f"{block}.")]
        parts.append(_table(f"`{block}`", settings))
    return "\n".join(parts)


def _table(title: str, settings: list[Setting]) -> str:
    lines = [f"## {title}\n", "| setting | what it does | value | default |", "|---|---|---|---|"]
    for setting in settings:
        default = "required" if setting.required else f"`{_yaml(setting.default)}`"
        cells = (f"`{setting.key}`", setting.description, setting.wanted, default)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    return write_yaml(value).removesuffix("...\n").strip()


def commands_page() -> str:
    parts = [f"{NOTE}# Commands\n\n```\n{overview()}\n```\n"]
    for command in COMMANDS.values():
        built = load_command(command, WIDTH)
        parts.append(_section(built, f"lorimer {command.name}", 2))
        for name, inner in getattr(built, "commands", {}).items():
            parts.append(_section(inner, f"lorimer {command.name} {name}", 3))
    return "\n".join([*parts, EXIT_CODES])


def _section(command: Any, name: str, level: int) -> str:
    context = command.make_context(
        name, [], resilient_parsing=True, terminal_width=WIDTH, help_option_names=["--help", "-h"]
    )
    return f"{'#' * level} {name}\n\n```\n{command.get_help(context).rstrip()}\n```\n"


def main() -> int:
    pages = {"config.md": config_page(), "commands.md": commands_page(), "traps.md": NOTE + traps_page()}
    stale = []
    for name, text in pages.items():
        path = HERE / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"not up to date: {', '.join(stale)}; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
