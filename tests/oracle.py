"""The mixture-of-experts layer as a loop over tokens, in NumPy float64: slow, and beyond doubt."""

import numpy as np

from moe_jax.config import MoEConfig


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gate(logits: np.ndarray, bias: np.ndarray, c: MoEConfig) -> tuple[list[int], list[float]]:
    """Experts, best first, and weights of one token; logits [E]."""
    scores = softmax(logits) if c.gate == "softmax" else sigmoid(logits)
    selection = scores if c.gate == "softmax" else scores + bias
    size = c.experts // c.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(c.groups)]

    def group_score(g: int) -> float:
        best = sorted((selection[e] for e in members[g]), reverse=True)
        automatic = 1 if c.gate == "softmax" else 2
        node = -(-c.experts_per_token // c.groups_per_token)
        return sum(best[: {"auto": automatic, "max": 1, "top2": 2, "node": node}[c.group_score]])

    kept = sorted(range(c.groups), key=lambda g: (-group_score(g), g))[: c.groups_per_token]
    allowed = [e for g in kept for e in members[g]]
    chosen = sorted(allowed, key=lambda e: (-selection[e], e))[: c.experts_per_token]
    weights = [scores[e] for e in chosen]
    if c.normalise:
        weights = [w / sum(weights) for w in weights]
    return chosen, [c.scale * w for w in weights]


def swiglu_expert(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """silu(x W_gate) · (x W_up) W_down for one token; gate_up [D, 2F], down [F, D]."""
    g, u = np.split(x @ gate_up, 2)
    return (g * sigmoid(g) * u) @ down


def moe(x, router, bias, gate_up, down, c: MoEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [T, D] and assignments per expert [E]; x [T, D], router [D, E]."""
    x, router, bias, gate_up, down = (
        np.asarray(a, np.float64) for a in (x, router, bias, gate_up, down)
    )
    out, load = np.zeros_like(x), np.zeros(c.experts, int)
    for t, token in enumerate(x):
        for expert, weight in zip(*gate(token @ router, bias, c), strict=True):
            out[t] += weight * swiglu_expert(token, gate_up[expert], down[expert])
            load[expert] += 1
    return out, load


def attention(query, key, value, segments) -> np.ndarray:
    """Causal attention inside a segment, one query at a time; [L, H, A], [L, N, A], [L, N, C]."""
    length, heads, width = query.shape
    out = np.zeros((length, heads, value.shape[-1]))
    for t in range(length):
        seen = [m for m in range(t + 1) if segments[m] == segments[t]]
        for h in range(heads):
            n = h // (heads // key.shape[1])
            weights = softmax(np.array([query[t, h] @ key[m, n] for m in seen]) / np.sqrt(width))
            out[t, h] = sum(w * value[m, n] for w, m in zip(weights, seen, strict=True))
    return out


def attention_gradients(query, key, value, d_out, segments) -> list[np.ndarray]:
    """Gradients of sum(attention · d_out) by query, key and value, one query at a time."""
    length, heads, width = query.shape
    d_query = np.zeros_like(query)
    d_key = np.zeros_like(key)
    d_value = np.zeros_like(value)
    for t in range(length):
        seen = [m for m in range(t + 1) if segments[m] == segments[t]]
        for h in range(heads):
            n = h // (heads // key.shape[1])
            weights = softmax(np.array([query[t, h] @ key[m, n] for m in seen]) / np.sqrt(width))
            d_weights = np.array([d_out[t, h] @ value[m, n] for m in seen])
            d_scores = weights * (d_weights - weights @ d_weights) / np.sqrt(width)
            for m, weight, d_score in zip(seen, weights, d_scores, strict=True):
                d_value[m, n] += weight * d_out[t, h]
                d_query[t, h] += d_score * key[m, n]
                d_key[m, n] += d_score * query[t, h]
    return [d_query, d_key, d_value]


def rotate(x: np.ndarray, base: float) -> np.ndarray:
    """Rotary embedding of [L, H, R] by complex multiplication: pair i is (x[i], x[i + R/2])."""
    length, _, width = x.shape
    half = width // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angle = np.arange(length)[:, None] * base ** (-2 * np.arange(half) / width)
    turned = pairs * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rms_norm(x: np.ndarray, epsilon: float) -> np.ndarray:
    """RMSNorm with a scale of one."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
