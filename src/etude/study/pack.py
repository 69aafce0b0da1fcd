"""Packing of a study: the files of cells that are done move from their folders into the archive."""

from __future__ import annotations

from pathlib import Path

from etude.errors import EtudeError
from etude.files import locked
from etude.study.archive import CELL_FILES, accepts, archived_files, write_archive
from etude.study.directory import StudyDirectory
from etude.study.study_file import Cell


def pack(cells: list[Cell], directory: StudyDirectory) -> int:
    """Move files from which results are made to the archive; return the number of its cells.

    These are files of the base model and of those `cells` that are done. Weights, checkpoints and
    all other files stay in the folders of their cells; folders that become empty are removed.
    A file is removed only after the archive was written and read back.

    Raises:
        EtudeError: no cell is done, the archive is damaged, a file cannot be read or written, or
            another process is packing.
    """
    if not directory.root.is_dir():
        raise EtudeError(f"'{directory.root}' is not a directory: run the study first.")
    with locked(directory.root):
        done = [cell for cell in cells if directory.progress(cell).state == "done"]
        if not done:
            raise EtudeError(f"no cell in '{directory.root}' is done: there is nothing to pack.")
        packed = archived_files(directory.archive)
        files = dict(packed)
        for cell in done:
            for name in CELL_FILES:
                place, stored = f"cells/{cell.slug}/{name}", directory.file(cell, name)
                files.pop(place, None)
                if stored is not None:
                    files[place] = stored.data
        folder = directory.root / "base"
        base = [f"base/{path.name}" for path in folder.iterdir()] if folder.is_dir() else []
        base = [name for name in base if accepts(name)]
        files |= {name: (directory.root / name).read_bytes() for name in base}
        if files != packed:
            write_archive(directory.archive, files)
        for cell in done:
            _remove(directory.root, files, [f"cells/{cell.slug}/{name}" for name in CELL_FILES])
        _remove(directory.root, files, base)
    return len({name.split("/")[1] for name in files if name.startswith("cells/")})


def _remove(root: Path, packed: dict[str, bytes], names: list[str]) -> None:
    """Remove packed files in order, up to the first that has changed since, and emptied folders."""
    # The config.yaml of a cell comes first: a folder without it is read together with the archive, so that
    # a kill between two files does no harm.
    for name in names:
        if (root / name).is_file():
            if (root / name).read_bytes() != packed[name]:
                return
            (root / name).unlink()
    folders = {folder for name in names for folder in (root / name).parents if root in folder.parents}
    for folder in sorted(folders, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
