"""Find the verbs of this folder, run the one that was asked for, and turn errors into text and exit codes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import typer

import effcompile.cli as package
from effcompile.cli.console import print_error
from effcompile.core.errors import EffError, unknown

HELP = "Compile transformers, mixture-of-experts and diffusion models through exact, explained rewrites."
# typer carries its own click since 0.20 and uses the installed one before: the classes are taken from its public names.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # type: ignore[assignment]


def run() -> None:
    """Run the command line of this process and exit."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    as_json = "--json" in argv
    try:
        command = typer.main.get_command(build_app())
        code = command.main(args=list(argv) or ["--help"], prog_name="eff", standalone_mode=False, obj=tuple(argv))
        return code if isinstance(code, int) else 0
    except EffError as error:
        print_error(error, as_json)
        return error.exit_code
    except _ClickException as error:
        print_error(_usage(error), as_json)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone; what is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if "EFF_TRACEBACK" in os.environ:
            traceback.print_exc()
        source = f"{where.filename}:{where.lineno}"
        fault = EffError("EFF-X000", f"{type(error).__name__}: {error}", source=source, hint=_TRACEBACK)
        print_error(fault, as_json)
        return 4


_TRACEBACK = "our own fault; EFF_TRACEBACK=1 shows where"


def build_app() -> typer.Typer:
    """Return the application with every verb of the folder."""
    options: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "rich"}
    app = typer.Typer(name="eff", help=HELP, no_args_is_help=True, **options)

    @app.callback(invoke_without_command=True)
    def version(
        version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
    ) -> None:
        if version:
            from effcompile import __version__

            typer.echo(__version__)
            raise typer.Exit(0)

    for name, module in verbs().items():
        group = getattr(module, "VERBS", None)
        if group is None:
            app.command(name)(getattr(module, name.replace("-", "_")))
            continue
        inner = typer.Typer(help=(module.__doc__ or "").splitlines()[0], no_args_is_help=True, **options)
        for function in group:
            inner.command(function.__name__.rstrip("_").replace("_", "-"))(function)
        app.add_typer(inner, name=name)
    return app


def verbs() -> dict[str, ModuleType]:
    """Return the modules of this folder that are verbs, by the word to type."""
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name == "main":
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        function = getattr(module, info.name, None)
        if hasattr(module, "VERBS") or getattr(function, "__module__", None) == module.__name__:
            found[info.name.replace("_", "-")] = module
    return found


def _usage(error: Any) -> EffError:
    """Restate what typer says about a command line, with the near matches of the words that exist."""
    context = getattr(error, "ctx", None)
    command = getattr(context, "command", None)
    path = getattr(context, "command_path", "eff")
    option = getattr(error, "option_name", None)
    if option is not None and command is not None:
        words = [word for parameter in command.params for word in parameter.opts if word.startswith("--")]
        return unknown("EFF-U201", "option", option, words, hint=f"{path} --help")
    message = error.format_message()
    if message.startswith("No such command"):
        return unknown(
            "EFF-U202", "verb", message.split("'")[1], getattr(command, "commands", {}), hint=f"{path} --help"
        )
    return EffError("EFF-U200", message, hint=f"{path} --help")
