"""Writes reports of finished runs: `python -m bert_glue.report FOLDER...`

For the folder of one run it rewrites `report.html` from the run's files. For several folders, or a folder that contains
runs, it writes one page for all tasks and seeds (`suite_page`). It uses no device and no network. Every run of
`run_glue.py` writes its own report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bert_glue.config.command_line import CommandParser
from bert_glue.errors import MachineError, exit_code_of, run_program
from bert_glue.report.page import write_page
from bert_glue.report.run_page import run_page
from bert_glue.storage.files import RESULTS_FILE


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage, 4 no results, 6 not written."""
    parser = CommandParser(
        same={"output_dir": "output"},
        prog="python -m bert_glue.report",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run, or a folder that contains runs"
    )
    parser.add_argument("--output", type=Path, help="default: report.html in the folder; in . for several folders")
    args = parser.parse_args(argv)

    sys.stdout.reconfigure(errors="backslashreplace")  # this locale may not be able to show a folder's name

    def write() -> int:
        from bert_glue.report.suite_page import find_runs, suite_page

        missing = [str(folder) for folder in args.folders if not folder.is_dir()]
        if missing:
            raise MachineError(f"{', '.join(missing)}: no such folder")
        is_one_run = len(args.folders) == 1 and (args.folders[0] / RESULTS_FILE).is_file()
        target = args.output or (args.folders[0] if len(args.folders) == 1 else Path()) / "report.html"
        text = run_page(args.folders[0]) if is_one_run else suite_page(find_runs(args.folders))
        write_page(target, text)
        print(f"wrote {target}")
        return 0

    return exit_code_of(write)


if __name__ == "__main__":
    run_program(main)
