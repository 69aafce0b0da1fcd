"""The audit of the pinned versions: what fails it, and when nothing was looked up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.audit import look_up, verdict

SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
BROKEN = {
    "name": "jinja2",
    "version": "3.1.5",
    "vulns": [{"id": "CVE-2025-27516", "fix_versions": ["3.1.6"], "aliases": [], "description": ""}],
}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


@pytest.mark.parametrize("if_reachable", [True, False])
def test_a_vulnerability_fails_and_names_the_version_that_mends_it(if_reachable):
    code, words = verdict([SOUND, BROKEN], if_reachable)
    assert code == 1
    assert "jinja2 3.1.5: CVE-2025-27516, mended in 3.1.6" in words


@pytest.mark.parametrize("if_reachable", [True, False])
def test_a_version_that_only_the_service_does_not_know_fails(if_reachable):
    code, words = verdict([SOUND, UNKNOWN], if_reachable)
    assert code == 1
    assert "not looked up" in words
    assert "torch" in words


@pytest.mark.parametrize("packages", [None, [UNKNOWN], []])
def test_a_service_that_knows_nothing_is_no_audit_and_passes_only_where_that_is_allowed(packages):
    for allowed in (True, False):
        code, words = verdict(packages, allowed)
        assert code == (0 if allowed else 1)
        assert words.endswith("no known vulnerability was looked up")
        assert "\n" not in words


def test_versions_without_a_known_vulnerability_pass():
    assert verdict([SOUND], False) == (0, "audit: no known vulnerability in 1 pinned versions")


def said(tmp_path: Path, code: str) -> str:
    """A pip-audit that does as the code says."""
    script = tmp_path / "pip-audit"
    script.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    script.chmod(0o755)
    return str(script)


def test_nobody_answering_is_told_from_a_tool_that_fails(tmp_path):
    assert look_up(said(tmp_path, "sys.exit('requests.exceptions.ConnectionError: no route')")) is None
    with pytest.raises(SystemExit, match="no such option"):
        look_up(said(tmp_path, "sys.exit('no such option')"))
    written = """open(sys.argv[sys.argv.index("--output") + 1], "w").write('{"dependencies": [], "fixes": []}')"""
    assert look_up(said(tmp_path, written)) == []
