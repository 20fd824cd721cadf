"""What MkDocs does to every page besides its own work: formulas become MathML, wide tables get a box to scroll in."""

import html
import itertools
import re

from llmft.runs.report import in_box, math_html

formula = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
bare_table = re.compile(r'<table>.*?</table>', flags=re.DOTALL)
output = re.compile(r'(<div class="output".*?</div>\s*</div>)', flags=re.DOTALL)


def with_mathml(match):
    "A formula as MathML, which needs no script."
    element, tex = match.groups()
    return math_html(html.unescape(tex), block=element == 'div')


def column_heads(table):
    "The text of the heads of a table's columns."
    heads = re.findall(r'<th\b[^>]*>(.*?)</th>', table, re.DOTALL)
    return [re.sub('<.*?>', '', head).strip() for head in heads]


def is_plain(table, columns):
    "Whether each row of a table has one cell per column, and no cell of its body is a head."
    rows = re.findall(r'<tr>.*?</tr>', table, re.DOTALL)[1:]
    body = table.partition('<tbody>')[2]
    return bool(rows) and all(row.count('<td') == columns for row in rows) and '<th' not in body


def with_labels(match):
    "A table in a box; its cells name their columns, so that a narrow screen can show a row as a list."
    table = match[0].replace('<table>', '<table class="plain">', 1)  # Material boxes tables without a class
    heads = column_heads(table)
    if not is_plain(table, len(heads)):
        return in_box(table)

    columns = itertools.cycle(heads)
    labelled = re.sub('<td', lambda _: f'<td data-label="{next(columns)}"', table)
    return in_box(labelled).replace('scroll table', 'scroll table rows', 1)


def on_post_page(output, **_):
    "The whole page; the search box, a dialog, gets the name that a screen reader says."
    return output.replace('role="dialog">', 'role="dialog" aria-label="Search">')


def on_page_content(content, **_):
    "The HTML of a page, with formulas that need no script and tables that do not widen the page."
    content = formula.sub(with_mathml, content)
    pieces = output.split(content)  # text, output, text, ...
    pieces[::2] = [bare_table.sub(with_labels, piece) for piece in pieces[::2]]
    return ''.join(pieces)
