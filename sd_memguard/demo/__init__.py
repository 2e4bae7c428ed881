"""`sd-memguard demo`."""
