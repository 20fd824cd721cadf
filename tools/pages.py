"""The Markdown page of each notebook and each .qmd file of nbs/, as nbdev processed it, without Quarto.

A page is made in this order: nbdev drops what is hidden and links names (docs.py), `write_pages` takes its files,
`notebook_page` or `markdown_page` turns one into Markdown cell by cell (`code_cell`), api_pages.py explains functions
and parameters, links.py makes links lead to pages, and sidebar.py puts the pages in order."""

import base64
import functools
import html
import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml
from api_pages import api_entry, experiment_parameters
from links import branch, linked, page_name, repository, resolved, root, with_links
from nbdev.processors import FilterDefaults

from llmft.runs.report import output_html
from llmft.runs.verdict import join_streams

colab = 'https://colab.research.google.com/github/'
home = 'index.md'
weights = dict(guides=3.0, concepts=1.5, studies=1.0, reference=2.0, experiments=1.0)  # library pages have 0.5


class Unexecuted(FilterDefaults):
    "nbdev's processing without running the exported code: api_pages.py reads signatures from the source."

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc.__name__ != 'exec_show_docs']


# ---- cells


@dataclass
class Place:
    "Where the parts of a page come from and go to."

    page: str  # its name: data/corpora.md
    source: str  # its notebook below nbs: data/02_corpora.ipynb
    folder: Path  # where it is written
    images: int = 0  # saved so far

    @property
    def module(self):
        "The module that the page explains, as a path below llmft."
        return self.page.removesuffix('.md')


def says(cell, directive):
    "Whether a cell has a directive, a regular expression: echo: *false."
    return re.search(rf'^#\s*\|\s*{directive}', cell.source, flags=re.MULTILINE) is not None


def code_of(cell):
    "The source of a cell without nbdev's directives."
    return re.sub(r'^#\s*\|.*\n?', '', cell.source, flags=re.MULTILINE).strip('\n')


def size_of(
    image,  # the bytes of a PNG or an SVG file
    shown=None,  # the width it is shown at, if not its own
):
    "The width and height of a picture as attributes of its element, so that the page does not jump when it comes."
    if image[:8] == b'\x89PNG\r\n\x1a\n':
        width, height = struct.unpack('>II', image[16:24])
        return f' width="{shown or width}" height="{round(height * (shown or width) / width)}"'
    head = re.search(rb'<svg\b[^>]*>', image)
    sides = re.search(rb'\bwidth="([\d.]+)pt" height="([\d.]+)pt"', head[0]) if head else None
    width, height = (round(float(side) * 4 / 3) for side in sides.groups()) if sides else ('', '')  # 72 pt are 96 px
    return f' width="{width}" height="{height}"' if sides else ''


def save_images(text, place):
    "HTML whose embedded images were written to files beside the page."
    figures = place.folder / 'figures'

    def save(match):
        kind = match[1].split('+')[0]
        place.images += 1
        file = f'{Path(place.page).stem}-{place.images}.{kind}'
        figures.mkdir(parents=True, exist_ok=True)
        image = base64.b64decode(match[2])
        (figures / file).write_bytes(image)
        return f'src="figures/{file}"{size_of(image, int(match[3] or 0))}'

    return re.sub(r'src="data:image/([\w+]+);base64,([^"]+)"(?: width="(\d+)")?', save, text)


def is_text(cell):
    "Whether a cell is Markdown."
    return cell.cell_type == 'markdown'


def is_widget(output):
    "Whether an output is a widget, such as a progress bar, which shows nothing without its kernel."
    return 'application/vnd.jupyter.widget-view+json' in output.get('data', {})


def is_worth_showing(output):
    "Whether an output says something to a reader: no widget, and no warning that some library printed."
    return not is_widget(output) and output.get('name') != 'stderr'


def is_drawn(text):
    "Whether lines of a text belong below each other: frames, or columns that blanks keep apart in several lines."
    return bool(re.search('[─━│┃]', text)) or len(re.findall(r'^.*\S {3,}\S', text, flags=re.MULTILINE)) > 2


