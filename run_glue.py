#!/usr/bin/env python3
"""Fine-tune, evaluate and predict a GLUE task: `python run_glue.py --help`.

Exit codes: 0 done, 2 usage, 3 data, 4 environment or device, 5 diverged, 6 checkpoint or disk,
7 the other ranks were lost, 8 a bound of --expect was missed, 130 and 143 ended by SIGINT and SIGTERM
after a checkpoint was saved.
"""

from bert_glue.errors import exit_code_of, run_program
from bert_glue.launch.requirements import refuse_unusable


def main(argv: list[str]) -> int:
    """Run one process; returns its exit code."""

    def parse_and_run() -> int:
        from bert_glue.config.parser import main_parse

        args = main_parse(argv)
        if args is None:  # --help, --version or --print_config was answered
            return 0
        refuse_unusable()
        from bert_glue.pipeline.run import run

        return run(args)

    return exit_code_of(parse_and_run)


if __name__ == "__main__":
    run_program(main)
