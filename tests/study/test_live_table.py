import json

from moe_jax.study.live_table import LiveTable


def test_a_heading_where_columns_change_and_a_line_of_json_a_row(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("an earlier run's rows\n")
    table = LiveTable(path)
    table.row("limit", "gemm", seconds=1.23456)
    table.row("limit", "plain gemm", seconds=None)
    table.row("layer", "xla", "a note", rate=0.5)
    printed = capsys.readouterr().out.split("\n")
    assert [line for line in printed if line in ("limit", "layer")] == ["limit", "layer"]
    assert "1.235" in printed[3]
    assert printed[4].split() == ["plain", "gemm", "-"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"section": "limit", "name": "gemm", "note": "", "seconds": 1.23456}
    assert lines[2]["note"] == "a note"
