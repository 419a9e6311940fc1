"""Cards and links: one table for what is compiled for, and for how fast it is."""

from moe_jax.predict.hardware.card import Card, Link
from moe_jax.predict.hardware.table import card_names, find_card, find_link, read_card

__all__ = ["Card", "Link", "card_names", "find_card", "find_link", "read_card"]
