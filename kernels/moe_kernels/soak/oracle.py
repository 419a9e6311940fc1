"""The right answers in NumPy, expert after expert, as the formulas say."""

import numpy as np

from moe_kernels.soak.case import Inputs

ARRAYS = ("x", "weights", "gate_up", "down")
"""The inputs that have gradients."""


def experts_oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """The output (`out`) and the gradient of every input, in float64."""
    x, weights, gate_up, down, d_out = [np.asarray(a, np.float64) for a in inputs[:5]]
    results = {name: np.zeros(getattr(inputs, name).shape) for name in ARRAYS}
    results["out"] = np.zeros_like(x)
    for e in range(len(down)):
        token, k = np.nonzero(inputs.experts == e)
        w = weights[token, k][:, None]
        gate, up = np.split(x[token] @ gate_up[e], 2, axis=1)
        slope = 1 / (1 + np.exp(-gate))
        hidden = gate * slope * up
        # np.add.at: a token may appear twice here, and += would count it once.
        np.add.at(results["out"], token, w * (hidden @ down[e]))
        d_hidden = d_out[token] @ down[e].T
        results["weights"][token, k] = (d_hidden * hidden).sum(1)
        d_gate = w * d_hidden * up * (slope + gate * slope * (1 - slope))
        dz = np.concatenate([d_gate, w * d_hidden * gate * slope], axis=1)
        np.add.at(results["x"], token, dz @ gate_up[e].T)
        results["gate_up"][e] = x[token].T @ dz
        results["down"][e] = (w * hidden).T @ d_out[token]
    return results


def schedule_oracle(
    experts: np.ndarray, num_experts: int, block_rows: int, blocks: int
) -> dict[str, np.ndarray]:
    """The arrays of schedule.Schedule by name, without a capacity."""
    flat = experts.reshape(-1)
    load = np.bincount(flat, minlength=num_experts + 1)[:num_experts]  # without the unassigned
    padded = -(-load // block_rows) * block_rows
    starts = np.cumsum(padded) - padded
    rows = blocks * block_rows
    assignment = np.full(rows, flat.size)
    row = np.full(flat.size, rows)
    block_expert = np.full(blocks, num_experts - 1)
    for e in range(num_experts):
        own = np.flatnonzero(flat == e)
        at = starts[e] + np.arange(own.size)
        assignment[at] = own
        row[own] = at
        first = starts[e] // block_rows
        block_expert[first : first + padded[e] // block_rows] = e
    return {
        "load": load,
        "counts": load,
        "starts": starts,
        "assignment": assignment,
        "row": row.reshape(experts.shape),
        "experts": experts,
        "block_expert": block_expert,
    }
