"""The proportions of real models: their E and K, with widths and tokens scaled down."""

from dataclasses import replace

from experiments.moe_layer.peers import fastest_peer, transformers_calls
from experiments.moe_layer.timing import Times, gemm_call, layer_calls, layer_row, paired_rounds
from moe_jax.base.result import Measurement
from moe_jax.study.layer_case import Shape, make_inputs
from moe_jax.study.live_table import LiveTable

MODELS = {
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
    "Qwen1.5-MoE": (2048, 1408, 60, 4),
    "Llama4-Scout": (5120, 8192, 16, 1),
    "gpt-oss-120b": (2880, 2880, 128, 4),
}
"""D, F, E, K as published."""

BESIDE = ("xla", "reference", "transformers eager", "transformers grouped_mm")
"""Implementations that are timed at each model's proportions."""


def model_shape(name: str, most_flops: float, most_tokens: int) -> Shape:
    """A model's E and K, with its widths divided by 8 and as many tokens as `most_flops` allows.

    The widths are divided by 16 where the matrices of a layer would take more than 256 MB. The
    number of tokens is a power of two and at most `most_tokens`. The FLOPs are the forward pass's.
    """
    width, hidden, experts, per_token = MODELS[name]
    one = Shape(1, width // 8, hidden // 8, experts, per_token)
    if experts * one.expert_bytes > 256e6:
        one = replace(one, width=width // 16, hidden=hidden // 16)
    tokens = 1 << (int(most_flops / one.flops).bit_length() - 1)
    return replace(one, tokens=min(most_tokens, tokens))


def model_table(
    shapes: dict[str, Shape], rounds: int, seed: int, table: LiveTable
) -> tuple[dict[str, dict[str, float | None]], list[Measurement]]:
    """The limit, ours and the peers. Returns (train rates by model and implementation, rows)."""
    rates = {}
    found = []
    for model, shape in shapes.items():
        inputs = make_inputs(shape, seed)
        ours = layer_calls(shape, inputs, "xla") + layer_calls(shape, inputs, "reference")
        peers, _ = transformers_calls(shape, inputs)
        times = paired_rounds([gemm_call(shape, seed), *ours, *peers], rounds, model)
        for name in BESIDE:
            layer_row(table, f"{model}, {shape}", name, times)
        rates[model] = {name: times.rate_of(f"{name} train") for name in BESIDE}
        found += model_measurements(f"{model}, {shape}", times)
    return rates, found


def model_measurements(label: str, times: Times) -> list[Measurement]:
    """Forward and backward beside the limit and beside the best peer."""
    of = times.rate_of("xla train")
    peer = fastest_peer(times, "train")
    over = times.speedup("xla train", peer)
    model = label.partition(",")[0]
    return [
        Measurement(f"train_of_gemm.{model}", of, "of the GEMM's rate", label, of),
        Measurement(f"train_over_transformers.{model}", over, "times as fast", peer, over),
    ]
