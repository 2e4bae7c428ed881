"""Write docs/flags.md: every flag of the training script with its default and meaning, from `sd_memguard.config`."""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sd_memguard.config import ALIASES, REFUSED, SETTINGS  # noqa: E402 (the checkout has to be found first)
from sd_memguard.settings import Setting  # noqa: E402

TARGET = ROOT / "docs" / "flags.md"
INTRODUCTION = """\
# Flags

Every flag of `sd-memguard train` (the same program as `sd_memguard/train.py`), written by `tools/make_flags_doc.py`
from the declarations in `sd_memguard/config.py`. `sd-memguard train --help` prints the same.

All flags of diffusers' `train_text_to_image.py`, `_lora.py`, `_sdxl.py` and `_lora_sdxl.py` are here under their own
names and with their own defaults; where the scripts differ, `--proxy` and the kind of the model (by its folder) decide.
Two of their flags are refused, with the reason: REFUSED.

Flags are not abbreviated, and an unknown one
is an error that names the nearest. `--config FILE` reads any of them from YAML, JSON or TOML; the command line wins
over the file, the file over `--preset`, the preset over the defaults below. A switch takes no value on the command
line, and `true` or `false` in a file.
"""


def flags_document() -> str:
    """Return the text of docs/flags.md."""
    groups = dict.fromkeys(setting.group for setting in SETTINGS.values())
    introduction = INTRODUCTION.replace("REFUSED", " and ".join(f"`--{name}`" for name in REFUSED))
    return "\n".join([introduction, *(line for group in groups for line in _table(group))])


def _table(group: str) -> Iterator[str]:
    yield f"## {group}\n"
    yield "| flag | default | meaning |"
    yield "|---|---|---|"
    yield from (_row(setting) for setting in SETTINGS.values() if setting.group == group)
    yield ""


def _row(setting: Setting) -> str:
    aliases = [f"`--{alias}`" for alias, name in ALIASES.items() if name == setting.name]
    flag = ", ".join([f"`--{setting.name}`", *aliases])
    meaning = setting.help[0].upper() + setting.help[1:]
    rule = f" Must be {setting.rule.text}." if setting.rule else ""
    number = "One or more" if setting.many else "One"
    words = f" {number} of {', '.join(f'`{word}`' for word in setting.words)}." if len(setting.words) > 1 else ""
    return f"| {flag} | {_default(setting)} | {meaning}.{words}{rule} |"


def _default(setting: Setting) -> str:
    if setting.default_for:
        return setting.default_text("`")
    if setting.default is None and not setting.optional:
        return "must be given"
    return "off" if setting.kind is bool else _text(setting.default)


def _text(value: object) -> str:
    return "not given" if value is None else f"`{value}`"


if __name__ == "__main__":
    TARGET.write_text(flags_document(), encoding="utf-8")
