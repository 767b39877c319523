"""The pages against the code: what exists is documented, and what is documented exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

import ray_envcache
from ray_envcache.cli.main import cli
from ray_envcache.field.spec import OPTIONS
from tests.benchmarks import pictures

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")
ELSEWHERE = "".join((REPOSITORY / name / "README.md").read_text("utf-8") for name in ("ray_envcache", "examples"))
PAGES = [REPOSITORY / folder / "README.md" for folder in ("ray_envcache", "examples", "tests", "tests/benchmarks")]
RESULTS = REPOSITORY / "tests" / "benchmarks" / "results"
PACKAGE = "".join(path.read_text("utf-8") for path in Path(ray_envcache.__file__).parent.rglob("*.py"))

CONTEXT = click.Context(cli)
COMMANDS = {name: command for name in cli.list_commands(CONTEXT) if (command := cli.get_command(CONTEXT, name))}


def _options() -> list[tuple[str, str]]:
    return [
        (name, option)
        for name, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
        if option.startswith("--")
    ]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_command_is_documented(command: str) -> None:
    """Every command has help, and a row in the reference."""
    assert f"`ray-envcache {command}" in README or f"`{command} " in README
    assert COMMANDS[command].help


@pytest.mark.parametrize(("command", "option"), _options())
def test_option_is_documented(command: str, option: str) -> None:
    """Every option of a command is in the README, and says what it does."""
    assert option in README, f"ray-envcache {command} {option}"
    (found,) = [one for one in COMMANDS[command].params if option in one.opts]
    assert isinstance(found, click.Option)
    assert found.help


@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_the_field_is_documented(option: str) -> None:
    """Every option of the field has a row."""
    assert re.search(rf"^\|.*`{option}`.*\|", README, re.MULTILINE)


def test_variables() -> None:
    """The variables of the README are those of the code."""
    internal = {f"RAY_ENVCACHE_{name}" for name in ("TEST_POINTS", "PROBE", "RUN", "RUN_ABOUT")}
    documented = set(re.findall(r"RAY_ENVCACHE_[A-Z_]+[A-Z]", README))
    spelled = set(re.findall(r"RAY_ENVCACHE_[A-Z_]+[A-Z]", PACKAGE)) - internal
    # The limits of the policy are put together from their names.
    assert documented >= spelled - {"RAY_ENVCACHE_"}
    for name in documented:
        assert name in PACKAGE or f'"{name.removeprefix("RAY_ENVCACHE_")}"' in PACKAGE, name


@pytest.mark.parametrize("name", ray_envcache.__all__)
def test_public_names_are_there(name: str) -> None:
    """What the package offers can be imported, is documented, and is on a page unless it is a type."""
    found = getattr(ray_envcache, name)
    assert found.__doc__
    assert isinstance(found, type) or f"ray_envcache.{name}" in README + ELSEWHERE


def test_readme_is_finished_in_one_sitting() -> None:
    """At most 300 lines and 3,000 words, and no page has more than 420 lines."""
    assert len(README.splitlines()) <= 300
    assert len(README.split()) <= 3000
    for page in PAGES:
        assert len(page.read_text("utf-8").splitlines()) <= 420, page


@pytest.mark.parametrize("section", ["Quickstart", "Tests"])
def test_section_begins_with_its_line(section: str) -> None:
    """These sections begin with one line alone in a block, which `.ci/run` and others run as it stands."""
    found = re.findall(rf"^## {section}\n\n```sh\n(.+)\n```$", README, re.MULTILINE)
    assert len(found) == 1
    # A comment in a block looks like a heading to a simple reader.
    assert len(re.findall(rf"^#+ .*{section}", README, re.MULTILINE | re.IGNORECASE)) == 1


def test_readme_has_no_relative_links() -> None:
    """The README is on an index page too, where links to files of the repository are dead; those it names are there."""
    assert re.findall(r"\]\((?!https://)", README) == []
    named = re.findall(r"`((?:examples|tests|ray_envcache)/[\w./-]+)`", README)
    assert len(named) > 5
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(REPOSITORY)))
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    """Other pages link to files beside them, which exist."""
    links = re.findall(r"\]\((?!https://)([^)]+)\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_examples_are_named() -> None:
    """The index of the recipes has a row for each folder, and for nothing else."""
    page = (REPOSITORY / "examples" / "README.md").read_text("utf-8")
    table = page.partition("\n## ")[0]
    rows = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}
    assert rows == {path.name for path in (REPOSITORY / "examples").iterdir() if path.name != "README.md"}


def test_results_are_named() -> None:
    """The page of the measurements leads to each file of samples and each picture."""
    page = (REPOSITORY / "tests" / "benchmarks" / "README.md").read_text("utf-8")
    assert [path.name for path in RESULTS.iterdir() if f"(results/{path.name})" not in page] == []


def test_pictures_are_drawn_from_the_samples() -> None:
    """Each bar of the README is one that the suite draws from the samples of a run."""
    drawn = "".join(
        "\n".join(pictures.bars(json.loads(path.read_text("utf-8")))) for path in RESULTS.glob("small*.json")
    )
    shown = [line for line in README.splitlines() if re.search("[█▏]", line)]
    assert len(shown) > 10
    assert [line for line in shown if line not in drawn.splitlines()] == []
