"""Sizes and durations: what people write is understood or refused, and what they read is near the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_envcache.errors import FieldValueError
from ray_envcache.system.texts import Space, format_duration, format_size, parse_duration, parse_size, parse_space

# Letters and digits that fold to ours, or that `int` and `float` know, are among them.
LIKE_OURS = "0123456789..  kKmMgGtTiIbBwWdDhHsS%-+_eE\n\t\u017f\u212a\u0130\u0131\u0663\u00b2\u00a0"
NASTY = (
    "", " ", ".", "%", "1.", ".5", "1..5", "-1", "+1", "1e3", "1_000", "0x10", "nan", "inf", "nan%", "inf%", "-inf%", "1,5",
    "\u0663", "\u00b2", "1\0", "\udcff", "\x1b[31m", "9" * 400, "9" * 10_000, "$(reboot)", "one",
)  # fmt: skip
NO_SIZES = (*NASTY, "GB", "i", "1i", "1iB", "5 i", "1X", "1PB", "1GBB", "1GG", "1G B", "1\u00a0GB", "1 G i B", "1GB 1MB", "10%", "1\u212aB",
            "1k\u0130B", "1k\u0131B", "9" * 400 + "TB", "\u0663GB")  # fmt: skip
NO_SHARES = (
    "-1%", "101%", "100.001%", "1e3%", "x%", "%%", "1%%", "10GB%", "9" * 400 + "%", "%10", "\u00b2%", "-0.001%",
)  # fmt: skip
NO_DURATIONS = (*NASTY, "d", "1x", "1dd", "1d2", "1d x", "-1d", "1 day", "1.d", "1.5.5d", "1. 5d", "1d,2h", "1mo", "1\u017f",
                "9" * 400 + "d", "10GB", "\u0663d", "1ms")  # fmt: skip

hostile = st.text(st.characters(exclude_categories=()), max_size=12) | st.text(LIKE_OURS, max_size=12)
hostile |= st.sampled_from((*NO_SIZES, *NO_SHARES, *NO_DURATIONS))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        (512, 512),
        ("512B", 512),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1ki", 1024),
        ("1mb", 10**6),
        ("1MiB", 2**20),
        ("50GB", 50 * 10**9),
        ("50 GiB", 50 * 2**30),
        ("2T", 2 * 10**12),
        ("2 tib", 2 * 2**40),
        ("1.5GB", 15 * 10**8),
        ("0.5k", 500),
        ("0.5", 0),
        ("007", 7),
        ("  1 \t GB\n", 10**9),
        ("9" * 15, 10**15 - 1),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    """A size is bytes, metric or binary, in any case and with or without a space and the B; a space may be one."""
    assert parse_size(text) == size
    assert parse_space(text) == Space(size=size)


@pytest.mark.parametrize("text", NO_SIZES)
def test_no_sizes(text: str) -> None:
    """What is no size is an error that quotes it and shows how to write one."""
    with pytest.raises(FieldValueError) as caught:
        parse_size(text)
    assert f"`{text}`" in caught.value.message
    assert '"50GiB"' in caught.value.hint


@pytest.mark.parametrize(
    ("text", "share"),
    [("0%", 0), ("10%", 0.1), (" 10 % ", 0.1), ("12.5%", 0.125), ("100%", 1), ("100.0 %", 1), (".5%", 0.005)],
)
def test_shares(text: str, share: float) -> None:
    """A space with a percent sign is a share of the disk."""
    assert parse_space(text).share == pytest.approx(share)


@pytest.mark.parametrize("text", [*NO_SHARES, *(text for text in NO_SIZES if text != "10%")])
def test_no_spaces(text: str) -> None:
    """What is neither a size nor between 0 and 100 percent is an error that quotes it and shows how to write one."""
    with pytest.raises(FieldValueError) as caught:
        parse_space(text)
    assert f"`{text.strip()}`" in caught.value.message
    assert "50GB" in caught.value.hint


@pytest.mark.parametrize(
    ("space", "total", "size"),
    [
        (Space(), 1000, 0),
        (Space(size=50), 1000, 50),
        (Space(size=2000), 1000, 2000),
        (Space(share=0.0), 1000, 0),
        (Space(share=0.1), 1000, 100),
        (Space(share=0.1), 9, 0),
        (Space(share=1.0), 2**50 + 1, 2**50 + 1),
        (Space(size=50, share=0.5), 1000, 500),
        (Space(share=0.5), 0, 0),
    ],
)
def test_bytes_of(space: Space, total: int, size: int) -> None:
    """A size is the same on every disk, a share is whole bytes of this one."""
    assert space.bytes_of(total) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("3600", 3600),
        (3600, 3600),
        (0.5, 0.5),
        ("45s", 45),
        ("90m", 5400),
        ("36h", 129_600),
        ("14d", 1_209_600),
        ("2w", 1_209_600),
        ("1d12h", 129_600),
        ("1D 12H", 129_600),
        (" 1 d\t12 h\n", 129_600),
        ("1.5h", 5400),
        ("12h1d", 129_600),
        ("1d1d", 172_800),
        ("1w1d1h1m1s", 694_861),
        ("0d", 0),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    """A duration is a number of seconds, or numbers with units that are added up."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", NO_DURATIONS)
