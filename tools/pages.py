"""Turn notebooks as nbdev processed them into the Markdown pages of the docs site, without Quarto."""

import ast
import base64
import functools
import html
import io
import json
import posixpath
import re
import tokenize
from pathlib import Path

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

from llmft.runs.params import parse_parameters
from llmft.runs.report import output_html

root = Path(__file__).resolve().parent.parent
config = get_config(path=root)
repository, branch = config.git_url, config.branch
docs_address = f'{config.doc_host}{config.doc_baseurl}/'
page_of_file = {'LOG.md': 'reference/findings.md', 'CHANGELOG.md': 'reference/changelog.md', 'README.md': 'index.md'}
link = re.compile(r'(\]\(|\b(?:src|href)=")([^)"\s]+)')
fence = re.compile(r'(^ *(`{3,}|~{3,}).*?^ *\2 *$)', flags=re.MULTILINE | re.DOTALL)
badge = re.compile(r'\[!\[[^\]]*\]\(https://colab[^)]*\)\]\((https://colab[^)]*)\)')


# ---- links


def page_name(source):
    "Where the page of `source`, a path relative to nbs, goes: 00_core.ipynb is core.md, as nbdev names it."
    source = Path(source)
    return (source.parent / (re.sub(r'^\d+[a-z]?_', '', source.stem.removesuffix('.qmd')) + '.md')).as_posix()


def on_site(target, page):
    "The link `target` as it is written in nbs, seen from `page`; files of the repository are linked at its address."
    address, _, anchor = target.partition('#')
    anchor = anchor and f'#{anchor}'
    if re.match(r'[a-z]+:|#|/', target) or not address:
        return target
    path = posixpath.normpath(posixpath.join('nbs', posixpath.dirname(page), address))
    if path.startswith('nbs/') and path.endswith(('.ipynb', '.qmd', '.md')):
        return relative(page_name(path.removeprefix('nbs/')), page) + anchor
    if path in page_of_file:
        return relative(page_of_file[path], page) + anchor
    if path.startswith(('nbs/images/', 'nbs/gallery/')):
        return address + anchor
    if not (root / path).exists():
        raise SystemExit(f'{page}: the link {target} leads to {path}, which is not there')
    return f'{repository}/{"tree" if (root / path).is_dir() else "blob"}/{branch}/{path}{anchor}'


def relative(target, page):
    return posixpath.relpath(target, posixpath.dirname(page) or '.')


def with_links(text, page):
    "Markdown with links as they must be on the site; what stands in code blocks is left alone."
    pieces = fence.split(text)
    for index in range(0, len(pieces), 3):
        pieces[index] = link.sub(lambda found: found[1] + on_site(found[2], page), badge.sub('', pieces[index]))
        if index + 2 < len(pieces):
            pieces[index + 2] = ''
    return ''.join(pieces)


@functools.cache
def lookup():
    return NbdevLookup()


def resolved(text, page, anchors):
    "`text` with links to names of the library, which nbdev writes as addresses of the published site, as links between pages; `anchors`: page -> names it explains."

    def local(found):
        target, name = f'{found[1]}.md', found[2] or ''
        if target not in anchors:
            raise SystemExit(f'{page} links to {found[0]}, and there is no page {target}')
        return relative(target, page) + (f'#{name}' if name in anchors[target] else '')

    return re.sub(re.escape(docs_address) + r'([\w./-]+?)\.html(?:#([\w.]+))?', local, text)


def linked(text, page):
    return with_links(lookup().linkify(text) or '', page)


# ---- API: signatures and parameter tables from docments


