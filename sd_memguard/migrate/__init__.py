"""`sd-memguard migrate`: the configuration of another trainer as one of ours, and what of it has no counterpart."""
