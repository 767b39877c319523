"""`build`, `explain`, `push` and `run`: environments for images, CI and other hosts, and for unmodified programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode
from ray_envcache.build.progress import observer
from ray_envcache.cli import tables
from ray_envcache.cluster import program
from ray_envcache.doctor.explain import explain
from ray_envcache.errors import CommandError, EnvCacheError, FieldValueError, StoreError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.remote import bucket
from ray_envcache.remote.push import push
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.sessions.run_directory import RunTmpdir
from ray_envcache.store import roots
from ray_envcache.store.layout import SHOWN_DIGITS
from ray_envcache.store.leases import Holder
from ray_envcache.survey.nearest import DIGESTS, Difference
from ray_envcache.system.texts import format_size

USAGE_ERROR = 2
"""The exit code of a run that fails before its command starts, unless the error has a more exact one."""


def absolute(path: str) -> str:
    """The absolute path of what a person named. Raises FieldValueError where it is empty."""
    if not path:  # of an unset variable; for Python it is the current directory
        raise FieldValueError("The path is empty", "name a project's folder, or `.` for this one")
    return os.path.abspath(path)


_LISTS = (
    ("extra", "extras", "Include this extra; may be repeated."),
    ("no-extra", "no_extras", "Leave this one out of --all-extras."),
    ("group", "groups", "Include this group; may be repeated."),
    ("no-group", "no_groups", "Leave out this group."),
    ("only-group", "only_groups", "Include this group, and nothing else."),
)
_FLAGS = (
    ("all-extras", "Include all extras."),
    ("all-groups", "Include all groups."),
    ("all-packages", "Include all members of the workspace."),
    ("no-default-groups", "Leave out the default groups."),
    ("dev", "Include the group dev."),
    ("no-dev", "Leave out the group dev."),
    ("only-dev", "Include the group dev, and nothing else."),
)
_VARIABLES = {"no-group": "UV_NO_GROUP", "no-default-groups": "UV_NO_DEFAULT_GROUPS", "no-dev": "UV_NO_DEV"}


def _selection(variables: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of uv that choose packages, with the variables that stand for some of them."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for name, text in reversed(_FLAGS):
            command = click.option(f"--{name}", is_flag=True, envvar=variables.get(name), help=text)(command)
        command = click.option("--package", metavar="NAME", help="Use this member of the workspace.")(command)
        for name, field, text in reversed(_LISTS):
            option = click.option(
                f"--{name}", field, multiple=True, metavar="NAME", envvar=variables.get(name), help=text
            )
            command = option(command)
        return command

    return add


def _spec(
    path: str, *, dev: bool, no_dev: bool, only_dev: bool, no_default_groups: bool, by_default: bool, **options: Any
) -> EnvSpec:
    """What the options select, the group dev `by_default` as other default groups, or only where it is named."""
    options["groups"] += ("dev",) * dev
    options["only_groups"] += ("dev",) * only_dev
    named = {"default_groups": not no_default_groups, "dev": by_default and not no_dev}
    return EnvSpec.parse({"path": path, **named, **options})


def field_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that are those of the field."""
    for option in (
        click.option(
            "--inherit", multiple=True, metavar="NAME", help="Take this package from the base Python; may be repeated."
        ),
        click.option("--no-install-project", is_flag=True, help="Leave out the project's own packages."),
        click.option("--python", metavar="VERSION|PATH", help="Use this Python."),
        click.option("--no-build", is_flag=True, help="Refuse packages without a wheel."),
        _selection({}),
    ):
        command = option(command)
    return command


def spec_of(*, path: str, no_install_project: bool, **options: Any) -> EnvSpec:
    """The spec that the values of `field_options` mean. Raises FieldValueError."""
    return _spec(absolute(path), install_project=not no_install_project, by_default=False, **options)


@click.command(epilog="Example: ray-envcache build .")
@field_options
@click.argument("path", type=click.Path())
def build(**options: Any) -> None:
    """Build or find an environment, and print its interpreter.

    PATH is a project's folder, its pyproject.toml or uv.lock, a pylock.toml, a requirements file or a script. When the
    command returns the bytecode is compiled too: made for images and CI. The options are those of the field.
    """
    spec = spec_of(**options)
    store = Store.open()
    with observer(sys.stderr) as shown:
        lease = store.acquire(spec, installed_ray(), Holder("cli"), shown, finish=False)
    with lease:
        with observer(sys.stderr) as shown:
            # Now, because a step of an image's build leaves no background process.
            bytecode.finish_lease_now(store.layout, lease, shown)
        click.echo(os.fsencode(lease.python))  # as bytes: stdout may have an encoding without some of its letters


@click.command("explain", epilog="Example: ray-envcache explain .")
@field_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("path", type=click.Path())
def explain_(*, as_json: bool, **options: Any) -> None:
    """Show whether `build` would make a new environment, and why.

    PATH and the options are those of `build`. Of a new environment it names the nearest one in the store, and what
    differs: packages, Python, ray, options, settings of uv; of a new layer the local packages whose content changed.
    Builds nothing; the exit code is 0 in both cases.
    """
    own, below = roots.opened()
    parts = explain(spec_of(**options), installed_ray(), (own, *below))
    new = next((one for one in parts if one.path is None), None)
    if as_json:
        tables.print_json({"new": new is not None, "parts": [asdict(one) for one in parts]})
    elif new is None:
        keys = " on ".join(one.key[:SHOWN_DIGITS] for one in reversed(parts))
        tables.say(f"{parts[0].project} is there: {keys}")
    else:
        tables.say(f"{new.project} would be {new.reason}")
        if near := new.nearest:
            tables.say(f"Compared with {near.key[:SHOWN_DIGITS]} of {near.project}:")
            rows = [[one.kind, one.name, _shown(one, one.was), _shown(one, one.now)] for one in near.differences]
            tables.print_table(("KIND", "NAME", "THERE", "WANTED"), rows, numeric=())


