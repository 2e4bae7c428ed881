"""How a setting is declared: one dataclass field holds its name, type, default, help, group and rule.

`setting` declares it, `settings_of` reads the declarations back, `check_settings` holds a configuration to them. The
flags of the command line and the keys of configuration files derive from the same declarations (`sd_memguard.flags`).
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sd_memguard.errors import ConfigError


class Rule(NamedTuple):
    """What a value has to fulfil; `text` completes the sentence "`--name` must be ..."."""

    text: str
    holds: Callable[[Any], bool]


MODEL_KINDS = ("sd", "sdxl")
CASES = {
    **{proxy: f"{{quote}}--proxy {proxy}{{quote}}" for proxy in ("full", "lora")},
    "sd": "SD 1.x/2.x",
    "sdxl": "SDXL",
}
"""What a default can depend on, in words."""

POSITIVE_COUNT = Rule("1 or more", lambda count: count >= 1)
NOT_NEGATIVE = Rule("0 or more", lambda number: 0 <= number < float("inf"))
GREATER_THAN_ZERO = Rule("greater than 0", lambda number: number > 0)
BELOW_ONE = Rule("at least 0 and below 1", lambda number: 0 <= number < 1)
PROBABILITY = Rule("between 0 and 1", lambda number: 0 <= number <= 1)


def setting(
    default: Any,
    group: str,
    help: str,
    rule: Rule | None = None,
    *,
    default_for: Mapping[str, Any] | None = None,
    fix: str = "",
    secret: bool = False,
) -> Any:
    """Declare a setting as a dataclass field; its type and its words (`Literal`) are read from the annotation.

    Args:
        default: Its value when nobody gives one. None in a field that must not be None means "has to be given".
        group: The heading under which `--help` lists it.
        help: What it does, in one line, lower case, units included.
        rule: What its value has to fulfil besides its type.
        default_for: Its default where that depends on the proxy ("full", "lora"), the kind of model ("sd", "sdxl") or
            both ("sdxl full", which comes first); where none applies, it must not be given.
        fix: The way out that the error message offers; by default, to leave the setting out.
        secret: Whether it must never be printed or written to a file.
    """
    words = {"group": group, "help": help, "fix": fix}
    declared = {**words, "rule": rule, "default_for": default_for or {}, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata={"setting": declared})


class Setting(NamedTuple):
    """A declared setting. `kind` is bool, int, float, str, or None where only `words` will do.

    `many` says that it takes a list, `single` that a list of one is that one value.
    """

    name: str
    kind: type | None
    words: tuple[str, ...]
    many: bool
    single: bool
    optional: bool
    default: Any
    group: str
    help: str
    rule: Rule | None
    default_for: Mapping[str, Any]
    fix: str
    secret: bool

    @property
    def depends_on_model(self) -> bool:
        """Whether the default depends on the kind of model."""
        return any(word in MODEL_KINDS for case in self.default_for for word in case.split())

    def case(self, model_kind: str | None, proxy: str) -> str | None:
        """Return the case of ``default_for`` that applies, the most special one; None where none does."""
        return next((case for case in (f"{model_kind} {proxy}", model_kind, proxy) if case in self.default_for), None)

    def default_text(self, quote: str = "") -> str:
        """Return the default as text, with the cases that it depends on; empty where there is none."""
        if not self.default_for:
            return "" if self.default is None or self.kind is bool else f"{quote}{self.default}{quote}"
        return ", ".join(
            f"{quote}{value}{quote} with {' and '.join(CASES[word].format(quote=quote) for word in case.split())}"
            for case, value in self.default_for.items()
        )

    def read(self, text: Any) -> Any:
        """Return the value that a text stands for, or the text itself where it stands for none, for `check` to refuse.

        What is no text needs no reading; of a list each entry is read.
        """
        if isinstance(text, list):
            return [self.read(entry) for entry in text]
        if not isinstance(text, str):
            return text
        if self.kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        if self.kind in (int, float) and text not in self.words:
            try:
                return self.kind(text)
            except ValueError:
                return text
        return text

    def check(self, value: Any) -> Any:
        """Return `value` in its normal form (a whole number as float, a path as text, a list as tuple).

        Raises:
            ConfigError: If the value is of the wrong type or breaks the rule.
        """
        if value is None and self.optional:
            return None
        if value is None:
            raise ConfigError(f"`--{self.name}` must be given; {self.fix}")
        if self.many and not self.single:
            return self._check_texts(value)
        if self.many and isinstance(value, list | tuple) and value:
            values = tuple(self._check_one(one) for one in value)
            return values if len(values) > 1 else values[0]
        return self._check_one(value)

    def _check_one(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        value = self._normalize(value)
        if self.kind is None or type(value) is not self.kind:
            raise self.refusal(self._describe_type(), value)
        if value == "":
            raise self.refusal("a text that is not empty", value)
        if self.rule and not self.rule.holds(value):
            raise self.refusal(self.rule.text, value)
        return value

    def refusal(self, rule: str, value: Any) -> ConfigError:
        """The error that says that `value` breaks `rule`, and what to do."""
        guess = nearest(value, self.words) if isinstance(value, str) else ""
        text = self.default_text() if self.default_for else "" if self.default is None else _as_text(self.default)
        default = f", which is {text}" if text else ""
        fix = self.fix or f"omit it for the default{default}"
        got = "something else" if self.secret else _as_text(value)
        return ConfigError(f"`--{self.name}` must be {rule}, got {got}{guess}; {fix}")

    def _normalize(self, value: Any) -> Any:
        if self.kind is float and type(value) is int:
            return float(value)
        if self.kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        return value

    def _check_texts(self, value: Any) -> tuple[str, ...]:
        if not value or not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise self.refusal("a list of one or more texts", value)
        for text in value:
            if self.words and text not in self.words:
                raise self.refusal(f"one or more of {', '.join(self.words)}", text)
        return tuple(value)

    def _describe_type(self) -> str:
        if self.kind is None:
            return f"one of {', '.join(self.words)}"
        name = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.kind]
        return " or ".join([name, *self.words])


def settings_of(owner: type) -> tuple[Setting, ...]:
    """The settings that the dataclass `owner` declares, in order; without its other fields."""
    annotations = get_type_hints(owner)
    return tuple(
        Setting(field.name, *_read_annotation(annotations[field.name]), field.default, **field.metadata["setting"])
        for field in dataclasses.fields(owner)
        if "setting" in field.metadata
    )


def check_settings(config: object, open: Iterable[str] = ()) -> None:
    """Hold a frozen dataclass to its declarations and bring its values to their normal form.

    Args:
        config: The dataclass.
        open: Settings that may be None, since what they depend on is not known yet.

    Raises:
        ConfigError: Naming the first setting that is of the wrong type or breaks its rule.
    """
    for declared in settings_of(type(config)):
        if declared.name in open and getattr(config, declared.name) is None:
            continue
        object.__setattr__(config, declared.name, declared.check(getattr(config, declared.name)))


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that names the entry of `known` most like `word`; empty where none comes near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean `{found[0]}`?)" if found else ""


def _read_annotation(annotation: Any) -> tuple[type | None, tuple[str, ...], bool, bool, bool]:
    """Split an annotation such as `int | Literal["auto"]` into kind, words, many, single and optional."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    many = any(get_origin(part) is tuple for part in parts)
    items = [item for part in parts for item in (get_args(part) if get_origin(part) is tuple else (part,))]
    words = tuple(word for item in items if get_origin(item) is Literal for word in get_args(item))
    kinds = [item for item in items if item in (bool, int, float, str)]
    single = many and any(part in kinds for part in parts)
    return (kinds[0] if kinds else None), words, many, single, type(None) in parts


def _as_text(value: Any) -> str:
    return str(value) if isinstance(value, bool | int | float) else repr(value)