def outputs_of(cell, place, words):
    "What a cell displayed, as HTML; `words` say what its figures show; its anchors and headings are not the page's."
    outputs = join_streams([output for output in cell.outputs if is_worth_showing(output)])
    shown = ''.join(output_html(output, {}) for output in outputs)
    shown = re.sub(r'/tmp/tmp\w{8}(?!\w)', '…', shown)
    shown = re.sub('\u2007+(?![^<]*>)', r'<span class="pad">\g<0></span>', shown)  # a phone needs no columns of digits
    drawings = re.split(r'(?s)(<svg\b.*?</svg>)', shown)  # HTML, drawing, HTML, ...
    drawings[::2] = [re.sub(r' (?:href|id)="#?[^":]*"', '', piece) for piece in drawings[::2]]
    shown = ''.join(drawings)  # the parts of a drawing need each other
    shown = re.sub(r'<h[1-6]\b', '<div class="heading"', re.sub(r'</h[1-6]>', '</div>', shown))
    shown = shown.replace('<img alt="figure"', f'<img alt="{html.escape(words)}"')
    shown = shown.replace('<table>', '<table class="plain">')  # Material boxes tables without a class
    shown = re.sub('<pre>([^<]*)', lambda pre: f'<pre class="drawn">{pre[1]}' if is_drawn(pre[1]) else pre[0], shown)
    if not shown:
        return ''
    return f'<div class="output" data-search-exclude>{save_images(shown, place)}<!-- output --></div>'


def words_around(cells, number):
    "What the figures of a cell show: the caption below it, or the heading above it."
    caption = cells[number + 1].source if number + 1 < len(cells) else ''
    if caption.startswith('*What to see: '):
        return re.sub(r'[*`$]', '', caption.partition('\n')[0])
    above = [cell.source for cell in cells[:number] if is_text(cell)]
    headings = re.findall(r'^#+ (.*)$', '\n'.join(above), flags=re.MULTILINE)
    return f'Figure: {re.sub(r"[*`$]", "", headings[-1])}' if headings else 'Figure of the cell above'


def entry_level(cells):
    "The level of the heading of a function below these cells: below the last section, or below the title."
    return 3 if any(re.search('^## ', cell.source, re.MULTILINE) for cell in cells if is_text(cell)) else 2


def code_cell(cell, place, words, level):
    "A code cell as Markdown: the documentation it stands for, or its source and what it displayed."
    source = code_of(cell)
    documented = re.match(r'show_doc\(([\w.]+)', source)
    if documented:
        return api_entry(place.module, documented[1], place.page, level)
    if 'parameters' in cell.metadata.get('tags', []):
        return experiment_parameters(source)
    if source.startswith('try: import google.colab'):
        return ''

    code = f'````python\n{source}\n````' if source.strip() and not says(cell, 'echo: *false') else ''
    hidden = cell.metadata.get('jupyter', {}).get('source_hidden')
    if code and (hidden or says(cell, 'code-fold: *true')):
        code = f'<details class="fold" markdown="1">\n<summary>code</summary>\n\n{code}\n\n</details>'
    return '\n\n'.join(part for part in (code, outputs_of(cell, place, words)) if part)


# ---- pages


records = ('reference/findings', 'reference/changelog')  # long pages of every word, written day by day


def search_weight(page):
    "How much a page counts in the search: guides come first, the library's API and what was written down last."
    folder = page.partition('/')[0] if '/' in page else ''
    if page.startswith(records):
        return 0.5
    return weights.get(folder, 0.5 if folder else 1.0)


@functools.cache
def section_names():
    "Folder of the library -> the section of the sidebar that takes its pages: studies/pdfs is PDFs."

    def found(contents):
        for one in contents:
            if isinstance(one, dict) and isinstance(one['contents'], str):
                yield Path(one['contents']).parent.as_posix(), one['section']
            elif isinstance(one, dict):
                yield from found(one['contents'])

    contents = yaml.safe_load((root / 'nbs/sidebar.yml').read_text(encoding='utf-8'))
    return dict(found(contents['website']['sidebar']['contents']))


@functools.cache
def module_counts():
    "Name of a module -> how many folders have one of this name."
    return Counter(Path(page_name(path.name)).stem for path in (root / 'nbs').rglob('[0-9]*_*.ipynb'))


def full_title(title, page):
    "The title of a page away from the sidebar, where a name such as setup needs its section: PDFs: setup."
    folder = Path(page).parent.as_posix()
    several = module_counts()[Path(page).stem] > 1
    module = folder in section_names() and title == Path(page).stem
    named = module and (several or folder.startswith(('studies/', 'bench')))
    return f'{section_names()[folder]}: {title}' if named else title


def as_page(front, parts, page):
    "(title, Markdown) of a page with its title, its promise and its parts; `tags` are words people search for."
    title = front.get('title', '')
    full = full_title(title, page)
    promise = front.get('description') or ''
    kept = dict(title=full, description=promise, search=dict(boost=search_weight(page)))
    if front.get('tags'):
        kept['tags'] = front['tags']
    head = yaml.safe_dump(kept, allow_unicode=True, width=1000)
    lead = f'<p class="lead" markdown>{promise}</p>' if promise else ''
    body = '\n\n'.join(part for part in [lead, *parts] if part.strip())
    return title, f'---\n{head}---\n\n# {full}\n\n{body}\n'