def test_no_durations(text: str) -> None:
    """What is no duration is an error that quotes it and shows how to write one."""
    with pytest.raises(FieldValueError) as caught:
        parse_duration(text)
    assert f"`{text}`" in caught.value.message
    assert '"14d"' in caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (512, "512 B"),
        (999, "999 B"),
        (999.5, "1.0 kB"),
        (1000, "1.0 kB"),
        (1024, "1.0 kB"),
        (99_400, "99.4 kB"),
        (99_500, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (150_000_000, "150 MB"),
        (4_123_456_789, "4.1 GB"),
        (999_500_000_000, "1.0 TB"),
        (123_456_000_000_000, "123.5 TB"),
        (10**18, "1000000.0 TB"),
    ],
)
def test_format_size(size: float, text: str) -> None:
    """A size reads as at most three digits before the point, in the unit that makes it so, if there is one."""
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (Space(size=50 * 10**9), "50.0 GB"),
        (Space(), "0 B"),
        (Space(share=0.1), "10 %"),
        (Space(share=0.125), "12.5 %"),
        (Space(share=1.0), "100 %"),
        (Space(share=0.0), "0 %"),
    ],
)
def test_text_of_a_space(space: Space, text: str) -> None:
    """A space reads as it could have been written."""
    assert str(space) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (0.9, "0 seconds"),
        (1, "1 second"),
        (59.9, "59 seconds"),
        (60, "1 minute"),
        (119, "1 minute"),
        (3599, "59 minutes"),
        (3600, "1 hour"),
        (86_399, "23 hours"),
        (86_400, "1 day"),
        (14 * 86_400, "14 days"),
        (10_000 * 86_400.0, "10000 days"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    """A duration reads as whole units of the largest kind that fits, never as more than it is."""
    assert format_duration(seconds) == text


def amount(parse: Callable[[str], Space | float], text: str) -> float:
    """What `text` means, in bytes or seconds; nothing if it is refused."""
    try:
        found = parse(text)
    except FieldValueError:
        return 0
    return found.bytes_of(1000) if isinstance(found, Space) else found


@pytest.mark.parametrize("parse", [parse_size, parse_space, parse_duration])
@given(text=hostile)
@settings(max_examples=150)
def test_hostile_text(parse: Callable[[str], Space | float], text: str) -> None:
    """Any text is a finite amount that is not negative, or a FieldValueError and no other exception."""
    assert 0 <= amount(parse, text) < math.inf


@given(st.integers(0, 10**18))
@settings(max_examples=60)
def test_size_that_is_read_and_written_again(size: int) -> None:
    """What `format_size` writes is a size, at most 5 % off."""
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05)
    assert parse_space(str(Space(size=size))) == Space(size=parse_size(format_size(size)))


@given(st.integers(0, 10**6))
@settings(max_examples=60)
def test_share_that_is_read_and_written_again(millionths: int) -> None:
    """The text of a share is that share again."""
    share = millionths / 10**6
    assert parse_space(str(Space(share=share))).share == pytest.approx(share)


@given(st.floats(1, 10**10))
@settings(max_examples=60)
def test_duration_that_is_read_and_written_again(seconds: float) -> None:
    """What `format_duration` writes is more than half of the duration, and never more than it."""
    number, unit = format_duration(seconds).split()
    assert seconds / 2 < parse_duration(number + unit[0]) <= seconds
