"""The teacher that a run names: a run of ours, a GGUF file, or a folder of safetensors."""

from dataclasses import replace

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.base.paths import user_path
from moe_jax.base.provenance import call_of
from moe_jax.config import TrainConfig, require
from moe_jax.distill.teacher import Teacher
from moe_jax.interop.gguf import GET_SMOLLM2, SMOLLM2
from moe_jax.interop.hugging_face import HUB
from moe_jax.model.count import count_parameters
from moe_jax.model.dtype import compute_dtype, slow_type
from moe_jax.runs.load import load_run
from moe_jax.train.task import Task
from moe_jax.train.teacher import TeacherTask
from moe_jax.train.upcycled import require_upcyclable


def find_teacher(name: str) -> Teacher:
    """Loads the teacher that --distill.teacher names, and prints a line about it.

    UserError: there is no such teacher.
    """
    place = user_path(name)
    if (place / "checkpoints").is_dir():
        run = load_run(place)
        teacher = Teacher(run.config.model, run.state.parameters, run.state.router, run.tokenizer)
        kind = f"run, step {run.step}"
    elif place.is_dir() or name.startswith(HUB):
        teacher = Teacher.from_folder(name)
        kind = "safetensors"
    elif place.is_file() or name == SMOLLM2:
        teacher = Teacher.from_gguf(name)
        kind = "GGUF"
    else:
        raise UserError(
            f"distill.teacher '{name}' is not here: use {SMOLLM2} ({GET_SMOLLM2}), a GGUF file, "
            f"a folder of safetensors, {HUB}OWNER/NAME, or the folder of a run"
        )
    size = count_parameters(teacher.model).total / 1e6
    tokens = teacher.tokenizer.vocabulary
    say(f"teacher {name}: {kind}, {size:.1f}M parameters, {tokens} tokens")
    return teacher


def task_of(config: TrainConfig) -> Task:
    """The task that the settings describe, with vocabulary and compute dtype resolved.

    UserError: there is no such teacher, or the student's shape does not fit it.
    """
    # Once, here: the checkpoint has the type with which the run began. On a machine for which auto
    # would be another one the run is refused by name, and not continued in other numbers.
    if line := slow_type(config.model):
        say(line)
    model = replace(config.model, compute_dtype=compute_dtype(config.model).name)
    config = replace(config, model=model)
    if not config.distill.teacher:
        return Task(config.resolved())
    teacher = find_teacher(config.distill.teacher)
    config = with_tokenizer_of(teacher, config).resolved()
    require_cacheable(config, teacher)
    if config.distill.upcycle:
        require_upcyclable(config, teacher.model)
    # The teacher computes as the student does, whatever it was trained with.
    moe = replace(teacher.model.moe, implementation="auto")
    attention = replace(teacher.model.attention, implementation="auto")
    dtype = config.model.compute_dtype
    model = replace(teacher.model, compute_dtype=dtype, attention=attention, moe=moe)
    return TeacherTask(config, teacher._replace(model=model))


def require_cacheable(config: TrainConfig, teacher: Teacher) -> None:
    """UserError: distill.cache stores more tokens of a distribution than the teacher has."""
    if config.distill.cache_contents is None:
        return
    _, count = config.distill.cache_contents
    tokens = teacher.tokenizer.vocabulary
    require(
        count < tokens,
        f"distill.cache={config.distill.cache} stores {count} tokens of each distribution, and the "
        f"teacher has {tokens}: lower the number, or set distill.cache to none",
    )


def with_tokenizer_of(teacher: Teacher, config: TrainConfig) -> TrainConfig:
    """The settings with the teacher's tokenizer.

    UserError: the settings name another vocabulary.
    """
    tokenizer = teacher.tokenizer
    vocabulary = config.model.vocabulary
    # The teacher's table may have more rows than its tokenizer has tokens. Either number is right.
    require(
        vocabulary in (None, tokenizer.vocabulary, teacher.model.vocabulary),
        f"model.vocabulary={vocabulary} is not the teacher's {tokenizer.vocabulary}: leave it "
        "unset, or train without a teacher on text that it wrote "
        f"({call_of('teacher-text')})",
    )
    if config.data.tokenizer != tokenizer.kind:
        say(f"the student uses the teacher's tokenizer, {tokenizer.kind}")
    return replace(config, data=replace(config.data, tokenizer=tokenizer.kind))
