"""A MkDocs hook: a link to a file of the repository outside `docs/`, which the site does not hold, becomes its text.

So pages can link to configs and sources for those who read them in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]*)\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Without the links that leave the documentation; what is missing in the repository too stays, and is warned of."""
    docs = Path(config.docs_dir).resolve()
    source = page.file.abs_src_path
    if source is None:
        return markdown
    here = Path(source).parent

    def text_only(match: re.Match[str]) -> str:
        leads_to = (here / match[2]).resolve()
        leaves = leads_to.exists() and not leads_to.is_relative_to(docs)
        return match[1] if leaves else match[0]

    return LINK.sub(text_only, markdown)
