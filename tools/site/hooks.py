"""What MkDocs does to every page besides its own work: formulas become MathML, wide tables get a box to scroll in."""

import html
import itertools
import re
import xml.etree.ElementTree as ET

from llmft.runs.report import in_box, math_html

formula = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
bare_table = re.compile(r'<table>.*?</table>', flags=re.DOTALL)
inline_code = re.compile(r'(?<!<pre>)(?<!</span>)<code>(?:[^<]|<wbr>)*</code>')
shell_code = re.compile(r'<div class="language-(?:ba)?sh\b.*?</pre>', flags=re.DOTALL)
shell_option = re.compile(
    r'(?<=<span class="w"> </span>)(-p|--[\w-]+)'
    r'(<span class="w"> </span>(?=[\w"./\']|<span class="(?!c1|o))(?:(?!<span class="w">)[^\n])+?)?'
    r'(?=<span class="w">|\n|</code>)'
)
shortest_torn = 25  # characters from which code in a line may break
shortest_torn_in_cell = 15
closed_formula = re.compile(r'\(?<math\b(?:(?!</math>).)*</math>[.,;:!?)]+', flags=re.DOTALL)
longest_option = 30  # characters that stay in one piece, less than a line of a phone
long_path = 16  # characters of text beyond which a path may break after its slashes
unit = re.compile(r'(?<=\d) (?=(?:GiB|MiB|GB|MB|KB|kB|ms|s|min|h)(?![\w]))|(?<=\bn =) (?=\d)')
not_prose = re.compile(r'(<(pre|code|math|svg|script|style)\b.*?</\2>|<[^>]*>)', flags=re.DOTALL)
most_roomy = 6  # columns of a table beyond which its cells are narrow
output = re.compile(r'(<div class="output".*?<!-- output --></div>)', flags=re.DOTALL)


ET.register_namespace('', 'http://www.w3.org/1998/Math/MathML')
functions = {'ln', 'log', 'exp', 'max', 'min', 'arg', 'sin', 'cos', 'Pr', 'lim', 'sup', 'inf'}
rows_of_signs = {'math', 'mrow', 'mtd', 'mstyle', 'msqrt'}  # elements whose children are in one line


def tag_of(node):
    "The name of an element without its namespace."
    return node.tag.rpartition('}')[2]


def kind_of(node):
    "The name of an element of a formula; that of a function, such as a logarithm with its base, is function."
    base = node[0] if tag_of(node) in ('msub', 'msup', 'msubsup', 'munder') else node
    return 'function' if tag_of(base) == 'mi' and (base.text or '').strip() in functions else tag_of(node)


def needs_space(left, right):
    "Whether two neighbours in a formula would run together: 2 ln K, but ln(K) and -ln K."
    kinds = kind_of(left), kind_of(right)
    signs = [(node.text or '').strip() if tag_of(node) == 'mo' else '' for node in (left, right)]
    if 'mspace' in kinds or 'function' not in kinds:
        return False
    return not signs[1] and (not signs[0] or signs[0] in ')]|') or kinds == ('function', 'function')


def with_spaces(formula):
    "A formula in MathML with a thin space between the name of a function and its neighbours, as TeX sets it."
    try:
        tree = ET.fromstring(formula)
    except ET.ParseError:
        return formula
    space = re.sub(r'math$', 'mspace', tree.tag)
    for row in [node for node in tree.iter() if tag_of(node) in rows_of_signs]:
        for number in range(len(row) - 1, 0, -1):
            if needs_space(row[number - 1], row[number]):
                row.insert(number, ET.Element(space, width='0.167em'))
    return ET.tostring(tree, encoding='unicode')


def with_mathml(match):
    "A formula as MathML, which needs no script."
    element, tex = match.groups()
    shown = math_html(html.unescape(tex), block=element == 'div')
    return re.sub(r'(?s)<math\b.*?</math>', lambda found: with_spaces(found[0]), shown)


def column_heads(table):
    "The text of the heads of a table's columns."
    heads = re.findall(r'<th\b[^>]*>(.*?)</th>', table, re.DOTALL)
    return [re.sub('<.*?>', '', head).strip() for head in heads]


def is_plain(table, columns):
    "Whether each row of a table has one cell per column, and no cell of its body is a head."
    rows = re.findall(r'<tr>.*?</tr>', table, re.DOTALL)[1:]
    body = table.partition('<tbody>')[2]
    return bool(rows) and all(row.count('<td') == columns for row in rows) and '<th' not in body


def without_empty_columns(table):
    "A table without the columns whose cells are all empty."
    rows = [re.findall(r'<t[hd]\b.*?</t[hd]>', row, re.DOTALL) for row in re.findall(r'<tr>.*?</tr>', table, re.DOTALL)]
    empty = [all(re.fullmatch(r'<td[^>]*></td>', cell) for cell in column) for column in zip(*rows[1:], strict=True)]
    gone = itertools.cycle(empty)
    return re.sub(r'(?s)\s*<t[hd]\b.*?</t[hd]>', lambda cell: '' if next(gone) else cell[0], table)


