"""Our settings for the metadata of a GGUF file."""

from moe_jax.base.errors import UserError, quote
from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.interop.fields import Fields
from moe_jax.interop.gguf.header import Header

ARCHITECTURES = ("llama", "qwen3")


def read_config(header: Header) -> ModelConfig:
    """Our settings for a file. UserError: another architecture, or a field is missing or absurd."""
    architecture = Fields(header.fields).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture {quote(architecture)} is not supported: use a llama or qwen3 model"
        )
    fields = Fields(header.fields, prefix=f"{architecture}.")
    # Llama 3 keeps its scaled frequencies as a tensor and leaves the field out.
    scaling = fields.text("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in header.tensors:
        raise UserError("rope scaling is not supported: use a model without it")
    embedding = header.tensors.get("token_embd.weight")
    layers = fields.integer("block_count")
    return ModelConfig(
        # The number of rows is the tensor's own. Without the tensor, reading it says so.
        vocabulary=embedding.shape[0] if embedding else 1,
        width=fields.integer("embedding_length"),
        layers=layers,
        dense_layers=layers,
        dense_hidden=fields.integer("feed_forward_length"),
        attention=_attention(fields, qk_norm=architecture == "qwen3"),
        tied_embedding="output.weight" not in header.tensors,
        norm_epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        rope_base=fields.number("rope.freq_base", 10_000.0, most=1e12),
    )


def _attention(fields: Fields, *, qk_norm: bool) -> AttentionConfig:
    width = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", max(width // heads, 1))
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise UserError("rotary embedding of a part of each head is not supported")
    return AttentionConfig(
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        qk_norm="head" if qk_norm else "none",
    )
