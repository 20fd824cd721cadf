"""What MkDocs does to every page beside its own work: formulas become MathML, wide tables get a box to scroll in."""
import html, re

from llmft.report import in_box, math_html

formula = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
bare_table = re.compile(r'<table>.*?</table>', flags=re.DOTALL)


def on_page_content(content, **_):
    "The HTML of a page, with formulas that need no script and tables that do not widen the page."
    content = formula.sub(lambda found: math_html(html.unescape(found[2]), block=found[1] == 'div'), content)
    pieces = re.split(r'(<div class="output".*?</div>\s*</div>)', content, flags=re.DOTALL)
    pieces[::2] = [bare_table.sub(lambda found: in_box(found[0]), piece) for piece in pieces[::2]]
    return ''.join(pieces)
