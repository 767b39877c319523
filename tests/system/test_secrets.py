"""Credentials in texts and URLs: gone, with nothing else."""

from __future__ import annotations

import time

import pytest

from ray_envcache.system.texts import strip_credentials, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://somebody:s3cret@example.org/a@1.0", "GET https://***@example.org/a@1.0"),
        ("https://token@example.org", "https://***@example.org"),
        ("https://somebody:s3c@ret@example.org/simple", "https://***@example.org/simple"),
        ("`https://a:s3c,`\"'ret@example.org/`, `b@example.org`", "`https://***@example.org/`, `b@example.org`"),
        ("a @ git+ssh://git@example.org/a@main", "a @ git+ssh://***@example.org/a@main"),
        ("(https://example.org/a?x=1&access_token=s3cret&y=2#z)", "(https://example.org/a?x=1&access_token=***&y=2#z)"),
        ("`https://example.org/a?X-Amz-Signature=s3cret`", "`https://example.org/a?X-Amz-Signature=***`"),
        ("https://somebody:s3/c@ret@example.org/simple", "https://***@example.org/simple"),
        ("https://example.org:8080/a@1.0", "https://example.org:8080/a@1.0"),
        ("nothing at example.org/@b, nor in a@b ://", "nothing at example.org/@b, nor in a@b ://"),
    ],
)
def test_messages(text: str, shown: str) -> None:
    """User and password go up to the last `@` before the path, or in a path that is none; so do tokens in a query. The rest stays."""
    assert without_credentials(text) == shown


def test_passwords_in_variables() -> None:
    """Wherever they are in the text, if they are long enough to be recognized."""
    given = {"UV_INDEX_A_PASSWORD": "s3cret", "UV_PUBLISH_TOKEN": "s3cret-too", "UV_INDEX_B_PASSWORD": "a"}
    assert without_credentials("an s3cret", given) == "an ***"


@pytest.mark.parametrize(
    ("url", "stripped"),
    [
        ("https://somebody:s3c@ret@example.org/a@1", "https://example.org/a@1"),
        ("git+https://token@example.org/a", "git+https://example.org/a"),
        ("https://example.org/a?token=needed", "https://example.org/a?token=needed"),
        ("ssh://git@example.org/a.git", "ssh://git@example.org/a.git"),
        ("git+ssh://git:s3cret@example.org/a.git", "git+ssh://example.org/a.git"),
        ("file:///a@b", "file:///a@b"),
    ],
)
def test_urls_that_are_kept(url: str, stripped: str) -> None:
    """User and password go; the user of an ssh address stays, since it is a part of the address and no secret."""
    assert strip_credentials(url) == stripped


@pytest.mark.parametrize(
    "text", ["://" + "a" * 1_000_000, "?" + "token" * 200_000, "://" * 300_000, "?a&" * 300_000, "://a:" * 200_000]
)
def test_long_texts(text: str) -> None:
    """The time grows with the text, and no faster: quadratic, this would take hours."""
    began = time.monotonic()
    assert without_credentials(text) == text
    assert time.monotonic() - began < 10
