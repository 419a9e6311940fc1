"""What can I do with the hardware I have: one RTX 4090, L4 or T4, or a laptop CPU?

    python experiments/small_hardware.py [--out DIR] [--docs docs/hardware.md] [--quick]

Everything is PREDICTED. Bytes are by formula for every preset. A preset that may be trained on a
GPU is compiled for it, which gives bytes and time as experiments/predict.py does. --docs writes the
tables into a text. With --quick nothing is compiled. With --recorded a result is read instead.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from moe_jax.base.startup import for_absent_gpus

if __name__ == "__main__":
    for_absent_gpus()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from moe_jax.base.console import say
from moe_jax.base.errors import UserError, require
from moe_jax.base.files import write_atomically
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config.presets import PRESETS
from moe_jax.predict.answer import PredictSettings, answer, check_compiler
from moe_jax.study.results import publish, read_measurements
from moe_jax.study.small_hardware import Device, by_formula, devices, section

QUESTION = "What can I do with the hardware I have?"
BEGIN = "<!-- experiments/small_hardware.py writes from here -->"
END = "<!-- to here -->"
VERDICT = (
    "PREDICTED, and not measured. Bytes by formula are the least that is needed. Decoding has at "
    "most these tokens/s, by the bytes that a token reads."
)


@dataclass(frozen=True)
class Settings:
    """Bytes and speeds of every preset on small hardware."""

    out: str = "runs/small_hardware"
    """Folder for result.json."""
    docs: str = ""
    """A Markdown file that gets the tables, between two comments that it has. Unset, none."""
    recorded: str = ""
    """A result.json whose numbers are taken. Unset, they are made."""
    seed: int = 0
    """Unused, since nothing is drawn."""
    quick: bool = False
    """Compiles nothing: formulas alone."""


def compiled(device: Device, preset: str) -> list[Measurement]:
    """Training as compiled, with the preset's own batch. Nothing if the compiler refuses it."""
    config = PRESETS[preset].resolved()
    name = f"{device.name}.{preset}"
    try:
        found = answer(PredictSettings(hardware=device.name, devices=1), config)
    except UserError as error:
        say(f"{name}: {error}")
        return []
    time = found.prediction
    ends = sorted((found.rate(time.low), found.rate(time.high)))
    return [
        Measurement(f"{name}.train_compiled_bytes", found.memory.total, "bytes, compiled"),
        Measurement(f"{name}.train_compiled_fits", int(found.memory.fits), "1 or 0"),
        Measurement(
            f"{name}.train_tokens_per_second",
            found.rate(time.seconds),
            f"tokens/s in batches of {config.batch} x {config.data.length}, PREDICTED",
            interval=ends,
        ),
    ]


def measure(settings: Settings) -> list[Measurement]:
    """All numbers."""
    rows = []
    for device in devices():
        for preset in PRESETS:
            own = by_formula(device, preset)
            fits = next(row.value for row in own if row.name.endswith(".train_fits"))
            rows += own
            if fits and device.card is not None and not settings.quick:
                rows += compiled(device, preset)
    return rows


def with_section(text: str, tables: str, path: str) -> str:
    """The text with these tables between its two comments. UserError: it has not both."""
    require(
        text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END),
        f"--docs {path} needs the lines {BEGIN} and {END}, once each",
    )
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def read(path: str, option: str) -> str:
    """A file's text. UserError: it cannot be read."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path} cannot be read: {error}") from error


def recorded(path: str) -> list[Measurement]:
    """The numbers of a result.json. UserError: it has other ones."""
    read(path, "--recorded")
    try:
        rows = list(read_measurements(Path(path)).values())
        section(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--recorded {path} is no result of this experiment: {error!r}") from error
    return rows


def measured(settings: Settings) -> list[Measurement]:
    """The numbers, which are written as well. UserError: the compiler is missing."""
    out = output_folder(settings.out)
    if not settings.quick:
        check_compiler()
    rows = measure(settings)
    publish(
        out,
        experiment="small_hardware",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=VERDICT,
        figures={},
    )
    return rows


def main(argv: list[str]) -> None:
    """Calculates, compiles, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    text = read(settings.docs, "--docs") if settings.docs else ""
    if settings.docs:
        with_section(text, "", settings.docs)
    rows = recorded(settings.recorded) if settings.recorded else measured(settings)
    if settings.docs:
        write_atomically(Path(settings.docs), with_section(text, section(rows), settings.docs))


if __name__ == "__main__":
    program(main)
