from dataclasses import dataclass

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import checks
from moe_jax.config.checks import parse_bytes


@dataclass
class Numbers:
    a: float = 0.0
    b: float = 0.0
    size: str = ""


@pytest.mark.parametrize(
    ("check", "good", "bad", "reason"),
    [
        (checks.positive, (0.1, 7), (0, -1), "it must be positive"),
        (checks.not_negative, (0, 7), (-0.1,), "it must not be negative"),
        (checks.fraction, (0, 0.5, 1), (-0.1, 1.1), "it must lie between 0 and 1"),
        (checks.fraction_below_one, (0, 0.5), (-0.1, 1), r"it must lie in \[0, 1\)"),
        (checks.strict_fraction, (0.5,), (0, 1), "it must lie strictly between 0 and 1"),
    ],
)
@pytest.mark.parametrize(("owner", "name"), [("model.moe", "model.moe.b"), ("", "b")])
def test_every_named_field_is_checked_and_named(check, good, bad, reason, owner, name):
    for value in good:
        check(owner, Numbers(value, value), "a", "b")
    for value in (*bad, float("nan")):
        with pytest.raises(UserError, match=f"^{name} is {value}: {reason}$"):
            check(owner, Numbers(good[0], value), "a", "b")
        check(owner, Numbers(good[0], value), "a")


def test_an_empty_size_is_no_budget():
    checks.byte_size("placement", Numbers(), "size")
    checks.byte_size("placement", Numbers(size="2GB"), "size")
    with pytest.raises(UserError, match=r"^placement\.size '2 fish' is no size"):
        checks.byte_size("placement", Numbers(size="2 fish"), "size")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("2GB", 2 * 10**9),
        ("512 mb", 512 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("64k", 64_000),
        ("8Ki", 8192),
        (".5kB", 500),
        ("8.2MB", 8_200_000),
        ("0", 0),
    ],
)
def test_sizes_in_bytes(text, size):
    assert parse_bytes("x", text) == size


@pytest.mark.parametrize("text", ["", "GB", "2i", "-1GB", "1e9", "2 G B", "1,5GB", "3PB", "nan"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(UserError, match=r"^--x '.*' is no size: write it like 2GB"):
        parse_bytes("--x", text)


def test_a_huge_value_is_quoted_in_short():
    @dataclass
    class Settings:
        layers: int = -(10**300)

    with pytest.raises(UserError) as caught:
        checks.positive("model", Settings(), "layers")
    assert len(str(caught.value)) < 150
