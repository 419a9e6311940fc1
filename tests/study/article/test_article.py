"""Figures by name, verdicts by their rules, tables of documents that are fresh."""

import json

import pytest

from moe_jax.base.errors import UserError
from moe_jax.study.article.claims import read_article
from moe_jax.study.article.documents import BEGIN, END, stale, with_table
from moe_jax.study.article.levers import Lever, run_levers
from moe_jax.study.article.markdown import write_report
from moe_jax.study.article.numbers import Numbers
from tests.repository.sources import ROOT

DATA = ROOT / "experiments" / "article.toml"
CLAIM = """
[files]
one = "one.json"
[[finding]]
[[question]]
[[run]]
[[claim]]
name = "a"
title = "A"
claim = "A is {one|gain|.1f}."
claimed = "2x"
measured = "{one|gain|.1f}x {one|gain|interval .1f}, the best {one|max *_high|.0%}"
value = "one|gain"
predicted = "none"
limit = "{one|gain|over .2f}"
because = "so"
command = "a.py"
details = "a.md"
rule = { value = "one|gain", supported = 2.0, partly = 1.5 }
"""


def write_results(path, **values):
    rows = [
        {"name": name, "value": value, "unit": "x", "baseline": None, "interval": [value, 9.0]}
        for name, value in values.items()
    ]
    path.write_text(json.dumps({"measurements": rows}))
    return path


@pytest.fixture
def data(tmp_path):
    write_results(tmp_path / "one.json", gain=1.6, p_high=0.25, q_high=0.5)
    (tmp_path / "article.toml").write_text(CLAIM)
    return tmp_path / "article.toml"


@pytest.mark.parametrize(
    ("gain", "verdict"), [(1.4, "not supported"), (1.5, "partly"), (2.0, "supported")]
)
def test_verdict_follows_its_rule(data, gain, verdict):
    write_results(data.parent / "one.json", gain=gain, p_high=1)
    (answer,) = read_article(data, data.parent).answers()
    assert answer.verdict == verdict


def test_figures_are_filled_in(data):
    (answer,) = read_article(data, data.parent).answers()
    assert answer.claim == "A is 1.6."
    assert answer.measured == "1.6x [1.6, 9.0], the best 50%"
    assert answer.limit == "0.62"
    assert (answer.value, answer.interval) == (1.6, [1.6, 9.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{one|gains|.1f}", "no measurement 'gains' (did you mean gain?)"),
        ("{two|gain|.1f}", "'two' is no result file"),
        ("{one|max *_low|.1f}", "no measurement like '*_low'"),
        ("{one|gain|blue}", "'blue' is no format of one|gain"),
        ("{one|gain}", "has a brace"),
    ],
)
def test_wrong_references_are_one_line(data, text, message):
    with pytest.raises(UserError) as error:
        Numbers({"one": data.parent / "one.json"}).fill(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_verdict_and_missing_field(data):
    text = data.read_text()
    data.write_text(text.replace("rule = {", 'verdict = "yes"\nrule = {'))
    with pytest.raises(UserError, match="'yes' is no verdict"):
        read_article(data, data.parent).answers()
    data.write_text(text.replace('limit = "{one|gain|over .2f}"\n', ""))
    with pytest.raises(UserError, match="claim 'a' has no limit"):
        read_article(data, data.parent).answers()


def test_documents_are_fresh():
    names = [str(path.relative_to(ROOT)) for path in stale(read_article(DATA, ROOT), ROOT)]
    assert names == [], "run python experiments/article.py --write-docs"


def test_changed_result_makes_documents_stale(tmp_path):
    content = json.loads((ROOT / "experiments/results/train.json").read_text())
    for row in content["measurements"]:
        row["value"] = 7.0
    (tmp_path / "train.json").write_text(json.dumps(content))
    article = read_article(DATA, ROOT, {"train": tmp_path / "train.json"})
    assert ROOT / "experiments/README.md" in stale(article, ROOT)


def test_table_needs_its_markers():
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb", "new", "x") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
    with pytest.raises(UserError, match="needs one line"):
        with_table("a", "new", "x")


def test_levers_are_repeated_until_they_finish(tmp_path, capsys):
    good = tmp_path / "good.py"
    good.write_text(
        "import sys, pathlib\nfolder = pathlib.Path(sys.argv[-1])\n"
        "with (folder / 'count').open('a') as f: f.write('x')\n"
        "(folder / 'result.json').write_text('{}')\n"
    )
    bad = tmp_path / "bad.py"
    bad.write_text("raise SystemExit('no such card')\n")
    levers = [Lever("bad", ["bad.py"], 1), Lever("good", ["good.py"], 2)]
    for _ in range(2):
        outcome = run_levers(levers, tmp_path, tmp_path / "out")
        assert list(outcome.results) == ["good"]
        assert outcome.failed == {"bad": "failed with exit code 1: no such card"}
    assert (tmp_path / "out/runs/good/count").read_text() == "x"
    assert "2/2 good: done before" in capsys.readouterr().out
    # A run that was killed has no finished.json.
    (tmp_path / "out/runs/good/finished.json").unlink()
    run_levers(levers, tmp_path, tmp_path / "out")
    assert (tmp_path / "out/runs/good/count").read_text() == "xx"


def test_report_has_every_claim(data):
    answers = read_article(data, data.parent).answers()
    report = write_report(answers, ["Recorded."])
    assert "| A | partly |" in report
    assert "- **Measured here**: 1.6x [1.6, 9.0], the best 50%" in report
