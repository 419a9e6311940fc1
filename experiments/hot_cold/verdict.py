"""The verdict on decoding with tiers, in sentences."""

from collections.abc import Mapping

Values = Mapping[str, float | int | None]


def verdict(values: Values, *, dtype: str, locality: float, reads: str) -> str:
    """The answer to the article's 2-4x. `values`: measurements by name. `reads`: how files are."""
    sentences = [
        *_memory(values, dtype),
        *_speed(values),
        *_conditions(values, dtype, locality, reads),
        *_training(values),
    ]
    return " ".join(sentences)


def _memory(values: Values, dtype: str) -> list[str]:
    """More model in the same memory, at what speed."""
    sentences = [
        "More model in the same memory: yes, at a price in speed.",
        f"With a quarter of the experts in memory and the others on disk, the model decodes at "
        f"{values['decode_of_all_resident_at_25']:.0%} of the all-resident speed.",
        f"With half of them, it decodes at {values['decode_of_all_resident_at_50']:.0%}.",
    ]
    if dtype != "float32":
        # Both at once would hide that a part of the gain is the smaller experts'.
        sentences.append(
            f"Of the speed of all experts resident in float32, that is "
            f"{values['decode_of_float32_all_resident_at_25']:.0%} and "
            f"{values['decode_of_float32_all_resident_at_50']:.0%}."
        )
    sentences.append(
        f"With the others in host memory, it decodes at "
        f"{values['host_copy_at_25.of_all_resident']:.0%} and "
        f"{values['host_copy_at_50.of_all_resident']:.0%} of the all-resident speed."
    )
    return sentences


def _speed(values: Values) -> list[str]:
    """More speed in the same memory, against the claim."""
    faster = values["decode_over_naive_at_25"]
    assert faster is not None
    claim = "within" if 2 <= faster <= 4 else "below" if faster < 2 else "above"
    return [
        f"More speed in the same memory: {faster:.2f}x naive loading at a quarter, {claim} the "
        "article's 2-4x.",
        f"That is {values['decode_of_ceiling_at_25']:.0%} of the ceiling.",
        f"Asynchronous copies are {values['async_over_blocking_at_25']:.2f}x as fast as blocking "
        "ones.",
    ]


def _conditions(values: Values, dtype: str, locality: float, reads: str) -> list[str]:
    """Whether the bits agree, and what was measured."""
    same = "are bit for bit those" if values["exact"] else "are NOT those"
    return [
        f"The results {same} of all experts resident.",
        f"One model ({values['model_bits_per_byte']:.3f} bits per byte, locality loss "
        f"{locality:g}, experts of {values['expert_bytes']} bytes in {dtype}), batch 1, one CPU.",
        f"Reads: {reads}.",
    ]


def _training(values: Values) -> list[str]:
    """Training with tiers, where it was measured."""
    if "train_capacity_gain_at_25" not in values:
        return []
    return [
        "Training with a quarter of the experts' state in memory: "
        f"{values['train_capacity_gain_at_25']:.1f}x the model in the same measured memory, at "
        f"{values['train_speed_of_all_resident_at_25']:.0%} of the speed."
    ]