def with_labels(match):
    "A table in a box; its cells name their columns, so that a narrow screen can show a row as a list."
    table = match[0].replace('<table>', '<table class="plain">', 1)  # Material boxes tables without a class
    heads = column_heads(table)
    if not is_plain(table, len(heads)):
        return in_box(table)

    table = without_empty_columns(table)
    heads = column_heads(table)
    columns = itertools.cycle(heads)
    labelled = re.sub('<td', lambda _: f'<td data-label="{next(columns)}"', table)
    kind = 'scroll table rows many' if len(heads) > most_roomy else 'scroll table rows'
    return in_box(labelled).replace('scroll table', kind, 1)


def breakable_code(code):
    "Code that may break after the signs within paths and names, but not within numbers."
    return re.sub(r'(?<=[\w>])([/_=:]|&#95;|\.(?!\d))(?=[\w*])', r'\1<wbr>', code[0])


def breakable_cell(cell):
    "A cell of a table whose code may break after its signs, and nowhere else."
    return re.sub(r'<code>[^<]*</code>', breakable_code, cell[0])


def breakable_path(word):
    "A long path that may break after its slashes."
    return word[0].replace('/', '/<wbr>') if len(word[0]) > long_path else word[0]


def breakable_text(page, unit_sign):
    "Text whose long paths break after a slash; `unit_sign` is between a number and its unit."
    pieces = not_prose.split(page)  # text, element or tag, name of the element, text, ...
    pieces[::3] = [re.sub(r'[^\s/]+/\S+', breakable_path, unit.sub(unit_sign, piece)) for piece in pieces[::3]]
    pieces[2::3] = [''] * len(pieces[2::3])
    return ''.join(pieces)


def breakable_prose(page):
    "A page whose long paths break after a slash, and whose numbers keep their units; cells of tables are too narrow."
    parts = re.split(r'(?s)(<table\b.*?</table>)', page)  # text, table, text, ...
    return ''.join(breakable_text(part, ' ' if number % 2 else '\u00a0') for number, part in enumerate(parts))


def whole(option):
    "An option in one piece with its value, or without it where that is long."
    if len(re.sub(r'<.*?>', '', option[0])) <= longest_option or not option[1]:
        return f'<span class="flag">{option[0].replace("<wbr>", "")}</span>'
    return f'<span class="flag">{option[1]}</span>{option[2] or ""}'


def with_whole_flags(code, limit=shortest_torn):
    """Code in a line: short code stays in one piece, in longer code the options, such as --small and -p seed=1, and words,
    such as gpu-check; other words may break after a sign within them."""
    words = html.unescape(re.sub('<.*?>', '', code[0]))
    if words.isidentifier():
        return code[0].replace('<wbr>', '') if len(words) < limit else code[0]
    if len(words) < limit:
        return code[0].replace('<code>', '<code class="flag">').replace('<wbr>', '')
    code = re.sub(r'(?<![^\s>])(--?[A-Za-z][\w-]*)( (?!-)(?:[^\s<]|<wbr>)+)?', whole, code[0])
    code = re.sub(r'(?<![\w/.=<"-])[\w.]{1,12}-\w{1,12}(?![\w/.=">-])', r'<span class="flag">\g<0></span>', code)
    return re.sub(rf'[\w./:=-]{{{shortest_torn},}}', breakable_code, code)


def with_whole_options(block):
    "A block of shell commands whose options, such as --small, --to gguf and -p seed=1, stay in one piece."
    return shell_option.sub(whole, block[0])


def with_full_titles(output, page):
    "A page whose links to its neighbours say their titles in full: the sidebar has a shorter name."
    for word, other in (('Previous', page.previous_page), ('Next', page.next_page)):
        short = html.escape(other.title) if other else ''
        full = html.escape(other.meta.get('title', other.title)) if other else ''
        pattern = (
            rf'(aria-label="{word}: ){re.escape(short)}(".*?<div class="md-ellipsis">\s*){re.escape(short)}(?=\s*<)'
        )
        output = re.sub(pattern, rf'\g<1>{full}\g<2>{full}', output, count=1, flags=re.DOTALL) if other else output
    return output


def on_post_page(output, page, **_):
    "The whole page, after the search has read it: the name of the search box, and where code may break."
    output = with_full_titles(output, page)
    output = output.replace('role="dialog">', 'role="dialog" aria-label="Search">')
    output = re.sub(r'(?s)<td\b.*?</td>', breakable_cell, output)
    output = re.sub(r'(?s)<article\b.*?</article>', lambda article: breakable_prose(article[0]), output)
    output = shell_code.sub(with_whole_options, output)
    parts = re.split(r'(?s)(<td\b.*?</td>)', output)  # text, cell, text, ...
    parts[::2] = [inline_code.sub(with_whole_flags, part) for part in parts[::2]]
    parts[1::2] = [
        inline_code.sub(lambda code: with_whole_flags(code, shortest_torn_in_cell), part) for part in parts[1::2]
    ]
    return ''.join(parts)


def on_page_content(content, **_):
    "The HTML of a page, with formulas that need no script and tables that do not widen the page."
    content = formula.sub(with_mathml, content)
    content = closed_formula.sub(r'<span class="flag">\g<0></span>', content)
    pieces = output.split(content)  # text, output, text, ...
    pieces[::2] = [bare_table.sub(with_labels, piece) for piece in pieces[::2]]
    return ''.join(pieces)
