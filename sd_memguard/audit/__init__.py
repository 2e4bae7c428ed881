"""Measuring how much a model copies. Knows training only through the folders it leaves on disk."""

from sd_memguard.errors import UserError


class AuditError(UserError):
    """Images, a model or a setting that the audit cannot work with."""
