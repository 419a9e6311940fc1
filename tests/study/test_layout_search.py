"""The search over layouts, with a stand-in for the compiler."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_jax.base.errors import UserError
from moe_jax.base.result import Measurement
from moe_jax.parallel.rules import device_bytes
from moe_jax.predict.answer import read_command
from moe_jax.predict.hardware import find_card
from moe_jax.predict.layouts.fsdp import Update
from moe_jax.predict.memory import CONTEXT, NCCL
from moe_jax.study.layout_search.candidates import Candidate, candidates
from moe_jax.study.layout_search.estimates import least_bytes
from moe_jax.study.layout_search.figures import pareto
from moe_jax.study.layout_search.report import report, verdict
from moe_jax.study.layout_search.search import Search, in_order, plan, run
from moe_jax.study.layout_search.tries import Try
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.state import abstract_state, tree_bytes

PROGRAM = """
import json, os, pathlib, sys
def value(option):
    return sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index(option) + 1]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
expert = int(value("--parallel.expert"))
if expert == 2:
    print("error: no such layout", file=sys.stderr)
    sys.exit(2)
if expert == 4:
    os.abort()
out = pathlib.Path(value("--out"))
out.mkdir(parents=True)
seconds = 2.0 if value("--model.remat") == "full" else 1.0
rows = {"step_seconds": seconds, "bytes_per_device": 3e9 / seconds, "fits": 1, "mfu": 0.1,
        "tokens_per_second_per_device": 10.0, "compile_seconds": 1.0}
