"""What the site shows from outside the folder docs: reports and figures, the examples, the changelog.

The pages link to them by their paths in the repository (``../benchmarks/results/demo.png``), so that they can
be read on GitHub. For the site the files are taken in from where they lie, without a copy in the repository,
and the links are made to point there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
OUTSIDE = re.compile(r"(\]\()((?:\.\./)+)(benchmarks/results/|examples/|CHANGELOG\.md|README\.md)")


def on_files(files: Files, *, config: Any) -> Files:
    """Take in the figures and reports, the examples as pages, and the changelog."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").glob("*.py")):
        page = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Point links that leave docs at the files that were taken in."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = match[3].replace("CHANGELOG.md", "changelog.md").replace("README.md", "index.md")
        return (
            match[1]
            + posixpath.relpath(target.rstrip("/"), here or ".")
            + ("/" if target.endswith("/") else "")
        )

    markdown = OUTSIDE.sub(moved, markdown)
    return re.sub(r"(\]\([^)\s]*examples/\w+)\.py\)", r"\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Drop the ``::`` that begins a block of code in a docstring, and that Markdown would show."""
    return html.replace("<p>::</p>\n", "").replace(
        '::</p>\n<div class="highlight"', ':</p>\n<div class="highlight"'
    )
