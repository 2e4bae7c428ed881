"""Attacks: what an adversary gets out of a model beyond generating from captions; each one file, off by default."""
