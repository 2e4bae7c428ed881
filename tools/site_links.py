"""Hook of mkdocs: links that leave docs/ become the name of the file, which must exist; mkdocs checks all others."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links to files of the repository as names.

    Raises:
        FileNotFoundError: one of them leads nowhere.
    """
    folder = Path(page.file.abs_src_path).parent

    def name(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which is not there")
        file = target.relative_to(ROOT).as_posix()
        return f"`{file}`" if link[1].strip("`") in {file, target.name} else f"{link[1]} (`{file}`)"

    return LINK.sub(name, markdown)
