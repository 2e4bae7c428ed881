"""Name the repository in what a release shows: the project's addresses, and the README's links to its files.

The checkout itself names no address, so that a fork need not change one; a package index shows the README away from the
files beside it. The release workflow runs this before it builds:

    python tools/release_metadata.py --repository https://HOST/OWNER/NAME --tag v0.1.0
"""

import argparse
import re
from pathlib import Path

from sd_memguard import __version__

ROOT = Path(__file__).parents[1]
URLS = "[project.urls]\n"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#)([^)\s]+)\)")


def main() -> None:
    """Rewrite pyproject.toml and README.md in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", required=True, help="address of the repository, without a slash at its end")
    parser.add_argument("--tag", required=True, help="v and the version")
    arguments = parser.parse_args()
    if arguments.tag != f"v{__version__}":
        parser.error(f"--tag must be v{__version__}, the package's version, got {arguments.tag}")
    for name, rewrite in (("pyproject.toml", with_urls), ("README.md", with_absolute_links)):
        file = ROOT / name
        file.write_text(rewrite(file.read_text(encoding="utf-8"), arguments.repository, arguments.tag), "utf-8")


def with_urls(pyproject: str, repository: str, tag: str) -> str:
    """Return pyproject.toml with the repository's addresses before those that it has."""
    urls = {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{tag}/docs",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    if pyproject.count(URLS) != 1:
        raise SystemExit(f"pyproject.toml must have one table {URLS.strip()}")
    return pyproject.replace(URLS, URLS + "".join(f'{name} = "{url}"\n' for name, url in urls.items()))


def with_absolute_links(readme: str, repository: str, tag: str) -> str:
    """Return the README with links to files beside it as addresses in the repository, images as their contents.

    >>> with_absolute_links("[a](docs/a.md#b), ![c](c.png), [d](#d)", "https://host/o/n", "v1")
    '[a](https://host/o/n/blob/v1/docs/a.md#b), ![c](https://host/o/n/raw/v1/c.png), [d](#d)'
    """
    return LINK.sub(
        lambda link: f"{link[1]}[{link[2]}]({repository}/{'raw' if link[1] else 'blob'}/{tag}/{link[3]})", readme
    )


if __name__ == "__main__":
    main()
