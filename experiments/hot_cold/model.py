"""The model whose experts are placed: trained on code, prose and tables, so popularity drifts."""

import json
from pathlib import Path

from moe_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from moe_jax.runs.load import Trained, load_run
from moe_jax.runs.run import run_training
from moe_jax.study.domains import write_corpus

LOCALITY = 0.3
"""Weight of the locality loss, unless another is given."""


def model_config(out: Path, seed: int, quick: bool, locality: float) -> TrainConfig:
    """32 experts in each of 4 layers, 4 a token, 1.6 MB each in float32. --quick has a smaller one.

    `locality` is the weight of the locality loss, which keeps experts in use for a while. Half of
    it is the weight of the balance over the whole batch, which keeps all experts in use. With 0 the
    balance is DeepSeek-V3's: a small sequence-wise loss and the router bias.
    """
    model = ModelConfig(
        width=64 if quick else 256,
        layers=3 if quick else 5,
        dense_layers=1,
        dense_hidden=256 if quick else 512,
        attention=AttentionConfig(kind="gqa", heads=8, kv_heads=2, head_dim=32),
        moe=MoEConfig(
            experts=16 if quick else 32,
            experts_per_token=4,
            expert_hidden=64 if quick else 512,
            locality_loss=locality,
            expert_loss=locality / 2,
            # A balance within each sequence would contradict locality.
            sequence_loss=0.0 if locality else 1e-4,
            bias_rate=0.003 if locality else 0.001,
        ),
        init_std=0.04,
        unroll=4,
    )
    return TrainConfig(
        preset="placement",
        # The settings are in the name: a folder holds the runs of several weights and seeds.
        out=str(out / f"model-{seed}-{locality:g}{'-quick' * quick}"),
        seed=seed,
        steps=30 if quick else 400,
        batch=8,
        evaluate_every=1000,
        samples=0,
        model=model,
        data=DataConfig(
            source=f"files:{out}/corpus/*/*.txt",
            tokenizer="bpe:2048",
            length=128,
            cache=str(out / "cache"),
            validation_fraction=0.02,
            validation_tokens=20_000,
        ),
        optim=OptimConfig(learning_rate=2e-3, beta2=0.95, weight_decay=0.1, final=0.1),
        checkpoint=CheckpointConfig(every=100),
    )


def trained_model(out: Path, seed: int, quick: bool, locality: float) -> Trained:
    """The model, trained now or before. A killed training continues from its checkpoint."""
    config = model_config(out, seed, quick, locality)
    if not (Path(config.out) / "result.json").exists():  # written when a run is complete
        write_corpus(out)
        run_training(config)
    return load_run(config.out)


def held_out_bits(run: Trained) -> float:
    """Bits per byte of the model on its validation text, as its training measured them."""
    measurements = json.loads((Path(run.config.out) / "result.json").read_text())["measurements"]
    return next(m["value"] for m in measurements if m["name"] == "validation_bits_per_byte")
