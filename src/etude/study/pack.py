"""Packing of a study: the files of cells that are done move from their folders into the archive.

At every moment a file is in its folder, in the archive, or in both.
"""

from __future__ import annotations

from pathlib import Path

from etude.errors import EtudeError
from etude.files import locked
from etude.study.archive import CELL_FILES, accepts, archived_files, write_archive
from etude.study.directory import StudyDirectory
from etude.study.study_file import Cell


def pack(cells: list[Cell], directory: StudyDirectory) -> int:
    """Move the files from which results are made into the archive of the study.

    These are files of the base model and of those `cells` that are done. Weights, checkpoints and
    all other files stay in the folders of their cells; folders that become empty are removed.
    A file is removed only after the archive was written and read back.

    Returns:
        Number of cells in the archive.

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
                stored = directory.file(cell, name)
                if stored is not None:
                    files[f"cells/{cell.slug}/{name}"] = stored.data
                else:
                    files.pop(f"cells/{cell.slug}/{name}", None)
        files |= {f"base/{path.name}": path.read_bytes() for path in _base(directory)}
        if files != packed:
            write_archive(directory.archive, files)
        for cell in done:
            _remove(directory.root, files, [f"cells/{cell.slug}/{name}" for name in CELL_FILES])
        _remove(directory.root, files, [f"base/{path.name}" for path in _base(directory)])
    return len({name.split("/")[1] for name in files if name.startswith("cells/")})


def _base(directory: StudyDirectory) -> list[Path]:
    folder = directory.root / "base"
    return [path for path in folder.iterdir() if accepts(f"base/{path.name}")] if folder.is_dir() else []


def _remove(root: Path, packed: dict[str, bytes], names: list[str]) -> None:
    """Remove packed files in order, up to the first that has changed since, and emptied folders.

    The `config.yaml` of a cell comes first: a folder without it is read together with the archive,
    so a kill between two files does no harm.
    """
    for name in names:
        if (root / name).is_file():
            if (root / name).read_bytes() != packed[name]:
                return
            (root / name).unlink()
    folders = {folder for name in names for folder in (root / name).parents if root in folder.parents}
    for folder in sorted(folders, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
