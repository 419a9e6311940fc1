"""Text that a teacher writes: the way to learn from one whose vocabulary is not the student's.

    python experiments/teacher_text.py --teacher smollm2 --out runs/teacher_text
    python experiments/train.py --data.source 'files:runs/teacher_text/*.txt' …

The teacher continues beginnings of the documents of a corpus. A student of any tokenizer is then
trained on the teacher's text (sequence-level distillation, arXiv:1606.07947, with samples in place
of beam search). Each document is a file. The same command goes on with the files that are missing.
They have the same text whether or not the command was interrupted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.base.console import say
from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.base.initial import root_key
from moe_jax.base.provenance import call_of
from moe_jax.base.result import output_folder
from moe_jax.cli import parse_settings
from moe_jax.config import DataConfig, require
from moe_jax.config.checks import not_negative
from moe_jax.data.tokens import TokenArray, prepare
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate, require_cache_room
from moe_jax.runs.load import decode_until_end
from moe_jax.runs.teacher import find_teacher


@dataclass(frozen=True)
class Settings:
    """Has a teacher continue beginnings of documents."""

    teacher: str = "smollm2"
    """As --distill.teacher of train.py."""
    out: str = "runs/teacher_text"
    """Folder of the texts, NNNNNN.txt."""
    source: str = "stdlib"
    """Where the beginnings come from, as --data.source of train.py. Its held-out part is left
    out."""
    documents: int = 200
    """Texts to write."""
    prompt: int = 32
    """Tokens of a beginning, the first of the document."""
    tokens: int = 224
    """At most this many tokens are written after it. The end of the document ends it."""
    temperature: float = 0.8
    """0 takes the likeliest token always."""
    batch: int = 8
    """Documents at once. Another number gives other texts."""
    seed: int = 0
    cache: str = ""
    """As --data.cache of train.py."""

    def __post_init__(self) -> None:
        for name in ("documents", "prompt", "tokens", "batch"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}: it must be positive")
        not_negative("", self, "temperature")


def beginnings(array: TokenArray, settings: Settings) -> np.ndarray:
    """The first tokens of documents in a random order, int32[documents, 1 + prompt], bos first.

    UserError: there are fewer documents that are long enough.
    """
    size = 1 + settings.prompt  # with bos
    ends = np.append(array.starts[1:], len(array.tokens))
    long_enough = array.starts[ends - array.starts > size]
    require(
        len(long_enough) >= settings.documents,
        f"documents={settings.documents}, but only {len(long_enough)} of the source have more than "
        f"prompt={settings.prompt} tokens: shorten --prompt or write fewer",
    )
    chosen = np.random.default_rng(settings.seed).permutation(long_enough)[: settings.documents]
    return np.stack([array.tokens[start : start + size] for start in chosen]).astype(np.int32)


def written(teacher: Teacher, prompts: np.ndarray, settings: Settings, first: int) -> Iterator[str]:
    """The texts of a batch that begins at document `first`."""
    # The last batch repeats its prompts, so that one program of one shape writes all batches.
    full = np.resize(prompts, (settings.batch, prompts.shape[1]))
    continued = generate(
        graph_of(teacher.model),
        (teacher.parameters, teacher.router),
        jnp.asarray(full),
        # Drawn from the batch's place, so that an interrupted run writes the same texts.
        jax.random.fold_in(root_key(settings.seed), first),
        count=settings.tokens,
        vocabulary=teacher.tokenizer.vocabulary,
        temperature=settings.temperature,
    )
    for prompt, tokens in zip(prompts, np.asarray(continued), strict=False):
        yield teacher.tokenizer.decode(prompt) + decode_until_end(teacher.tokenizer, tokens)


def main(argv: list[str]) -> None:
    """Writes the missing texts, a batch at a time."""
    prog = call_of("teacher-text")
    settings = parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0], prog)
    out = output_folder(settings.out)
    teacher = find_teacher(settings.teacher)
    require_cache_room(teacher.model, settings.batch, 1 + settings.prompt + settings.tokens)
    data = prepare(DataConfig(source=settings.source, cache=settings.cache), teacher.tokenizer)
    prompts = beginnings(data.train, settings)
    paths = [out / f"{index:06d}.txt" for index in range(settings.documents)]
    with disk_errors(out):
        for first in range(0, settings.documents, settings.batch):
            own = slice(first, first + settings.batch)
            if not all(path.exists() for path in paths[own]):
                texts = written(teacher, prompts[own], settings, first)
                for path, text in zip(paths[own], texts, strict=True):
                    write_atomically(path, text)
                say(f"{first + len(paths[own])} of {settings.documents} texts")
    say(f"done: {call_of('train')} --data.source 'files:{out}/*.txt'")
