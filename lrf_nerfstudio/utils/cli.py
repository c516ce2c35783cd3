"""How every command starts: options from the command line, one message for what the user can mend.

A command's `main` takes its options, a dataclass whose fields are those of the command line.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar, get_type_hints

import tyro

from lrf_nerfstudio.utils.errors import exit_on_user_error
from lrf_nerfstudio.utils.options import check_options

_Options = TypeVar("_Options")


def run(main: Callable[[_Options], None], arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call a command's `main` with the options of the command line.

    The options' type is that of the only parameter of `main`; `--help` begins with the docstring of its module.

    Args:
        main: the command's function.
        arguments: the command line without the program's name; None stands for that of the process.
        prog: what the help calls the command; None stands for the name of the file that was run.

    Raises:
        SystemExit: with status 1 where an option is out of its range or `main` raises a UserError, after its message;
            with 2 for options that do not exist.
    """
    (parameter,) = inspect.signature(main).parameters
    options_type: type[_Options] = get_type_hints(main)[parameter]
    with exit_on_user_error():
        description = sys.modules[main.__module__].__doc__
        options = tyro.cli(options_type, prog=prog, description=description, args=arguments)
        check_options(options)
        main(options)
