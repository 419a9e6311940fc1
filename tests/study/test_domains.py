import ast

import pytest

from moe_jax.study import domains


def test_docstrings_are_taken_and_what_is_left_is_code():
    source = (
        '"""Module."""\ndef f():\n    """Only this."""\n\nclass A:\n    """Class."""\n    x = 1\n'
    )
    tree = ast.parse(source)
    prose = domains._take_docstrings(tree)
    assert sorted(prose.split("\n\n")) == ["Class.\n", "Module.", "Only this."]
    assert ast.unparse(tree) == "def f():\n    pass\n\nclass A:\n    x = 1"


def test_held_out_text_takes_the_domains_in_turn_until_one_runs_out(tmp_path):
    lengths = {"code": 10, "prose": 10, "tables": 5}
    (tmp_path / "held-out").mkdir()
    for domain, length in lengths.items():
        (tmp_path / "held-out" / f"{domain}.txt").write_text(domain[0] * length)
    found = list(domains.held_out_texts(tmp_path, stretch=5, total=1000))
    assert [domain for domain, _ in found] == ["code", "prose", "tables", "code", "prose"]
    assert all(len(text) == 5 for _, text in found)


def test_a_corpus_is_written_once(tmp_path, monkeypatch):
    texts = [("a.py", "code", "x" * 40), ("b.py", "code", "y" * 40), ("c.py", "code", "z" * 40)]
    monkeypatch.setattr(domains, "domain_texts", lambda: iter(texts))
    monkeypatch.setattr(domains, "LIMIT", 80)
    domains.write_corpus(tmp_path)
    assert (tmp_path / "held-out" / "code.txt").read_text() == "x" * 10
    assert {p.name for p in (tmp_path / "corpus" / "code").iterdir()} == {"b.txt", "c.txt"}
    monkeypatch.setattr(domains, "domain_texts", lambda: pytest.fail("written already"))
    domains.write_corpus(tmp_path)


def test_a_held_out_text_is_in_no_file_for_training(tmp_path, monkeypatch):
    first = [("a.py", "code", "x" * 10), ("b.py", "code", "y" * 40), ("c.py", "code", "x" * 10)]
    # The prose is held out while there is room, but its text is one to train on already.
    texts = [
        *first,
        ("d.py", "prose", "y" * 40),
        ("e.py", "prose", "z" * 9),
        ("f.py", "prose", "w"),
    ]
    monkeypatch.setattr(domains, "domain_texts", lambda: iter(texts))
    monkeypatch.setattr(domains, "LIMIT", 80)
    domains.write_corpus(tmp_path)
    train = {str(p.relative_to(tmp_path / "corpus")) for p in tmp_path.rglob("corpus/*/*.txt")}
    assert train == {"code/b.txt", "prose/d.txt"}
    assert (tmp_path / "held-out" / "code.txt").read_text() == "x" * 10
    assert (tmp_path / "held-out" / "prose.txt").read_text() == "z" * 9 + "w"
