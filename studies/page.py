"""Tables of the studies, and the pages in docs/ that show them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pargs_jax.durable_files import write_whole
from pargs_jax.errors import InputError


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table in Markdown. All but the first `texts` columns are numbers, aligned to the right."""
    rule = ["---"] * texts + ["---:"] * (len(headings) - texts)
    lines = [headings, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def fill_page(page: Path, parts: Mapping[str, str]) -> None:
    """Replaces what stands between the comments `<!-- NAME -->` and `<!-- end -->` of a page.

    Raises InputError if the page has no such comments for one of the parts.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (start and end):
            raise InputError(f"{page}: has no part '<!-- {name} -->' ... '<!-- end -->'")
        text = f"{before}{start}\n{content}\n{end}{after}"
    write_whole(page, text)
