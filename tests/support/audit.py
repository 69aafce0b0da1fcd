"""Known vulnerabilities of the pinned versions, as pip-audit finds them in PyPI's vulnerability service.

`make audit` runs it. Silence is never taken for safety: pip-audit passes over a version that the service does not know, and says "no known
vulnerabilities" where it knew none at all. Here that is a failure, and with `--if-reachable`, which continuous integration gives since it
may have nothing but a mirror of the packages, one line that nothing was looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINNED = "constraints.txt"
ACCEPTED: dict[str, str] = {}
"""Vulnerabilities that do not concern etude, by their id, and why they do not; there is no other way around a failure."""
UNREACHABLE = ("requests.exceptions.", "Could not connect")
"""What pip-audit says when nobody answers."""


def look_up(pip_audit: str) -> list[dict[str, Any]] | None:
    """What pip-audit says of each pinned package; None if nobody answered it."""
    ignored = [word for name in ACCEPTED for word in ("--ignore-vuln", name)]
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        where = ["--requirement", PINNED, "--no-deps", "--disable-pip"]
        how = ["--progress-spinner", "off", "--format", "json", "--output", str(report)]
        done = subprocess.run([pip_audit, *where, *how, *ignored], capture_output=True, text=True, check=False)
        if report.exists():
            dependencies: list[dict[str, Any]] = json.loads(report.read_text())["dependencies"]
            return dependencies
    if any(words in done.stderr for words in UNREACHABLE):
        return None
    sys.exit(f"pip-audit failed:\n{done.stderr}")


def verdict(packages: list[dict[str, Any]] | None, if_reachable: bool) -> tuple[int, str]:
    """The exit code, and what to say."""
    known = [package for package in packages or [] if "vulns" in package]
    if not known:
        return int(not if_reachable), (
            "audit: PyPI's vulnerability service cannot be reached from here, so no known vulnerability was looked up"
        )
    found = [f"{p['name']} {p['version']}: {v['id']}, {_mended(v)}" for p in known for v in p["vulns"]]
    missing = [p["name"] for p in packages or [] if "vulns" not in p]
    if missing:
        found.append(f"not looked up, since the service does not know the pinned version: {', '.join(missing)}")
    if found:
        return 1, "\n".join(["audit: move these forward in constraints.txt", *found])
    return 0, f"audit: no known vulnerability in {len(known)} pinned versions"


def _mended(vulnerability: dict[str, Any]) -> str:
    versions = vulnerability.get("fix_versions")
    return f"mended in {', '.join(versions)}" if versions else "not mended in any version"


def main(pip_audit: str, *options: str) -> None:
    code, words = verdict(look_up(pip_audit), "--if-reachable" in options)
    print(words, file=sys.stderr if code else sys.stdout)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