@functools.cache
def module_source(module):
    "(text, tree, line number -> comment) of a module of the library."
    text = (root / 'llmft' / f'{module}.py').read_text(encoding='utf-8')  # a module as a path: data/corpora
    notes = {
        token.start[0]: token.string.lstrip('# ')
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    return text, ast.parse(text), notes


def definition(module, name):
    "The node that defines `name` or `Class.method` in the module; None when it is not there."
    body = module_source(module)[1].body
    for part in name.split('.'):
        found = next(
            (
                node
                for node in body
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == part
            ),
            None,
        )
        body = getattr(found, 'body', [])
    return found


def arguments(node):
    "(name, annotation, default) nodes of a function's parameters, or of a dataclass's fields."
    if isinstance(node, ast.ClassDef):
        start = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == '__init__'), None)
        if not any('dataclass' in ast.unparse(decorator) for decorator in node.decorator_list):
            return arguments(start) if start else []
        return [
            (one.target.id, one.annotation, one.value, one.end_lineno)
            for one in node.body
            if isinstance(one, ast.AnnAssign) and not one.target.id.startswith('_')
        ]
    spec = node.args
    named = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(named) - len(spec.defaults)) + spec.defaults
    rows = [(arg.arg, arg.annotation, default, arg.end_lineno) for arg, default in zip(named, defaults, strict=True)]
    if spec.vararg:
        rows.append(('*' + spec.vararg.arg, spec.vararg.annotation, None, spec.vararg.end_lineno))
    rows += [
        (arg.arg, arg.annotation, default, arg.end_lineno)
        for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    ]
    if spec.kwarg:
        rows.append(('**' + spec.kwarg.arg, spec.kwarg.annotation, None, spec.kwarg.end_lineno))
    return [row for row in rows if row[0] not in ('self', 'cls')]


def in_parameters(head, rows):
    return (
        '<div class="parameters" markdown="1">\n\n'
        + '\n'.join([head, '| --- | --- | --- | --- |', *rows])
        + '\n\n</div>'
    )


def shown_type(node):
    "The type of a parameter, and its default: of a command-line option the value it has when it is not given."
    return ast.unparse(node) if node is not None else ''


def default_of(node):
    "A default as a reader wants to see it."
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith('typer.') and node.args:
        node = node.args[0]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'field':
        node = next((word.value for word in node.keywords if word.arg == 'default_factory'), node)
    text = shown_type(node)
    return '' if text in ('', '...') else text if len(text) <= 60 else text[:57] + '...'


def cell_text(text):
    return text.replace('|', '\\|').replace('\n', ' ')


def code_span(text):
    "Text as code within a table's cell."
    return (
        f'<code>{html.escape(text).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")}</code>'
        if text
        else ''
    )


def signature(node, name, rows):
    "The signature as code, wrapped where it is long."
    plain = [
        argument
        + (f': {shown_type(kind)}' if kind is not None else '')
        + (f' = {default_of(default)}' if default is not None and default_of(default) else '')
        for argument, kind, default, _ in rows
    ]
    result = f' -> {ast.unparse(node.returns)}' if getattr(node, 'returns', None) is not None else ''
    line = f'{name}({", ".join(plain)}){result}'
    if len(line) <= 92:
        return line
    return f'{name}(\n' + ''.join(f'    {one},\n' for one in plain) + f'){result}'


def methods(node):
    return [
        one.name
        for one in getattr(node, 'body', [])
        if isinstance(node, ast.ClassDef)
        and isinstance(one, ast.FunctionDef)
        and not one.name.startswith('_')
        and ast.get_docstring(one)
    ]


