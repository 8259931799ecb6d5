"""A MkDocs hook: every notebook of `notebooks/` becomes a page, with the outputs that are stored in it.

The page is made of the notebook's own Markdown, its code, what was printed and its pictures. Nothing is executed here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """In the navigation a notebook goes by its file; its page ends in `.md`."""
    config.nav = _renamed(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and a file for each of its pictures."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        name = f"notebooks/{path.stem}"
        page, pictures = rendered(nbformat.read(path, as_version=4), path.stem)
        note = f"\n\nThis page is `{name}.ipynb`, as it was last run.\n"
        files.append(File.generated(config, f"{name}.md", content=page + note))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
    return files


def rendered(notebook: Any, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for text, png in _outputs(cell):
            if png is None:
                parts.append(f'<div class="printed" markdown>\n```text\n{text}\n```\n</div>')
            else:
                name = f"{stem}-{len(pictures)}.png"
                pictures[name] = png
                parts.append(f"![{text}]({name})")
    return "\n\n".join(parts), pictures


def _outputs(cell: Any) -> Iterator[tuple[str, bytes | None]]:
    """What a cell printed, as text; and its pictures, with what stands for them."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text.rstrip(), None
            continue
        data = output.get("data", {})
        if "image/png" in data:
            yield "What the code above draws", base64.b64decode(data["image/png"])
        elif "text/plain" in data:
            yield data["text/plain"], None


def _renamed(entry: Any) -> Any:
    match entry:
        case list():
            return [_renamed(item) for item in entry]
        case dict():
            return {title: _renamed(item) for title, item in entry.items()}
        case str():
            return str(Path(entry).with_suffix(".md")) if entry.endswith(".ipynb") else entry
        case _:
            return entry
