"""`pip install .`: the wheel, its `bert-glue` command from an empty folder, and how quick its help is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from bert_glue import __version__
from bert_glue.__main__ import COMMANDS, completion, main
from bert_glue.errors import run_program

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "sklearn", "matplotlib", "pyarrow")


def test_every_command_has_a_module_with_a_main():
    for command in COMMANDS.values():
        source = Path(find_spec(command.module).origin).read_text()
        assert "\ndef main(argv: list[str]) -> int:" in source, command.module


def test_the_first_words(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__
    assert main([]) == 2 and "usage: bert-glue COMMAND" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: unknown command 'trian'. Did you mean train? Choices: train, eval,"
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--seed", "7"], ["--do_train", "--seed", "7"]),
        (["eval", "run.json", "--seed", "7"], ["run.json", "--do_eval", "--seed", "7"]),
        (["predict", "--model", "x"], ["--model", "x"]),
    ],
)
def test_words_are_passed_on(monkeypatch, argv, expected):
    import importlib

    seen = []
    module = importlib.import_module(COMMANDS[argv[0]].module)
    monkeypatch.setattr(module, "main", lambda words: seen.append(words) or 5)
    assert main(argv) == 5 and seen == [expected]


def test_submission_is_another_name_of_submit(monkeypatch):
    seen = []
    monkeypatch.setattr("bert_glue.submission.main", lambda words: seen.append(words) or 5)
    assert main(["submission", "run"]) == main(["submit", "run"]) == 5 and seen == [["run"], ["run"]]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", [["--help"], ["--no_such_flag_at_all"]])
def test_help_and_usage_errors_import_nothing_heavy(name, words):
    code = (
        "import sys\nfrom bert_glue.__main__ import main\ntry: code = main(sys.argv[1:])\n"
        "except SystemExit as ended: code = ended.code\n"
        f"print('LOADED', *[m for m in {HEAVY} if m in sys.modules])\nsys.exit(code)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, name, *words], capture_output=True, text=True, cwd=REPOSITORY)
    spent = time.monotonic() - begin
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    assert done.stdout.rstrip().endswith("LOADED") and spent < 20  # 0.3 s on a machine at rest


def without_reader(*words: str) -> tuple[int, str]:
    """(exit code, stderr) of a program whose stdout is a pipe that nobody reads any more, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *words], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["", *COMMANDS, "submission"])
def test_help_that_nobody_reads_on_ends_quietly(name):
    assert without_reader("-m", "bert_glue", *filter(None, [name]), "--help") == (0, "")


@pytest.mark.parametrize("words", [("run_glue.py", "--help", "all"), ("-m", "bert_glue.soup", "-h")])
def test_programs_of_their_own_end_as_quietly(words):
    assert without_reader(*words) == (0, "")


def test_work_that_nobody_reads_on_says_so():
    gone = "error: the reader of this program's output has ended\n"
    assert without_reader("-m", "bert_glue", "completion") == (141, gone)
    assert without_reader(
        "run_glue.py", "--print_config", "--sample", "--task_name", "mrpc", "--output_dir", "x", "--do_train"
    ) == (141, gone)


def test_a_broken_socket_is_no_reader_that_left(monkeypatch):
    def main(argv: list[str]) -> int:
        raise BrokenPipeError("a socket")

    with pytest.raises(BrokenPipeError), (REPOSITORY / "LICENSE").open() as file:
        monkeypatch.setattr(sys, "stdout", file)
        run_program(main)


def bash(script: str) -> str:
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes_commands_and_flags():
    ask = 'COMP_WORDS=({words}); COMP_CWORD={at}; _bert_glue; echo "${{COMPREPLY[*]}}"'
    assert bash(completion() + "\n" + ask.format(words="bert-glue pre", at=1)).split() == ["predict"]
    flags = bash(completion() + "\n" + ask.format(words="bert-glue train --learning", at=2)).split()
    assert flags == ["--learning_rate"]
    assert bash(completion() + "\n" + ask.format(words="bert-glue doctor --learning", at=2)).split() == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git has, with this environment's setuptools and no network."""
    # Asked of the list of packages: setuptools' hook takes a look for pip as pip's start, and then no longer serves
    # its distutils to those who come later in this process, such as torch's compiler.
    if not {"pip", "setuptools"} <= packages_distributions().keys():
        pytest.skip("no pip or setuptools in this environment")
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip(f"setuptools {version('setuptools')} does not know licence expressions")
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE", "run_glue.py", "requirements.txt"):
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    shutil.copytree(REPOSITORY / "bert_glue", folder / "bert_glue", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "."]
    done = subprocess.run([*command, "-w", "dist"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_holds_the_program_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [
        path for path in (REPOSITORY / "bert_glue").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    ours = {path.relative_to(REPOSITORY).as_posix() for path in files}  # modules and templates
    recipes = {f"bert_glue/{p.relative_to(REPOSITORY)}" for p in (REPOSITORY / "configs").glob("*/*.json")}
    assert {*ours, *recipes, "run_glue.py"} <= names and len(recipes) == 3 * 9 + 2  # baselines of cpu and npu
    assert all(name.startswith("bert_glue/") or name == "run_glue.py" for name in names)


def test_the_installed_command_runs_from_an_empty_folder(wheel, tmp_path):
    """In a fresh environment that sees this one's packages, not its source."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text(f"{Path(find_spec('torch').origin).parents[1]}\n")
    target = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv" / "bin" / "python"), "install", "-q"]
    done = subprocess.run([*target, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"BERT_GLUE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess:
        door = tmp_path / "venv" / "bin" / "bert-glue"
        return subprocess.run([door, *words], cwd=empty, env=environment, capture_output=True, text=True)

    assert run("--version").stdout.strip() == __version__
    sample = ["--sample", "--task_name", "wnli", "--max_steps", "2", "--output_dir", "out", "--use_cpu"]
    done = run("train", *sample, "--do_eval", "--do_predict", "--save_strategy", "no")
    assert done.returncode == 0, done.stderr
    (empty / "in.jsonl").write_text('{"sentence1": "a dog runs", "sentence2": "a cat runs"}\n')
    assert run("predict", "--model", "out", "--input", "in.jsonl", "--output", "out.csv").returncode == 0
    assert (empty / "out.csv").read_text().startswith("sentence1,sentence2,prediction,")
    recipe = ["--recipe", "stable", "--print_config"]
    assert '"early_stopping_patience": 5' in run("train", *sample, "--do_train", *recipe).stdout
    assert run("report", "out").stdout == "wrote out/report.html\n"
    assert run("submit", "out").returncode == 3
