"""The ensemble in a loop that somebody else has written: what `MemorizationGuard.prepare` and `.attach` put there."""
