"""Small settings that all tests share."""

import os
import sys

if "gpu" in sys.argv:  # pytest -m gpu
    os.environ["MOE_JAX_TEST_GPU"] = "1"  # also in pytest-xdist's processes, which share the GPU:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "MOE_JAX_TEST_GPU" not in os.environ:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Nearly all of the tests' time is LLVM's, on programs that run for milliseconds. XLA's own
    # passes, fusion among them, stay; `XLA_FLAGS= pytest` compiles as users do.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # Triton decides at its import whether kernels are interpreted; tests that need the compiler
    # start a process of their own.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from moe_jax.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, TrainConfig

# Two CPU devices, so that data parallelism is tested on any machine; not more, because XLA's CPU
# collectives wait for each other's threads, and a machine with two cores starves four of them.
jax.config.update("jax_num_cpu_devices", 2)

GQA = AttentionConfig(kind="gqa", heads=4, kv_heads=2, head_dim=8)
MLA = AttentionConfig(kind="mla", heads=3, q_rank=10, kv_rank=12, nope_dim=8, rope_dim=4, v_dim=6)


SMALL_MODEL = ModelConfig(
    vocabulary=61,
    width=20,
    layers=3,
    dense_layers=1,
    dense_hidden=24,
    attention=GQA,
    moe=MoEConfig(experts=6, experts_per_token=2, expert_hidden=14),
    init_std=0.2,
    compute_dtype="float32",  # resolved, as in the checkpoint of a run
)


@pytest.fixture
def small_model() -> ModelConfig:
    """One dense and two sparse blocks over 61 tokens; sizes that are no powers of two."""
    return SMALL_MODEL


@pytest.fixture(params=["gqa", "mla"])
def either_attention(request: pytest.FixtureRequest, small_model: ModelConfig) -> ModelConfig:
    """small_model with each kind of attention."""
    return replace(small_model, attention=GQA if request.param == "gqa" else MLA)


def make_run(folder: Path, model: ModelConfig, **settings) -> TrainConfig:
    """A run of 12 steps of a one-block model on eight small files, all inside `folder`: its time
    goes into compiling, so the model is as small as it can be."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for index in range(8):
        body = "\n".join(f"def f{index}_{n}(x):\n    return x + {n}" for n in range(60))
        (texts / f"module{index}.py").write_text(body)
    model = replace(model, vocabulary=None, layers=1, dense_layers=0, init_std=0.02)
    data = DataConfig(
        source=f"files:{texts}/*.py",
        tokenizer="bytes",
        length=48,
        validation_fraction=0.3,
        cache=str(folder / "cache"),
    )
    defaults = {"steps": 12, "batch": 4, "evaluate_every": 6, "samples": 0}
    out = str(folder / "run")
    settings = {**defaults, "out": out, "model": model, "data": data, **settings}
    return TrainConfig(**settings).resolved()


@pytest.fixture
def small_run(tmp_path: Path, small_model: ModelConfig) -> TrainConfig:
    """make_run in a folder of the test's own, not yet trained."""
    return make_run(tmp_path, small_model)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """make_run with one sample, trained to its end once for all tests, which only read it."""
    from moe_jax.runs.run import run_training

    config = make_run(tmp_path_factory.mktemp("finished"), SMALL_MODEL, samples=1)
    run_training(config)
    return config


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Processes that a module's tests start find what others of them have compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        yield
