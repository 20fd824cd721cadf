"""Write README.md from nbs/index.ipynb, or with --check tell whether it is up to date. Quarto is not needed."""

import posixpath
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import exec_nb

root = Path(__file__).resolve().parent.parent
link = re.compile(r'(\]\(|\bsrc="|\bhref=")([^)"\s]+)')


class Plain(FilterDefaults):
    "nbdev's processing without links to the docs site: README.md must not change with the library."

    def procs(self):
        return [proc for proc in super().procs() if proc.__name__ != 'add_links']


def from_root(match):
    "A link of index.ipynb as it must read in README.md, one folder higher."
    before, target = match.groups()
    if re.match(r'[a-z]+:|#|/', target):
        return match[0]
    return before + posixpath.normpath(posixpath.join('nbs', target))


def readme(notebook):
    "The text of README.md that `notebook` gives: its cells after nbdev's processing, as Markdown."
    with tempfile.TemporaryDirectory() as folder:
        processed = Path(folder) / 'index.ipynb'
        exec_nb(notebook, processed, Plain)
        cells = nbformat.read(processed, as_version=4)
    front = yaml.safe_load(cells.cells.pop(0).source.strip().strip('-'))
    text, _ = MarkdownExporter().from_notebook_node(cells)
    text = '\n'.join(line.rstrip() for line in text.splitlines())
    text = re.sub(r'\n{3,}', '\n\n', link.sub(from_root, text)).strip()
    return f"# {front['title']}\n\n> {front['description']}\n\n{text}\n"


def main(check):
    "Write the file, or with `check` leave it alone and return 1 when it is out of date."
    target = root / 'README.md'
    text = readme(get_config(path=root).nbs_path / 'index.ipynb')
    if not check:
        target.write_text(text, encoding='utf-8')
    elif target.read_text(encoding='utf-8') != text:
        print('README.md is not what nbs/index.ipynb gives: run make readme', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main('--check' in sys.argv[1:]))
