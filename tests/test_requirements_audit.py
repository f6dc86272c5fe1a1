"""The audit of installed packages: what fails the gate, what is only reported, and that no failed audit passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.requirements_audit import audit, judge

SOUND = {"name": "torch", "version": "2.13.0", "vulns": []}
SKIPPED = {"name": "numpy", "skip_reason": "not found and could not be audited"}
BAD = {
    "name": "x",
    "version": "1.0",
    "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}, {"id": "CVE-2", "fix_versions": []}],
}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([SOUND, SOUND], 0, "audit: no known vulnerability in 2 packages"),
        ([SOUND, SKIPPED], 0, "audit: no known vulnerability in 1 packages; 1 could not be audited"),
        ([SKIPPED, SKIPPED], 0, "audit: skipped, because the service knows none of the 2 packages"),
        ([], 0, "audit: skipped, because the service knows none of the 0 packages"),
        ([SOUND, BAD], 1, "audit: x 1.0: CVE-1, fixed in 1.1\naudit: x 1.0: CVE-2, fixed in none"),
    ],
)
def test_what_a_report_means(packages, code, words):
    assert judge({"dependencies": packages}) == (code, words)


def tool(folder: Path, body: str) -> str:
    """An executable in pip-audit's place; its sixth argument is the output file."""
    path = folder / "pip-audit"
    path.write_text(f"#!{sys.executable}\nimport sys\noutput = sys.argv[sys.argv.index('--output') + 1]\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_vulnerability_fails_the_gate(tmp_path):
    found = json.dumps({"dependencies": [BAD], "fixes": []})
    path = tool(tmp_path, f"open(output, 'w').write({found!r}); sys.exit(1)")
    command = [sys.executable, "-m", "tools.requirements_audit", path, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and "CVE-1" in done.stdout


def test_no_network_is_said_and_fails_nothing(tmp_path):
    path = tool(tmp_path, "sys.exit('ConnectionError: failed to resolve the service')")
    assert audit(path, str(tmp_path)) == (
        0,
        "audit: skipped, because the service cannot be reached: ConnectionError: failed to resolve the service",
    )


@pytest.mark.parametrize("body", ["pass", "open(output, 'w').write('{')", "open(output, 'w').write('[]')"])
def test_an_answer_that_is_none_is_no_all_clear(tmp_path, body):
    code, line = audit(tool(tmp_path, body), str(tmp_path))
    assert code == 0 and line.startswith("audit: skipped")


def test_without_the_tool_it_says_how_to_get_it(tmp_path):
    assert audit("", str(tmp_path)) == (
        0,
        "audit: skipped, because pip-audit is not installed (bash test/run_tests.sh --audit installs it)",
    )
    assert audit(str(tmp_path / "absent"), str(tmp_path))[1].startswith("audit: skipped")
