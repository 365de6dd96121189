"""Hooks of mkdocs, for pages that also read well as files.

Pages link to pictures of `bench/results` and to files of the repository, which lie outside docs/.
The site gets a copy of each file that is linked, under `files/`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add every file outside docs/ that a page links to."""
    kind = importlib.import_module("mkdocs.structure.files").File  # of the group docs
    names = set()
    for page in files.documentation_pages():
        names |= {match[1] for match in OUTSIDE.finditer(page.content_string)}
    for name in sorted(names):
        content = (ROOT / name).read_bytes()
        files.append(kind.generated(config, f"files/{_plain(name)}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to those copies."""
    return OUTSIDE.sub(lambda match: f"](files/{_plain(match[1])})", markdown)


def _plain(name: str) -> str:
    """A Markdown file outside docs/ is no page of the site: it is shown as text."""
    return f"{name}.txt" if name.endswith(".md") else name
