"""Where tools leave MNIST's four files: as published, renamed by an archiver, in torchvision's folders, a folder for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .download import MNIST_FILES

__all__ = ["find_parts", "what_is_there"]

SHOWN = 8  # names in a message
STANDARD = ("", "MNIST/raw", "MNIST", "raw")
"""Below the folder that was given: itself, torchvision's, and those in which other tools make a copy."""


def find_parts(folder: Path) -> dict[str, Path | None]:
    """Find the four files in a folder or in the folders below it in which tools put them.

    Names are those of `MNIST_FILES` in upper or lower case, with ``.idx`` for ``-idx`` or not, with ``.gz``
    or not; each file may lie in a folder of its own name. All come from one place: no other data set fills
    the gaps of this one.

    Parameters
    ----------
    folder : Path
        It exists.

    Returns
    -------
    dict
        The file of each part, None where it is missing. Of a place that lacks some, what the fullest one has.

    Raises
    ------
    ValueError
        If there are several data sets below the folder, and none in a place that says which is MNIST.
    """
    standard = [_parts(place) for name in STANDARD if (place := _below(folder, name)) is not None]
    fullest = max(standard, key=lambda found: sum(path is not None for path in found.values()))
    if any(fullest.values()):
        return fullest
    others = {place: found for place in _folders(folder, 2) if any((found := _parts(place)).values())}
    whole = [place for place, found in others.items() if all(found.values())]
    if len(whole) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in whole[:SHOWN])
        raise ValueError(
            f"{folder}: expected one data set, found several: {names}; name one of these folders"
        )
    return others[whole[0]] if whole else fullest


def what_is_there(folder: Path) -> str:
    """What a folder holds, as part of a sentence."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    if not names:
        return "the folder is empty"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"found there: {', '.join(names[:SHOWN])}{more}"


def _parts(place: Path) -> dict[str, Path | None]:
    entries = {_plain(entry.name): entry for entry in _entries(place) if entry.is_dir()}
    files = _files(place)
    found: dict[str, Path | None] = {}
    for part, (name, _) in MNIST_FILES.items():
        own = entries.get(name)
        found[part] = files.get(name) or (None if own is None else _files(own).get(name))
    return found


def _files(place: Path) -> dict[str, Path]:
    """The files of a folder by their plain names; the one that is not compressed where there are two."""
    files = sorted(
        (entry for entry in _entries(place) if entry.is_file()),
        key=lambda entry: entry.suffix.lower() != ".gz",
    )
    return {_plain(entry.name): entry for entry in files}


def _plain(name: str) -> str:
    """A file's name as MNIST's authors would have written it."""
    return name.lower().removesuffix(".gz").replace(".idx", "-idx")


def _below(folder: Path, name: str) -> Path | None:
    """The folder of this name, in upper or lower case."""
    for step in filter(None, name.split("/")):
        same = [entry for entry in _entries(folder) if entry.is_dir() and entry.name.lower() == step.lower()]
        if not same:
            return None
        folder = same[0]
    return folder


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing where that may not be read."""
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        return []


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    for entry in _entries(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            yield entry
            if depth > 1:
                yield from _folders(entry, depth - 1)
