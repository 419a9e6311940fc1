"""What the experts of a mixture have become: who gets which tokens, and how alike they are.

Copies of one feed-forward that train side by side may stay copies. Two questions tell: does the
router send different text to different experts (mutual information), and do they compute different
things (cosines)?
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
from moe_jax.moe.experts import swiglu

PROBES = 256
"""Random inputs on which experts are compared."""


class Specialisation(NamedTuple):
    """One number for each mixture-of-experts block."""

    class_nats: list[float]
    """mutual_information between a token's experts and the class of its text."""
    token_nats: list[float]
    """The same with the token itself."""
    load_entropy: list[float]
    """normalised_entropy of the experts' loads."""
    weight_cosine: list[float]
    """weight_cosine of the experts' matrices."""
    output_cosine: list[float]
    """output_cosine of the experts."""


def routing_table(
    experts: Int[np.ndarray, "N K"], classes: Int[np.ndarray, "N"], shape: tuple[int, int]
) -> Int[np.ndarray, "E C"]:
    """How often expert e (of shape[0]) was chosen for a token of class c (of shape[1]). Expert
    numbers from E on stand for nobody and do not count."""
    table = np.zeros(shape, np.int64)
    pairs = experts, np.broadcast_to(classes[:, None], experts.shape)
    chosen = experts < shape[0]
    np.add.at(table, tuple(part[chosen] for part in pairs), 1)
    return table


def mutual_information(table: Int[np.ndarray, "E C"]) -> float:
    """I = sum p(e, c) log(p(e, c) / (p(e) p(c))) of a table of counts, in nats.

    0 if experts ignore the class; log C if each of C equally frequent classes has experts of its
    own. From N independent counts it comes out too large by about (E-1)(C-1)/(2N) (Miller, 1955).
    """
    p = table / max(table.sum(), 1)
    expected = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / expected[seen])))


def normalised_entropy(counts: Int[np.ndarray, "E"]) -> float:
    """Entropy of counts / log E: 1 where all are equal, 0 where one has everything."""
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)) / np.log(len(counts)))


def mean_cosine(vectors: Float[np.ndarray, "E M"]) -> float:
    """Mean over pairs of a · b / (|a| |b|): 1 for copies, about 0 for independent ones."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, 1e-30)
    return float(np.mean([unit[a] @ unit[b] for a, b in combinations(range(len(unit)), 2)]))


def weight_cosine(gate_up: Float[Array, "E D twoF"], down: Float[Array, "E F D"]) -> float:
    """mean_cosine of the experts' matrices, the mean of the two. Hidden units have no order: two
    experts that compute the same in another order look different, unless both began as copies."""
    parts = [np.asarray(m, np.float64).reshape(len(m), -1) for m in (gate_up, down)]
    return float(np.mean([mean_cosine(part) for part in parts]))


def output_cosine(
    gate_up: Float[Array, "E D twoF"], down: Float[Array, "E F D"], inputs: Float[Array, "N D"]
) -> float:
    """mean_cosine of what the experts make of the same inputs; the order of hidden units does not
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
    """Of a model that reads N texts, each of one class (its domain), in one batch.

    Outputs are compared on random inputs of the size that a block's norm gives them: a unit normal
    draw times the norm's scale. UserError: no mixture-of-experts block, or a single expert.
    """
    require(
        model.moe_layers > 0 and model.moe.experts > 1,
        "specialisation needs a model with at least two experts in a block",
    )
    built = graph_of(model)
    experts = np.asarray(_routed(parameters, router, jnp.asarray(tokens), graph=built))
    blocks = nnx.to_pure_dict(parameters)["sparse"]["blocks"]
    probes = jax.random.normal(jax.random.key(0), (PROBES, model.width))
    each = [np.repeat(classes, tokens.shape[1]), np.asarray(tokens).reshape(-1)]
    sizes = [int(part.max()) + 1 for part in each]
    rows = []
    for layer, chosen in enumerate(experts):
        tables = [
            routing_table(chosen.reshape(-1, chosen.shape[-1]), part, (model.moe.experts, size))
            for part, size in zip(each, sizes, strict=True)
        ]
        gate_up, down = (blocks["moe"][name][layer] for name in ("gate_up", "down"))
        inputs = probes * blocks["feed_forward_norm"]["scale"][layer]
        rows.append(
            (
                *(mutual_information(table) for table in tables),
                normalised_entropy(tables[0].sum(1)),
                weight_cosine(gate_up, down),
                output_cosine(gate_up, down, inputs),
            )
        )
    return Specialisation(*(list(column) for column in zip(*rows, strict=True)))


@jax.jit(static_argnames="graph")
def _routed(
    parameters: Any, router: Any, tokens: Int[Array, "N L"], *, graph: nnx.GraphDef
) -> Int[Array, "layers N L K"]:
    built = nnx.merge(graph, parameters, router)
    _, stats = built.hidden(tokens, jnp.ones_like(tokens))
    assert stats is not None
    return stats.experts
