"""experiments/convert.py on a folder: its line, its check, and what it refuses."""

import pytest

from experiments import convert
from moe_jax.base.errors import UserError
from moe_jax.distill.teacher import Teacher
from moe_jax.interop.hugging_face import load_model
from tests.interop import folder as small


def test_a_folder_is_converted_and_checked(tmp_path, capsys):
    small.write(tmp_path / "a", "llama", dtype="BF16")
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    convert.main([source, target, "--check", "--shard", "20kB", "--text", "the tin"])
    said = capsys.readouterr().out
    assert "peak memory" in said
    assert "differ by at most 0.0e+00" in said
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
    damaged = load_model(target)
    damaged.parameters["embedding"][...] *= 1.5
    with pytest.raises(UserError, match=r"the models differ: .* nats exceed 0\.015"):
        convert.check(Teacher(*load_model(source)), Teacher(*damaged), "the tin")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"name both models: python experiments/convert.py SRC DST"),
        (["a"], "name both models"),
        (["a", "b", "--shard", "much"], "shard 'much' is no size"),
        (["a", "b", "--dtype", "int8"], "dtype"),
        (["nowhere/at-all", "b"], "there is no folder"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        convert.main(argv)
