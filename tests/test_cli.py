import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import cli
from moe_jax.base.errors import UserError
from moe_jax.base.signals import Stopped
from moe_jax.config import ModelConfig, MoEConfig, OptimConfig, TrainConfig

PRESETS = {
    "tiny": TrainConfig(preset="tiny"),
    "small": TrainConfig("small", steps=50, model=ModelConfig(layers=6, moe=MoEConfig(experts=16))),
}


def parse(line: str) -> TrainConfig:
    return cli.parse(shlex.split(line), PRESETS)


def test_without_arguments_the_default_preset():
    assert parse("") == PRESETS["tiny"]


def test_a_preset_and_options_of_every_kind():
    config = parse(
        "small --out 'a b' --seed=3 --model.moe.experts_per_token 4 --optim.learning-rate 1e-4 "
        "--optim.schedule wsd --model.vocabulary 5000 --model.no-tied-embedding "
        "--data.source 'files:~/texts/*.txt'"
    )
    assert (config.preset, config.out, config.seed, config.steps) == ("small", "a b", 3, 50)
    assert (config.model.moe.experts, config.model.moe.experts_per_token) == (16, 4)
    assert (config.optim.learning_rate, config.optim.schedule) == (1e-4, "wsd")
    assert (config.model.vocabulary, config.model.tied_embedding) == (5000, False)
    assert config.data.source == "files:~/texts/*.txt"


def test_none_is_a_value_and_the_last_of_two_counts():
    assert parse("--model.vocabulary 5000 --model.vocabulary None").model.vocabulary is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tinny", "unknown preset 'tinny': use one of tiny, small (did you mean tiny?)"),
        ("zzz", "unknown preset 'zzz': use one of tiny, small"),
        ("''", "unknown preset '': use one of tiny, small"),
        (
            "--model.moe.expert 3",
            "unknown option --model.moe.expert: did you mean --model.moe.experts?",
        ),
        (
            "--learning-rate 1",
            "unknown option --learning-rate: did you mean --optim.learning-rate?",
        ),
        ("--zzzz=1", "unknown option --zzzz: see --help"),
        ("--preset small", "unknown option --preset: see --help"),
        ("--steps abc", "--steps: 'abc' is not an int"),
        ("--steps=1e3", "--steps: '1e3' is not an int"),
        ("--steps=", "--steps: '' is not an int"),
        ("--steps 3 small", "--steps: '3 small' is not an int"),
        ("--model.vocabulary x", "--model.vocabulary: 'x' is not an int or None"),
        ("--optim.learning-rate fast", "--optim.learning-rate: 'fast' is not a float"),
        (
            "--optim.schedule cos",
            "--optim.schedule: 'cos' is not one of cosine, wsd, constant (did you mean cosine?)",
        ),
        ("--lr 1", "unknown option --lr: did you mean --optim.learning-rate?"),
        ("--heads 1", "unknown option --heads: did you mean --model.attention.heads?"),
        ("--shedule wsd", "unknown option --shedule: did you mean --optim.schedule?"),
        ("--steps", "--steps needs a value: an int"),
        ("--steps --seed 3", "--steps needs a value: an int"),
        (
            "--model.tied-embedding False",
            "--model.tied-embedding takes no value, but got 'False'",
        ),
        ("-s 3", "unexpected '-s': options start with --, see --help"),
        ("small large", "unexpected 'large': options start with --, see --help"),
        ("--optim.learning-rate -1e-3", "optim.learning_rate is -0.001: it must be positive"),
        (
            "--model.moe.experts 1",
            "model.moe.experts_per_token=2 exceeds experts=1: a token goes to distinct experts",
        ),
        # a typo is reported before what it leads to
        (
            "--model.moe.experts 1 --model.moe.expert-per-token 1",
            "unknown option --model.moe.expert-per-token: "
            "did you mean --model.moe.experts-per-token?",
        ),
    ],
)
def test_every_mistake_is_one_line(line, message, capsys):
    with pytest.raises(UserError) as caught:
        parse(line)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("line", ["--help", "-h", "small --steps 3 --help"])
