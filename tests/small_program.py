"""Options for a small run of experiments/train.py as a process of its own."""

from pathlib import Path


def small_settings(folder: Path) -> list[str]:
    """Options for a tiny model on six texts. Text and token cache lie in `folder`."""
    for index in range(6):
        lines = [f"value_{index}_{n} = compute({n} * {index})" for n in range(150)]
        (folder / f"text{index}.py").write_text("\n".join(lines))
    return [
        *("--model.width", "32", "--model.layers", "1", "--model.dense-layers", "0"),
        *("--model.moe.expert-hidden", "16", "--model.attention.head-dim", "8"),
        *("--data.source", f"files:{folder}/*.py", "--data.cache", f"{folder / 'cache'}"),
        *("--data.tokenizer", "bytes", "--data.length", "64", "--data.validation-fraction", "0.3"),
    ]


def run_settings(folder: Path, *, steps: int, batch: int, save_every: int) -> list[str]:
    """Options for a run of it that evaluates twice and writes no samples."""
    return [
        *("--steps", f"{steps}", "--batch", f"{batch}", "--samples", "0"),
        *("--evaluate-every", f"{steps // 2}", "--checkpoint.every", f"{save_every}"),
        *small_settings(folder),
    ]
