"""Files that commands write: looked at before the work, as the work may take an hour."""

from __future__ import annotations

from pathlib import Path


def refuse_overwriting(*files: Path | None, force: bool) -> None:
    """Whether every file can be written.

    Args:
        files: What will be written; None for what will not.
        force: Existing files may be replaced.

    Raises:
        ValueError: If one exists, is a folder, or has no folder to be in.
    """
    for file in files:
        if file is None:
            continue
        if not file.parent.is_dir():
            raise ValueError(f"the folder of {file} does not exist: create it first")
        if file.is_dir():
            raise ValueError(f"{file} is a folder: name a file")
        if file.exists() and not force:
            raise ValueError(f"{file} exists: choose another name or pass --force")
