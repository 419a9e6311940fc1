import pytest

from moe_jax.base.errors import UserError
from moe_jax.commands import teacher_text
from tests.interop import folder as safetensors


@pytest.fixture
def arguments(tmp_path):
    safetensors.write(tmp_path / "teacher")
    for index in range(6):
        (tmp_path / f"text{index}.py").write_text(f"the value = {index}\n" * 20)
    return [
        *("--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "written")),
        *("--source", f"files:{tmp_path}/*.py", "--cache", str(tmp_path / "cache")),
        *("--documents", "3", "--prompt", "6", "--tokens", "5", "--batch", "2"),
    ]


def test_it_writes_what_is_missing_and_the_same_again(tmp_path, arguments, capsys):
    teacher_text.main(arguments)
    out = tmp_path / "written"
    texts = {path.name: path.read_bytes() for path in sorted(out.glob("*.txt"))}
    assert list(texts) == ["000000.txt", "000001.txt", "000002.txt"]
    assert all(text.startswith(b"the val") for text in texts.values())
    assert len(set(texts.values())) == 3
    assert f"--data.source 'files:{out}/*.txt'" in capsys.readouterr().out
    (out / "000001.txt").unlink()
    kept = (out / "000002.txt").stat().st_mtime_ns
    teacher_text.main(arguments)
    assert {path.name: path.read_bytes() for path in sorted(out.glob("*.txt"))} == texts
    assert (out / "000002.txt").stat().st_mtime_ns == kept


def test_too_few_documents(arguments):
    with pytest.raises(UserError, match=r"documents=50, but only [1-6] of the source have more"):
        teacher_text.main([*arguments, "--documents", "50"])
    with pytest.raises(UserError, match="batch is 0: it must be positive"):
        teacher_text.main([*arguments, "--batch", "0"])
