"""An archive of cells gives the results that folders give, and a bad one changes nothing."""

from __future__ import annotations

import io
import lzma
import re
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from etude.cli.app import app
from etude.errors import EtudeError
from etude.study import archive
from etude.study.archive import CELL_FILES, archive_bytes, read_archive
from etude.study.directory import StudyDirectory
from etude.study.pack import pack
from etude.study.runner import run_study
from etude.study.study_file import parse_study
from etude.study.study_page import write_results
from support.fake_study import SMALL, made_up, write

RESULTS = ("results.json", "results.csv", "tables.md", "report.html")


@pytest.fixture
def study():
    return made_up(SMALL)[0]


@pytest.fixture
def directory(study, tmp_path):
    return write(study, made_up(SMALL)[1], tmp_path / "study")


def content(root):
    """Every file below a folder, but the locks."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".claims" not in path.parts
    }


def results(study, directory):
    write_results(study, directory)
    return {name: data for name, data in content(directory.root).items() if name in RESULTS or "figures" in name}


def test_results_from_an_archive_are_those_from_folders(study, directory):
    before = results(study, directory)
    assert pack(list(study.cells), directory) == len(study.cells)
    assert not (directory.root / "cells").exists()
    assert not (directory.root / "base").exists()
    assert results(study, directory) == before
    assert results(study, StudyDirectory(directory.root)) == before


def test_packing_at_once_in_parts_or_twice_gives_the_same_bytes(study, directory, tmp_path):
    cells, other = list(study.cells), write(study, made_up(SMALL)[1], tmp_path / "other")
    pack(cells, directory)
    once = directory.archive.read_bytes()
    pack(cells, directory)
    pack(cells[2:], other)
    assert other.progress(cells[0]).state == "done"
    assert (other.cell(cells[0]) / "config.yaml").is_file()
    pack(cells, other)
    assert directory.archive.read_bytes() == other.archive.read_bytes() == once


def test_what_is_no_result_stays_in_its_folder(study, directory):
    weights = directory.cell(study.cells[0]) / "lora" / "weights"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    pack(list(study.cells), directory)
    assert content(directory.root / "cells") == {f"{study.cells[0].slug}/lora/weights": b"weights"}
    assert directory.progress(study.cells[0]).state == "done"


def test_cells_that_are_not_done_are_not_packed(study, directory):
    (directory.cell(study.cells[1]) / "summary.json").unlink()
    before = content(directory.cell(study.cells[1]))
    pack(list(study.cells), directory)
    assert content(directory.cell(study.cells[1])) == before
    assert [directory.progress(cell).state for cell in study.cells] == ["done", "part", "done", "done"]
    assert pack(list(study.cells), directory) == 3


def test_a_cell_that_is_measured_again_replaces_the_one_in_the_archive(study, directory):
    pack(list(study.cells), directory)
    cell = study.cells[0]
    stored = directory.file(cell, "scores.json")
    directory.cell(cell).mkdir(parents=True)
    directory.scores(cell).write_bytes(stored.data + b"\n")
    pack(list(study.cells), directory)
    assert directory.file(cell, "scores.json").data == stored.data + b"\n"
    assert directory.file(cell, "metrics.jsonl") is not None
    assert not (directory.root / "cells").exists()


def test_a_folder_with_a_configuration_is_read_without_the_archive(study, directory):
    pack(list(study.cells), directory)
    cell = study.cells[0]
    directory.cell(cell).mkdir(parents=True)
    (directory.cell(cell) / "config.yaml").write_text(cell.config.to_yaml())
    assert directory.progress(cell).state == "part"
    assert directory.file(cell, "scores.json") is None


@pytest.mark.parametrize("removed", range(len(CELL_FILES)))
def test_a_kill_while_files_are_removed_loses_nothing(study, directory, monkeypatch, removed):
    cells, files = list(study.cells), content(directory.root)
    unlink, calls = Path.unlink, []

    def killed(path, missing_ok=False):
        if "cells" in path.parts:
            if len(calls) == removed:
                raise KeyboardInterrupt
            calls.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(cells, directory)
    again = StudyDirectory(directory.root)
    assert [again.progress(cell).state for cell in cells] == ["done"] * len(cells)
    for cell in cells:
        for name in CELL_FILES:
            assert again.file(cell, name).data == files[f"cells/{cell.slug}/{name}"]
    pack(cells, again)
    assert read_archive(again.archive) == files
    assert list(content(directory.root)) == ["cells.tar.xz"]


def test_a_reader_that_meets_packing_halfway_reads_on_in_the_archive(study, directory, monkeypatch):
    read, begun = Path.read_bytes, []

    def late(path):
        if path.name == "summary.json" and not begun:
            begun.append(path)
            pack(list(study.cells), directory)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", late)
    assert directory.progress(study.cells[0]).state == "done"
    assert begun


def test_nothing_is_removed_where_the_archive_cannot_be_written_or_read_back(study, directory, monkeypatch):
    before = content(directory.root)
    monkeypatch.setattr(archive, "archive_bytes", lambda files: archive_bytes(dict(list(files.items())[1:])))
    with pytest.raises(EtudeError, match="does not hold what was written"):
        pack(list(study.cells), directory)
    assert content(directory.root) == before


def test_a_study_with_nothing_done_has_nothing_to_pack(study, tmp_path):
    with pytest.raises(EtudeError, match="is not a directory"):
        pack(list(study.cells), StudyDirectory(tmp_path / "none"))
    with pytest.raises(EtudeError, match="nothing to pack"):
        pack(list(study.cells), StudyDirectory(tmp_path))


def test_a_packed_cell_of_another_configuration_is_refused(study, directory):
    pack(list(study.cells), directory)
    changed = parse_study(SMALL | {"overrides": SMALL["overrides"] | {"iterations": 3}})
    with pytest.raises(EtudeError, match=r"iterations = 2, but the study now says 3: unpack '.*cells\.tar\.xz'"):
        directory.check(changed.cells[0])


def test_going_on_from_an_archive_trains_only_what_is_missing(study, directory, monkeypatch):
    pack(list(study.cells), directory)
    grown = parse_study(SMALL | {"grids": [*SMALL["grids"], {"keys": {"rewards": ["alignment"], "seed": [0]}}]})
    begun = []
    monkeypatch.setattr("etude.study.runner._run_cell", lambda cell, *others: begun.append(cell.slug))
    assert run_study(grown, list(grown.cells), directory, quiet=True) == {}
    assert begun == ["alignment_seed-0"]
    assert not (directory.root / "cells").exists()


def member(name, data=b"x", **attributes):
    made = tarfile.TarInfo(name)
    made.size = len(data)
    for key, value in attributes.items():
        setattr(made, key, value)
    return made, data


def packed(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for made, data in members:
            tar.addfile(made, io.BytesIO(data))
    return buffer.getvalue()


GOOD = member("cells/a/config.yaml")
HOSTILE = {
    "above the folder": packed(GOOD, member("cells/../../config.yaml")),
    "from the root": packed(member("/cells/a/config.yaml")),
    "hidden": packed(member("cells/.git/config.yaml")),
    "another file": packed(member("cells/a/lora/adapter_config.json")),
    "a long name": packed(member("base/" + "x" * 300 + "/y")),
    "a folder": packed(member("cells/a/config.yaml", b"", type=tarfile.DIRTYPE)),
    "a symbolic link": packed(member("base/a.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a hard link": packed(GOOD, member("base/a.json", b"", type=tarfile.LNKTYPE, linkname="cells/a/config.yaml")),
    "a device": packed(member("base/a.json", b"", type=tarfile.CHRTYPE)),
    "a sparse file": packed(member("base/a.json", b"x" * 512, type=tarfile.GNUTYPE_SPARSE)),
    "one name twice": packed(GOOD, GOOD),
    "cut off": packed(member("cells/a/config.yaml", b"x" * 5000))[:2048],
    "a damaged header": packed(GOOD, member("cells/b/config.yaml")).replace(b"cells/b", b"cells/c"),
    "nothing": b"",
    "noise": bytes(range(256)) * 20,
    "nested headers": (member("x" * 120)[0].tobuf(tarfile.GNU_FORMAT)[:512] + b"x" * 512) * 3000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_sentence(tmp_path, kind):
    path = tmp_path / "cells.tar.xz"
    path.write_bytes(lzma.compress(HOSTILE[kind]))
    with pytest.raises(EtudeError, match=r"^the archive '.*cells\.tar\.xz' cannot be used \(.+\): ") as caught:
        read_archive(path)
    assert "\n" not in str(caught.value)


def test_an_archive_of_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "cells.tar.xz"
    path.write_bytes(archive_bytes({"base/a": b"\0" * 100_000, "base/b": b""}))
    assert len(read_archive(path)) == 2
    monkeypatch.setattr(archive, "MOST", 1)
    with pytest.raises(EtudeError, match="more than 1 files"):
        read_archive(path)
    monkeypatch.setattr(archive, "LARGEST", 50_000)
    with pytest.raises(EtudeError, match="unpacks to more than 50000 bytes"):
        read_archive(path)
    monkeypatch.setattr(archive, "LARGEST", 50)
    with pytest.raises(EtudeError, match="larger than 50 bytes"):
        read_archive(path)


@pytest.mark.parametrize(
    "harm",
    [lambda b: b[:-1], lambda b: b[:100], lambda b: b"", lambda b: b + b"x", lambda b: b * 2, lambda b: b"x" + b],
)
def test_a_torn_archive_is_refused(tmp_path, harm):
    path = tmp_path / "cells.tar.xz"
    path.write_bytes(harm(archive_bytes({"base/a.json": b"{}"})))
    with pytest.raises(EtudeError, match="cannot be used"):
        read_archive(path)


def test_any_flipped_byte_is_found(tmp_path):
    whole = archive_bytes({"base/a.json": bytes(range(200)), "cells/a/scores.json": b"{}" * 50})
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        (tmp_path / "cells.tar.xz").write_bytes(bytes(data))
        with pytest.raises(EtudeError, match="cannot be used"):
            read_archive(tmp_path / "cells.tar.xz")


@pytest.mark.parametrize("option", ["--list", "--report-only", "--pack", "--quiet"])
def test_a_damaged_archive_stops_every_command_in_one_sentence_and_changes_nothing(study, directory, tmp_path, option):
    pack(list(study.cells[:2]), directory)
    directory.archive.write_bytes(directory.archive.read_bytes()[:-9])
    (directory.root / "results.json").write_text("{}")
    before = content(directory.root)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    outcome = CliRunner().invoke(app, ["study", str(file), "--out", str(directory.root), option])
    assert outcome.exit_code == 1
    assert re.fullmatch(r"error: the archive '.*cells\.tar\.xz' cannot be used \(.+\): .*\n", outcome.stderr)
    assert content(directory.root) == before


def test_the_command_packs_and_says_how_much(directory, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    arguments = ["study", str(file), "--out", str(directory.root)]
    assert CliRunner().invoke(app, [*arguments, "--pack", "--list"]).exit_code == 2
    outcome = CliRunner().invoke(app, [*arguments, "--pack"])
    assert outcome.exit_code == 0, outcome.output
    assert "cells.tar.xz (4 cells, 0." in outcome.output
    assert CliRunner().invoke(app, [*arguments, "--list"]).output.count("done") == 4
