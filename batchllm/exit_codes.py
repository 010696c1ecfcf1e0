"""What a command exits with. docs and README say it to users."""

from __future__ import annotations

OK = 0  # all that was asked for
FAULT = 1  # of ours, or a file that could not be written
USER_ERROR = 2  # a job file, arguments or input; nothing was written
SOME_FAILED = 3  # finished, but some rows, lines, chunks or tasks have an error
REGRESSION = 4  # an evaluation is worse than the one before
INTERRUPTED = 130  # what was finished before is kept
