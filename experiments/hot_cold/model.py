"""The model whose experts are placed: trained on three kinds of text, so that popularity drifts.

Code, prose and tables, all from Python's own standard library: its modules without docstrings and
comments, those docstrings, and the tables of character sets in `encodings`.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_jax.base.files import write_atomically
from moe_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from moe_jax.runs.load import Trained, load_run
from moe_jax.runs.run import run_training

DOMAINS = ("code", "prose", "tables")
LOCALITY = 0.3
"""Weight of the locality loss, unless another is given."""
LIMIT = 2_000_000
"""Most bytes of a domain's training text; its held-out text has at most an eighth of that."""


def model_config(out: Path, seed: int, quick: bool, locality: float) -> TrainConfig:
    """32 experts in each of 4 layers, 4 a token, 1.6 MB each; a smaller model for --quick.

    `locality`: weight of the locality loss, with half of it on the balance of the whole batch, so
    that experts stay in use for a while and yet all of them are used. With 0 the balance is
    DeepSeek-V3's.
    """
    model = ModelConfig(
        width=64 if quick else 256,
        layers=3 if quick else 5,
        dense_layers=1,
        dense_hidden=256 if quick else 512,
        attention=AttentionConfig(kind="gqa", heads=8, kv_heads=2, head_dim=32),
        moe=MoEConfig(
            experts=16 if quick else 32,
            experts_per_token=4,
            expert_hidden=64 if quick else 512,
            locality_loss=locality,
            expert_loss=locality / 2,
            sequence_loss=0.0 if locality else 1e-4,
            bias_rate=0.003 if locality else 0.001,
        ),
        init_std=0.04,
        unroll=4,
    )
    return TrainConfig(
        preset="placement",
        out=str(out / f"model-{seed}-{locality:g}{'-quick' * quick}"),
        seed=seed,
        steps=30 if quick else 400,
        batch=8,
        evaluate_every=1000,
        samples=0,
        model=model,
        data=DataConfig(
            source=f"files:{out}/corpus/*/*.txt",
            tokenizer="bpe:2048",
            length=128,
            cache=str(out / "cache"),
            validation_fraction=0.02,
            validation_tokens=20_000,
        ),
        optim=OptimConfig(learning_rate=2e-3, beta2=0.95, weight_decay=0.1, final=0.1),
        checkpoint=CheckpointConfig(every=100),
    )


def trained_model(out: Path, seed: int, quick: bool, locality: float) -> Trained:
    """The model, trained now or before; a killed training goes on where it was."""
    config = model_config(out, seed, quick, locality)
    if not (Path(config.out) / "result.json").exists():  # written when a run is complete
        write_corpus(out)
        run_training(config)
    return load_run(config.out)


def held_out_bits(run: Trained) -> float:
    """Bits per byte of the model on its validation text, as its training measured them."""
    found = json.loads((Path(run.config.out) / "result.json").read_text())["measurements"]
    return next(m["value"] for m in found if m["name"] == "validation_bits_per_byte")


def write_corpus(out: Path) -> None:
    """out/corpus/DOMAIN/*.txt for training and out/held-out/DOMAIN.txt, unless they are there.

    corpus.done is written last: a killed run writes all of it anew.
    """
    if (out / "corpus.done").exists():
        return
    size: dict[str, int] = dict.fromkeys(DOMAINS, 0)
    held: dict[str, str] = dict.fromkeys(DOMAINS, "")
    for name, domain, text in domain_texts():
        if len(held[domain]) < LIMIT // 8:
            held[domain] += text
        elif size[domain] < LIMIT:
            size[domain] += len(text)
            stem = name.replace("/", "-").removesuffix(".py")
            (out / "corpus" / domain).mkdir(parents=True, exist_ok=True)
            (out / "corpus" / domain / f"{stem}.txt").write_text(text)
    for domain, text in held.items():
        write_atomically(out / "held-out" / f"{domain}.txt", text[: LIMIT // 8])
    write_atomically(out / "corpus.done", "")


def domain_texts() -> Iterator[tuple[str, str, str]]:
    """(module's file, domain, text) of the whole standard library, in an order by hash."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in library.rglob("*.py") if "site-packages" not in p.parts]
    names = {str(path.relative_to(library)): path for path in paths}
    for name in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()):
        for domain, text in _texts(name, names[name]):
            yield name, domain, text


def _texts(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """What a module holds of each domain; nothing where it cannot be parsed."""
    try:
        source = path.read_text()
        if name.startswith("encodings/"):
            yield "tables", source
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            prose = _take_docstrings(tree)
            code = ast.unparse(tree)
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    if len(prose) > 500:
        yield "prose", prose
    if len(code) > 500:
        yield "code", code


def _take_docstrings(tree: ast.Module) -> str:
    """Removes every docstring from the tree and returns them, a blank line between them."""
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            found.append(ast.get_docstring(node) or "")
            node.body = node.body[1:] or [ast.Pass()]
    return "\n\n".join(found) + "\n"


def held_out_texts(out: Path, stretch: int, total: int) -> Iterator[tuple[str, str]]:
    """Stretches of so many characters, the domains in turn, until `total` or one runs out."""
    texts = {domain: (out / "held-out" / f"{domain}.txt").read_text() for domain in DOMAINS}
    for index in range(total // stretch):
        domain = DOMAINS[index % len(DOMAINS)]
        start = index // len(DOMAINS) * stretch
        piece = texts[domain][start : start + stretch]
        if len(piece) < stretch:
            return
        yield domain, piece
