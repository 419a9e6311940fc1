"""Plain and chunked exchange in two processes: from invented seconds, and measured."""

import pytest

from moe_jax.study.exchange_speed import LayerSize, measurements, time_exchanges
from moe_jax.study.on_cores import on_cores, two_cores

SIZE = LayerSize().quick()


def test_ratios_are_of_one_round_and_of_the_slower_process():
    one = {"plain_backward": 2.0, "chunked_2_backward": 3.0}
    one |= {"plain_forward": 1.0, "chunked_2_forward": 1.0}
    slow = {name: 9 * value for name, value in one.items()}
    other = {name: value / 2 for name, value in one.items()} | {"chunked_2_forward": 1.25}
    values = {m.name: m.value for m in measurements(SIZE, [[one, slow, one], [other] * 3])}
    assert values["two_process_chunked_over_plain"] == 1.5
    assert values["two_process_chunked_over_plain_forward_2"] == 1.25
    assert values["two_process_plain_backward"] == 2000


@pytest.mark.slow
def test_measured():
    found = on_cores(time_exchanges, two_cores(), SIZE, 2)
    assert all((row.value or 0) > 0 for row in measurements(SIZE, found))
