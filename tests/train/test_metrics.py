import json

import numpy as np

from moe_jax.train.metrics import MetricsFile, imbalance, read_lines


def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 0.1 * s}) + "\n" for s in range(1, 6)))
    file = MetricsFile(path, resume_after=3)
    file.write({"step": 4, "loss": 7.0})
    file.close()
    assert [(x["step"], x["loss"]) for x in read_lines(path)] == [
        (1, 0.1), (2, 0.2), (3, 0.1 * 3), (4, 7.0),
    ]  # fmt: skip


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert [x["step"] for x in read_lines(path)] == [1]
    MetricsFile(path, resume_after=1).close()
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n'


def test_damaged_lines_are_set_aside_and_the_others_kept(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step}).encode() + b"\n" for step in range(1, 6)]
    bad = [b'{"step": 2, "lo\n', b"\xff\xfe\n", b"[1, 2]\n", b'{"step": "x"}\n']
    path.write_bytes(b"".join([good[0], bad[0], *good[1:3], *bad[1:], *good[3:], b'{"st']))
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5]
    MetricsFile(path, resume_after=4).close()
    assert path.read_bytes() == b"".join(good[:4])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(bad)
    assert (
        "damaged lines (2, 5, 6, 7) are moved to metrics.jsonl.damaged" in capsys.readouterr().out
    )


def test_floats_survive_exactly(tmp_path):
    value = float(np.float32(1) / 3)
    file = MetricsFile(tmp_path / "m.jsonl", resume_after=0)
    file.write({"step": 1, "loss": value})
    file.close()
    assert next(read_lines(tmp_path / "m.jsonl"))["loss"] == value


def test_imbalance_is_max_over_mean():
    found = imbalance(np.array([[4, 4, 4], [9, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(found, [1, 3, 0])
