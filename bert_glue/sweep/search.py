"""Searches hyperparameters with Optuna. The study is in Optuna's storage, which several machines can share.

Each trial trains all seeds of the sweep. Its value is the mean of the task's headline metric. If a sweep is killed,
the same command continues the unfinished trials of its folder. The best of many trials on one dev set is
optimistic: confirm it with new seeds.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from bert_glue.config.arguments import FLAGS, without_login
from bert_glue.config.values import flag_value
from bert_glue.errors import MachineError, UsageError, UserError, first_line
from bert_glue.result_keys import headline_keys
from bert_glue.storage.files import write_json, write_whole
from bert_glue.sweep.plan import Suite, SweepRun
from bert_glue.tasks import GlueTask

# The ranges of Devlin et al. 2019 (appendix A.3), extended by the longer training of Mosbach et al. 2021.
_SPACE = {
    "learning_rate": "1e-5:1e-4",
    "num_train_epochs": "2:10",
    "warmup_steps": "0:0.2",
    "per_device_train_batch_size": "16,32",
}
# The tiny BERT of the sample starts from random weights and needs higher rates.
_SAMPLE_SPACE = {**_SPACE, "learning_rate": "1e-4:1e-3"}
_OWNER = "sweep_folder"
STORAGE_SECONDS = 60.0
T = TypeVar("T")


def read_space(words: list[str], is_sample: bool) -> dict[str, str]:
    """The ranges to search, flag -> "low:high" or "a,b,c": the default ones, changed by the words of `--space`.

    Raises:
        UsageError: a flag is unknown, or a range does not fit its values.
    """
    space = dict(_SAMPLE_SPACE if is_sample else _SPACE)
    for word in words:
        name, equals, text = word.partition("=")
        ends = text.split(":") if ":" in text else text.split(",")
        flag = FLAGS.get(name)
        if not equals or flag is None or flag.kind == "bool":
            raise UsageError(
                f"--space {word}: write FLAG=LOW:HIGH or FLAG=A,B,C, where FLAG is a flag of run_glue.py with a value"
            )
        try:
            values = [flag_value(flag, end) for end in ends]
        except ValueError as error:
            raise UsageError(f"--space {name}: {error}") from None
        if ":" in text and (len(ends) != 2 or flag.kind == "str" or not values[0] < values[1]):
            raise UsageError(f"--space {word}: LOW:HIGH needs two numbers, and LOW must be below HIGH")
        space[name] = text
    return space


def _suggest(trial: Any, name: str, text: str) -> str:
    """A suggested value of one flag, as text: integers for integer ranges, log scale for ranges of a decade or more."""
    if ":" not in text:
        return trial.suggest_categorical(name, text.split(","))
    low, high = text.split(":")
    if low.isdecimal() and high.isdecimal():
        return str(trial.suggest_int(name, int(low), int(high)))
    bottom, top = float(low), float(high)
    return repr(trial.suggest_float(name, bottom, top, log=bottom > 0 and top / bottom >= 10))


@dataclass
class _Trial:
    """A trial that runs here: its number in the study, its runs, and how many of them are not done."""

    task: GlueTask
    number: int
    runs: list[SweepRun]
    left: int


class BoundedCalls:
    """Runs calls in a thread of its own, one after the other, and waits for each of them for a limited time.

    A database driver waits as long as it likes, in C code that no signal interrupts. The thread is a daemon, so that
    one which waits forever does not keep the process from ending.

    Args:
        seconds: the limit of one call, > 0.
        name: of what is called, for errors; without a login.
    """

    def __init__(self, seconds: float, name: str):
        self._seconds, self._name = seconds, name
        self._calls: SimpleQueue[tuple[futures.Future, Callable[[], Any]]] = SimpleQueue()
        self._is_hanging = False
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            result, action = self._calls.get()
            try:
                result.set_result(action())
            except BaseException as error:  # whatever a driver raises is the caller's
                result.set_exception(error)

    def __call__(self, action: Callable[[], T]) -> T:
        """The result of `action`, or what it raises.

        Raises:
            MachineError: there is no answer in time, or there was none to an earlier call.
        """
        result: futures.Future = futures.Future()
        if not self._is_hanging:
            self._calls.put((result, action))
            self._is_hanging = not futures.wait([result], self._seconds).done
        if self._is_hanging:
            raise MachineError(
                f"{self._name}: no answer within {self._seconds:g} s (--storage_timeout); the same command continues"
            )
        return result.result()


class Search:
    """A source of runs for the queue: gets trials from the study and reports their values to it.

    Args:
        trials: the number of trials of each study, over all machines.
        storage: the address of Optuna's storage. None: a file in the folder of the sweep.
        space: the result of `read_space`.
        timeout: seconds that one call of the storage may take.
    """

    def __init__(
        self, suite: Suite, tasks: list[GlueTask], seeds: list[int], trials: int, storage: str | None,
        space: dict[str, str], timeout: float = STORAGE_SECONDS,
    ):  # fmt: skip
        self.suite, self.tasks, self.seeds, self.trials, self.space = suite, tasks, seeds, trials, space
        self.storage = storage or f"sqlite:///{suite.output_dir.resolve()}/search.db"
        self._storage_name = f"--storage {without_login(self.storage)}"
        self._bounded = BoundedCalls(timeout, self._storage_name)
        self.runs: list[SweepRun] = []
        self._studies: dict[str, Any] = {}
        self._waiting: deque[SweepRun] = deque()
        self._open: dict[tuple[str, int], _Trial] = {}
        for task in tasks:  # finds a wrong flag before anything starts
            suite.run(task, seeds[0], {name: text.replace(":", ",").split(",")[0] for name, text in space.items()}, 0)

    def open(self) -> None:
        """Opens or creates the studies, and continues the unfinished trials of this folder.

        Raises:
            MachineError: Optuna is not installed, or the storage cannot be opened in time.
            UsageError: the folder of an unfinished trial has other settings.
        """
        try:
            import optuna
        except ImportError as error:
            raise MachineError(f"--search needs Optuna ({error}): python -m pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._owner = optuna, self._folder_id()
        storage = self._asked(lambda: optuna.storages.RDBStorage(self.storage))
        for task in self.tasks:
            self._studies[task.name] = self._asked(partial(self._study, storage, task))
        for task in self.tasks:
            for trial in self._trials(task, states=(self._state("RUNNING"),)):
                if trial.user_attrs.get(_OWNER) == self._owner:
                    self._begin(task, trial.number, trial.user_attrs["chosen"])

    def _study(self, storage: Any, task: GlueTask) -> Any:
        return self._optuna.create_study(
            storage=storage, study_name=self._study_name(task), direction="maximize", load_if_exists=True,
            sampler=self._optuna.samplers.TPESampler(constant_liar=True),
        )  # fmt: skip

    def _trials(self, task: GlueTask, **which: Any) -> list[Any]:
        return self._asked(lambda: self._studies[task.name].get_trials(deepcopy=False, **which))

    def _asked(self, action: Callable[[], T]) -> T:
        """Calls the storage with a time limit and returns the result.

        Raises:
            MachineError: there is no answer, or Optuna, SQLAlchemy or a database driver has raised any error.
        """
        try:
            return self._bounded(action)
        except UserError:
            raise
        except Exception as error:
            first = first_line(error).replace(self.storage, "it")
            raise MachineError(f"{self._storage_name}: {first}") from error

    def _state(self, name: str) -> Any:
        return getattr(self._optuna.trial.TrialState, name)

    def _folder_id(self) -> str:
        """An id that tells the trials of this folder from those of other machines, even if the host is renamed."""
        file = self.suite.output_dir / "search_folder_id"
        if not file.exists():
            write_whole(file, uuid.uuid4().hex)
        return file.read_text(encoding="utf-8")

    def _study_name(self, task: GlueTask) -> str:
        """The task and a hash of all settings that are not searched, so that different problems never share a study."""
        first = {name: text.replace(":", ",").split(",")[0] for name, text in self.space.items()}
        settings = self.suite.run(task, 0, first, 0).settings
        same = {name: value for name, value in settings.items() if name not in (*self.space, "seed")}
        text = json.dumps([same, self.seeds, self.space], sort_keys=True)
        return f"bert_glue {task.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def next_run(self) -> SweepRun | None:
        """A run of an open trial, else of a new trial. None once every study has all of its trials."""
        for task in self.tasks:
            if not self._waiting and len(self._trials(task)) < self.trials:
                self._begin(task, *self._asked(partial(self._new_trial, self._studies[task.name])))
        return self._waiting.popleft() if self._waiting else None

    def _new_trial(self, study: Any) -> tuple[int, dict[str, str]]:
        """The number of a new trial, and the values chosen for it."""
        trial = study.ask()
        chosen = {name: _suggest(trial, name, text) for name, text in self.space.items()}
        trial.set_user_attr("chosen", chosen)
        trial.set_user_attr(_OWNER, self._owner)
        return trial.number, chosen

    def _begin(self, task: GlueTask, number: int, chosen: dict[str, str]) -> None:
        runs = [self.suite.run(task, seed, chosen, number) for seed in self.seeds]
        self.runs += runs
        waiting = [run for run in runs if run.results() is None]
        trial = self._open[task.name, number] = _Trial(task, number, runs, len(waiting))
        self._waiting.extend(waiting)
        if not waiting:
            self._tell(trial)

    def ended(self, run: SweepRun, is_done: bool) -> None:
        """Reports a trial to the study once all of its runs are done, or once one of them has failed."""
        trial = self._open.get((run.task.name, run.trial or 0))
        if trial is None:
            return
        trial.left -= 1
        if not is_done:
            del self._open[trial.task.name, trial.number]
            self._waiting = deque(other for other in self._waiting if other not in trial.runs)
            self._fail(trial)
        elif trial.left == 0:
            self._tell(trial)

    def _tell(self, trial: _Trial) -> None:
        del self._open[trial.task.name, trial.number]
        key = headline_keys(trial.task)[0]
        values = [(run.results() or {}).get(key) for run in trial.runs]
        if None in values:  # a correlation of constant scores has no value
            self._fail(trial)
        else:
            self._asked(lambda: self._studies[trial.task.name].tell(trial.number, statistics.fmean(values)))

    def _fail(self, trial: _Trial) -> None:
        self._asked(lambda: self._studies[trial.task.name].tell(trial.number, state=self._state("FAIL")))

    def summary(self) -> dict[str, Any]:
        """The best trial and the counts of each study, over all machines. Also writes `best_<task>.json`.

        Raises:
            MachineError: as in `open`.
        """
        return {name: self._about(name, study) for name, study in self._studies.items()}

    def _about(self, name: str, study: Any) -> dict[str, Any]:
        trials = self._asked(lambda: study.get_trials(deepcopy=False))
        counts = {state: sum(t.state.name == state for t in trials) for state in ("COMPLETE", "FAIL", "RUNNING")}
        about = {"study": study.study_name, "storage": without_login(self.storage), "space": self.space, **counts}
        if counts["COMPLETE"]:
            best = self._asked(lambda: study.best_trial)
            about |= {"best_trial": best.number, "best_value": best.value, "best": best.user_attrs["chosen"]}
            self._write_best(name, best.user_attrs["chosen"])
        return about

    def _write_best(self, name: str, chosen: dict[str, str]) -> None:
        task = next(task for task in self.tasks if task.name == name)
        settings = self.suite.run(task, self.seeds[0], chosen, 0).settings
        config = {k: v for k, v in settings.items() if k != "seed" and k in FLAGS and v != FLAGS[k].default}
        file = self.suite.output_dir / f"best_{name}.json"
        write_json(file, config)
