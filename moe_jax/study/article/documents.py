"""Tables between two markers of a Markdown file, written anew from the data file."""

from pathlib import Path

from moe_jax.base.errors import require
from moe_jax.base.files import write_atomically
from moe_jax.study.article.claims import Article
from moe_jax.study.article.markdown import question_table, verdict_table

BEGIN = "<!-- python experiments/article.py --write-docs -->"
END = "<!-- end -->"
DOCUMENTS = {"README.md": verdict_table, "experiments/README.md": question_table}


def with_table(text: str, table: str, name: str) -> str:
    """`text` with `table` between its markers. UserError: there is not one pair of markers."""
    once = text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)
    require(once, f"{name} needs one line '{BEGIN}' and one line '{END}' below it")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def stale(article: Article, root: Path) -> dict[Path, str]:
    """Documents whose table is not the data file's, with the text that they should have."""
    found = {}
    for name, table in DOCUMENTS.items():
        path = root / name
        text = path.read_text()
        if (fresh := with_table(text, table(article), name)) != text:
            found[path] = fresh
    return found


def write_documents(article: Article, root: Path) -> list[Path]:
    """Writes those that are stale, and returns them."""
    changed = stale(article, root)
    for path, text in changed.items():
        write_atomically(path, text)
    return list(changed)
