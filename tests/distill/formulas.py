"""Every divergence and its gradient in the student's logits, in NumPy float64: the oracle."""

import numpy as np


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * np.log(p / q), -1)


def value(kind, p, q, mix):
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    if kind == "jsd":
        m = mix * p + (1 - mix) * q
        return (mix * kl(p, m) + (1 - mix) * kl(q, m)) / (mix * (1 - mix))
    if kind == "skew_forward":
        return kl(p, mix * p + (1 - mix) * q)
    if kind == "skew_reverse":
        return kl(q, mix * q + (1 - mix) * p)
    return 0.5 * np.abs(p - q).sum(-1)


def _centred(q, g):
    """Gradient in the logits from the gradient g in the probabilities."""
    return q * (g - np.sum(q * g, -1, keepdims=True))


def slope(kind, p, q, mix):
    if kind == "forward":
        return q - p
    if kind == "reverse":
        return q * (np.log(q / p) - kl(q, p)[..., None])
    if kind == "jsd":
        m = mix * p + (1 - mix) * q
        return _centred(q, np.log(q / m)) / mix
    if kind == "skew_forward":
        m = mix * p + (1 - mix) * q
        return -(1 - mix) * _centred(q, p / m)
    if kind == "skew_reverse":
        m = mix * q + (1 - mix) * p
        return _centred(q, np.log(q / m) - mix * q / m)
    return _centred(q, 0.5 * np.sign(q - p))
