"""What MkDocs does to every page beside its own work: formulas become MathML, wide tables get a box to scroll in."""

import html
import itertools
import re

from llmft.runs.report import in_box, math_html

formula = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
bare_table = re.compile(r'<table>.*?</table>', flags=re.DOTALL)


def with_labels(table):
    "A table whose cells know the heads of their columns, so that a narrow screen can show a row as a list; tables with joined cells stay as they are."
    heads = [re.sub('<.*?>', '', head).strip() for head in re.findall(r'<th\b[^>]*>(.*?)</th>', table, re.DOTALL)]
    rows = [row.count('<td') for row in re.findall(r'<tr>.*?</tr>', table, re.DOTALL)][1:]
    if not rows or set(rows) != {len(heads)} or '<th' in table.partition('<tbody>')[2]:
        return in_box(table)
    columns = itertools.cycle(heads)
    return in_box(re.sub('<td', lambda found: f'<td data-label="{next(columns)}"', table)).replace(
        'scroll table', 'scroll table rows', 1
    )


def on_page_content(content, **_):
    "The HTML of a page, with formulas that need no script and tables that do not widen the page."
    content = formula.sub(lambda found: math_html(html.unescape(found[2]), block=found[1] == 'div'), content)
    pieces = re.split(r'(<div class="output".*?</div>\s*</div>)', content, flags=re.DOTALL)
    pieces[::2] = [bare_table.sub(lambda found: with_labels(found[0]), piece) for piece in pieces[::2]]
    return ''.join(pieces)
