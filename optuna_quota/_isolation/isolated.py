"""``isolated`` and ``script``: objectives whose trials run in processes that can be killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
import functools
import os
import re
import shlex
import shutil
from typing import Any, get_args

from optuna.trial import BaseTrial

from optuna_quota._isolation.launch import IsolationOptions, OnCrash, StartMethod
from optuna_quota._isolation.run import TrialRun
from optuna_quota._isolation.script_process import RunScript
from optuna_quota._limits import Limits
from optuna_quota._units import check_flags, check_mapping, Duration, parse_seconds


class Isolated:
    """An objective whose trials run in processes of their own; made by :func:`isolated`."""

    def __init__(self, objective: Callable[..., Any], options: IsolationOptions) -> None:
        functools.update_wrapper(self, objective, updated=())
        self.objective = objective
        self.options = options

    def __call__(self, trial: BaseTrial) -> Any:
        return TrialRun(lambda _: self.objective, self.options, trial).run()

    def __repr__(self) -> str:
        name = getattr(self.objective, "__qualname__", repr(self.objective))
        return f"isolated({name})"


def isolated(
    objective: Callable[..., Any],
    *,
    grace_period: Duration = 5.0,
    start_method: StartMethod = "forkserver",
    limits: Limits | None = None,
    predictive_stop: bool = False,
    on_crash: OnCrash = "fail",
    strict_memory: bool = False,
    preload: Sequence[str] = (),
) -> Isolated:
    """Run each trial of an objective in a child process that can be killed.

    The trial that the objective gets works as usual, and what the objective returns, raises,
    prints and logs arrives as if it had run in this process. In a trial over a limit,
    :class:`~optuna_quota.LimitBreached` is raised in the main thread, so that it can save a
    checkpoint; after the grace period it is killed, with all processes that it started. A trial
    whose process dies fails, and the study continues. After Ctrl-C, too, a trial has its grace
    period; a second Ctrl-C kills it. While this process is stopped (Ctrl-Z, SIGSTOP), so are its
    trials, and that time does not count.

    Example:

        .. code-block:: python

            study = optuna.create_study(
                pruner=QuotaPruner(MedianPruner(), limits=Limits(memory="4GiB", wall_time="5min"))
            )
            study.optimize(isolated(objective), n_trials=100)

    The script needs no ``if __name__ == "__main__":`` guard: a trial's process runs its imports
    and definitions only, and gets the global variables that the objective uses by value. With a
    guard, all code outside of it runs again, as under :mod:`multiprocessing`. Settings that the
    script has made in its modules, in numpy, torch and other libraries hold in its trials. What a
    trial changes stays in its process.

    A trial starts with the modules loaded that this process has imported. Its random generators
    (``random``, numpy, torch; those that the script has made, too) are seeded differently for each
    trial, and reproducibly in a script that seeds them. Threads, pools and processes that it
    leaves open end with it.

    Args:
        objective: A function, lambda, closure, bound method or any callable that takes a trial.
        grace_period: Seconds between the polite stop and the kill, or a duration such as "1min".
            Also the time for exit handlers once the objective has ended (1 to 5 s), and for a
            process that was stopped by SIGSTOP to be continued. A trial over its memory limit that
            continues to grow gets none. 0 kills at once.
        start_method: ``"forkserver"`` forks each trial from a server process that has loaded the
            modules (some milliseconds), ``"spawn"`` starts an interpreter for each (some hundred),
            ``"fork"`` forks this process, so that nothing needs to be pickled; it is refused once
            this process uses CUDA, and is unsafe with threads that hold locks. Locks and queues
            of :mod:`multiprocessing` can be passed in as to a ``Process`` of that method; an
            objective that refers to one of its fork context is forked in any case.
        limits: Limits on each trial, for where no :class:`~optuna_quota.QuotaPruner` can be
            passed; otherwise those of the study's pruner are in force.
        predictive_stop: Whether to stop a trial as soon as the growth of its memory, or its pace
            against the time limit, is certain to breach: see ``Breach.forecast``.
        on_crash: What ``optimize`` does when a trial's process dies of a signal, exits, or returns
            a value that can't be pickled: ``"fail"`` fails the trial and continues with the next
            one, ``"raise"`` raises :class:`~optuna_quota.TrialCrashed`. When the first three
            trials of a study, or five in a row, have crashed, it is raised in either case.
        strict_memory: Whether the kernel refuses an allocation that would pass the memory limit.
            Then a trial never passes it, but memory that is reserved and never touched counts as
            well (``np.zeros``, the stacks of threads). By default the memory in use is measured,
            and a trial is stopped once it passes the limit.
        preload: Names of modules to import before the first trial starts, in addition to those
            that this process has imported. What a trial imports of their packages is imported
            before the next one starts.

    Returns:
        A callable for ``study.optimize``, or to be called with a trial from ``study.ask``.

    Raises:
        ValueError: If ``grace_period`` is negative or not finite, or ``start_method`` or
            ``on_crash`` is unknown.
        TypeError: If the objective can't be called, ``limits`` is not a Limits, or ``preload``
            is not a sequence of module names.
        LimitBreached: By the call, when the trial was over a limit.
        TrialCrashed: By the call, when the trial's process died; within ``optimize`` as
            ``on_crash`` says.
    """
    if not callable(objective):
        raise TypeError(f"`objective` must be callable but got {objective!r}.")
    if isinstance(getattr(objective, "__dict__", {}).get("options"), IsolationOptions):
        raise TypeError(
            f"`objective` must not be isolated already but got {objective!r}: pass that to "
            "`study.optimize` as it is."
        )
    if start_method not in get_args(StartMethod):
        methods = ", ".join(get_args(StartMethod))
        raise ValueError(f"`start_method` must be one of {methods} but got {start_method!r}.")
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"`limits` must be Limits but got {limits!r}.")
    if on_crash not in get_args(OnCrash):
        raise ValueError(f"`on_crash` must be 'fail' or 'raise' but got {on_crash!r}.")
    check_flags(predictive_stop=predictive_stop, strict_memory=strict_memory)
    is_several = isinstance(preload, Iterable) and not isinstance(preload, str)
    names = tuple(preload) if is_several else ()
    if not is_several or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`preload` must be a sequence of module names but got {preload!r}.")
    options = IsolationOptions(
        grace_period=parse_seconds(grace_period, "grace_period", zero=True),
        start_method=start_method,
        limits=limits,
        predictive_stop=predictive_stop,
        on_crash=on_crash,
        strict_memory=strict_memory,
        preload=names,
    )
    return Isolated(objective, options)


@dataclass(eq=False, repr=False)
class Script:
    """An objective that runs a script for each trial; made by :func:`script`."""

    words: Sequence[str]
    params: Callable[[Any], Mapping[str, Any]]
    options: IsolationOptions
    folder: str | None
    env: Mapping[str, str]

    def __call__(self, trial: BaseTrial) -> Any:
        return TrialRun(self._bind, self.options, trial).run()

    def _bind(self, trial: BaseTrial) -> RunScript:
        values = self.params(trial)
        if not isinstance(values, Mapping):
            raise TypeError(f"`params` must return a dict but returned {values!r}.")
        words = fill_command(self.words, values)
        return RunScript(words, self.folder, self.env, self.options.grace_period)

    def __repr__(self) -> str:
        return f"script({shlex.join(self.words)!r})"


def script(
    command: str | Sequence[str | os.PathLike[str]],
    params: Callable[[Any], Mapping[str, Any]],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    grace_period: Duration = 5.0,
    on_crash: OnCrash = "fail",
) -> Script:
    """Use a training script as an objective, in any language.

    Each trial runs the command in a process of its own, under the limits of the study's
    :class:`~optuna_quota.QuotaPruner` and with all processes that it starts, as under
    :func:`isolated`. The script says how it does in lines of its standard output:

    - ``{"step": 3, "value": 0.41}`` is an intermediate value, for the study's pruner.
    - ``{"value": 0.25}`` is its value, ``{"values": [0.25, 3]}`` for several objectives; the last
      such line counts.

    A trial that is pruned, or over a limit, gets SIGTERM, to save its work, and is killed when the
    grace period is over. All output is passed on, with the trial's number before each line.

    Example:

        .. code-block:: python

            objective = script(
                "python train.py --lr {lr} --width {width}",
                lambda trial: {
                    "lr": trial.suggest_float("lr", 1e-5, 1e-1, log=True),
                    "width": trial.suggest_int("width", 8, 512),
                },
            )
            study.optimize(objective, n_trials=100, n_jobs=2)

    Args:
        command: A string, split into words as a shell does but run without one, or a sequence of
            words. ``{name}`` stands for what ``params`` returns under that name, with a format if
            need be, as in ``{lr:.3e}``; a value never splits into words. ``{{name}}`` stands for
            ``{name}`` itself; other braces stay as they are.
        params: A function that takes a trial and returns a dict; it runs in this process.
        cwd: The working directory of the script; that of this process by default.
        env: Environment variables beside those of this process. ``PYTHONUNBUFFERED`` is set to 1
            if it is not set, so that values arrive as they are printed.
        grace_period: Seconds between SIGTERM and the kill, or a duration such as "1min"; 0 kills
            at once.
        on_crash: What ``optimize`` does when the script fails, by its exit status, by a signal or
            because it prints no value: ``"fail"`` fails the trial and continues, ``"raise"``
            raises :class:`~optuna_quota.TrialCrashed`. When the first three trials of a study, or
            five in a row, have failed so, it is raised in either case.

    Returns:
        A callable for ``study.optimize``, or to be called with a trial from ``study.ask``.

    Raises:
        TypeError: If an argument is of the wrong type, or ``params`` returns no dict.
        ValueError: If the command is empty, or its quotes don't match; in a trial, if it has a
            ``{name}`` that ``params`` does not return.
        FileNotFoundError: If the program or ``cwd`` does not exist.
        PermissionError: If the program is not executable.
        NotImplementedError: On Windows, which has no SIGTERM.
        LimitBreached: By the call, when the trial was over a limit.
        TrialCrashed: By the call, when the script failed; within ``optimize`` as ``on_crash``
            says.
    """
    if os.name != "posix":
        raise NotImplementedError("`script` needs Linux or macOS: Windows has no SIGTERM.")
    words = split_command(command)
    if not callable(params):
        raise TypeError(f"`params` must be a function of a trial but got {params!r}.")
    variables = {} if env is None else env
    check_mapping(variables, "env", "names to strings")
    if not all(isinstance(text, str) for text in variables.values()):
        raise TypeError(f"`env` must map names to strings but got {env!r}.")
    if cwd is not None and not isinstance(cwd, (str, os.PathLike)):
        raise TypeError(f"`cwd` must be the path of a folder but got {cwd!r}.")
    folder = None if cwd is None else os.fspath(cwd)
    if folder is not None and not os.path.isdir(folder):
        raise FileNotFoundError(f"`cwd` must be an existing folder but got {folder!r}.")
    if not _FIELD.search(words[0]):
        _check_program(words[0], folder, variables)
    options = isolated(params, grace_period=grace_period, on_crash=on_crash).options
    return Script(words, params, options, folder, dict(variables))


def _check_program(program: str, folder: str | None, env: Mapping[str, str]) -> None:
    if not os.path.dirname(program):
        if shutil.which(program, path=env.get("PATH")) is None:
            raise FileNotFoundError(
                f"`command` begins with {program!r}, which is not on the PATH. No shell runs it: "
                "for a shell's syntax pass ['bash', '-c', '…']."
            )
        return
    path = os.path.join(folder or "", program)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`command` begins with {program!r}, which does not exist.")
    if not os.access(path, os.X_OK):
        raise PermissionError(
            f"`command` begins with {program!r}, which is not executable: put its interpreter "
            "before it, such as `python` or `bash`."
        )


# The command: it is split before it is filled, so that a value with spaces stays in one word.

# A name with an optional format, in braces. Other braces, as in JSON or in code, stay as they are,
# and so do a shell's variables, `${name}`.
_NAME = r"([^\W\d][\w./-]*)(?::([^{}\s]*))?"
_FIELD = re.compile(rf"\{{(\{{{_NAME}\}})\}}|(?<!\$)\{{{_NAME}\}}")


def split_command(command: Any) -> list[str]:
    """Return the words of a command: a string, split as a POSIX shell would, or a sequence."""
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"`command` can't be split: {error}, in {command!r}.") from None
    else:
        is_sequence = isinstance(command, Sequence) and not isinstance(command, (bytes, bytearray))
        parts: list[Any] = list(command) if is_sequence else [command]
        words = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in parts]
        if not is_sequence or not all(isinstance(word, str) for word in words):
            raise TypeError(
                f"`command` must be a string or a sequence of strings but got {command!r}."
            )
    if not words or not words[0]:
        raise ValueError(f"`command` must begin with a program but got {command!r}.")
    return words


def fill_command(words: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    def fill(field: re.Match[str]) -> str:
        doubled, _, _, name, spec = field.groups()
        if doubled is not None:
            return str(doubled)
        if name not in values:
            known = ", ".join(map(repr, values)) or "nothing"
            raise ValueError(
                f"`command` has {field[0]} but `params` returned {known}. Write {{{field[0]}}} "
                "where it is no parameter."
            )
        try:
            return format(values[name], spec or "")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{field[0]} can't format {values[name]!r}: {error}.") from error

    return [_FIELD.sub(fill, word) for word in words]