def api_entry(module, name, page, shown='', level=3):
    "One function or class as Markdown: heading, signature, promise, parameters, methods; `shown` is what nbdev made of it, for what is not found."
    node = definition(module, name)
    if node is None:
        return with_links(shown, page)
    rows, notes = arguments(node), module_source(module)[2]
    address = f'{repository}/blob/{branch}/llmft/{module}.py#L{node.lineno}'
    text = [
        f'{"#" * level} {name.replace("_", chr(92) + "_")} {{ #{name.lower()} .api }}',
        f'<a class="source" data-search-exclude href="{address}">source</a>',
        f'```python {{ .signature }}\n{signature(node, name, rows)}\n```',
    ]
    if promise := ast.get_docstring(node):
        text.append(linked(promise, page))

    def meaning(line):
        return cell_text(linked(notes.get(line, ''), page))

    lines = [
        f'| {code_span(argument)} | {code_span(shown_type(kind))} | {code_span(default_of(default))} | {meaning(line)} |'
        for argument, kind, default, line in rows
    ]
    returns = None if isinstance(node, ast.ClassDef) else node.returns
    last = node.body[0].lineno - 1 if node.body else node.lineno
    note = next(
        (
            notes[line]
            for line in range(last, node.lineno - 1, -1)
            if line in notes and line not in {row[3] for row in rows}
        ),
        '',
    )
    if note or (returns is not None and rows):
        lines.append(f'| *returns* | {code_span(shown_type(returns))} | | {cell_text(linked(note, page))} |')
    documented = any(notes.get(row[3]) for row in rows) or note
    if lines and documented:
        text.append(in_parameters('| parameter | type | default | meaning |', lines))
    return '\n\n'.join(text + [api_entry(module, f'{name}.{method}', page, level=4) for method in methods(node)])


# ---- experiment parameters


def parameter_table(source, prefix=''):
    "The parameters cell of an experiment as a table; each row has an anchor, its name after `prefix`."
    rows = [
        f'| <span id="{prefix}{p.name}"></span>{code_span(p.name)} | {code_span(p.type)} | {code_span(json.dumps(p.default, ensure_ascii=False))} | {cell_text(html.escape(p.help, quote=False))} |'
        for p in parse_parameters(source, 'parameters cell')
    ]
    return in_parameters('| parameter | type | default | meaning, unit |', rows)


# ---- cells


def source_of(cell):
    return re.sub(r'^#\s*\|.*\n?', '', cell.source, flags=re.MULTILINE).strip('\n')


def saved_images(text, folder, stem, count):
    "HTML whose embedded images were written to files beside the page."

    def save(found):
        kind = found[1].split('+')[0]
        count.append(kind)
        (folder / 'figures').mkdir(parents=True, exist_ok=True)
        (folder / 'figures' / f'{stem}-{len(count)}.{kind}').write_bytes(base64.b64decode(found[2]))
        return f'src="figures/{stem}-{len(count)}.{kind}" loading="lazy"'

    return re.sub(r'src="data:image/([\w+]+);base64,([^"]+)"', save, text)


def code_cell(cell, page, module, folder, count):
    "A code cell as Markdown: the documentation it stands for, or its source and what it displayed."
    shown = re.match(r'show_doc\(([\w.]+)', source_of(cell))
    if shown:
        return api_entry(
            module, shown[1], page, '\n'.join(o.data.get('text/markdown', '') for o in cell.outputs if 'data' in o)
        )
    if 'parameters' in cell.metadata.get('tags', []):
        return parameter_table(source_of(cell))
    source = source_of(cell)
    if source.startswith('try: import google.colab'):
        return ''
    parts = (
        []
        if re.search(r'^#\s*\|\s*echo:\s*false', cell.source, flags=re.MULTILINE) or not source.strip()
        else [f'````python\n{source}\n````']
    )
    outputs = re.sub(
        r' (?:href|id)="#?[^":]*"', '', ''.join(output_html(output, {}) for output in cell.outputs)
    )  # anchors of a page within the page
    if outputs:
        parts.append(
            f'<div class="output" data-search-exclude>{saved_images(outputs, folder, Path(page).stem, count)}</div>'
        )
    return '\n\n'.join(parts)


