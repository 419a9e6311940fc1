"""Small settings that all tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dataclasses import replace

import jax
import pytest

from moe_jax.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, TrainConfig

# Four CPU devices, so that data parallelism is tested on any machine; most tests use the first.
jax.config.update("jax_num_cpu_devices", 4)

GQA = AttentionConfig(kind="gqa", heads=4, kv_heads=2, head_dim=8)
MLA = AttentionConfig(kind="mla", heads=3, q_rank=10, kv_rank=12, nope_dim=8, rope_dim=4, v_dim=6)


@pytest.fixture
def small_model() -> ModelConfig:
    """One dense and two sparse blocks over 61 tokens; sizes that are no powers of two."""
    return ModelConfig(
        vocabulary=61,
        width=20,
        layers=3,
        dense_layers=1,
        dense_hidden=24,
        attention=GQA,
        moe=MoEConfig(experts=6, experts_per_token=2, expert_hidden=14),
        init_std=0.2,
    )


@pytest.fixture(params=["gqa", "mla"])
def either_attention(request: pytest.FixtureRequest, small_model: ModelConfig) -> ModelConfig:
    """small_model with each kind of attention."""
    return replace(small_model, attention=GQA if request.param == "gqa" else MLA)


@pytest.fixture
def text_files(tmp_path):
    """Eight small Python-like files; returns the data.source that names them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(8):
        body = "\n".join(f"def f{index}_{n}(x):\n    return x + {n}" for n in range(60))
        (folder / f"module{index}.py").write_text(body)
    return f"files:{folder}/*.py"


@pytest.fixture
def small_run(tmp_path, text_files, small_model: ModelConfig) -> TrainConfig:
    """A run of 12 steps on text_files that takes seconds, with its cache in tmp_path."""
    return TrainConfig(
        out=str(tmp_path / "run"),
        steps=12,
        batch=4,
        evaluate_every=6,
        samples=1,
        model=replace(small_model, vocabulary=None, init_std=0.02),
        data=DataConfig(
            source=text_files,
            tokenizer="bytes",
            length=48,
            validation_fraction=0.3,
            cache=str(tmp_path / "cache"),
        ),
    )
