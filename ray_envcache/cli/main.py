"""The command line. Data on stdout, talk and progress on stderr; 0 done, 1 failed, 2 usage, 3 store unusable."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

import click

from ray_envcache.errors import EnvCacheError, FieldValueError, StoreError
from ray_envcache.field import registration
from ray_envcache.store.layout import default_root
from ray_envcache.version import __version__

_COMMANDS = {
    "build": "build.build",
    "doctor": "doctor.doctor",
    "explain": "build.explain_",
    "gc": "store.gc",
    "list": "listing.list_",
    "log": "operators.log",
    "metrics": "operators.metrics_",
    "pin": "store.pin",
    "prefetch": "doctor.prefetch",
    "purge": "store.purge",
    "push": "build.push_",
    "rm": "store.rm",
    "run": "build.run",
    "stats": "operators.stats",
    "unpin": "store.unpin",
    "verify": "operators.verify_",
    "why": "store.why",
}


class _Lazy(click.Group):
    """Imports the module of a command when it is asked for: `list` needs nothing that builds or asks Ray."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, name = _COMMANDS[cmd_name].partition(".")
        command: click.Command = getattr(import_module(f"ray_envcache.cli.{module}"), name)
        return command


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: ray-envcache run -- python main.py",
)
@click.version_option(__version__, prog_name="ray-envcache")
def cli() -> None:
    """Python environments for Ray, built once per host and shared by all clusters.

    They lie in the store: $RAY_ENVCACHE_DIR, or a folder in your cache directory (`ray-envcache dir` prints it).
    """


@cli.command("dir", epilog="Example: ray-envcache dir")
def dir_() -> None:
    """Print the path of the store."""
    click.echo(os.fsencode(default_root()))  # as bytes: stdout may have an encoding without some of its letters


@cli.command(epilog='Example: eval "$(ray-envcache env)"; ray start --head')
def env() -> None:
    """Print the variables that `ray start` needs, as shell exports.

    A node that is started with them knows the `envcache` field. `ray.init` of a local cluster needs none of them.
    """
    # Importing this package registered it in os.environ: `without_us` is what the shell gave us.
    for name, value in sorted(registration.exports(registration.without_us(os.environ)).items()):
        click.echo(f"export {name}={shlex.quote(value)}")


def main() -> None:
    """Run the command line, and turn our errors into one sentence, a hint and an exit code."""
    _replace_closed_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have letters that it has no code for
    # A caller may ignore SIGCHLD, and we inherit that: the kernel then forgets exit codes, and every child succeeds.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    color = False if os.environ.get("NO_COLOR") else None  # None: click decides. https://no-color.org
    try:
        cli(standalone_mode=False, color=color)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EnvCacheError as error:
        _fail(error)
    except OSError as error:
        _flush_or_forget()
        _fail(_explained(error))


def _replace_closed_streams() -> None:
    """Put /dev/null in place of standard streams that the caller closed.

    Else a file of the store gets their number, and what is written to stderr goes into it. Programs under `run` do not
    inherit it: for them the stream is closed as before.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None and os.open(os.devnull, os.O_RDWR) == number:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _fail(error: EnvCacheError) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def _flush_or_forget() -> None:
    """Forget what stdout did not take: Python would try it again at exit, fail, and change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: OSError) -> EnvCacheError:
    """An error of the operating system as one of ours: a StoreError if it is about a file of the store."""
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if error.errno == errno.ENOENT and not place:  # a relative path leads nowhere then
        return FieldValueError("The working directory was removed", "cd to a directory that exists")
    message = f"{error.strerror or error}" + (f": `{place}`" if place else "")
    with suppress(EnvCacheError):  # a root that cannot be one
        if place.startswith(f"{default_root()}/"):
            return StoreError(message, "`ray-envcache doctor` checks the store")
    return EnvCacheError(message)
