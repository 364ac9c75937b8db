"""Everything this package raises on purpose.

    QfaeError            exit 1   anything that stops a command
    ├── UsageError       exit 2   the command line or a setting is wrong; holds every fault found
    ├── InputError       exit 1   one input file cannot be read; in a run it becomes a row
    ├── ManifestError    exit 1   a manifest is missing, damaged, or does not describe the files beside it
    ├── EngineError      exit 1   an engine cannot be opened or was handed what it does not take
    ├── SelfTestError    exit 1   an engine does not reproduce its golden outputs on this machine
    ├── CanaryError      exit 1   a golden image that rode in a run did not give its outputs: the engine went wrong
    ├── CalibrationError exit 1   a threshold cannot be found, or does not belong to the engine
    ├── OutputError      exit 1   the output folder cannot be used as asked
    └── RunInterruptedError  exit 130  the user stopped the run; what was written is whole

Each message says what, what was got, what was expected, and the cure.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

SOME_INPUTS_FAILED = 3
"""Exit code of a command that did its work, but for some inputs that could not be scored."""
LONGEST_REASON = 500
_CURE_OF_CANARY = ", and repeat the self-test: this machine does not compute as it did"
INTERRUPTED = 130
"""Exit code of a command that the user or the system stopped."""


class QfaeError(Exception):
    """Anything that stops a command with one clear sentence and no traceback."""

    exit_code = 1


class UsageError(QfaeError):
    """Wrong usage. `faults` holds every fault found, so that they can be cured in one go."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: list[str] = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class InputError(QfaeError):
    """One input file cannot be read. `reason` is the sentence without the file's name, cut at LONGEST_REASON letters.

    A longer one would be no sentence of this project, but something of the file.
    """

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + " ..."
        super().__init__(f"{source}: {self.reason}")


class ManifestError(QfaeError):
    """A manifest is missing, damaged, or does not describe the files beside it."""


class EngineError(QfaeError):
    """An engine cannot be opened, or was handed what it does not take."""


class SelfTestError(QfaeError):
    """An engine does not reproduce its golden outputs on this machine."""


class CanaryError(QfaeError):
    """A golden image that rode in a batch did not give PyTorch's outputs; `reason` says how.

    `first` is the number, from 1, of the first image (in a run: row) whose score is not to be trusted.
    """

    def __init__(self, reason: str, first: int, of: str = "image", where: str = "", cure: str = "") -> None:
        self.reason = reason
        self.first = first
        super().__init__(
            f"canary: a golden image in a batch no longer gives PyTorch's outputs ({reason}); do not trust the scores "
            f"from {of} {first}{where} on{cure or _CURE_OF_CANARY}"
        )


class CalibrationError(QfaeError):
    """A threshold cannot be found, or a calibration is damaged or does not belong to the engine."""


class OutputError(QfaeError):
    """The output folder cannot be used as asked."""


class RunInterruptedError(QfaeError):
    """The user stopped the run. What was written until then is whole."""

    exit_code = INTERRUPTED


def cure_of_writing(error: OSError, choose: str) -> str:
    """Return what cures a place that cannot be written; `choose` names what else could be given ("another --out")."""
    cures = {
        errno.ENOTDIR: "a part of that path is a file:",
        errno.EACCES: "let yourself write there or",
        errno.EPERM: "let yourself write there or",
        errno.EROFS: "it is mounted read-only:",
    }
    return f"{cures.get(error.errno or 0, 'free some space or')} choose {choose}"
