"""Traces survive kills and name their damage; the generator has the parameters it was given."""

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.placement.place import Placement, replay
from moe_jax.placement.policy import LRU
from moe_jax.placement.synthetic import ZipfMarkov, fit, generate_trace
from moe_jax.placement.trace import Trace, TraceWriter, read_trace


def random_tokens(count, experts, seed=0):
    return np.random.default_rng(seed).integers(0, experts + 1, (count, 3, 2))


def write(path, experts, lengths=(5, 1, 7)):
    parts = [random_tokens(n, experts, n) for n in lengths]
    with TraceWriter(
        path, layers=3, experts=experts, per_token=2, domains=("code", "prose"), note="a test"
    ) as writer:
        for index, part in enumerate(parts):
            writer.append(part, ("code", "prose")[index % 2])
    return parts


@pytest.mark.parametrize("experts", [6, 255, 256, 300])
def test_what_is_written_is_read(tmp_path, experts):
    parts = write(tmp_path / "a.trace", experts)
    trace = read_trace(tmp_path / "a.trace")
    np.testing.assert_array_equal(trace.chosen, np.concatenate(parts))
    assert trace.domain.tolist() == [0] * 5 + [1] + [0] * 7
    assert (trace.experts, trace.domains, trace.note) == (experts, ("code", "prose"), "a test")


def test_every_cut_of_the_file_gives_its_whole_blocks(tmp_path):
    path = tmp_path / "a.trace"
    parts = write(path, 6)
    whole = path.read_bytes()
    lengths = set()
    begin = whole.index(b"\n") + 1
    first = begin + 8 + int.from_bytes(whole[begin : begin + 4], "little")
    for size in range(begin, len(whole) + 1):
        path.write_bytes(whole[:size])
        if size < first:
            with pytest.raises(UserError, match="holds no tokens"):
                read_trace(path)
            continue
        trace = read_trace(path)
        lengths.add(len(trace.chosen))
        np.testing.assert_array_equal(trace.chosen, np.concatenate(parts)[: len(trace.chosen)])
    assert lengths == {5, 6, 13}


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.trace"
    write(path, 6)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="block 2 is damaged"):
        read_trace(path)
    path.write_bytes(b"hello\n")
    with pytest.raises(UserError, match="not a routing trace"):
        read_trace(path)
    with pytest.raises(UserError, match="none is missing"):
        read_trace(tmp_path / "none")


def test_bad_input_is_refused_before_it_is_written(tmp_path):
    write(tmp_path / "a.trace", 6)
    with pytest.raises(UserError, match="never overwritten"):
        write(tmp_path / "a.trace", 6)
    with TraceWriter(tmp_path / "b.trace", layers=3, experts=6, per_token=2) as writer:
        with pytest.raises(UserError, match=r"\(3, 2\) cannot hold tokens of \(2, 3\)"):
            writer.append(np.zeros((4, 2, 3), int))
        with pytest.raises(UserError, match="experts 0 … 7 are not in 0 … 6"):
            writer.append(np.array([[[0, 1], [2, 7], [0, 0]]]))
        with pytest.raises(UserError, match="unknown domain 'prose'"):
            writer.append(np.zeros((1, 3, 2), int), "prose")


def test_steps_are_the_distinct_experts_of_a_batch():
    chosen = np.array([[[0, 1], [3, 4]], [[1, 2], [4, 0]], [[1, 0], [2, 3]], [[2, 3], [0, 4]]])
    trace = Trace(chosen, np.zeros(4, int), 4, ("text",))
    assert [(layer, e.tolist()) for layer, e in trace.steps()][:4] == [
        (0, [0, 1]), (1, [3]), (0, [1, 2]), (1, [0]),
    ]  # fmt: skip
    assert [(layer, e.tolist()) for layer, e in trace.steps(batch=2)] == [
        (0, [0, 1]), (1, [2, 3]), (0, [1, 2, 3]), (1, [0]),
    ]  # fmt: skip
    assert trace.frequency().tolist() == [2, 3, 2, 1, 2, 0, 1, 2]


def test_the_fit_finds_the_parameters_and_the_hit_rate():
    given = ZipfMarkov(3, 24, 2, domains=2, exponent=1.0, repeat=0.4, switch=0.01)
    trace = generate_trace(given, 6000, seed=1)
    fitted = fit(trace)
    assert fitted.repeat == pytest.approx(given.repeat, abs=0.05)
    assert fitted.switch == pytest.approx(given.switch, rel=0.5)
    assert fitted.exponent == pytest.approx(given.exponent, abs=0.25)
    rates = [
        replay(Placement(LRU(72), 3, 24, 18), t.steps()).hit_rate
        for t in (trace, generate_trace(fitted, 6000, seed=2))
    ]
    assert rates[0] == pytest.approx(rates[1], abs=0.05)


def test_every_token_has_distinct_experts_and_repeat_one_never_moves():
    p = ZipfMarkov(2, 5, 3, domains=2, exponent=0.7, repeat=1.0, switch=0.5)
    trace = generate_trace(p, 20)
    assert all(len(set(row)) == 3 for token in trace.chosen.tolist() for row in token)
    assert (np.sort(trace.chosen, axis=-1) == np.sort(trace.chosen[:1], axis=-1)).all()
    with pytest.raises(UserError, match="K=3 is not in 1 … E=2"):
        generate_trace(p._replace(experts=2), 4)
