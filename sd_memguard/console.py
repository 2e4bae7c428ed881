"""What the programs show on a terminal."""

import logging
import os


def configure_logging() -> None:
    """Show our own log lines on the terminal, and of the libraries' only warnings; of several processes say which."""
    rank = int(os.environ.get("RANK", "0"))
    who = f"[process {rank}] " if rank else ""
    logging.basicConfig(format=f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sd_memguard").setLevel(logging.INFO)
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
