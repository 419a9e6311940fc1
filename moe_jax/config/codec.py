"""Configs as dictionaries: flat with dotted names, and back from the dictionary in a checkpoint.

Everything here reads the dataclasses' own fields and type hints. A new config class or field needs
no change in this file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moe_jax.base.errors import UserError, brief, quote

Settings = TypeVar("Settings")

MAY_DIFFER: Mapping[str, Any] = MappingProxyType({"may_differ_on_resume": True})
"""`metadata` of a field that a continued run may change, because it does not touch the training.

On a field that holds another config it covers that whole config, but for fields with MUST_MATCH.
"""
MUST_MATCH: Mapping[str, Any] = MappingProxyType({"may_differ_on_resume": False})
"""`metadata` of a field that changes results, in a config that may differ otherwise."""


def fields(settings: Any) -> dict[str, Any]:
    """Every field of a nested dataclass instance: dotted name -> value."""
    return _flat(settings, lambda field, outer: True)


def settings_that_must_match(settings: Any) -> dict[str, Any]:
    """The fields, as `fields` gives them, without those that a continued run may change."""
    return _flat(
        settings, lambda field, outer: not field.metadata.get("may_differ_on_resume", not outer)
    )


def _flat(
    settings: Any, wanted: Callable[[dataclasses.Field, bool], bool], outer: bool = True
) -> dict[str, Any]:
    """The leaves that are wanted(field, whether the config around it is)."""
    flat = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        own = wanted(field, outer)
        if dataclasses.is_dataclass(value):
            inner = _flat(value, wanted, own)
            flat |= {f"{field.name}.{name}": leaf for name, leaf in inner.items()}
        elif own:
            flat[field.name] = value
    return flat


def from_dict(settings: type[Settings], saved: Mapping[str, Any]) -> Settings:
    """The instance of `settings` that `dataclasses.asdict` turned into `saved`.

    A field that `saved` lacks takes its default. UserError: `saved` has a field that the class
    lacks, or a value that the class does not accept. Either means that another version wrote it.
    """
    return _decode(settings, saved, "")


def _decode(settings: type[Settings], saved: Mapping[str, Any], prefix: str) -> Settings:
    if not isinstance(saved, Mapping):
        raise _outdated(f"its settings are {quote(saved)}")
    hints = get_type_hints(settings)
    values = {}
    for name, value in saved.items():
        if name not in hints:
            raise _outdated(f"its setting {prefix}{brief(name)} no longer exists")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            assert isinstance(hint, type)
            values[name] = _decode(hint, value, f"{prefix}{name}.")
        elif _fits(value, hint):
            values[name] = value
        else:
            raise _outdated(f"its setting {prefix}{name} has the value {quote(value)}")
    try:
        return settings(**values)
    except UserError as error:
        raise _outdated(str(error)) from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is one that the type hint allows."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    # No setting is larger, and an error line would have hundreds of digits.
    if type(value) is int and abs(value) > 2**63:
        return False
    if hint is float:
        # A default such as `scale: float = 2` is written as an int.
        return type(value) in (int, float)
    # By type(), because bool is a subclass of int.
    return type(value) is (NoneType if hint is None else hint)


@cache
def choices(settings: type) -> dict[str, tuple[Any, ...]]:
    """The values that each field with a Literal type may have."""
    hints = {name: _options(hint) for name, hint in get_type_hints(settings).items()}
    return {name: options for name, options in hints.items() if options}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _outdated(problem: str) -> UserError:
    return UserError(
        f"the checkpoint is from another version of moe_jax: {problem}. Choose another --out, "
        "or use that version"
    )
