"""`sd-memguard inspect`: what happened in a run."""
