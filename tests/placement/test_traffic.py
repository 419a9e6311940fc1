"""The counters of a store have an end, however long it runs."""

from moe_jax.placement import traffic
from moe_jax.placement.traffic import TrafficMeter


def test_times_of_the_first_copies_are_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(traffic, "RECORDED", 3)
    meter = TrafficMeter()
    for expert in range(9):
        meter.copied(expert, meter.now(), False, disk=2, host=1)
        meter.fetched(meter.now())
    assert [copy.expert for copy in meter.traffic.copies] == [0, 1, 2]
    assert len(meter.traffic.fetches) == 3
    assert (meter.traffic.disk_bytes, meter.traffic.host_bytes) == (18, 9)
