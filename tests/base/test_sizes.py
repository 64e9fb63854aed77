"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_flash import ConfigError
from hf_flash.base.sizes import format_bytes, parse_bytes, parse_share

UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "kB": 10**3,
    "KiB": 2**10,
    "MB": 10**6,
    "MiB": 2**20,
    "g": 10**9,
    "GiB": 2**30,
    "TiB": 2**40,
}


@given(number=st.integers(1, 1 << 40), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " "]))
def test_sizes_are_read_as_people_write_them(number: int, unit: str, space: str) -> None:
    assert parse_bytes(number) == number
    assert parse_bytes(f"{space}{number % 100000 + 1}{space}{unit}{space}") == (number % 100000 + 1) * UNITS[unit]


@given(number=st.integers(1, 1 << 45))
def test_a_printed_size_is_read_back_up_to_its_digits(number: int) -> None:
    assert parse_bytes(format_bytes(number)) == pytest.approx(number, rel=0.05)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 29, "2.50 GiB")]
)
def test_sizes_are_printed_in_binary_units(number: int, text: str) -> None:
    assert format_bytes(number) == text


def test_a_fraction_of_a_unit_is_a_size() -> None:
    assert parse_bytes("1.5GiB") == 3 << 29


@pytest.mark.parametrize(
    "value", [0, -1, True, 1.5, None, "", "GiB", "-1", "1e9", "1 parsec", "0", "0.4", "0.0001 kB", "9" * 400]
)
def test_what_is_not_a_size_is_a_config_error(value: Any) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(value)


@given(percent=st.floats(0, 400).map(lambda value: f"{value:.3f}"), whole=st.integers(0, 1 << 45))
def test_a_share_is_of_the_whole_and_a_size_is_one_too(percent: str, whole: int) -> None:
    assert parse_share(f"{percent} %", whole) == int(whole * float(percent) / 100)
    assert parse_share("3GB", whole) == parse_bytes("3GB")


@pytest.mark.parametrize("value", ["%", "-5%", "50%%", "half", None])
def test_what_is_no_share_is_a_config_error(value: Any) -> None:
    with pytest.raises(ConfigError):
        parse_share(value, 100)
