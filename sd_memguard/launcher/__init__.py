"""Runs scripts of others, unmodified, under the guard."""
