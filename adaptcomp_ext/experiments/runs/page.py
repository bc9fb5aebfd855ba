"""`adaptcomp report`: everything that was run, on one page."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from adaptcomp_ext.experiments.files import read_json, write_text

from .cells import CONFIG_NAME

__all__ = ["FORMATS", "find_runs", "write_page"]

FORMATS = (".html", ".md")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
_STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #22272e }
body { font: 16px/1.5 system-ui, sans-serif }
img { max-width: 100% } pre { background: #f5f6f8; padding: .6rem; overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e6ea }
section { border-top: 3px solid #2166ac; margin-top: 3rem }
"""


class Run(NamedTuple):
    """A finished experiment: its folder, its name, its configuration, and its own report in Markdown."""

    folder: Path
    experiment: str
    config: dict[str, Any]
    text: str


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Find the experiments in these folders and the folders in them, each with its own report.

    Raises
    ------
    FileNotFoundError
        If a folder does not exist, or there is no finished experiment in any.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: expected a folder with results, found no such folder")
    runs = []
    for path in sorted({path for folder in folders for path in folder.rglob(CONFIG_NAME)}):
        about = read_json(path)
        if not isinstance(about, dict) or not {"experiment", "config"} <= about.keys():
            continue  # another program's
        report = path.parent / f"{about['experiment']}.md"
        if report.is_file():
            runs.append(
                Run(path.parent, about["experiment"], about["config"], report.read_text(encoding="utf-8"))
            )
    if not runs:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(
            f"{where}: expected finished experiments (config.json beside NAME.md), found none"
        )
    return runs


def write_page(runs: Sequence[Run], out: Path) -> None:
    """Write one page: HTML with the pictures in it, or Markdown that points to them.

    Parameters
    ----------
    runs : sequence of Run
        In the order of the page.
    out : Path
        Ends in ``.html`` or ``.md``.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"out: expected a file that ends in {' or '.join(FORMATS)}, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, _html(runs) if out.suffix == ".html" else _markdown(runs, out.parent))


def _configuration(run: Run) -> str:
    return json.dumps(run.config, indent=1, ensure_ascii=False)


def _markdown(runs: Sequence[Run], beside: Path) -> str:
    parts = ["# Results\n"]
    for run in runs:
        near = os.path.relpath(run.folder, beside)
        parts.append(_IMAGE.sub(rf"![\1]({near}/\2)", run.text))
        parts.append(f"Configuration:\n\n```json\n{_configuration(run)}\n```\n")
    return "\n".join(parts)


def _html(runs: Sequence[Run]) -> str:
    import markdown

    contents = "".join(
        f'<li><a href="#run{i}">{html.escape(run.experiment)}</a></li>' for i, run in enumerate(runs)
    )
    parts = []
    for i, run in enumerate(runs):
        # What a report says is text: only the marks of Markdown become tags.
        body = markdown.markdown(html.escape(run.text, quote=False), extensions=["tables"])
        body = re.sub(r'src="([^"]+)"', partial(_embedded, run.folder), body)
        options = html.escape(_configuration(run))
        config = f"<details><summary>Configuration</summary><pre>{options}</pre></details>"
        parts.append(f'<section id="run{i}">{body}{config}</section>')
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Results</title>'
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>Results</h1><ul>{contents}</ul>{''.join(parts)}</body></html>\n"
    )


def _embedded(folder: Path, source: re.Match[str]) -> str:
    name = source[1]
    picture = folder / html.unescape(name)
    if (
        picture.suffix != ".png"
        or not picture.resolve().is_relative_to(folder.resolve())
        or not picture.is_file()
    ):
        return f'src="{name}"'
    return f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode("ascii")}"'
