"""The table of small hardware: its formulas by hand, and that docs/hardware.md is up to date."""

from pathlib import Path

import pytest

from experiments import small_hardware
from moe_jax.base.errors import UserError
from moe_jax.config.presets import PRESETS
from moe_jax.model.count import count_parameters
from moe_jax.study.results import read_measurements
from moe_jax.study.small_hardware import by_formula, devices, needs_of

ROOT = Path(small_hardware.__file__).parents[1]
RECORDED = ROOT / "experiments/results/small_hardware.json"
DOCS = ROOT / "docs/hardware.md"


def test_needs_of_olmoe_by_hand():
    """16 layers of 64 experts, 3 D F numbers each, AdamW in float32."""
    needs = needs_of(PRESETS["olmoe_1b_7b"].resolved())
    expert = 3 * 2048 * 1024
    total = count_parameters(PRESETS["olmoe_1b_7b"].resolved().model).total
    trunk = total - 16 * 64 * expert
    assert needs.parameters == total
    assert needs.train == pytest.approx(16 * total, rel=1e-6)  # and a few counters
    assert needs.decode == 4 * trunk + 2 * 16 * 64 * expert
    assert needs.tiered_decode == 4 * trunk + 2 * 8 * expert
    assert needs.read_experts == 2 * 16 * 8 * expert
    assert needs.read == 4 * (trunk - 50304 * 2048) + needs.read_experts
    # Four layers' matrices, and two chunks of four experts on their way, with their moments.
    working = 4 * 64 * 4 * expert + 2 * 4 * (2 * 16 - 4) * expert
    assert needs.tiered_train == pytest.approx(16 * trunk + working, rel=1e-6)


def test_speeds_are_bytes_over_rates():
    device = devices()[0]
    needs = needs_of(PRESETS["small"].resolved())
    rows = {row.name: row.value for row in by_formula(device, "small")}
    name = f"{device.name}.small"
    fastest = rows[f"{name}.decode_at_most"]
    assert fastest == pytest.approx(0.9 * 1008.096e9 / needs.read)
    assert fastest is not None
    slowest = 1 / (1 / fastest + needs.read_experts / 27.5e9)
    assert rows[f"{name}.tiered_decode_from_below"] == pytest.approx(slowest)


def test_the_recorded_formulas_are_those_of_the_code():
    recorded = read_measurements(RECORDED)
    for device in devices():
        for preset in PRESETS:
            for row in by_formula(device, preset):
                assert recorded[row.name].value == pytest.approx(row.value), row.name


def test_the_tables_of_the_docs_are_up_to_date(tmp_path):
    """Run `python experiments/small_hardware.py --recorded … --docs …` after a change."""
    copy = tmp_path / "hardware.md"
    copy.write_text(DOCS.read_text())
    small_hardware.main(["--recorded", str(RECORDED), "--docs", str(copy)])
    assert copy.read_text() == DOCS.read_text()


def test_the_summary_of_the_docs():
    recorded = read_measurements(RECORDED)

    def fits(what: str) -> dict[str, set[str]]:
        def of(device: str) -> set[str]:
            return {p for p in PRESETS if recorded[f"{device}.{p}.{what}_fits"].value}

        return {device.name: of(device.name) for device in devices()}

    own = {"tiny", "small"}
    assert all(presets >= own for presets in fits("train").values())
    assert fits("tiered_train") == {
        "rtx4090": {*own, "olmoe_1b_7b"},
        "l4": {*own, "olmoe_1b_7b"},
        "t4": own,
        "laptop": own,
    }
    decoded = fits("tiered_decode").values()
    assert all(set(PRESETS) - presets == {"deepseek_v3"} for presets in decoded)


def test_everything_in_the_tables_is_labelled():
    text = DOCS.read_text()
    assert "PREDICTED" in text
    speeds = [r for r in read_measurements(RECORDED).values() if r.unit.startswith("tokens/s")]
    assert len(speeds) > 2 * 4 * len(PRESETS)
    assert all("PREDICTED" in row.unit for row in speeds)


@pytest.mark.parametrize("text", ["no comments", small_hardware.END + small_hardware.BEGIN])
def test_a_text_without_its_two_comments_is_left_alone(tmp_path, text):
    path = tmp_path / "docs.md"
    path.write_text(text)
    with pytest.raises(UserError, match="once each"):
        small_hardware.main(["--recorded", str(RECORDED), "--docs", str(path)])
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--docs", "no/such.md"], "--docs no/such.md cannot be read"),
        (["--recorded", "no/such.json", "--docs", str(DOCS)], "--recorded no/such.json"),
        (["--quik"], "did you mean --quick"),
    ],
)
def test_bad_commands(argv, message):
    with pytest.raises(UserError) as error:
        small_hardware.main(argv)
    assert message in str(error.value)


def test_a_recorded_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="is no result of this experiment"):
        small_hardware.main(["--recorded", str(path), "--docs", str(DOCS)])
