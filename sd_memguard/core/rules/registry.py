"""Sample rules by name."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch

from sd_memguard.core.rules.base import SampleRule
from sd_memguard.errors import ConfigError

Rule = TypeVar("Rule", bound=type[SampleRule])

_RULES: dict[str, type[SampleRule]] = {}


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Return a class decorator that makes a rule known as ``GuardConfig(sample_rule=name)``.

    Raises:
        ValueError: another rule has this name.
    """

    def register(rule: Rule) -> Rule:
        if _RULES.setdefault(name, rule) is not rule:
            raise ValueError(f"there is a sample rule `{name}` already: {_RULES[name].__name__}; choose another name")
        return rule

    return register


def rule_class(name: str) -> type[SampleRule]:
    """Return the rule registered under a name, or the one that ``package.module:Class`` names.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    if attribute:
        return _imported_rule(module, attribute)
    if name not in _RULES:
        raise ConfigError(
            f"`--sample_rule` must be one of {', '.join(sorted(_RULES))} or the `package.module:Class` of your own, "
            f"got {name!r}"
        )
    return _RULES[name]


def _imported_rule(module: str, attribute: str) -> type[SampleRule]:
    try:
        rule = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"`--sample_rule {module}:{attribute}` cannot be imported: {error}") from error
    if not (isinstance(rule, type) and issubclass(rule, SampleRule)):
        raise ConfigError(f"`--sample_rule {module}:{attribute}` is no `SampleRule`; derive it from that class")
    return rule


def make_rule(config: Any, *, num_timesteps: int, device: torch.device | str = "cpu") -> SampleRule:
    """Return a new rule as a ``GuardConfig`` asks for.

    Raises:
        ConfigError: no rule has that name.
    """
    return rule_class(config.sample_rule).from_config(config, num_timesteps=num_timesteps, device=device)
