import pytest

from moe_jax.base.errors import UserError
from moe_jax.commands.complete import Completion, Settings, describe
from moe_jax.placement.traffic import Traffic

TRAFFIC = Traffic(
    uses=100, hits=60, ahead=30, disk_bytes=2_000_000, host_bytes=1_000_000, peak_bytes=500_000
)


def test_without_a_budget_nothing_is_said_of_residents_or_copies():
    said = describe(Completion("text", TRAFFIC, 0.05), "")
    assert said.startswith("20.0 tokens/s, the median token, without compilation. ")
    assert "room for all experts. The text used 0.5 MB of them" in said
    for word in ("%", "resident", "disk", "host", "compilation included"):
        assert word not in said


def test_with_a_budget_the_traffic_is_said():
    said = describe(Completion("text", TRAFFIC, 0.05), "1MB")
    assert "60% of the uses found their expert on the device, 30% more were fetched ahead" in said
    assert "2.0 MB came from disk, 1.0 MB from host memory. At most 0.5 MB" in said


@pytest.mark.parametrize("budget", ["", "1MB"])
def test_a_single_token_has_no_speed(budget):
    assert "tokens/s" not in describe(Completion("text", TRAFFIC, None), budget)


@pytest.mark.parametrize("temperature", [float("inf"), float("nan"), -1.0])
def test_a_temperature_that_is_no_number_is_refused(temperature):
    with pytest.raises(UserError, match=r"^temperature is"):
        Settings(run="x", temperature=temperature)
