"""Whole models on nodes."""

from moe_jax.study.interconnect.whole import job_of, plain, software


def test_software_is_no_slower():
    job = job_of("deepseek_v2_lite", 1, 27.5e9)
    alone = plain(job)
    best = software(job)
    assert alone is not None
    assert best is not None
    assert job.ideal < best.update.seconds < alone.update.seconds
