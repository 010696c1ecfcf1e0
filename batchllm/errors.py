"""Errors a person caused and can mend. Each message is one sentence: where, what is wrong, what to do."""

from __future__ import annotations


class UserError(Exception):
    """Ends the command with exit code 2 and its message, without a traceback; nothing has been written."""


class JobError(UserError):
    """The job file or its overrides are wrong. The message names file, key path and the nearest valid name."""


class InputError(UserError):
    """The input data cannot be opened or lacks a column."""


class ModelError(UserError):
    """The model folder cannot be used, or the model would give silently wrong results."""


class OutputError(UserError):
    """The output folder holds something this job must not touch."""


class ArgumentError(UserError, ValueError):
    """An argument of the Python API is wrong."""


def first_line(error: BaseException) -> str:
    """The message of a library's error, which may go on for many lines, in one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
