"""The text of a run as tokens: the same ones after a restart, and in every process."""

from moe_jax.base.console import say
from moe_jax.base.errors import UserError, require
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokens import TokenData, prepare
from moe_jax.parallel.processes import Peers
from moe_jax.train.checkpoint import Extra
from moe_jax.train.task import Task


def prepare_data(task: Task, saved: Extra | None) -> TokenData:
    """The token arrays.

    A continued run keeps its own tokenizer. A new one takes the task's tokenizer, if it has one.
    UserError: the text has changed since the run began, or its split has.
    """
    settings = task.config.data
    if saved is None:
        return prepare(settings, task.tokenizer, say=say)
    data = prepare(settings, Tokenizer.from_json(saved["tokenizer"]), say=say)
    began_with = saved["data_fingerprint"]
    if data.fingerprint != began_with == data.split_by_names:
        raise UserError(
            f"data.source '{settings.source}' holds the same text more than once. This run began "
            "with copies in training and in validation, and they are on one side now: choose "
            "another --out for a run whose validation is held out"
        )
    if data.fingerprint != began_with:
        raise UserError(
            f"the text of data.source '{settings.source}' has changed since this run began "
            f"({saved['data_stats']['train']['bytes']} bytes of training text then, "
            f"{data.stats['train']['bytes']} now): restore it, or choose another --out"
        )
    return data


def require_same_text(data: TokenData, peers: Peers) -> None:
    """UserError: the processes do not read the same tokens."""
    found = peers.exchange("text", data.fingerprint)
    for index, fingerprint in enumerate(found):
        require(
            fingerprint == found[0],
            f"process {index} reads another text or tokenizer than process 0: give --data.source "
            "and --data.cache that are the same on all machines",
        )


def describe_data(data: TokenData) -> str:
    """One line: sizes of the two splits."""
    parts = (
        f"{name} {s['documents']} documents, {s['bytes'] / 1e6:.1f} MB, {s['tokens']} tokens"
        for name in ("train", "validation")
        for s in [data.stats[name]]
    )
    return "; ".join(parts)
