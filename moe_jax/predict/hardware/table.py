"""The cards and links that are known by name, and cards from a user's file."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from moe_jax.base.errors import UserError, near_name, quote, require
from moe_jax.base.paths import user_path
from moe_jax.predict.hardware.card import Card, Link

FOLDER = Path(__file__).parent
LINKS = ("link", "network", "host_link")
OPTIONAL = ("gemm_flops", "peak_fp8_flops", "gemm_fp8_flops", "sources")
NEEDED_BY_XLA = (
    *("core_count", "fpus_per_core", "clock_rate_ghz", "memory_bandwidth", "device_memory_size"),
    *("l2_cache_size", "threads_per_warp", "threads_per_block_limit", "threads_per_core_limit"),
    *("block_dim_limit_x", "block_dim_limit_y", "block_dim_limit_z", "shared_memory_per_block"),
    *("shared_memory_per_block_optin", "shared_memory_per_core"),
    *("registers_per_core_limit", "registers_per_block_limit"),
)
"""Without threads_per_warp or block_dim_limit_x XLA divides by 0, which ends the process. Without
others it fuses otherwise and says nothing."""


@cache
def _tables(name: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def card_names() -> tuple[str, ...]:
    """The cards of cards.toml."""
    return tuple(_tables("cards"))


def find_card(name: str) -> Card:
    """A card of cards.toml, or of a TOML file. UserError: neither, or the file is no card."""
    if name.endswith(".toml"):
        return read_card(user_path(name))
    known = card_names()
    require(
        name in known,
        f"unknown hardware {quote(name)}: use one of {', '.join(known)}, or a file NAME.toml"
        f"{near_name(name, known)}",
    )
    return _card(name, _tables("cards")[name], name)


def find_link(name: str, where: str = "links.toml") -> Link:
    """A link of links.toml. UserError: there is none. `where` is what named it."""
    known = _tables("links")
    require(
        name in known,
        f"{where}: unknown link {quote(name)}: use one of {', '.join(known)}, or a table"
        f"{near_name(name, known)}",
    )
    return Link(name=name, **known[name])


def read_card(path: Path) -> Card:
    """A card from a file with the fields of a card in cards.toml. UserError: it is none."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--hardware {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--hardware {path} is no TOML: {error}") from error
    return _card(path.stem, table, str(path))


def _card(name: str, table: Mapping[str, Any], where: str) -> Card:
    merged = _with_base(table, where)
    known = [f.name for f in fields(Card) if f.name != "name"]
    for key in merged:
        require(key in known, f"{where}: unknown field {quote(key)}{near_name(key, known)}")
    for key in known:
        require(key in merged or key in OPTIONAL, f"{where}: the field {key} is missing")
    values = dict(merged)
    values |= {key: _link(merged[key], f"{where}: {key}") for key in LINKS}
    values["sources"] = tuple(merged.get("sources", ()))
    for field in fields(Card):
        if field.type in (float, int, "float", "int") and field.name in values:
            _number(
                values[field.name], f"{where}: {field.name}", positive=field.name not in OPTIONAL
            )
    _check_xla(values["xla"], where)
    return Card(name=name, **values)


def _with_base(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table with what it leaves out taken from the card that `like` names."""
    own = dict(table)
    base = own.pop("like", None)
    if base is None:
        return own
    known = _tables("cards")
    require(
        base in known,
        f"{where}: like = {quote(str(base))} is no card: use one of {', '.join(known)}",
    )
    inherited = _with_base(known[base], base)
    return inherited | own | {"xla": inherited["xla"] | own.get("xla", {})}


def _link(value: Any, where: str) -> Link:
    if isinstance(value, str):
        return find_link(value, where)
    require(isinstance(value, dict), f"{where} is {value!r}: it must be a name or a table")
    needed = ("peak", "rate", "hop", "tree_hop")
    for key in value:
        require(key in (*needed, "name", "source"), f"{where}: unknown field {quote(key)}")
    for key in needed:
        require(key in value, f"{where}: the field {key} is missing")
        _number(value[key], f"{where}.{key}")
    return Link(**{"name": "custom", **value})


def _check_xla(table: Any, where: str) -> None:
    require(isinstance(table, dict), f"{where}: xla must be a table")
    for key in NEEDED_BY_XLA:
        require(key in table, f"{where}: the field xla.{key} is missing")
    for key, value in table.items():
        require(
            key in NEEDED_BY_XLA,
            f"{where}: unknown field {quote(f'xla.{key}')}{near_name(key, NEEDED_BY_XLA)}",
        )
        _number(value, f"{where}: xla.{key}")


def _number(value: Any, where: str, positive: bool = True) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        number and (value > 0 or (value == 0 and not positive)),
        f"{where} is {value!r}: it must be a positive number",
    )
