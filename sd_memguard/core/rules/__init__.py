"""Sample rules: what decides, sample by sample, what becomes of a gradient; one file for each rule."""

from sd_memguard.core.rules.agc import AntiGradientControl
from sd_memguard.core.rules.anchored import AnchoredControl
from sd_memguard.core.rules.base import AUGMENT, SKIP, Action, Decision, SampleRule, shares_text
from sd_memguard.core.rules.registry import make_rule, register_rule, rule_class

__all__ = [
    "AUGMENT",
    "SKIP",
    "Action",
    "AnchoredControl",
    "AntiGradientControl",
    "Decision",
    "SampleRule",
    "make_rule",
    "register_rule",
    "rule_class",
    "shares_text",
]
