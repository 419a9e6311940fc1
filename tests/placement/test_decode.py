"""Decoding with tiers: the model's own tokens, and the same bits whatever is resident."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.model.generate import generate
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias
from moe_jax.placement.decode import TieredDecoder
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.policy import make_policy
from moe_jax.placement.save_experts import save_experts
from moe_jax.placement.store import ExpertStore
from tests.conftest import MLA


def split(config):
    model = Transformer(config, key=jax.random.key(0))
    graph, parameters, router = nnx.split(model, nnx.Param, RouterBias)
    router = jax.tree.map(lambda b: 0.2 * jax.random.normal(jax.random.key(3), b.shape), router)
    return graph, parameters, router


def store(folder, name, slots, working_set, **settings):
    files = ExpertFiles(folder)
    size = files.layers * files.experts
    experts = ExpertStore(
        files,
        make_policy(name, size, files.layers, np.arange(size)),
        device_bytes=slots * files.expert_bytes,
        working_set=working_set,
        **settings,
    )
    if name == "static":
        experts.fill()
    return experts


@pytest.mark.parametrize(
    ("attention", "temperature", "change"),
    [
        ("gqa", 1.0, {"tied_embedding": False, "dense_layers": 0}),
        pytest.param("mla", 0.0, {"mtp_depth": 1}, marks=pytest.mark.slow),
    ],
)
def test_the_models_own_tokens(small_model, tmp_path, attention, temperature, change):
    config = replace(small_model, **change)
    if attention == "mla":
        config = replace(config, attention=MLA)
    graph, parameters, router = split(config)
    save_experts(tmp_path, parameters)
    prompt = jax.random.randint(jax.random.key(1), (2, 4), 0, 61)
    settings = {"count": 6, "vocabulary": 50, "temperature": temperature, "top_k": 7}
    expected = generate(graph, (parameters, router), prompt, jax.random.key(2), **settings)
    with store(tmp_path, "lru", 6, 4, look_ahead=2) as tiers:
        decoder = TieredDecoder(config, parameters, router, tiers)
        tokens = decoder.generate(prompt, jax.random.key(2), **settings)
        assert tiers.traffic.hits < tiers.traffic.uses  # some experts did have to come
    np.testing.assert_array_equal(tokens, expected)


def test_the_same_bits_whatever_is_resident(small_model, tmp_path):
    _, parameters, router = split(small_model)
    save_experts(tmp_path, parameters)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (7, 2), 0, 61))

    def logits(*arguments, **settings):
        with store(tmp_path, *arguments, **settings) as tiers:
            decoder = TieredDecoder(small_model, parameters, router, tiers)
            caches = decoder.empty_caches(2, len(tokens))
            outputs = []
            for position, token in enumerate(tokens):
                out, caches = decoder.step(token, position, caches)
                outputs.append(np.asarray(out))
            return np.stack(outputs)

    everything = logits("static", 16, 4)
    for name in ("static", "lru", "lfu", "decayed_lfu", "lfru"):
        for slots in (4, 8):
            np.testing.assert_array_equal(logits(name, slots, 4, look_ahead=3), everything)
    host = 4 * 3 * small_model.width * small_model.moe.expert_hidden * 4
    np.testing.assert_array_equal(logits("lru", 5, 4, host_bytes=host), everything)
    np.testing.assert_array_equal(
        logits("lru", 5, 4, host_bytes=host, on_miss="compute"), everything
    )
    np.testing.assert_array_equal(logits("lru", 5, 4, blocking=True), everything)
    np.testing.assert_array_equal(logits("lru", 9, 4, scope="quota"), everything)


def test_routing_without_a_capacity_only_and_experts_of_this_model(small_model, tmp_path):
    _, parameters, router = split(small_model)
    save_experts(tmp_path, parameters)
    with store(tmp_path, "lru", 6, 2) as tiers:
        for change, message in (
            ({"moe": replace(small_model.moe, capacity_factor=1.0)}, "capacity_factor=1.0"),
            ({"moe": replace(small_model.moe, expert_hidden=7)}, r"20, 28\), the model has"),
            ({"dense_layers": 3}, "has no experts"),
        ):
            with pytest.raises(UserError, match=message):
                TieredDecoder(replace(small_model, **change), parameters, router, tiers)


def test_the_routing_of_a_decoded_text_can_be_collected(small_model, tmp_path):
    _, parameters, router = split(small_model)
    save_experts(tmp_path, parameters)
    with store(tmp_path, "lru", 6, 2) as tiers:
        decoder = TieredDecoder(small_model, parameters, router, tiers)
        decoder.routing = []
        prompt = jnp.zeros((1, 3), jnp.int32)
        known: list[int] = []
        decoder.generate(
            prompt,
            jax.random.key(0),
            count=2,
            vocabulary=61,
            on_token=lambda: known.append(len(decoder.routing or [])),
        )
    assert known == [3 * 2, 4 * 2], "after the prompt, and after each step"
    assert [chosen.shape for chosen in decoder.routing] == [(1, 2)] * (4 * 2)


def test_experts_in_the_memory_of_another_device_are_computed_there(small_model, tmp_path):
    """The second of two CPU devices stands for an accelerator, whose host computes on a miss."""
    _, parameters, router = split(small_model)
    save_experts(tmp_path, parameters)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (7, 2), 0, 61))
    everything = 16 * 3 * small_model.width * small_model.moe.expert_hidden * 4

    def logits(device, **settings):
        parts = jax.device_put((parameters, router), device)
        with store(tmp_path, "static", 5, 4, device=device, **settings) as tiers:
            tiers.unified = device == jax.devices()[0]
            decoder = TieredDecoder(small_model, *parts, tiers)
            with jax.default_device(device):
                caches = decoder.empty_caches(2, len(tokens))
                outputs = []
                for position, token in enumerate(tokens):
                    out, caches = decoder.step(token, position, caches)
                    outputs.append(np.asarray(out))
            return np.stack(outputs), tiers.traffic

    here, accelerator = jax.devices()[:2]
    exact, _ = logits(here)
    copied, _ = logits(accelerator)
    np.testing.assert_array_equal(copied, exact)
    settings = {"host_bytes": everything, "on_miss": "compute"}
    computed, traffic = logits(accelerator, **settings)
    assert traffic.computed > 0
    # The same products, but the host's experts are summed apart: only the order differs.
    np.testing.assert_allclose(computed, exact, rtol=1e-5, atol=1e-5)
