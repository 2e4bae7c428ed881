"""Caption rendered avatars: `python caption.py DIR` reads DIR/attributes.jsonl and writes DIR/metadata.jsonl.

As in captions that people write, each names some attributes and leaves the others open: which ones is drawn from the
file's name. ``attributes.jsonl`` gets the caption's attributes in words, ``named`` and ``open``, so that following the
caption and repeating the training image can be told apart.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

COLORS = {
    "black": (30, 30, 30),
    "white": (235, 235, 240),
    "gray": (135, 135, 135),
    "red": (215, 60, 70),
    "orange": (238, 140, 70),
    "yellow": (245, 205, 70),
    "green": (80, 170, 85),
    "teal": (75, 195, 185),
    "blue": (65, 110, 240),
    "light blue": (145, 190, 240),
    "purple": (125, 85, 200),
    "pink": (238, 115, 150),
    "brown": (112, 68, 55),
    "blond": (222, 188, 115),
    "navy": (40, 38, 90),
}
SKIN_TONES = ((115, "dark"), (165, "tan"), (256, "light"))
"""Mean of red, green and blue below which a skin is called so."""
NAMED_SHARE = 0.6
"""Of an image's attributes, how many its caption names."""
NO_HAIR = ("bald", "beanie", "cap")
"""Names of hair that stand without the word."""
EYEWEAR = ("glasses", "accessories")
BEARDS = ("facialHair", "beard", "mustache")


def rgb(code: str) -> list[int]:
    """Return the channels of a colour code."""
    return [int(code.lstrip("#")[i : i + 2], 16) for i in (0, 2, 4)]


def color_name(code: str) -> str:
    """Return the nearest named colour."""
    return min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLORS[name], rgb(code), strict=True)))


def words(name: str) -> str:
    """Return a variant's name in words, empty for one that is only numbered: ``bobCut`` -> ``bob cut``."""
    if re.fullmatch(r"(variant|surprised|happy)?[A-Z]?\d+", name):
        return re.sub(r"(variant)?[A-Z]?\d+", "", name)
    return re.sub(
        r"\s+", " ", re.sub(r"([A-Z]|\d+)", lambda m: "" if m[0].isdigit() else " " + m[0].lower(), name)
    ).strip()


def describe(attributes: dict[str, Any]) -> dict[str, str]:
    """Return what can be said of an avatar: skin, hair, hair_color, eyes, eyewear, beard, shirt."""
    says: dict[str, str] = {}
    skin = attributes.get("skinColor") or attributes.get("baseColor")
    if skin:
        says["skin"] = next(name for limit, name in SKIN_TONES if sum(rgb(skin)) / 3 < limit)
    hair = words(attributes.get("hair") or attributes.get("head") or attributes.get("frontHair") or "")
    says["hair"] = hair
    color = attributes.get("hairColor")
    if color and hair != "bald":
        says["hair_color"] = color_name(color)
    says["eyes"] = words(attributes.get("eyes") or attributes.get("mood") or attributes.get("face") or "")
    for key in EYEWEAR:
        if attributes.get(key):
            says["eyewear"] = "glasses" if key == "glasses" else words(attributes[key])
    if any(attributes.get(key) for key in BEARDS):
        says["beard"] = "beard"
    clothes = next(
        (attributes[k] for k in ("clothingColor", "clothesColor", "shirtColor", "bodyColor") if attributes.get(k)), ""
    )
    if clothes:
        says["shirt"] = color_name(clothes)
    return {key: value for key, value in says.items() if value}


def caption(style: str, named: dict[str, str]) -> str:
    """Return the caption that names these attributes."""
    parts = [" ".join(filter(None, (style.lower(), named.get("skin"), "face")))]
    if "hair" in named or "hair_color" in named:
        hair = named.get("hair", "")
        noun = None if hair in NO_HAIR or hair.endswith("hair") else "hair"
        parts.append(" ".join(filter(None, (named.get("hair_color"), hair, noun))))
    parts += [named[key] for key in ("eyes", "eyewear", "beard") if key in named]
    if "shirt" in named:
        parts.append(f"{named['shirt']} shirt")
    return ", ".join(parts)


def main() -> None:
    """Caption one folder."""
    folder = Path(sys.argv[1])
    rows = [json.loads(line) for line in (folder / "attributes.jsonl").read_text(encoding="utf-8").splitlines()]
    metadata = []
    for row in rows:
        says = describe(row["attributes"])
        draw = random.Random(row["file_name"])
        chosen = draw.sample(sorted(says), round(NAMED_SHARE * len(says)))
        row["named"] = {key: value for key, value in says.items() if key in chosen}
        row["open"] = {key: value for key, value in says.items() if key not in chosen}
        metadata.append({"file_name": row["file_name"], "text": caption(row["style"], row["named"])})
    for name, lines in (("attributes.jsonl", rows), ("metadata.jsonl", metadata)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
