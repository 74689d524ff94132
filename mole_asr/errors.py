"""What the user is told of what went wrong."""

import sys
from collections.abc import Iterable


class MoleError(Exception):
    """A problem that the user can solve.

    The message is one line: it names the file, the key or the value, and says what to do. The command line prints
    it without a traceback and exits with code 1.
    """


def print_skipped(failures: Iterable[str]) -> None:
    """Names on standard error what a verb could not use and went on without.

    Args:
        failures: "name: reason" each.
    """
    listed = list(failures)
    if listed:
        print("\n  ".join([f"{len(listed)} skipped:", *listed]), file=sys.stderr)
