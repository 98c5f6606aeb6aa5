"""The command line: one small file per command, loaded when it is called."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from errno import EDQUOT, EIO, ENOSPC
from typing import NoReturn

import click

from llmkern import __version__
from llmkern.errors import InterruptedRunError, LlmkernError
from llmkern.record import signals

INTERNAL_ERROR = 70
_FULL = (ENOSPC, EDQUOT, EIO)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
# Name: (module, what it is for). Here and not in the modules, so that 'llmkern --help' imports none of them.
_COMMANDS = {
    "trace": ("trace", "Run a model, record its kernels and energy, and print where the joules went."),
    "report": ("report", "Print the report of run folder RUN again, or write it as JSON, CSV or an HTML page."),
    "evaluate": ("evaluate", "Say of a kernel whether it is right, how fast, and what a call costs in joules."),
    "study": ("study", "Run a plan of many configurations, and show what all of them say together."),
    "serve-study": ("serve_study", "Serve requests that arrive in different ways, and say what one of them takes."),
    "collect": ("collect", "Put many runs into one frame, with figures, and say what they say together."),
    "diff": ("diff", "Say where the difference between two runs went, or how several stand beside a baseline."),
    "macro": ("macro", "Say what a day of requests takes by each of two runs: kWh, households, kg of CO2."),
    "export": ("export", "Write RUN for another tool: kernels and gaps with their joules, host calls, ranges, power."),
    "import": ("import_", "Make a run folder of a capture of Nsight Systems or torch.profiler, and report it."),
    "doctor": ("doctor", "Say what works on this machine and what to do about the rest."),
    "models": ("models", "List the models that --model knows by name."),
}


class _Lazy(click.Group):
    """A group that imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return command(name) if name in _COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, told) for name, (_, told) in _COMMANDS.items()])


def command(name: str) -> click.Command:
    """Return the command called *name*; it is ``command`` in its module."""
    found: click.Command = importlib.import_module(f"llmkern.commands.{_COMMANDS[name][0]}").command
    return found


@click.group(cls=_Lazy, context_settings=CONTEXT)
@click.version_option(__version__, "-V", "--version", prog_name="llmkern")
def cli() -> None:
    """Where each joule of an LLM inference run goes: which kernel, or which idle gap between kernels."""


def run(called: click.Command, program: str) -> None:
    """Run a command and leave the process: 0 when it worked, else a sentence on stderr and the error's exit code."""
    # Libraries talk on stdout and stderr while they load; the report should stand alone.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or file that has no µ or × gets an escape for it rather than an error.
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        _fail("standard output is closed: open it, or send it to /dev/null.", 4)
    try:
        with signals.handled():
            try:
                called.main(prog_name=program, standalone_mode=False)
            except click.Abort as error:
                # What click makes of every KeyboardInterrupt.
                raise signals.Ended(signals.came() or signal.SIGINT) from error
            except InterruptedRunError:
                raise
            except Exception as error:
                # C code that is interrupted in its initialization makes another error of it, and that another one.
                came = signals.came()
                if came is None:
                    raise
                raise signals.Ended(came) from error
    except LlmkernError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except signals.Ended as error:
        _fail(f"ended by {error.signal.name}; nothing was changed.", error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (head, less): that is no fault of the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, OSError) and error.errno in _FULL:
            # What is written to files says so itself; this is what was printed.
            _unwritable(error)
        kind = type(error).__name__
        _fail(
            f"something unforeseen went wrong ({kind}: {error}). This is a fault of llmkern: run the command again "
            "with --debug and report what it prints.",
            INTERNAL_ERROR,
        )
    _leave()


def _leave() -> None:
    """Flush what was printed and leave; a reader that has gone in the meantime is no error."""
    signals.ignored()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _unwritable(error)
    # What is left needs no collecting any more.
    gc.freeze()
    sys.exit(0)


def _unwritable(error: OSError) -> NoReturn:
    # Nothing that is still in the buffer may complain once more when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _fail(f"the output cannot be written ({error.strerror or error}): free some space or print it elsewhere.", 4)


def _fail(message: str, code: int) -> NoReturn:
    signals.ignored()
    from llmkern.text import visible

    click.echo(f"llmkern: {visible(message)}", err=True)
    sys.exit(code)


def main() -> None:
    """Run the command ``llmkern``."""
    run(cli, "llmkern")
