"""Specialisation of the experts of a mixture: which tokens they get, and how similar they are.

Copies of one feed-forward that train together may stay copies. Mutual information shows whether the
router sends different text to different experts. Cosines show whether the experts compute different
functions.
"""

from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.config import ModelConfig, require
from moe_jax.model.abstract import graph_of
from moe_jax.model.trunk import sparse_experts
from moe_jax.moe.experts import swiglu

PROBES = 256
"""Random inputs on which experts are compared."""


class Specialisation(NamedTuple):
    """One number for each mixture-of-experts block."""

    class_nats: list[float]
    """mutual_information between a token's experts and the class of its text."""
    token_nats: list[float]
    """mutual_information between a token's experts and the token itself."""
    load_entropy: list[float]
    """normalised_entropy of the experts' loads."""
    weight_cosine: list[float]
    """weight_cosine of the experts' matrices."""
    output_cosine: list[float]
    """output_cosine of the experts."""


def routing_table(
    experts: Int[np.ndarray, "N K"], classes: Int[np.ndarray, "N"], shape: tuple[int, int]
) -> Int[np.ndarray, "E classes"]:
    """How often expert e (of shape[0]) was chosen for a token of class c (of shape[1])."""
    table = np.zeros(shape, np.int64)
    columns = np.broadcast_to(classes[:, None], experts.shape)
    chosen = experts < shape[0]  # the number E says that a choice went to no expert
    # Not table[...] += 1, which counts a pair that occurs several times once.
    np.add.at(table, (experts[chosen], columns[chosen]), 1)
    return table


def mutual_information(table: Int[np.ndarray, "E classes"]) -> float:
    """I = sum p(e, c) log(p(e, c) / (p(e) p(c))) of a table of counts, in nats.

    It is 0 if experts ignore the class. It is log(classes) if all classes are equally frequent and
    each has experts of its own. Estimated from N counts it is about (E - 1)(classes - 1)/(2N) too
    large (Miller, 1955).
    """
    p = table / max(table.sum(), 1)
    expected = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    positive = p > 0  # 0 log 0 = 0
    return float(np.sum(p[positive] * np.log(p[positive] / expected[positive])))


def normalised_entropy(counts: Int[np.ndarray, "E"]) -> float:
    """Entropy of counts / log E: 1 where all are equal, 0 where one expert has all tokens."""
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)) / np.log(len(counts)))


def mean_cosine(vectors: Float[np.ndarray, "E n"]) -> float:
    """Mean over pairs of a · b / (|a| |b|): 1 for copies, about 0 for independent ones."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, 1e-30)
    return float(np.mean([unit[a] @ unit[b] for a, b in combinations(range(len(unit)), 2)]))


def weight_cosine(gate_up: Float[Array, "E D twoF"], down: Float[Array, "E F D"]) -> float:
    """The mean of both matrices' mean_cosine over the experts.

    Experts with the same hidden units in another order compute the same function and look
    different here. Only between experts that began as copies is a low cosine a difference.
    """
    vectors = [np.asarray(m, np.float64).reshape(len(m), -1) for m in (gate_up, down)]
    return float(np.mean([mean_cosine(of) for of in vectors]))


def output_cosine(
    gate_up: Float[Array, "E D twoF"], down: Float[Array, "E F D"], inputs: Float[Array, "N D"]
) -> float:
    """mean_cosine of the experts' outputs for the same inputs. The order of hidden units does not
    matter."""
    hidden = swiglu(jnp.einsum("nd,edf->enf", inputs, gate_up))
    outputs = jnp.einsum("enf,efd->end", hidden, down)
    return mean_cosine(np.asarray(outputs, np.float64).reshape(len(outputs), -1))


def specialisation(
    model: ModelConfig,
    parameters: Any,
    router: Any,
    tokens: Int[np.ndarray, "N L"],
    classes: Int[np.ndarray, "N"],
) -> Specialisation:
    """Specialisation in a model that reads N texts, each of one class (its domain), in one batch.

    Outputs are compared on random inputs of the size that a block's norm produces: a unit normal
    draw times the norm's scale. UserError: no mixture-of-experts block, or a single expert.
    """
    require(
        model.moe_layers > 0 and model.moe.experts > 1,
        "specialisation needs a model with at least two experts in a block",
    )
    graph = graph_of(model)
    experts = np.asarray(_routed(parameters, router, jnp.asarray(tokens), graph=graph))
    all_down, all_gate_up = sparse_experts(parameters)
    norms = nnx.to_pure_dict(parameters)["sparse"]["blocks"]["feed_forward_norm"]["scale"]
    probes = jax.random.normal(jax.random.key(0), (PROBES, model.width))
    of_text = np.repeat(classes, tokens.shape[1])
    of_token = np.asarray(tokens).reshape(-1)
    measured = Specialisation([], [], [], [], [])
    for layer, chosen in enumerate(experts):
        chosen = chosen.reshape(-1, chosen.shape[-1])
        by_class = routing_table(chosen, of_text, (model.moe.experts, int(of_text.max()) + 1))
        by_token = routing_table(chosen, of_token, (model.moe.experts, int(of_token.max()) + 1))
        gate_up = all_gate_up[layer]
        down = all_down[layer]
        inputs = probes * norms[layer]
        measured.class_nats.append(mutual_information(by_class))
        measured.token_nats.append(mutual_information(by_token))
        measured.load_entropy.append(normalised_entropy(by_class.sum(1)))
        measured.weight_cosine.append(weight_cosine(gate_up, down))
        measured.output_cosine.append(output_cosine(gate_up, down, inputs))
    return measured


@jax.jit(static_argnames="graph")
def _routed(
    parameters: Any, router: Any, tokens: Int[Array, "N L"], *, graph: nnx.GraphDef
) -> Int[Array, "layers N L K"]:
    model = nnx.merge(graph, parameters, router)
    _, stats = model.hidden(tokens, jnp.ones_like(tokens))
    assert stats is not None
    return stats.experts
