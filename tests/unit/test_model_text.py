"""Sizes and names as people write them."""

from __future__ import annotations

import contextlib
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.model.errors import InvalidInput
from hostler.model.names import MAX_NAME, check_name, nearest, new_id
from hostler.model.units import GiB, KiB, MiB, TiB, format_size, parse_size

pytestmark = pytest.mark.unit

UNITS = {
    "": 1,
    "B": 1,
    "K": KiB,
    "kB": KiB,
    "KiB": KiB,
    "m": MiB,
    "Mi": MiB,
    "GiB": GiB,
    " gb": GiB,
    "T": TiB,
    " TiB ": TiB,
}


@given(number=st.integers(0, 10**15 - 1), suffix=st.sampled_from(sorted(UNITS)))
def test_a_whole_number_with_any_unit_is_exact(number: int, suffix: str) -> None:
    assert parse_size(f"{number}{suffix}") == number * UNITS[suffix]


@given(
    whole=st.integers(0, 10**6), fraction=st.from_regex(r"[0-9]{1,6}", fullmatch=True), suffix=st.sampled_from("KMGT")
)
def test_a_fraction_is_rounded_down_to_bytes(whole: int, fraction: str, suffix: str) -> None:
    exact = Decimal(f"{whole}.{fraction}") * UNITS.get(suffix, UNITS.get(suffix.lower(), GiB))
    assert parse_size(f"{whole}.{fraction}{suffix}") == int(exact)


@pytest.mark.parametrize(
    "text",
    ["", " ", "G", "-1G", "+1G", "1e9", "1,5G", "1.G", ".5G", "1.5", "1.5B", "0x10", "10 G B", "512bb", "512bib", "5P",
     "1\x00", "1G\n2", "٣G", "1234567890123456", "NaN", "inf"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_the_text_and_an_example(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_size(text)
    assert repr(text) in caught.value.object
    assert "20G" in caught.value.advice


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert parse_size(text) >= 0


@given(st.integers(0, 2**60))
def test_a_printed_size_reads_back_within_its_precision(size: int) -> None:
    back = parse_size(format_size(size))
    assert abs(back - size) <= max(size / 20, 0)
    assert size >= KiB or back == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KiB, "1 KiB"),
        (1536, "1.5 KiB"),
        (2040 * GiB, "2040 GiB"),
        (64 * TiB, "64 TiB"),
        (2000 * MiB, "2000 MiB"),
        (3 * GiB // 2, "1.5 GiB"),
        (2000 * MiB + 1, "2.0 GiB"),
    ],
)
def test_printed_sizes(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("name", ["web1", "Größe 1", "日本", "a", "x" * MAX_NAME, "a.b", ".a", "a-b_c (2)", "été: 1"])
def test_good_names_come_back_unchanged(name: str) -> None:
    assert check_name("VM", name) == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * (MAX_NAME + 1), " a", "a ", "-a", ".", "..", "a/b", "a\\b", "a\nb", "a\x00", "a\u2028b", "a\u2029b",
     "\u202eabc", "a\ud800", "3F2C0A55-0000-4000-8000-0123456789ab"],
)  # fmt: skip
def test_bad_names_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_name("VM", name)
    assert caught.value.object.startswith("VM name ")
    assert caught.value.cause
    assert not caught.value.cause.endswith(".")
    assert caught.value.advice


@given(st.text(max_size=MAX_NAME + 5))
def test_an_accepted_name_is_safe_in_a_path_a_url_and_a_line(name: str) -> None:
    try:
        check_name("VM", name)
    except InvalidInput:
        return
    assert "/" not in name
    assert name not in ("", ".", "..")
    assert name == name.strip()
    assert len(name.splitlines()) == 1
    assert not any(unicodedata.category(char) == "Cc" for char in name)


def test_a_fresh_id_is_unique_and_never_a_name() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    with pytest.raises(InvalidInput):
        check_name("VM", ids.pop())


def test_the_nearest_name_is_found_or_nothing() -> None:
    assert nearest("wbe1", ["web1", "db1"]) == "web1"
    assert nearest("mail", ["web1", "db1"]) is None
    assert nearest("x", []) is None