def _shown(one: Difference, value: str | None) -> str:
    # The beginnings of digests tell them apart.
    return "-" if value is None else f"{value[:SHOWN_DIGITS]}…" if one.kind in DIGESTS else value


@click.command("push", epilog="Example: ray-envcache push . --to s3://bucket/envcache")
@field_options
@click.option("--to", metavar="URL", envvar=bucket.VARIABLE, help=f"Publish there; default: ${bucket.VARIABLE}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="PATH...")
def push_(*, paths: tuple[str, ...], to: str | None, as_json: bool, **options: Any) -> None:
    """Publish environments in a bucket, for other hosts.

    The bucket is s3://, gs://, az:// or file://. A PATH, as for `build`, is built first where it is not in the store.
    What is there is not uploaded again. Hosts with $RAY_ENVCACHE_REMOTE fetch it instead of building it.
    """
    if not to:
        raise FieldValueError("Publish where?", f"--to s3://bucket/prefix, or set {bucket.VARIABLE}")
    store, target, done = Store.open(), bucket.Bucket(to, writes=True), list[dict[str, Any]]()
    for path in paths:
        with observer(sys.stderr) as shown:
            lease = store.acquire(spec_of(path=path, **options), installed_ray(), Holder("cli"), shown, finish=False)
        with lease, observer(sys.stderr) as shown:
            bytecode.finish_lease_now(store.layout, lease, shown)
            for one in push(store.layout, lease.entries, target):
                done.append({"key": one.entry.key, "uploads": one.uploads, "bytes": one.size, "present": one.present})
                if not as_json:
                    sent = f"{one.uploads} uploaded, {format_size(one.size)}"
                    tables.say(f"{one.entry.key}: {sent}; {one.present} were there")
    if as_json:
        tables.print_json({"remote": target.url, "envs": done})


def _refuse_with(_context: click.Context, _option: click.Parameter, packages: tuple[str, ...]) -> None:
    if packages:
        raise click.UsageError(
            "--with: the environment is shared, and has what is locked. Add the package to the project (`uv add`, with "
            "`--group NAME` if need be), or call `uv run --with` in the program"
        )


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: ray-envcache run --extra gpu -- python main.py",
)
@click.option(
    "--project",
    metavar="PATH",
    envvar="UV_PROJECT",
    help="Folder or lockfile of the project; default: the nearest project upwards.",
)
@_selection(_VARIABLES)
@click.option("--python", "-p", metavar="VERSION|PATH", help="Use this Python; default: the one that uv takes.")
@click.option("--with", multiple=True, expose_value=False, hidden=True, help="Refused.", callback=_refuse_with)
@click.option("--module", "-m", is_flag=True, help="Run the module of this name.")
@click.option("--tmpdir", metavar="DIR", help="Put Ray's session directories here; the path may be long.")
@click.option("--keep-session", is_flag=True, help="Keep the session directories.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    *,
    project: str | None,
    tmpdir: str | None,
    keep_session: bool,
    module: bool,
    command: tuple[str, ...],
    **options: Any,
) -> None:
    """Run a Ray program from the environment of its project.

    As with `uv run`: the program and every cluster it starts run from there, and the program needs no changes. The
    project's own packages are imported from where they are developed. Options that choose packages are those of uv. At
    the end the session directories of its clusters are removed; after a failed run the logs stay.
    """
    try:
        folder = absolute(project) if project is not None else os.fspath(program.find_project(Path(absolute("."))))
        words = ["python", "-m", *command] if module else program.command_of(command)
        status = _run(_spec(folder, by_default=True, **options), tmpdir, words, keep=keep_session)
    except EnvCacheError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code if isinstance(error, StoreError | CommandError) else USAGE_ERROR)
    sys.exit(program.end_like(status))


def _run(spec: EnvSpec, tmpdir: str | None, command: list[str], *, keep: bool) -> int:
    with observer(sys.stderr) as shown:
        lease = program.acquire(spec, shown)
    with lease:
        environ = program.environ_for(lease, spec, os.environ)
        found, note = program.find_command(command[0], lease, spec, environ)
        if note:
            _say(note)
        place = RunTmpdir.make(tmpdir, os.environ)
        status = 1
        try:
            held = [*lease.descriptors, *place.descriptors]
            status = program.run(found, command, {**environ, "RAY_TMPDIR": place.short}, held)
        finally:
            place.close(_say, failed=status != 0, keep=keep)
        return status


def _say(text: str) -> None:
    # Unbuffered: Python would try at exit to write what a full disk did not take, and change our exit code.
    with suppress(OSError):
        os.write(2, f"ray-envcache: {text}\n".encode(errors="replace"))
