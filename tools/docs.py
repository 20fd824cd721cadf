"""Make the docs site in _docs from the notebooks as nbdev processes them, with MkDocs Material.

nbdev_docs would build it with Quarto, and tries to install a missing one with administrator's rights: it is never
called here."""

import argparse
import functools
import html
import http.server
import logging
import os
import re
import shutil
import sys
import time
import urllib.parse
from pathlib import Path

import nbdev.doclinks
import nbdev.quarto
import nbdev.serve
import pages
import sidebar
import yaml
from nbdev.config import get_config

root = Path(__file__).resolve().parent.parent
site = root / 'tools' / 'site'


# ---- build


def prepare():
    "Process every notebook into _proc, as nbdev_docs does before it calls Quarto."
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev.serve.FilterDefaults = pages.Unexecuted
    os.chdir(root)  # nbdev passes over files below a hidden folder, and a relative path has none above it
    return nbdev.serve.proc_nbs(path='nbs', n_workers=2, force=True)


def palette_css():
    "The colours of the figures as CSS variables, so that pages and figures match."
    from llmft.runs.figures import faint, ink, muted, palette

    colours = dict(ink=ink, soft=muted, line=faint)
    colours |= {f'c{number}': colour for number, colour in enumerate(palette, 1)}
    return ':root{' + ';'.join(f'--figure-{name}:{colour}' for name, colour in colours.items()) + '}\n'


def write_source(processed, source):
    "Everything that MkDocs reads, in the folder `source`; name of the notebook -> (page, title)."
    shutil.rmtree(source, ignore_errors=True)
    written = pages.write_pages(processed, source)
    shutil.copytree(processed / 'images', source / 'images')
    shutil.copytree(site / 'assets', source / 'assets')
    (source / 'assets/palette.css').write_text(palette_css())
    return written


def site_settings(source, target, nav):
    "The settings of MkDocs: tools/site/mkdocs.yml with what settings.ini knows."
    import mkdocs.config

    project = get_config(path=root)
    return mkdocs.config.load_config(
        str(site / 'mkdocs.yml'),
        docs_dir=str(source),
        site_dir=str(target),
        site_name=project.title,
        nav=nav,
        repo_url=project.git_url,
        site_url=f'{project.doc_host}{project.doc_baseurl}/',
        site_description=project.description,
        copyright=f'{project.copyright} · Apache License 2.0',
    )


def copy_reports(folder):
    "Put the reports of the gallery, and the richest figure of each, where the gallery page looks for them."
    for report in sorted((root / 'outputs/gallery').glob('*/*/report.html')):
        notebook, name = report.parent.parts[-2:]
        target = folder / 'gallery' / notebook / f'{name}.html'
        target.parent.mkdir(parents=True, exist_ok=True)
        text = without_dead_links(report.read_text(encoding='utf-8'), target.parent)
        target.write_text(text.replace('<div class="page">', f'<div class="page">{way_back}', 1), encoding='utf-8')
        save_thumbnail(text, target)


def without_dead_links(text, folder):
    "A page for `folder`, of whose links to files those are left that lead to a file there; the words of the others stay."

    def kept(link):
        address = urllib.parse.urlsplit(html.unescape(link[1]))
        is_file = not (address.scheme or address.netloc) and address.path
        return link[2] if is_file and not (folder / urllib.parse.unquote(address.path)).is_file() else link[0]

    return re.sub(r'(?s)<a\b[^>]*\bhref="([^"]*)"[^>]*>(.*?)</a>', kept, text)


way_back = '<p class="home"><a href="../../gallery.html">Gallery of llmft</a></p>'


def save_thumbnail(text, target):
    "Put the main figure of a report beside its copy."
    image = pages.main_figure(text)
    if image:
        target.with_suffix('.svg').write_bytes(image)


def render(processed, target):
    "The site in `target` from the notebooks that nbdev `processed`; how many pages."
    import mkdocs.commands.build
    import mkdocs.exceptions

    source = processed / '_pages'
    written = write_source(processed, source)
    contents = yaml.safe_load((root / 'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    nav = sidebar.navigation(contents, written)

    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    try:
        mkdocs.commands.build.build(site_settings(source, target, nav))
    except mkdocs.exceptions.Abort as error:
        raise SystemExit(f'the site is not whole: {error}') from None
    copy_reports(target)
    return len(written)


def build(target):
    "Build the site into the folder `target`."
    started = time.time()
    count = render(prepare(), target)
    seconds = time.time() - started
    print(f'{count} pages in {seconds:.0f} s: open {target / "index.html"}, or see them with make docs-serve')


# ---- command line


def serve(target, port):
    "Show the site on this machine alone, until Ctrl-C."
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(target))
    with http.server.ThreadingHTTPServer(('localhost', port), handler) as server:
        print(f'http://localhost:{server.server_address[1]} (Ctrl-C ends it)', flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main():
    "Read the command line: build, and serve when asked to."
    command = argparse.ArgumentParser(description='Make the docs site.')
    command.add_argument(
        '--serve', action='store_true', help='show it on localhost; an existing site is not built again'
    )
    command.add_argument('--port', type=int, default=8000)
    given = command.parse_args()

    target = get_config(path=root).doc_path
    if not given.serve or not (target / 'index.html').exists():
        build(target)
    if given.serve:
        serve(target, given.port)


if __name__ == '__main__':
    sys.exit(main())
