"""Failures of the command line: one sentence on stderr, an exit code, a traceback with --debug."""

from __future__ import annotations

import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from etude.errors import EtudeError

# Some versions of typer contain a copy of click, so the classes come from its exports.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
_DEBUG = "etude.debug"


class Group(TyperGroup):
    """Commands that refuse an option which is given several times and takes one value: the last would win in silence."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            setattr(command, "make_parser", partial(_parser, type(command).make_parser.__get__(command)))  # noqa: B010
        return command


def _parser(make_parser: Callable[[Any], Any], ctx: Any) -> Any:
    """The parser of a command, with a look for repeated options."""
    parser = make_parser(ctx)
    parse = parser.parse_args

    def parse_args(args: Any) -> Any:
        values, rest, order = parse(args)
        for parameter, count in Counter(order).items():
            single = parameter.param_type_name == "option" and not (
                parameter.multiple or parameter.is_flag or parameter.count
            )
            if single and count > 1:
                raise UsageError(
                    f"{parameter.opts[0]} is given {count} times and takes one value: leave the others out", ctx
                )
        return values, rest, order

    parser.parse_args = parse_args
    return parser


class CommandGroup(Group):
    """Commands that fail with 2 for misuse, 128 plus its number after a signal (130 for Ctrl-C), and 1 otherwise."""

    def main(self, *args: Any, **options: Any) -> Any:
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        options["standalone_mode"] = False
        try:
            result = super().main(*args, **options)
        except _ClickException as error:
            result = _usage_error(error)
        except typer.Abort:
            result = 1
        raise SystemExit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _ClickException):
            raise
        except KeyboardInterrupt as error:
            if is_first_process():
                usual = "interrupted; what was saved stays, and `etude train --resume --out DIR` continues a run."
                complain(str(error) or usual)
            raise typer.Exit(128 + getattr(error, "signum", signal.SIGINT)) from None
        except EtudeError as error:
            if error.shared and not is_first_process():
                raise typer.Exit(1) from None
            _fail(ctx, str(error))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            _fail(ctx, f"unexpected {type(error).__name__} ({reason}): this is a defect, --debug shows where it arose.")


def remember_debug(ctx: typer.Context, value: bool) -> None:
    """The callback of --debug, which may stand anywhere on the command line."""
    if value:
        ctx.meta[_DEBUG] = True


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=remember_debug)]
"""The option that every command takes."""


def complain(message: str) -> None:
    typer.secho("error: ", fg="red", err=True, nl=False)
    typer.echo(message, err=True)


def is_first_process() -> bool:
    """Whether this process speaks for the run: the only one, or the first of those launched together.

    A number of a process counts beside a number of processes alone: one may be left in a shell.
    """
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") in ("", "1")


def _fail(ctx: Any, message: str) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        traceback.print_exc()
    complain(message)
    raise typer.Exit(1) from None


def _usage_error(error: Any) -> int:
    """Prints a misuse as one sentence with a hint to the help; returns the exit code."""
    from pydantic import ValidationError

    message = " ".join(error.format_message().split()).rstrip(".")
    path = error.ctx.command_path if getattr(error, "ctx", None) is not None else "etude"
    if isinstance(error.__cause__, ValidationError):  # newer versions of typer leave out the value
        message += f", not {error.__cause__.errors()[0]['input']!r}"
    if message:  # empty if the help was shown because the command was missing
        complain(f"{message[:1].lower()}{message[1:]} (see `{path} --help`).")
    return int(error.exit_code)
