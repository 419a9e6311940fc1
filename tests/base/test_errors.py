"""Error lines are one line, short, and printable on any terminal."""

import pytest

from moe_jax.base.errors import MOST_CHARACTERS, UserError, brief, near_name, quote, reading
from moe_jax.base.paths import read_file, user_path

FOREIGN = [
    "a\nb\r\x00\x1b[31m", "\u202e\u2028", "\ud800", "x" * 10**6, b"\xff" * 1000, 10**5000,
    float("nan"), ["a\n"] * 1000, {"a": {"b": {"c": [["d"]]}}}, [[[[[[]]]]]], None, (1, "\n"),
]  # fmt: skip


@pytest.mark.parametrize("value", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_value_is_at_most_80_printable_characters(value):
    assert quote(value).isprintable()
    assert len(quote(value)) <= 80
    if not isinstance(value, int):
        assert brief(value).isprintable()
        assert len(brief(value)) <= 80


def test_short_values_are_as_python_writes_them():
    for value in ("llama", 7, 0.5, True, [1, 2], {"a": 1}, (3, 4), b"x"):
        assert quote(value) == repr(value)


def test_every_error_line_is_one_line():
    line = str(UserError("begin\n" + "x" * 5000 + "\x1b the fix"))
    assert line.isprintable()
    assert len(line) <= MOST_CHARACTERS
    assert line.startswith("begin\\nx")
    assert line.endswith("the fix")


@pytest.mark.parametrize("error", [KeyError("a\nb"), RecursionError(), ValueError("x" * 999)])
def test_errors_of_libraries_become_one_line_that_names_the_file(error):
    damaged = pytest.raises(UserError, match=r"^m\.bin is damaged \(.+\): fetch")
    with damaged as caught, reading("m.bin"):
        raise error
    assert caught.value.__cause__ is error
    assert len(str(caught.value)) < 200


def test_a_panic_of_a_rust_library_is_an_error_too_but_ctrl_c_is_none():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(UserError, match="is damaged"), reading("m.bin"):
        raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), reading("m.bin"):
        raise KeyboardInterrupt


def test_paths_as_a_person_writes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a/../b") == tmp_path / "a" / ".." / "b"
    with pytest.raises(UserError, match="no home folder"):
        user_path("~nobody-of-that-name/a")
    with pytest.raises(UserError, match="holds a NUL"):
        user_path("a\0b")


def test_a_file_is_measured_before_it_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes, more than"):
        read_file(tmp_path / "a", 4)
    with pytest.raises(UserError, match="is no regular file"):
        read_file(tmp_path, 4)


def test_a_near_name_is_a_hint():
    assert near_name("sigmod", ["softmax", "sigmoid"]) == " (did you mean sigmoid?)"
    assert near_name("zzz", ["softmax", "sigmoid"]) == ""