rows = [dict(name=n, value=v, unit="", interval=[v / 2, 2 * v]) for n, v in rows.items()]
(out / "result.json").write_text(json.dumps({"measurements": rows}))
"""


@pytest.fixture
def search(tmp_path, monkeypatch) -> Search:
    """A search of few candidates: experts over 1, 2, 4 or 8 devices, remat none or full."""
    program = tmp_path / "predict.py"
    program.write_text(PROGRAM)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr("moe_jax.study.layout_search.candidates.REMAT", ("none", "full"))
    monkeypatch.setattr("moe_jax.study.layout_search.candidates.PARTS", (1,))
    argv = ["tiny", "--batch", "16", "--out", str(tmp_path / "out"), "--search"]
    argv += ["--parallel.pipe", "1", "--parallel.tensor", "1", "--parallel.fsdp", "1"]
    settings, config = read_command(argv)
    return Search(settings, config, find_card("h100"), argv, str(program))


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().splitlines())


def test_candidates_fill_the_devices_and_split_the_batch():
    _, config = read_command(["tiny", "--batch", "32", "--model.layers", "9"])
    found = list(candidates(config, 8, {"parallel.tensor"}))
    assert len({one.name for one in found}) == len(found)
    for one in found:
        parallel = one.of(config).parallel
        assert 8 % parallel.fixed == 0
        parts = parallel.microbatches if parallel.pipe > 1 else one.options["optim.accumulation"]
        assert 32 % (parts * 8 // parallel.pipe // parallel.tensor) == 0
    assert {one.of(config).parallel.schedule for one in found} >= {"1f1b", "dualpipe", "zb-v"}
    assert {one.of(config).model.remat for one in found} == {"none", "dots", "full"}


def test_fields_of_the_command_line_stay(search):
    assert search.kept == {"parallel.pipe", "parallel.tensor", "parallel.fsdp"}
    found = [one.candidate.of(search.config) for one in plan(search)]
    assert {config.parallel.fsdp for config in found} == {1}
    assert {config.parallel.expert for config in found} == {1, 2, 4, 8}


@pytest.mark.parametrize("options", [{"fsdp": 2}, {"expert": 2}, {"tensor": 2}])
def test_least_bytes_are_the_engines_state_and_gradients(options):
    _, config = read_command(["tiny"])
    config = replace(config, parallel=replace(config.parallel, **options))
    engine = DenseEngine(config)
    gradients = device_bytes(engine.abstract_state().parameters)
    least = least_bytes(config, abstract_state(config), 2)
    assert least == engine.memory_bytes() + gradients + CONTEXT + NCCL


def test_a_pipeline_needs_a_stages_weights_and_sums_whole():
    _, config = read_command(["tiny", "--model.layers", "5", "--parallel.pipe", "2"])
    fsdp = replace(config, parallel=replace(config.parallel, fsdp=4))
    state = abstract_state(fsdp)
    least = least_bytes(fsdp, state, 8) - CONTEXT - NCCL
    assert least >= tree_bytes(state.parameters)


def test_the_order_is_by_time_with_other_axes_before_many_variants():
    def ready(pipe: int, remat: str, seconds: float, size: float = 1.0) -> Try:
        options = {"parallel.pipe": pipe, "model.remat": remat}
        return Try(Candidate(options), "not tried", rough=Update(seconds, size))

    planned = [
        ready(1, "none", 1.0),
        ready(1, "dots", 1.05),
        ready(1, "full", 1.1),
        ready(2, "none", 1.3),
        ready(4, "none", 0.5, 99.0),
    ]
    found = [(*one.candidate.options.values(),) for one in in_order(planned, 10)]
    assert found == [(1, "none"), (1, "dots"), (2, "none"), (1, "full"), (4, "none")]


def test_layers_that_do_not_divide_are_refused_before_anything_is_compiled():
    _, config = read_command(["tiny", "--model.layers", "4", "--parallel.pipe", "2"])
    with pytest.raises(UserError, match="layers"):
        least_bytes(config, abstract_state(config), 2)


def test_failures_are_recorded_and_do_not_end_the_search(search, tmp_path):
    found = run(search, plan(search))
    states = {(one.candidate.options["parallel.expert"], one.state) for one in found}
    assert states == {(1, "compiled"), (2, "refused"), (4, "failed"), (8, "compiled")}
    assert {one.line for one in found if one.state == "refused"} == {"no such layout"}
    assert all("ended with -6" in one.line for one in found if one.state == "failed")
    assert calls(tmp_path) == 8
    # A second start reads what there is, and tries nothing again.
    again = run(search, plan(search))
    assert [(one.candidate, one.state, one.line) for one in again] == [
        (one.candidate, one.state, one.line) for one in found
    ]
    assert calls(tmp_path) == 8


def test_a_damaged_result_is_made_again(search, tmp_path):
    found = run(search, plan(search))
    first = next(one for one in found if one.fits)
    (search.folder(first.candidate) / "result.json").write_text("{")
    (tmp_path / "predict.py").write_text(
        PROGRAM.replace("mkdir(parents=True)", "mkdir(exist_ok=True)")
    )
    again = run(search, plan(search))
    assert calls(tmp_path) == 9
    assert all(one.state != "not tried" for one in again)


def test_when_the_time_is_over_the_rest_is_named(search, tmp_path):
    times = iter([0.0, 0.0, 1e9])
    found = run(search, plan(search), clock=lambda: next(times, 1e9))
    assert calls(tmp_path) == 1
    assert sum(one.state == "not tried" for one in found) == len(found) - 1
    assert "7 not tried within 30 minutes" in verdict(search, found)


def test_a_candidate_that_takes_too_long_is_not_tried(search, tmp_path):
    (tmp_path / "predict.py").write_text("import time; time.sleep(60)")
    short = replace(search, settings=replace(search.settings, search_minutes=0.01))
    assert {one.state for one in run(short, plan(short))} == {"not tried"}


def test_the_report_ranks_and_gives_the_best_command(search, tmp_path, capsys):
    report(search, run(search, plan(search)))
    out = tmp_path / "out"
    rows = list(csv.DictReader((out / "candidates.csv").open()))
    assert [row["state"] for row in rows[:4]] == ["compiled"] * 4
    assert [float(row["step_seconds"]) for row in rows[:4]] == [1.0, 1.0, 2.0, 2.0]
    result = {m["name"]: m for m in json.loads((out / "result.json").read_text())["measurements"]}
    assert result["best.step_seconds"]["interval"] == [0.5, 2.0]
    counts = {
        name: result[name]["value"] for name in ("candidates", "compiled", "refused", "failed")
    }
    assert counts == {"candidates": 8, "compiled": 4, "refused": 2, "failed": 2}
    assert (out / "plots" / "search.png").is_file()
    printed = capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("    python"))
    assert "train.py tiny" in command
    assert "--search" not in command


def fitting(name: int, seconds: float, size: float, fits: int = 1) -> Try:
    values = {"step_seconds": seconds, "bytes_per_device": size, "fits": fits}
    rows = {key: Measurement(key, value, "") for key, value in values.items()}
    return Try(Candidate({"parallel.expert": name}), "compiled", rows=rows)


def test_the_front_by_hand():
    tries = [
        fitting(2, 3.0, 1.0),
        fitting(3, 3.0, 2.0),
        fitting(4, 1.0, 5.0),
        fitting(5, 0.1, 9, 0),
    ]
    assert [one.candidate.options["parallel.expert"] for one in pareto(tries)] == [2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search-minutes", "0"], "search_minutes is 0"),
        (["--search-minutes", "soon"], "is not a float"),
        (["--searching"], "did you mean --search"),
        (["--search", "--hardware", "h1000"], "h1000"),
        (["--search", "--distill.teacher", "smollm2"], "a teacher is not in the program"),
        (["--search", "--placement.device-budget", "1GB"], "experts in tiers"),
    ],
)
def test_bad_commands(options, message):
    argv = ["tiny", *options]
    with pytest.raises(UserError) as error:
        Search.of(*read_command(argv), argv, sys.argv[0])
    assert message in str(error.value)
