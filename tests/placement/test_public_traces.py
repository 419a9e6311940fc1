"""Other systems' traces: the same routing from every form, and one line for what is damaged."""

import json

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.placement.public_traces import open_trace

CHOSEN = np.random.default_rng(0).integers(0, 9, (7, 3, 2))


def megatron(path, chosen=CHOSEN, split=4, first=5):
    """Two steps in the order that several layers finish, layers numbered from `first`."""
    records = []
    for step, part in enumerate((chosen[:split], chosen[split:])):
        for layer in reversed(range(chosen.shape[1])):
            record = {"step": step, "block": "decoder", "layer": layer + first}
            records.append({**record, "top_indices": part[:, layer].tolist()})
        records.append({**records[-1], "mtp_idx": 0, "top_indices": [[0, 0]]})
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_every_form_gives_the_same_routing(tmp_path):
    np.save(tmp_path / "a.npy", CHOSEN.astype(np.int16))
    for path in (tmp_path / "a.npy", megatron(tmp_path / "b.jsonl")):
        trace = open_trace(path, experts=12)
        np.testing.assert_array_equal(trace.chosen, CHOSEN)
        assert (trace.experts, trace.layers) == (12, 3)
    assert open_trace(tmp_path / "a.npy").experts == CHOSEN.max() + 1


def test_parquet_folders(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for layer in range(3):
        column = arrow.array(CHOSEN[:, layer].tolist(), arrow.list_(arrow.int16()))
        parquet.write_table(arrow.table({"indices": column}), tmp_path / f"layer_0{layer}.parquet")
    np.testing.assert_array_equal(open_trace(tmp_path).chosen, CHOSEN)


def test_every_kind_of_list_of_whole_numbers_is_read(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "layer_00.parquet"
    lists = (arrow.list_, arrow.large_list, lambda kind: arrow.list_(kind, 2))
    for numbers in (arrow.uint8(), arrow.int32(), arrow.uint64()):
        for kind in lists:
            column = arrow.array(CHOSEN[:, 0].tolist(), kind(numbers))
            parquet.write_table(arrow.table({"indices": column}), path, row_group_size=3)
            np.testing.assert_array_equal(open_trace(tmp_path).chosen, CHOSEN[:, :1])


def test_damaged_parquet_is_one_line_and_long_rows_are_read_in_parts(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from tests.fuzz.readers import failure

    path = tmp_path / "layer_00.parquet"
    refused = {
        "as many for each token": [[[1], [2, 3]], [[1, 2], None], [[1, None]], [[0.5]], ["a"]],
        "up to 65535 experts": [[[1, 2**62]]],
        "numbered from 0": [[[1, -1]]],
        "has no rows": [[]],
        "experts, not 60000": [[[7] * 60_000] * 40],  # takes a few bytes on disk
    }
    for message, columns in refused.items():
        for column in columns:
            values = arrow.array(column or arrow.array([], arrow.list_(arrow.int64())))
            parquet.write_table(arrow.table({"indices": values}), path)
            assert failure(open_trace, tmp_path) is None
            with pytest.raises(UserError, match=message):
                open_trace(tmp_path)
    for content in (b"", b"PAR1PAR1", path.read_bytes()[:-9], bytes(100)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"layer_00.parquet is damaged \("):
            open_trace(tmp_path)


def test_an_unfinished_step_is_passed_over(tmp_path):
    path = megatron(tmp_path / "b.jsonl")
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    np.testing.assert_array_equal(open_trace(path).chosen, CHOSEN[:4])


def test_damage_is_named_in_one_line(tmp_path):
    cases = {
        "flat.npy": (np.zeros(4, int), r"shape \(4,\), not \[tokens, layers, K\]"),
        "real.npy": (np.zeros((2, 2, 2)), "holds float64"),
        "negative.npy": (np.full((1, 1, 1), -1), "names expert -1"),
        "many.npy": (np.full((1, 1, 1), 70_000), "up to 65535 experts"),
    }
    for name, (array, message) in cases.items():
        np.save(tmp_path / name, array)
        with pytest.raises(UserError, match=message):
            open_trace(tmp_path / name)
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(UserError, match="is no array that NumPy saved"):
        open_trace(tmp_path / "text.npy")
    # A last line without its end is what a killed run leaves.
    texts = {"{\n": "line 1 is no record", '{"step": 0}': "line 1 is no record"}
    texts |= {"": "no records", "{": "no records"}
    for text, message in texts.items():
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            open_trace(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"absent\.jsonl is missing"):
        open_trace(tmp_path / "absent.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"holds no layer_NN.parquet"):
        open_trace(tmp_path / "folder")


def test_a_header_longer_than_its_file_is_refused_without_room_for_it(tmp_path):
    path = tmp_path / "routing.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + (600 << 20).to_bytes(4, "little") + b"{}")
    with pytest.raises(UserError, match="its header has 629145600 bytes"):
        open_trace(path)
