"""Errors, logging, seeds and checkpoint files: what every part needs and no part owns."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the user's: the message names the key or file at fault and the remedy, in one or two lines."""


def run_command_line(main: Callable[[], int | None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status or 0)
