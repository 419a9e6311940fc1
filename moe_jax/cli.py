"""Command lines from frozen dataclasses: `train.py [PRESET] [--flag value …]`.

tyro reads and documents the fields. This module puts presets in front of it and turns every mistake
into a UserError of one line. Fields have dotted names (`model.moe.experts`) everywhere.
"""

import contextlib
import dataclasses
import difflib
import io
import shlex
import sys
import traceback
import types as builtin_types
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from moe_jax.base.errors import UserError, brief, near_name, quote
from moe_jax.base.process import in_group, leave, named
from moe_jax.base.provenance import commit
from moe_jax.base.seeds import check_seeds
from moe_jax.base.signals import handled, stopped
from moe_jax.config import TrainConfig, fields

Settings = TypeVar("Settings")


def types(settings: type) -> dict[str, Any]:
    """Every field of a nested dataclass that the command line may set: dotted name -> type."""
    flat = {}
    # Hints rather than dataclasses.fields: a field's own `type` may be a string. `extras` keep the
    # mark of a suppressed field, which get_type_hints strips otherwise.
    for name, hint in get_type_hints(settings, include_extras=True).items():
        if tyro.conf.Suppress in getattr(hint, "__metadata__", ()):
            continue
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            flat |= {f"{name}.{inner}": t for inner, t in types(hint).items()}
        else:
            flat[name] = hint
    return flat


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`: `experts` finds `model.moe.experts`, and so do its
    misspellings. `lr` finds `optim.learning_rate`, by its initials.

    None if no name is similar.
    """
    known = list(known)
    leaves: dict[str, str] = {}
    for dotted in known:
        leaf = dotted.rpartition(".")[2]
        leaves.setdefault(leaf, dotted)
        if "_" in leaf:
            leaves.setdefault("".join(word[:1] for word in leaf.split("_")), dotted)
    head, _, given = name.rpartition(".")
    # In the config that is named, before the same word in another one.
    own = [dotted for dotted in known if head and dotted.rpartition(".")[0] == head]
    if close := difflib.get_close_matches(name, own, n=1):
        return close[0]
    if given in leaves:
        return leaves[given]
    if close := difflib.get_close_matches(name, known, n=1):
        return close[0]
    return next((leaves[leaf] for leaf in difflib.get_close_matches(given, leaves, n=1)), None)


def preset(presets: Mapping[str, TrainConfig], name: str) -> TrainConfig:
    """The preset called `name`. UserError: there is none."""
    if name not in presets:
        close = nearest(name, presets)
        hint = f" (did you mean {close}?)" if close else ""
        raise UserError(f"unknown preset {quote(name)}: use one of {', '.join(presets)}{hint}")
    return dataclasses.replace(presets[name], preset=name)


def parse(
    argv: list[str],
    presets: Mapping[str, TrainConfig],
    default: str = "tiny",
    description: str = "Trains a mixture-of-experts language model.",
    prog: str | None = None,
) -> TrainConfig:
    """The settings that `[PRESET] [--flag value …]` asks for. --help prints and exits with 0.

    UserError: unknown preset or option, a value missing or of the wrong type, or settings that the
    config classes refuse.
    """
    name = default
    options = argv
    if argv and not argv[0].startswith("-"):
        name, *options = argv
    about = (
        f"{description}\n\nPRESET is one of {', '.join(presets)} (unset: {default}). "
        f"The defaults below are those of {name}."
    )
    return parse_settings(
        preset(presets, name), options, about, prog=f"{prog or sys.argv[0]} [PRESET]"
    )


def parse_settings(
    default: Settings, argv: list[str], description: str | None = None, prog: str | None = None
) -> Settings:
    """`default` with the fields that `argv` sets, for any frozen dataclass. Errors as in parse."""
    read = partial(tyro.cli, type(default), default=default, description=description, prog=prog)
    if asks_for_help(argv):
        return read(args=["--help"])
    # First for its errors alone: a typo is reported before its consequences.
    _options(argv, types(type(default)))
    # tyro explains a mistake in a box on stderr. check() finds the same mistake and reports a line.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        settings = read(args=argv)
        check_seeds(settings)
        return settings
    check(default, argv)
    raise UserError(f"cannot read '{shlex.join(argv)}': see --help")


def asks_for_help(argv: list[str]) -> bool:
    """Whether -h or --help is among the arguments."""
    return not {"-h", "--help"}.isdisjoint(argv)


def check(default: Any, argv: list[str]) -> None:
    """Raises UserError for an option that is unknown or has a value of the wrong type.

    Unlike parse_settings it does not ask whether the values go together.
    """
    known = types(type(default))
    for name, option in _options(argv, known):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                tyro.cli(type(default), args=option, default=default)
        except SystemExit:
            raise UserError(_complaint(option, known[name])) from None
        except UserError:
            # The value has the right type. The class refuses it only because this option stands
            # alone here, without the others that may go with it.
            pass


def split(argv: list[str], first: type, second: type) -> tuple[list[str], list[str]]:
    """Splits one command line into the options of two dataclasses.

    An option that both have goes to `first`. UserError: neither has it.
    """
    first_types = types(first)
    first_argv: list[str] = []
    second_argv: list[str] = []
    for name, option in _options(argv, types(second) | first_types):
        (first_argv if name in first_types else second_argv).extend(option)
    return first_argv, second_argv


def fields_set(argv: list[str], *settings: type) -> set[str]:
    """The fields of these dataclasses that the options set. UserError: an unknown option."""
    known = {name: hint for one in settings for name, hint in types(one).items()}
    return {name for name, _ in _options(argv, known)}


def to_argv(settings: type, assignments: Mapping[str, str]) -> list[str]:
    """The options that set these fields, given as text. UserError: unknown field, bad boolean."""
    known = types(settings)
    argv = []
    for given, text in assignments.items():
        name = given.replace("-", "_")
        if name not in known:
            raise UserError(_unknown(name, known))
        value = {"true": True, "false": False}.get(text.lower()) if known[name] is bool else text
        if value is None:
            raise UserError(f"{name}: '{text}' is not true or false")
        argv += _option(name, value)
    return argv


def override(config: Settings, assignments: Mapping[str, str]) -> Settings:
    """`config` with dotted fields set from text, through the same parser and the same checks."""
    return parse_settings(config, to_argv(type(config), assignments))


def command_line(
    config: TrainConfig,
    preset_config: TrainConfig,
    call: str = "python experiments/train.py",
) -> str:
    """The shortest command that gives `config`: its preset and the fields that differ from it."""
    base = fields(preset_config)
    changed = {k: v for k, v in fields(config).items() if v != base[k] and k != "preset"}
    options = [word for name, value in changed.items() for word in _option(name, value)]
    return f"{call} {shlex.join([config.preset, *options])}"


def program(main: Callable[[list[str]], None]) -> None:
    """Runs main(arguments). A UserError becomes `error: …` and exit code 2.

    A signal (base.signals) becomes one line: its name, and what is kept where the program knows.
    The exit code is 130 for Ctrl-C and 143 for SIGTERM.
    """
    commit()  # now, and not when the result is written: the checkout may have changed by then
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or a file without UTF-8 shows an escape where it lacks a character.
            stream.reconfigure(errors="backslashreplace")
    try:
        with handled():
            require_utf8(sys.argv[1:])
            main(sys.argv[1:])
    except UserError as error:
        print(named(f"error: {error}"), file=sys.stderr)
        leave(2)
    except KeyboardInterrupt as interrupt:
        stop = stopped(interrupt)
        print(named(str(stop)), file=sys.stderr)
        leave(stop.exit_code)
    except Exception:
        if not in_group():
            raise
        traceback.print_exc()
        leave(1)


def require_utf8(argv: list[str]) -> None:
    """UserError: an argument has bytes that are no UTF-8, which no tokenizer and no file takes."""
    for number, word in enumerate(argv, 1):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            data = word.encode(errors="surrogateescape")
            raise UserError(f"argument {number} is no UTF-8: {quote(data)}") from error


def _option(name: str, value: Any) -> list[str]:
    """The words that set a field: `--model.width 64`, `--model.no-tied-embedding`."""
    head, dot, leaf = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{head}{dot}{leaf if value else 'no-' + leaf}"]
    flag = f"--{head}{dot}{leaf}"
    text = str(value)
    # With a space, a value that begins with a dash would be read as an option.
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _options(argv: list[str], known: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Groups words into options, each with the field that it sets: ("steps", ["--steps", "5"]).

    An option is a word that starts with -- and all words up to the next such word.
    """
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            options.append((_field(word, known), [word]))
        elif options:
            options[-1][1].append(word)
        else:
            raise UserError(f"unexpected {quote(word)}: options start with --, see --help")
    return options


def _field(word: str, known: Mapping[str, Any]) -> str:
    """The field that an option sets: `--model.no-tied-embedding` -> `model.tied_embedding`."""
    name = word[2:].partition("=")[0].replace("-", "_")
    head, dot, leaf = name.rpartition(".")
    # The type decides, so that a field whose own name begins with no_ is not cut.
    positive = f"{head}{dot}{leaf.removeprefix('no_')}"
    if known.get(positive) is bool:
        return positive
    if name not in known:
        raise UserError(_unknown(name, known))
    return name


def _unknown(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    hint = f"did you mean --{close.replace('_', '-')}?" if close else "see --help"
    return f"unknown option --{brief(name.replace('_', '-'))}: {hint}"


def _complaint(option: list[str], hint: Any) -> str:
    """What is wrong with an option that tyro refuses."""
    flag, equals, attached = option[0].partition("=")
    values = [attached, *option[1:]] if equals else option[1:]
    given = " ".join(values)
    if hint is bool:
        return f"{flag} takes no value, but got {quote(given)}"
    if not values:
        return f"{flag} needs a value: {_describe(hint)}"
    options = get_args(hint) if get_origin(hint) is Literal else ()
    near = near_name(given, map(str, options))
    return f"{flag}: {quote(given)} is not {_describe(hint)}{near}"


def _describe(hint: Any) -> str:
    """A type in words: `an int`, `one of cosine, wsd`."""
    if get_origin(hint) is Literal:
        # An empty value is what leaves a field unset.
        return f"one of {', '.join(str(value) or repr('') for value in get_args(hint))}"
    if get_origin(hint) in (Union, builtin_types.UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    name = "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
    return {"int": "an int", "float": "a float", "str": "a text"}.get(name, name)
