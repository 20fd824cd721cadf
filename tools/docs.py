"""Make the docs site in _docs from the notebooks as nbdev processes them, with MkDocs Material.

nbdev_docs would build it with Quarto, and tries to install a missing one with administrator's rights: it is never called here."""

import argparse
import base64
import functools
import http.server
import logging
import re
import shutil
import sys
import time
from pathlib import Path

import nbdev.doclinks
import nbdev.quarto
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent
site = root / 'tools' / 'site'


def prepare():
    "Process every notebook into _proc, as nbdev_docs does before it calls Quarto; the pages that came out."
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    return sorted(proc_nbs(n_workers=2, force=True).rglob('*.ipynb'))


def palette_css():
    "The colours and the type scale of the figures as CSS variables, so that pages and figures are of one kind."
    from llmft.runs.figures import faint, ink, muted, palette

    names = dict(ink=ink, soft=muted, line=faint) | {f'c{number}': colour for number, colour in enumerate(palette, 1)}
    return ':root{' + ';'.join(f'--figure-{name}:{colour}' for name, colour in names.items()) + '}\n'


def copy_reports(folder):
    "Put the reports of the gallery, and the richest figure of each, where the gallery page looks for them; how many."
    reports = sorted((root / 'outputs/gallery').glob('*/*/report.html'))
    for report in reports:
        target = folder / 'gallery' / report.parent.parent.name / f'{report.parent.name}.html'
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(report, target)
        figures = re.findall(r'src="data:image/png;base64,([^"]+)', report.read_text(encoding='utf-8'))
        if figures:
            target.with_suffix('.png').write_bytes(base64.b64decode(max(figures, key=len)))
    return len(reports)


def render(processed, target):
    "The site in `target` from the notebooks that nbdev `processed`; how many pages."
    import mkdocs.commands.build
    import mkdocs.config
    import mkdocs.exceptions
    import pages

    source = processed / '_pages'
    shutil.rmtree(source, ignore_errors=True)
    made = pages.write_pages(processed, source)
    shutil.copytree(processed / 'images', source / 'images')
    shutil.copytree(site / 'assets', source / 'assets')
    (source / 'assets/palette.css').write_text(palette_css())
    project, nav = get_config(path=root), pages.navigation(yaml.safe_load((root / 'nbs/sidebar.yml').read_text()), made)
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    settings = mkdocs.config.load_config(
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
    try:
        mkdocs.commands.build.build(settings)
    except mkdocs.exceptions.Abort as error:
        raise SystemExit(f'the site is not whole: {error}') from None
    copy_reports(target)
    return len(made)


def build(target):
    "Build the site into the folder `target`; the exit status."
    started = time.time()
    prepare()
    count = render(root / '_proc', target)
    print(
        f'{count} pages in {time.time() - started:.0f} s: open {target / "index.html"}, or see them with make docs-serve'
    )
    return 0


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
        '--serve', action='store_true', help='show it on localhost afterwards; an existing site is not built again'
    )
    command.add_argument('--port', type=int, default=8000)
    given, target = command.parse_args(), get_config(path=root).doc_path
    status = 0 if given.serve and (target / 'index.html').exists() else build(target)
    if given.serve and not status:
        serve(target, given.port)
    return status


if __name__ == '__main__':
    sys.exit(main())
