"""Errors that say what happened, on which slide, file or field, and how to fix it.

Exit codes of the command line: 0 all good, 1 some slides failed (listed), 2 bad usage or input.
"""

from collections.abc import Sequence


class HmilError(Exception):
    """A mistake or a bad input that the user can mend.

    Args:
        what: What happened, naming the slide, file or field and the value.
        fix: What to do about it, in the imperative.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\nFix: {self.fix}"


class UsageError(HmilError):
    """A bad argument, setting, label file or label tree."""


class SlideError(HmilError):
    """One slide cannot be used; the others of the job go on."""


class StoreError(HmilError):
    """The feature store, or one slide in it, is missing, damaged or of another kind."""


class DamagedError(StoreError):
    """Bytes in the feature store are missing, or are not those that were written.

    A read that fails (permission, network, timeout) raises StoreError: it says nothing of them.
    """


class Stopped(KeyboardInterrupt):
    """The user asked to stop by a signal; what was done so far is kept.

    Args:
        signal_number: The signal, which decides the exit code.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.exit_code = 128 + signal_number


def some(names: Sequence[str]) -> str:
    """The first five names, for people."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
