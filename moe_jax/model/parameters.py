"""What every parameter of the model is: one table from the end of its path to its role.

Weight decay, Muon, tiers, upcycling and counting look the role up here.
"""

from typing import Any, Literal, NamedTuple, get_args

Role = Literal[
    "embedding",
    "head",
    "norm",
    "attention",
    "feed_forward",
    "shared_expert",
    "expert",
    "router",
    "router_noise",
    "router_bias",
    "projection",
]


class Kind(NamedTuple):
    """A kind of parameter."""

    role: Role
    axes: str
    """Its axes in the project's letters, without the leading axis of stacked layers.

    H·A is the width of all heads together, R a low rank.
    """


_OUTPUT_HEADS = "H·A D"
_INPUT_HEADS = "D H·A"
TABLE: dict[str, Kind] = {
    "embedding": Kind("embedding", "V D"),
    "head": Kind("head", "V D"),
    "scale": Kind("norm", "D"),
    "attention.query.weight": Kind("attention", _INPUT_HEADS),
    "attention.key.weight": Kind("attention", _INPUT_HEADS),
    "attention.value.weight": Kind("attention", _INPUT_HEADS),
    "attention.query_down.weight": Kind("attention", "D R"),
    "attention.query_up.weight": Kind("attention", "R H·A"),
    "attention.kv_down.weight": Kind("attention", "D R"),
    "attention.kv_up.weight": Kind("attention", "R H·A"),
    "attention.out.weight": Kind("attention", _OUTPUT_HEADS),
    "feed_forward.gate_up.weight": Kind("feed_forward", "D 2F"),
    "feed_forward.down.weight": Kind("feed_forward", "F D"),
    "shared_experts.gate_up.weight": Kind("shared_expert", "D 2F"),
    "shared_experts.down.weight": Kind("shared_expert", "F D"),
    "moe.gate_up": Kind("expert", "E D 2F"),
    "moe.down": Kind("expert", "E F D"),
    "moe.router": Kind("router", "D E"),
    "moe.router_noise": Kind("router_noise", "D E"),
    "moe.bias": Kind("router_bias", "E"),
    "projection.weight": Kind("projection", "2D D"),
}
"""By the end of the dotted path. A new parameter needs a line here, or `kind_of` raises."""
ROLES: tuple[Role, ...] = get_args(Role)


def dotted(path: tuple[Any, ...]) -> str:
    """The name of a leaf from its path, for example `sparse.blocks.moe.gate_up`.

    The path may be that of a parameter state or of an optimizer's state. An optimizer's own entries
    (tuple indices, .mu) are left out, so that a moment has the name of its parameter.
    """
    # A DictKey has a `key`, and entries of nnx.to_flat_state are plain strings. GetAttrKey and
    # SequenceKey are neither, and drop out below.
    keys = (getattr(entry, "key", entry) for entry in path)
    return ".".join(key for key in keys if isinstance(key, str))


def kind_of(path: tuple[Any, ...] | str) -> Kind:
    """The table's entry for a leaf. KeyError: the table lacks it."""
    name = path if isinstance(path, str) else dotted(path)
    parts = name.split(".")
    for begin in range(max(0, len(parts) - 3), len(parts)):  # the longest ending first
        kind = TABLE.get(".".join(parts[begin:]))
        if kind is not None:
            return kind
    raise KeyError(f"model/parameters.py knows no parameter {name}")


def role_of(path: tuple[Any, ...] | str) -> Role:
    """The role of a leaf, by its path (jax.tree_util, nnx.to_flat_state) or its dotted name."""
    return kind_of(path).role
