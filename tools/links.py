"""Links of the docs site: from names of files and of the library, as nbs/ writes them, to pages."""

import ast
import functools
import posixpath
import re
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

root = Path(__file__).resolve().parent.parent
config = get_config(path=root)
repository = config.git_url
branch = config.branch
docs_address = f'{config.doc_host}{config.doc_baseurl}/'

page_of_file = {'LOG.md': 'reference/findings.md', 'CHANGELOG.md': 'reference/changelog.md', 'README.md': 'index.md'}
page_endings = ('.ipynb', '.qmd', '.md')
folders_on_site = ('nbs/images/', 'nbs/gallery/')

link = re.compile(r'(\]\(|\b(?:src|href)=")([^)"\s]+)')
fence = re.compile(r'(^ *(`{3,}|~{3,}).*?^ *\2 *$)', flags=re.MULTILINE | re.DOTALL)
# Names of the library that pages mostly write for something else: a field, a parameter, a status, an experiment.
also_words = set(
    'describe document_lengths left_out peak_bytes printable share_of_peak Trainer '
    'altered build chat compare condition count coverage fill forecast growth instruct measured needs ratio score '
    'spread statement summary table text verify'.split()
)
of_transformers = re.compile(r"(transformers'? )\[`generate`\]\([^)]*\)|\[`generate`\]\([^)]*\)(?=\s+of transformers)")
in_colab = re.compile(r'\[Open in Colab\]\(https://colab[^)]*\)')  # a page has a button for it


def page_name(source):
    "Where the page of `source`, a path relative to nbs, goes: data/02_corpora.ipynb is data/corpora.md."
    source = Path(source)
    name = re.sub(r'^\d+[a-z]?_', '', source.stem.removesuffix('.qmd'))
    return (source.parent / f'{name}.md').as_posix()


def relative(target, page):
    "The address of the page `target` as a link on `page`."
    return posixpath.relpath(target, posixpath.dirname(page) or '.')


def on_site(target, page):
    "The link `target` as it is written in nbs, seen from `page`; files of the repository are linked at its address."
    address, _, anchor = target.partition('#')
    if re.match(r'[a-z]+:|#|/', target) or not address:
        return target

    anchor = anchor and f'#{anchor}'
    path = posixpath.normpath(posixpath.join('nbs', posixpath.dirname(page), address))
    if path.startswith('nbs/') and path.endswith(page_endings):
        return relative(page_name(path.removeprefix('nbs/')), page) + anchor
    if path in page_of_file:
        return relative(page_of_file[path], page) + anchor
    if path.startswith(folders_on_site):
        return address + anchor

    if not (root / path).exists():
        raise SystemExit(f'{page}: the link {target} leads to {path}, which is not there')
    view = 'tree' if (root / path).is_dir() else 'blob'
    return f'{repository}/{view}/{branch}/{path}{anchor}'


def with_links(text, page):
    "Markdown with its links as the site needs them; code blocks stay as they are."

    def replaced(match):
        before, target = match.groups()
        return before + on_site(target, page)

    pieces = fence.split(text)  # text, code block, its fence, text, ...
    prose = [link.sub(replaced, in_colab.sub('', piece)) for piece in pieces[::3]]
    blocks = [*pieces[1::3], '']
    return ''.join(before + block for before, block in zip(prose, blocks, strict=True))


@functools.cache
def lookup():
    return NbdevLookup()


def linked(text, page):
    "Markdown whose names in backticks lead to their pages as well."
    return with_links(lookup().linkify(text) or '', page)


def imports(code, name):
    "Whether `code` takes `name` from the library."
    return re.search(rf'from llmft[\w.]* import (?:\([^)]*|.*)\b{name}\b', code) is not None


def source_of(page):
    "The source of the module that a page explains, '' where it explains none."
    module = root / 'llmft' / page.replace('.md', '.py')
    return module.read_text(encoding='utf-8') if module.is_file() else ''


def defined(source):
    "(functions and classes, values) that a module defines: their names."
    body = ast.parse(source).body
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names, {each.id for target in assigned for each in ast.walk(target) if isinstance(each, ast.Name)}


def without_chance_links(text, page):
    """Markdown where names lead where they are meant to.

    Private names lead nowhere, those of the module that the page explains do not leave it, and a word that is also a
    name of the library leads there only if the page uses that name."""
    source = source_of(page)
    code = text + source
    own, values = defined(source)

    def checked(match):
        word, target = match.groups()
        if word.startswith('_') or word in values:
            return f'`{word}`'
        if word in own and f'{target}.md' != page:
            return f'[`{word}`]({docs_address}{page.removesuffix(".md")}.html#{word.lower()})'
        if word not in also_words or f'{target}.md' == page or imports(code, word):
            return match[0]
        if (root / f'nbs/experiments/{word}.ipynb').exists():
            return f'[`{word}`]({docs_address}experiments/{word}.html)'
        return f'`{word}`'

    address = re.escape(docs_address) + r'([\w./-]+?)\.html(?:#[\w.]+)?'
    return re.sub(rf'\[`(\w+)`\]\({address}\)', checked, text)


def resolved(
    text,  # Markdown of a page
    page,  # its name
    anchors,  # page -> names it explains
):
    "`text` with nbdev's links to names of the library, addresses of the published site, as links between pages."

    def local(match):
        words, address, name = match.groups()
        target = f'{address}.md'
        if target not in anchors:
            raise SystemExit(f'{page} links to {match[0]}, and there is no page {target}')
        written = (words or '').strip('[`](')
        exact = written if written.lower() == name else name  # Flips, where flips is there as well
        anchor = next((each for each in (exact, name) if each in anchors[target]), '')
        return (words or '') + relative(target, page) + (anchor and f'#{anchor}')

    text = of_transformers.sub(r'\1`generate`', without_chance_links(text, page))
    return re.sub(r'(\[`[\w.]+`\]\()?' + re.escape(docs_address) + r'([\w./-]+?)\.html(?:#([\w.]+))?', local, text)
