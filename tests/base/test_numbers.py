import math

import pytest

from moe_jax.base.numbers import amount_text, number_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (10346.02, "10,350"),
        (-10346.02, "-10,350"),
        (999.96, "1,000"),
        (1000, "1,000"),
        (1234567, "1,235,000"),
        (0.34937, "0.3494"),
        (0.0003, "0.0003"),
        (2.5e-7, "2.5e-07"),
        (1.5e20, "1.5e+20"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_a_number_is_read_without_counting_digits(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1585131520, "bytes", "1.585 GB"),
        (999, "bytes", "999 bytes"),
        (999_960, "bytes", "1 MB"),
        (205978999428.6, "FLOP/s", "206 GFLOP/s"),
        (6955776.0, "FLOP", "6.956 MFLOP"),
        (10346.02, "tokens/s", "10,350 tokens/s"),
        (None, "bytes", "- bytes"),
        (math.inf, "FLOP/s", "inf FLOP/s"),
    ],
)
def test_large_amounts_have_a_prefix(value, unit, text):
    assert " ".join(amount_text(value, unit)) == text
