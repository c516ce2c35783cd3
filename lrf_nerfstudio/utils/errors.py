"""The one exception for problems that the user can mend, and how the commands report it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A problem on the user's side: bad data, a missing file, options that do not fit together.

    The message is one to three sentences: what is wrong, where (file, frame, option), and what to do. The nerfstudio
    plugin and the commands print it without a traceback and exit with status 1; code that uses the package from Python
    catches it like any other exception.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into a message on stderr and exit status 1; also works as a decorator."""
    try:
        yield
    except UserError as error:
        print(f"\nError: {error}", file=sys.stderr)
        raise SystemExit(1) from None