def test_help_lists_presets_and_fields(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(line)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "[PRESET]" in text
    assert "tiny, small" in text
    assert "--model.moe.experts INT" in text
    assert "Routed experts (E)." in text
    assert "--preset" not in text


@dataclass(frozen=True)
class Small:
    out: str
    quick: bool = False
    seeds: tuple[int, ...] = (0,)


def test_other_settings_have_the_same_errors():
    default = Small("runs")
    assert cli.parse_settings(default, ["--quick", "--seeds", "1", "2"]) == Small(
        "runs", True, (1, 2)
    )
    with pytest.raises(UserError, match="unknown option --quik: did you mean --quick"):
        cli.parse_settings(default, ["--quik"])


def test_check_judges_types_but_not_combinations():
    cli.check(TrainConfig(), ["--model.moe.experts", "1"])
    with pytest.raises(UserError, match="--batch: 'x' is not an int"):
        cli.check(TrainConfig(), ["--model.moe.experts", "1", "--batch", "x"])


def test_split_deals_options_to_their_settings():
    argv = shlex.split("--steps 5 --quick --out=a --seeds 1 2 --model.width 8")
    assert cli.split(argv, Small, TrainConfig) == (
        ["--quick", "--out=a", "--seeds", "1", "2"],
        ["--steps", "5", "--model.width", "8"],
    )


def test_override_sets_dotted_fields():
    changed = cli.override(
        PRESETS["small"],
        {"model.moe.experts": "32", "model.tied-embedding": "false", "data.source": "files:--help"},
    )
    assert (changed.preset, changed.steps, changed.model.moe.experts) == ("small", 50, 32)
    assert (changed.model.tied_embedding, changed.data.source) == (False, "files:--help")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({"model.moe.expert": "1"}, "did you mean --model.moe.experts"),
        ({"help": ""}, "unknown option --help"),
        ({"preset": "small"}, "unknown option --preset"),
        ({"batch": "1.5"}, "--batch: '1.5' is not an int"),
        ({"model.tied_embedding": "maybe"}, "model.tied_embedding: 'maybe' is not true or false"),
        ({"model.moe.experts": "1"}, "experts_per_token=2 exceeds experts=1"),
    ],
)
def test_override_refuses(assignments, message):
    with pytest.raises(UserError, match=message):
        cli.override(TrainConfig(), assignments)


def test_fields_are_flat():
    flat = cli.fields(PRESETS["small"])
    assert flat["model.moe.experts"] == 16
    assert set(flat) == {"preset", *cli.types(TrainConfig)}


def test_command_line_has_only_what_differs():
    base = PRESETS["small"]
    config = replace(base, out="a b", optim=OptimConfig(learning_rate=1e-4))
    assert cli.command_line(base, base) == "python experiments/train.py small"
    assert (
        cli.command_line(config, base)
        == "python experiments/train.py small --out 'a b' --optim.learning-rate 0.0001"
    )


@settings(max_examples=20, deadline=None)
@given(
    out=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8),
    rate=st.floats(1e-12, 1e3),
    tied=st.booleans(),
    vocabulary=st.none() | st.integers(4096, 10**6),
)
def test_command_line_gives_the_config_back(out, rate, tied, vocabulary):
    base = PRESETS["small"]
    model = replace(base.model, tied_embedding=tied, vocabulary=vocabulary)
    config = replace(base, out=out, model=model, optim=OptimConfig(learning_rate=rate))
    _, _, *argv = shlex.split(cli.command_line(config, base))
    assert cli.parse(argv, PRESETS) == config


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("steps is 0"), 2, "error: steps is 0\n"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT\n"),
        (Stopped(signal.SIGTERM, "a is kept"), 143, "stopped by SIGTERM: a is kept\n"),
    ],
)
def test_program_ends_with_a_line_and_a_code(raised, code, line, capsys):
    def main(argv):
        raise raised

    with pytest.raises(SystemExit) as caught:
        cli.program(main)
    assert caught.value.code == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("word", ["caf\udce9", "--out=\ud800"])
def test_arguments_that_are_no_utf8_are_refused(word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "tiny", word])
    with pytest.raises(SystemExit) as caught:
        cli.program(lambda argv: None)
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: argument 2 is no UTF-8: b'")
    assert line.count("\n") == 1


def test_a_terminal_without_utf8_shows_escapes_and_the_run_ends_well():
    code = "from moe_jax.cli import program; program(lambda argv: print('naïve … ‖'))"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "naïve ".encode("latin-1") + rb"\u2026 \u2016" + b"\n"


def test_program_passes_arguments_and_catches_nothing_else(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "small"])
    seen = []
    cli.program(seen.extend)
    assert seen == ["small"]
    with pytest.raises(ZeroDivisionError):
        cli.program(lambda argv: 1 / 0)  # type: ignore[arg-type]
