"""The teacher that a run names: a run of ours, a GGUF file, or a folder of safetensors."""

from dataclasses import replace
from pathlib import Path

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.config import TrainConfig, require
from moe_jax.distill.teacher import Teacher
from moe_jax.interop.gguf import GET_SMOLLM2, SMOLLM2
from moe_jax.interop.hugging_face import HUB
from moe_jax.model.count import count_parameters
from moe_jax.runs.load import load_run
from moe_jax.train.upcycled import require_upcyclable


def find_teacher(name: str) -> Teacher:
    """The teacher that --distill.teacher names, told in one line. UserError: there is none."""
    place = Path(name).expanduser()
    if (place / "checkpoints").is_dir():
        run = load_run(place)
        teacher = Teacher(
            run.config.resolved_model(), run.state.parameters, run.state.router, run.tokenizer
        )
        kind = f"run, step {run.step}"
    elif place.is_dir() or name.startswith(HUB):
        teacher, kind = Teacher.from_folder(name), "safetensors"
    elif place.is_file() or name == SMOLLM2:
        teacher, kind = Teacher.from_gguf(name), "GGUF"
    else:
        raise UserError(
            f"distill.teacher '{name}' is not here: use {SMOLLM2} ({GET_SMOLLM2}), a GGUF file, "
            f"a folder of safetensors, {HUB}OWNER/NAME, or the folder of a run"
        )
    size = count_parameters(teacher.model).total / 1e6
    tokens = teacher.tokenizer.vocabulary
    say(f"teacher {name}: {kind}, {size:.1f}M parameters, {tokens} tokens")
    return teacher


def with_teacher(config: TrainConfig) -> tuple[TrainConfig, Teacher | None]:
    """The settings with the teacher's tokenizer in them, and the teacher in the student's compute
    dtype. UserError: no such teacher, or the student's shape does not fit it."""
    if not config.distill.teacher:
        return config, None
    teacher = find_teacher(config.distill.teacher)
    model, tokenizer = teacher.model, teacher.tokenizer
    vocabulary, rows = config.model.vocabulary, model.vocabulary
    require(
        vocabulary in (None, tokenizer.vocabulary, rows),
        f"model.vocabulary={vocabulary} is not the teacher's {tokenizer.vocabulary}: leave it "
        "unset, or train without a teacher on text that it wrote (experiments/teacher_text.py)",
    )
    if config.data.tokenizer != tokenizer.kind:
        say(f"the student uses the teacher's tokenizer, {tokenizer.kind}")
    config = replace(config, data=replace(config.data, tokenizer=tokenizer.kind))
    if config.distill.upcycle:
        require_upcyclable(config, model)
    moe = replace(model.moe, implementation="auto")
    reader = replace(model, compute_dtype=config.model.compute_dtype, moe=moe)
    return config, teacher._replace(model=reader)
