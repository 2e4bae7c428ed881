"""The prompts to generate from while training."""

from pathlib import Path

from sd_memguard.config import ConfigError, TrainConfig


def validation_prompts(config: TrainConfig) -> list[str]:
    """Return the prompts of ``--validation_prompts``, then those of ``--validation_prompts_file``.

    Raises:
        ConfigError: the file cannot be read or holds no prompt.
    """
    file = config.validation_prompts_file
    return [*(config.validation_prompts or ()), *([] if file is None else read_prompts(Path(file)))]


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a text file, one a line; empty lines and those that begin with ``#`` are passed over.

    Raises:
        ConfigError: it cannot be read or holds no prompt.
    """
    rule = "`--validation_prompts_file` must be a text file in UTF-8 with one prompt a line"
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{rule}, got {str(file)!r}: {error}; mend or omit it") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"{rule}, got {str(file)!r}, which holds none; write some or omit it")
    return prompts
