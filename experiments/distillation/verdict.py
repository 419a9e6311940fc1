"""The sentences of the distillation experiment: which parts of the article's claim are true."""

from collections.abc import Mapping

from experiments.distillation.measurements import OWN_TEXT
from moe_jax.base.result import Measurement
from moe_jax.study.results import significance

Rows = Mapping[str, Measurement]


def verdict(rows: Rows) -> str:
    """All sentences about the byte-level arms."""
    return " ".join(
        [
            _savings(rows),
            *_differences(rows),
            *_cached(rows),
            *_on_policy(rows),
            *_experts(rows),
            "The models have 0.2M to 0.5M parameters on bytes of one corpus.",
        ]
    )


def _savings(rows: Rows) -> str:
    tokens = rows["tokens_to_scratch_loss_ratio"].value
    flops = rows["flops_to_scratch_loss_ratio"].value
    if tokens is None or flops is None:
        return "No taught student reached the loss of the one from scratch."
    return (
        f"A taught student reaches the loss of the one from scratch with {tokens:.1f}x fewer "
        "tokens of its own. With the teacher's training counted, training from scratch needs "
        f"{flops:.2f}x the FLOPs of the taught student."
    )


def _differences(rows: Rows) -> list[str]:
    if "upcycled_kd_minus_upcycled_bits" not in rows:
        return []
    plain = rows["student_minus_best_plain_bits"]
    return [
        f"The best student ends {significance(rows['student_minus_teacher_bits'])} bits per byte "
        f"from its teacher and {significance(plain)} from the best training without a teacher's "
        f"advice ({plain.baseline}).",
        "Plain training tuned over steps, dropout and weight decay is in experiments/adversarial, "
        "part beyond.",
        f"The teacher's advice adds {significance(rows['upcycled_kd_minus_upcycled_bits'])} to "
        f"upcycling and {significance(rows['kd_minus_scratch_bits'])} to training from scratch.",
    ]


def _cached(rows: Rows) -> list[str]:
    """Cached against online teaching."""
    names = [f"kd_{kind}_minus_kd_bits" for kind in ("sampled", "top_k")]
    if not all(name in rows for name in names):
        return []
    sampled, top_k = (significance(rows[name]) for name in names)
    return [
        f"From a cache of 12 samples a token the student ends {sampled} from whole distributions. "
        f"From the 5 best and the tail it ends {top_k}."
    ]


def _on_policy(rows: Rows) -> list[str]:
    """The student's own text against the corpus."""
    sentences = []
    for off_policy in ("kd", "upcycled_kd"):
        bits = f"{off_policy}_on_policy_minus_{off_policy}_bits"
        own = f"{off_policy}_on_policy_minus_{off_policy}_{OWN_TEXT}"
        if bits in rows:
            sentences.append(
                f"Half of the batches of {off_policy} written by the student itself change the "
                f"held-out loss by {significance(rows[bits])} and the divergence from the teacher "
                f"on the student's own text by {significance(rows[own])}."
            )
    return sentences


def _experts(rows: Rows) -> list[str]:
    difference = "upcycled_minus_scratch_expert"
    if f"{difference}_domain_nats" not in rows:
        return []
    alike = rows["upcycled.expert_output_cosine"].value or 0.0
    other = rows["scratch.expert_output_cosine"].value or 0.0
    return [
        f"Upcycled experts {'stay alike' if alike > 0.5 else 'part ways'} (cosine of their outputs "
        f"{alike:.2f}, from scratch {other:.2f}).",
        f"Beside experts from scratch, their routing knows "
        f"{significance(rows[f'{difference}_domain_nats'])} nats about the domain and "
        f"{significance(rows[f'{difference}_byte_nats'])} about the byte.",
    ]
