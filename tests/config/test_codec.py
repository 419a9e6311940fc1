import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from moe_jax.base.errors import UserError, require
from moe_jax.config import (
    CheckpointConfig,
    DistillConfig,
    PlacementConfig,
    ProcessesConfig,
    TrainConfig,
    fields,
    from_dict,
    settings_that_must_match,
)
from moe_jax.config.codec import MAY_DIFFER


@dataclass(frozen=True)
class Inner:
    count: int = 1
    size: int | None = None
    where: str = field(default="", metadata=MAY_DIFFER)

    def __post_init__(self) -> None:
        require(self.count > 0, f"inner.count is {self.count}: it must be positive")


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    quiet: bool = False
    inner: Inner = field(default_factory=Inner)
    saved: Inner = field(default_factory=Inner, metadata=MAY_DIFFER)


def test_fields_are_flat_and_dotted():
    assert fields(TrainConfig())["model.moe.experts"] == TrainConfig().model.moe.experts


def test_fields_of_nested_configs_in_order():
    assert fields(Outer(inner=Inner(count=3))) == {
        "rate": 0.5,
        "kind": "a",
        "quiet": False,
        "inner.count": 3,
        "inner.size": None,
        "inner.where": "",
        "saved.count": 1,
        "saved.size": None,
        "saved.where": "",
    }


def test_what_may_differ_is_left_out_alone_and_as_a_whole():
    names = {"rate", "kind", "quiet", "inner.count", "inner.size"}
    assert settings_that_must_match(Outer()).keys() == names


def test_a_continued_run_may_change_what_does_not_touch_the_training():
    may_differ = fields(TrainConfig()).keys() - settings_that_must_match(TrainConfig()).keys()
    assert may_differ == {
        *("out", "samples", "evaluate_every", "log", "profile"),
        *("data.cache", "distill.teacher"),
        *(f"checkpoint.{f.name}" for f in dataclasses.fields(CheckpointConfig)),
        *(f"processes.{f.name}" for f in dataclasses.fields(ProcessesConfig)),
        *(f"placement.{f.name}" for f in dataclasses.fields(PlacementConfig) if f.name != "mode"),
        *(name for name in fields(TrainConfig()) if name.startswith("parallel.")),
    } - {"parallel.exchange.fp8"}  # it rounds what is sent


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(rate=2, kind="b", quiet=True, inner=Inner(count=4, size=5, where="x")),
        TrainConfig(distill=DistillConfig(teacher="t", alpha=0.5)),
    ],
)
def test_json_and_back(config):
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(type(config), saved) == config


def test_a_missing_field_takes_its_default():
    assert from_dict(Outer, {"inner": {"size": 3}}) == Outer(inner=Inner(size=3))


def test_a_config_saved_before_there_were_tiers_can_be_read():
    saved = dataclasses.asdict(TrainConfig())
    del saved["placement"]
    assert from_dict(TrainConfig, saved) == TrainConfig()


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ({"speed": 1}, "its setting speed no longer exists"),
        ({"inner": {"counts": 1}}, "its setting inner.counts no longer exists"),
        ({"rate": "fast"}, "its setting rate has the value 'fast'"),
        ({"rate": True}, "its setting rate has the value True"),
        ({"quiet": 1}, "its setting quiet has the value 1"),
        ({"kind": "c"}, "its setting kind has the value 'c'"),
        ({"inner": {"count": 1.5}}, "its setting inner.count has the value 1.5"),
        ({"inner": {"size": "3"}}, "its setting inner.size has the value '3'"),
        ({"inner": 3}, "its setting inner has the value 3"),
        ({"rate": {"count": 1}}, "its setting rate has the value {'count': 1}"),
        ({"inner": {"count": 0}}, "inner.count is 0: it must be positive"),
    ],
)
def test_settings_of_an_older_version_are_one_line_that_names_them(saved, problem):
    with pytest.raises(UserError) as refused:
        from_dict(Outer, saved)
    assert str(refused.value) == (
        f"the checkpoint is from another version of moe_jax: {problem}. Choose another --out, "
        "or use that version"
    )


def test_an_older_training_run_is_refused():
    saved: dict[str, Any] = dataclasses.asdict(replace(TrainConfig(), steps=3))
    saved["model"]["moe"]["top_k"] = 2
    with pytest.raises(
        UserError, match=r"another version of moe_jax: its setting model\.moe\.top_k"
    ):
        from_dict(TrainConfig, saved)