def opening(path):
    "What the title cell of a notebook says below its title and its promise; nbdev takes the cell away."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    title = next((''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown'), '')
    return '\n'.join(line for line in title.splitlines() if not re.match(r'# |> |- tags:', line)).strip()


def buttons(source):
    "The links to the notebook itself."
    address = f'{repository}/blob/{branch}/nbs/{source}'
    in_colab = address.replace('https://github.com/', colab)
    return (
        f'<p class="buttons"><a class="colab" href="{in_colab}">Open in Colab</a><a href="{address}">Notebook</a></p>'
    )


def reports_of(source):
    "A sentence with the reports of the gallery that an experiment wrote, or how to get one: its page has no results."
    notebook = Path(source).stem
    reports = sorted(root.glob(f'outputs/gallery/{notebook}/*/report.html'))
    files = sorted(root.glob(f'params/{notebook}/[!_]*.yaml'))
    if not source.startswith('experiments/') or not (reports or files):
        return ''
    if not reports:
        command = f'llmft run {files[0].relative_to(root)}'
        return f'<p class="reports" markdown>The gallery has no report of it: `{command}` writes one.</p>'
    links = [f'<a href="../gallery/{path.parts[-3]}/{path.parts[-2]}.html">{path.parts[-2]}</a>' for path in reports]
    return f'<p class="reports">{"Its reports" if len(links) > 1 else "Its report"}: {", ".join(links)}.</p>'


def notebook_page(notebook, place):
    "A processed notebook as (title, Markdown); its images are written beside the page."
    cells = list(notebook.cells)
    front = {}
    if cells and cells[0].cell_type == 'raw':
        front = yaml.safe_load(cells.pop(0).source.strip().strip('-'))

    parts = []
    if place.page != home:
        promise = with_links(opening(root / 'nbs' / place.source), place.page)
        parts = [buttons(place.source), promise, reports_of(place.source)]
    for number, cell in enumerate(cells):
        if is_text(cell):
            parts.append(with_links(cell.source, place.page))
        elif cell.cell_type == 'code':
            parts.append(code_cell(cell, place, words_around(cells, number), entry_level(cells[:number])))
    return as_page(front, parts, place.page)


def main_figure(text):
    "The figure under the verdict of a report as an SVG file; b'' where there is none."
    drawing = re.search(r'(?s)<svg role="img".*?</svg>', text)
    return drawing[0].replace('<svg', '<svg xmlns="http://www.w3.org/2000/svg"', 1).encode() if drawing else b''


def gallery_figure(match, page):
    "The main figure of a report of the gallery with its caption and a link to the report."
    report, caption = match.groups()
    place = '../' * page.count('/') + 'gallery/'
    words = html.escape(caption)
    image = main_figure((root / f'outputs/gallery/{report}/report.html').read_text(encoding='utf-8'))
    picture = f'<img src="{place}{report}.svg" alt="{words}"{size_of(image)}>'
    link = f'<a href="{place}{report}.html">Report {report}</a>'
    return f'<figure class="figure">{picture}<figcaption>{words} {link}</figcaption></figure>'


def markdown_page(text, page):
    "A Markdown page with Quarto's front matter as (title, Markdown)."
    _, front, body = text.split('---\n', 2)
    body = re.sub(r'<!-- WARNING.*?-->', '', body)
    body = re.sub(r'<figure data-report="(.*?)">(.*?)</figure>', lambda found: gallery_figure(found, page), body)
    return as_page(yaml.safe_load(front), [linked(body, page)], page)


def page_of(path, place):
    "(title, Markdown) of a processed file."
    if path.suffix == '.qmd':
        return markdown_page(path.read_text(encoding='utf-8'), place.page)
    return notebook_page(nbformat.read(path, as_version=4), place)


def explained(text):
    "The names that a page has an entry for."
    return set(re.findall(r'^#+ .*\{ #([\w.]+) \.api \}$', text, flags=re.MULTILINE))


def write_pages(
    processed,  # the folder that nbdev wrote
    target,  # the folder of the pages
):
    "Write the page of every processed file; name of the source -> (page, title)."
    pages = {}
    texts = {}
    for path in sorted([*processed.rglob('*.ipynb'), *processed.rglob('*.qmd')]):
        if target in path.parents:
            continue
        source = path.relative_to(processed).as_posix()
        page = page_name(source)
        if page in texts:
            raise SystemExit(f'two sources give the page {page}')

        folder = (target / page).parent
        folder.mkdir(parents=True, exist_ok=True)
        title, texts[page] = page_of(path, Place(page, source, folder))
        pages[source] = (page, title)

    anchors = {page: explained(text) for page, text in texts.items()}
    for page, text in texts.items():
        (target / page).write_text(resolved(text, page, anchors), encoding='utf-8')
    return pages
