"""`python -m sd_memguard` is `sd-memguard`."""

from sd_memguard.cli import main

if __name__ == "__main__":
    main()
