import jax
import numpy as np

from moe_jax.base.initial import layer_keys, named_key


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def test_a_key_depends_on_its_own_path_alone():
    key = jax.random.key(3)
    assert bits(named_key(key, "sparse", 2)) == bits(named_key(named_key(key, "sparse"), 2))
    names = ["embedding", "head", "dense", "sparse", "mtp", "moe", "router", "attention"]
    different = {tuple(bits(named_key(key, name))) for name in names}
    assert len(different) == len(names)


def test_the_keys_of_layers_are_those_of_their_indices():
    key = named_key(jax.random.key(0), "sparse")
    stacked = layer_keys(key, 3)
    for layer in range(3):
        assert bits(stacked[layer]) == bits(named_key(key, layer))
    traced = jax.jit(lambda layer: named_key(key, layer))(2)
    assert bits(traced) == bits(stacked[2])
