"""The table of cards, and cards from a user's file."""

import pytest

from moe_jax.base.errors import UserError
from moe_jax.predict.hardware import card_names, find_card
from moe_jax.predict.hardware.table import NEEDED_BY_XLA

OWN = """
like = "h100"
description = "a card of mine"
gemm_flops = 500e12
network = {peak = 1e9, rate = 9e8, hop = 1e-5, tree_hop = 1e-5}
[xla]
device_memory_size = 1000000000
"""


@pytest.fixture
def own(tmp_path):
    """The path of a file with this text."""

    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


def test_the_cards_that_the_documents_promise():
    promised = {
        "h100",
        "h100_96",
        "h100_pcie",
        "h800",
        "h200",
        "a100",
        "a100_40",
        "l40s",
        "l4",
        "rtx4090",
    }
    assert promised | {"t4", "b200", "gb200"} == set(card_names())


@pytest.mark.parametrize("name", card_names())
def test_every_card_is_whole(name):
    card = find_card(name)
    assert card.sources
    assert all(link.source and link.rate < link.peak for link in (card.link, card.network))
    assert 0.7 * card.peak_flops < card.product_rate < card.peak_flops
    assert set(card.xla) == set(NEEDED_BY_XLA)
    assert all(f"{field}: " in card.target for field in NEEDED_BY_XLA)
    assert card.peak_fp8_flops == 0 or card.peak_fp8_flops == pytest.approx(
        2 * card.peak_flops, rel=0.02
    )


def test_measured_rates_prevail():
    assert find_card("h100").product_rate == 794.5e12
    # Its own, and not that of the card that it is like.
    assert find_card("h100_pcie").product_rate == pytest.approx(0.8 * 756e12)


def test_a_card_of_ones_own(own):
    card = find_card(own(OWN))
    assert (card.name, card.description) == ("mine", "a card of mine")
    assert (card.product_rate, card.memory_bytes) == (500e12, 10**9)
    assert card.network.rate == 9e8
    assert card.link == find_card("h100").link


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('like = "h10"', "like = 'h10' is no card"),
        ("gemm_flop = 1.0\n" + OWN, "unknown field 'gemm_flop' (did you mean gemm_flops?)"),
        (OWN.replace("500e12", "-1"), "gemm_flops is -1: it must be a positive number"),
        (OWN + 'core_count = "many"', "xla.core_count is 'many'"),
        (OWN + "cores = 1", "unknown field 'xla.cores'"),
        (OWN.replace("hop = 1e-5, tree", "tree"), "network: the field hop is missing"),
        ('network = "nvlink"\n' + OWN.replace("network", "link"), "unknown link 'nvlink'"),
        ("capability = 9.0", "the field description is missing"),
        ("= 1", "is no TOML"),
    ],
)
def test_a_bad_file_is_one_line(own, text, message):
    with pytest.raises(UserError) as error:
        find_card(own(text))
    assert message in str(error.value)
    assert "mine.toml" in str(error.value)


def test_every_field_of_xla_is_asked_for(own):
    """XLA divides by a field that is left out, and the process ends."""
    for field in NEEDED_BY_XLA:
        lines = [line for line in find_card("h100").xla if line != field]
        card = 'capability = 9.0\ndescription = "x"\npeak_flops = 1.0\nnode = 8\nlink = "pcie4"\n'
        card += 'network = "pcie4"\nhost_link = "pcie4"\n[xla]\n'
        with pytest.raises(UserError, match=f"the field xla.{field} is missing"):
            find_card(own(card + "".join(f"{line} = 1\n" for line in lines)))


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown hardware 'h10': .*did you mean h100\?"):
        find_card("h10")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        find_card("nowhere.toml")
