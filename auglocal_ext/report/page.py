"""A page of text, tables and pictures in one HTML file, which needs nothing else."""

import base64
import html
from pathlib import Path

from ..common.files import write_text

__all__ = ["heading", "paragraph", "picture", "table", "write_page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.2rem 0.8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


def write_page(path, title, parts):
    """Writes the page.

    Args:
        path: the file.
        title: of the page, and its first heading.
        parts: of `heading`, `paragraph`, `table` and `picture`, from the top down.
    """
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    write_text(path, f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n')


def heading(text):
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text):
    return f"<p>{html.escape(text)}</p>"


def table(header, rows):
    """Rows of texts below a header of as many."""

    def row(cells, tag):
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    lines = [row(header, "th"), *(row(cells, "td") for cells in rows)]
    return "<table>\n{}\n</table>".format("\n".join(lines))


def picture(path, text):
    """A PNG file, taken into the page; text: what it shows, for those who do not see it."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>'
