"""Reports known vulnerabilities of the installed packages, found by pip-audit. Needs only the standard library.

    python -m tools.requirements_audit <pip-audit> <site-packages>

pip-audit also ends with 0 and "no known vulnerabilities" if the service knows none of the packages, for example behind
a proxy that answers 404. So this script reads its JSON and never calls a package sound that was not audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_SECONDS = 300


def judge(report: dict) -> tuple[int, str]:
    """Exit code and lines for one JSON report of pip-audit. The code is 1 if a package has a known vulnerability."""
    packages = report["dependencies"]
    audited = [package for package in packages if "vulns" in package]
    bad = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in audited
        for found in package["vulns"]
    ]
    if bad:
        return 1, "\n".join(f"audit: {line}" for line in bad)
    if not audited:
        return 0, f"audit: skipped, because the service knows none of the {len(packages)} packages"
    rest = len(packages) - len(audited)
    more = f"; {rest} could not be audited" if rest else ""
    return 0, f"audit: no known vulnerability in {len(audited)} packages{more}"


def audit(tool: str, packages: str) -> tuple[int, str]:
    """Run pip-audit on an installation.

    Args:
        tool: pip-audit's path; "" if it is not installed.
        packages: folder of the installed packages.

    Returns:
        Exit code and lines; 0 and the reason if nothing could be audited.
    """
    if not tool:
        return 0, "audit: skipped, because pip-audit is not installed (bash test/run_tests.sh --audit installs it)"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "audit.json"
        command = [tool, "--path", packages, "--format", "json", "--output", str(output), "--progress-spinner", "off"]
        try:
            done = subprocess.run([*command, "--timeout", "5"], capture_output=True, text=True, timeout=_SECONDS)
            if output.is_file():
                return judge(json.loads(output.read_text(encoding="utf-8")))
            reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
    return 0, f"audit: skipped, because the service cannot be reached: {reason[:200]}"


if __name__ == "__main__":
    code, lines = audit(sys.argv[1], sys.argv[2])
    print(lines)
    sys.exit(code)