def opening(path):
    "What the title cell of a notebook says below its title and its promise; nbdev takes the cell away."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    title = next((''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown'), '')
    return '\n'.join(line for line in title.splitlines() if not re.match(r'# |> ', line)).strip()


def notebook_page(notebook, page, folder, source):
    "A processed notebook as (title, Markdown); images go to the `folder` of the page."
    cells = list(notebook.cells)
    front = yaml.safe_load(cells.pop(0).source.strip().strip('-')) if cells and cells[0].cell_type == 'raw' else {}
    module, count, parts = page.removesuffix('.md'), [], []
    for cell in cells:
        if cell.cell_type == 'markdown':
            parts.append(with_links(cell.source, page))
        elif cell.cell_type == 'code':
            parts.append(code_cell(cell, page, module, folder, count))
    head = f'{repository}/blob/{branch}/nbs/{source}'
    colab = head.replace('https://github.com/', 'https://colab.research.google.com/github/')
    buttons = (
        ''
        if page == 'index.md'
        else f'<p class="buttons"><a class="colab" href="{colab}">Open in Colab</a><a href="{head}">Notebook</a></p>'
    )
    return as_page(
        front, [buttons, '' if page == 'index.md' else with_links(opening(root / 'nbs' / source), page), *parts]
    )


def as_page(front, parts):
    "(title, Markdown) of a page with its title, its promise and its parts."
    title, promise = front.get('title', ''), front.get('description') or ''
    head = yaml.safe_dump(dict(title=title, description=promise), allow_unicode=True, width=1000)
    lead = f'<p class="lead" markdown>{promise}</p>' if promise else ''
    return title, f'---\n{head}---\n\n# {title}\n\n' + '\n\n'.join(
        part for part in [lead, *parts] if part.strip()
    ) + '\n'


def markdown_page(text, page):
    "A Markdown page with Quarto's front matter as (title, Markdown)."
    _, front, body = text.split('---\n', 2)
    body = re.sub(r'<!-- WARNING.*?-->', '', body)
    return as_page(yaml.safe_load(front), [linked(body, page)])


def write_pages(processed, target):
    "Write the page of every file that nbdev processed into `target`; name of the source -> (page, title)."
    pages, texts = {}, {}
    for path in sorted([*processed.rglob('*.ipynb'), *processed.rglob('*.qmd')]):
        if target in path.parents:
            continue
        source = path.relative_to(processed).as_posix()
        page = page_name(source)
        file = target / page
        file.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.qmd':
            title, text = markdown_page(path.read_text(encoding='utf-8'), page)
        else:
            title, text = notebook_page(nbformat.read(path, as_version=4), page, file.parent, source)
        if page in {one for one, _ in pages.values()}:
            raise SystemExit(f'two sources give the page {page}')
        pages[source], texts[page] = (page, title), text
    anchors = {
        page: set(re.findall(r'^#+ .*\{ #([\w.]+) \.api \}$', text, flags=re.MULTILINE)) for page, text in texts.items()
    }
    for page, text in texts.items():
        (target / page).write_text(resolved(text, page, anchors), encoding='utf-8')
    return pages


def navigation(sidebar, pages):
    "The sidebar of nbs/sidebar.yml as MkDocs writes it; a page that no entry names is an error."
    used = []

    def entry(source):
        source = source.removeprefix('/')
        if source not in pages:
            raise SystemExit(f'nbs/sidebar.yml names {source}, which is not there')
        used.append(source)
        return {pages[source][1]: pages[source][0]}

    def entries(contents):
        if isinstance(contents, str):
            return [entry(source) for source in matching(contents)]
        return [
            found
            for one in contents
            for found in (
                [{one['section']: entries(one['contents'])}]
                if isinstance(one, dict)
                else [entry(source) for source in matching(one)]
            )
        ]

    def matching(pattern):
        if '*' not in pattern:
            return [pattern]
        found = [
            source
            for source in pages
            if Path(source).match(pattern.removeprefix('/'))
            and posixpath.dirname(source) == posixpath.dirname(pattern.removeprefix('/'))
        ]
        return [source for source in sorted(found) if source not in used]

    nav = [one for one in entries(sidebar['website']['sidebar']['contents'])]
    left = sorted(set(pages) - set(used))
    if left:
        raise SystemExit(f'nbs/sidebar.yml leaves out {", ".join(left)}')
    return [one for one in nav if next(iter(one.values()))]
