"""Run folders: records, checkpoints, locks."""
