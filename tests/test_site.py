"""The docs site, built once and driven in a real browser: pages, links, search, figures, phone width, no network."""

import contextlib
import functools
import http.server
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

root = Path(__file__).parent.parent
needed = ('mkdocs', 'material', 'playwright', 'axe_playwright_python')
missing = [package for package in needed if importlib.util.find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: pip install -e '.[docs]'")
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
flags = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
phone = dict(width=390, height=844)
desk = dict(width=1280, height=900)
own_repository = re.compile(
    r'https://(?:colab\.research\.google\.com/github/llmft/llmft|github\.com/llmft/llmft)'
    r'/(?:blob|tree)/main/([^#]+)(?:#L(\d+))?'
)

# ---- the built site


def processor_seconds():
    "What the processes that this one started and that have ended have used."
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def copy_project(target):
    "A copy of the project whose site can be built without leaving anything here."
    for name in ('nbs', 'tools', 'llmft'):
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns('__pycache__', '*.safetensors'))
    for path in root.iterdir():
        if path.name not in ('nbs', 'tools', 'llmft', '_proc', '_docs') and not path.name.startswith('.'):
            (target / path.name).symlink_to(path)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the built site, the folder that nbdev processed, and the processor time of the build in seconds."
    if given := os.environ.get('LLMFT_SITE'):
        return dict(folder=Path(given), seconds=0, processed=root / '_proc')  # one that make docs has built

    copy = tmp_path_factory.mktemp('project')
    copy_project(copy)
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(copy), os.environ.get('PYTHONPATH', '')]))
    before = processor_seconds()
    done = subprocess.run(
        [sys.executable, 'tools/docs.py'], cwd=copy, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'[-6000:]
    return dict(folder=copy / '_docs', seconds=processor_seconds() - before, processed=copy / '_proc')


class Page(HTMLParser):
    "The ids, links, images and text of a page."

    def __init__(self, text):
        super().__init__()
        self.ids = set()
        self.twice = set()  # ids of several elements
        self.links = []
        self.resources = []
        self.levels = []  # of the headings
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        named = attributes.get('id')
        self.twice |= {named} & self.ids
        self.ids |= {attributes[name] for name in ('id', 'name') if attributes.get(name)}
        if re.fullmatch('h[1-6]', tag):
            self.levels.append(int(tag[1]))
        source = attributes.get('src')
        target = attributes.get('href')
        if tag == 'a' and target:
            self.links.append(target)
        if tag in ('img', 'script', 'iframe', 'source') and source:
            self.resources.append(source)
        if tag == 'link' and target and attributes.get('rel') not in ('canonical', 'prev', 'next', 'edit'):
            self.resources.append(target)


@pytest.fixture(scope='module')
def pages(site):
    "Path of each page -> what it holds."
    return {
        path.relative_to(site['folder']).as_posix(): Page(path.read_text(encoding='utf-8'))
        for path in sorted(site['folder'].rglob('*.html'))
    }


def test_no_column_is_empty_and_no_bar_of_progress_is_left(site, pages):
    looked = 0
    for path in pages:
        text = (site['folder'] / path).read_text(encoding='utf-8')
        assert path.startswith('gallery/') or 'step/s]' not in text, f'{path} shows a bar of progress'
        for table in re.findall(r'(?s)<div class="scroll table rows[^>]*>(.*?)</table>', text):
            looked += 1
            rows = [re.findall(r'(?s)<td[^>]*>(.*?)</td>', row) for row in re.findall(r'(?s)<tr>.*?</tr>', table)[1:]]
            assert all(any(column) for column in zip(*rows, strict=True)), f'{path}: an empty column in {table[:200]}'
    assert looked > 300


def test_pages_of_studies_have_the_numbers_of_their_reports():
    "page, report of the gallery, name of the number, how the page writes it."
    for page, report, name, form in (
        ('code', 'instruct/diverse', 'eval_loss_before', '{:.3f} before'),
        ('code', 'instruct/diverse', 'eval_loss', '**{:.3f}** at step'),
        ('code', 'instruct/diverse', 'test_loss', '{:.3f} after'),
        ('pdfs', 'pdf_finetune/all', 'perplexity_before', 'falls from {:.1f}'),
        ('pdfs', 'pdf_finetune/all', 'perplexity_after', ' to {:.1f} (23 chunks'),
        ('finetuning', 'compare/finetune-matrix', 'lora_peak_memory_gb', 'LoRA takes {:.3f} GiB and '),
        ('finetuning', 'compare/finetune-matrix', 'lora_time_per_epoch_seconds', ' GiB and {:.2f} s per epoch'),
        ('finetuning', 'compare/finetune-matrix', 'full_time_per_epoch_seconds', ' GiB and {:.2f} s. '),
        ('finetuning', 'compare/finetune-matrix', 'lora_ddp_time_per_epoch_seconds', ' | {:.2f} | '),
        ('finetuning', 'compare/finetune-matrix', 'qlora_zero3_gc_time_per_epoch_seconds', ' | {:.2f} | '),
        ('finetuning', 'inference_compare/inference', 'fp16_throughput_tokens_per_sec', ' | {:,.0f} ('),
        ('finetuning', 'inference_compare/inference', 'fp16_avg_latency', ' | {:.3f} | '),
        ('finetuning', 'inference_compare/inference', 'nf4_throughput_tokens_per_sec', ' | {:,.0f} ('),
        ('finetuning', 'inference_compare/inference', 'nf4_perplexity', '{:.1f} in nf4'),
        ('forecasting', 'forecast_eval/final', 'mae', '| tuned | {:.3f} |'),
        ('forecasting', 'forecast_eval/final', 'context_parroting_mae_median', ' | {:.3f} | 0.272 |'),
        ('forecasting', 'forecast_eval/final', 'trajectories', '{} test trajectories of the same generator'),
    ):
        metrics = json.loads((root / f'outputs/gallery/{report}/metrics.json').read_text(encoding='utf-8'))
        text = (root / f'nbs/studies/{page}/index.qmd').read_text(encoding='utf-8')
        assert form.format(metrics[name]) in text, f'{page}: {name} of {report} is {metrics[name]}'


def test_thumbnails_of_the_gallery_say_what_they_show():
    shown = subprocess.run([sys.executable, 'nbs/gallery.qmd.py'], cwd=root, capture_output=True, text=True).stdout
    pictures = re.findall(r'<img src="(gallery/[^"]*)\.svg" alt="([^"]*)"', shown)
    assert len(pictures) >= 25
    for page, words in pictures:
        report = (root / f'outputs/{page}/report.html').read_text(encoding='utf-8')
        assert f'aria-label="{words}"' in report and len(words) > 10, f'{page}: {words}'


def test_every_notebook_is_a_page(site, pages):
    sources = [*root.glob('nbs/**/*.ipynb'), *root.glob('nbs/**/*.qmd'), *root.glob('nbs/**/*.qmd.py')]
    reports = list(root.glob('outputs/gallery/*/*/report.html'))
    assert len(sources) >= 50 and len(reports) >= 4
    assert len(pages) == len(sources) + len(reports) + 1, (
        'one page for each notebook and each report, and the page for what is not found'
    )
    assert len(list(site['processed'].rglob('*.ipynb'))) == len(list(root.glob('nbs/**/*.ipynb')))
    for path in [name for name in pages if name.startswith('gallery/')]:
        assert (site['folder'] / path).stat().st_size < 1_500_000, f'{path} is too large'
    assert max((site['folder'] / path).stat().st_size for path in pages) < 1_500_000


def test_the_build_is_quick(site):
    assert site['seconds'] < 120, f"the site took {site['seconds']:.0f} s of processor time"


def test_no_link_and_no_anchor_is_broken(site, pages):
    looked = 0
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.resources]:
            if re.match(r'(https?|mailto|data|javascript):', link):
                continue
            address, anchor = urldefrag(urljoin(f'/{path}', link))
            target = unquote(address).lstrip('/') or 'index.html'
            if path == '404.html':
                target = target.removeprefix('llmft/') or 'index.html'
            looked += 1
            if not (site['folder'] / target).exists():
                broken.append(f'{path}: {link}')
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids and anchor != '__toc':
                broken.append(f'{path}: no #{anchor} in {target}')
    assert looked > 3000 and not broken, f'of {looked} links {len(broken)} are broken: {broken[:20]}'


def test_an_anchor_names_one_place(pages):
    "A heading and a parameter of one name, or Flips and flips, would have one anchor: links lead to the first."
    twice = [f'{path}: {sorted(page.twice)}' for path, page in pages.items() if page.twice]
    assert not twice, twice
    assert {'Flips', 'flips'} <= pages['runs/rivals.html'].ids
    assert {'#Flips', '#flips'} <= set(pages['runs/rivals.html'].links)


def test_headings_of_a_page_are_in_order(pages):
    "One title, and no heading more than one level below the one before it."
    wrong = []
    for path, page in pages.items():
        jumps = [pair for pair in itertools.pairwise([0, *page.levels]) if pair[1] > pair[0] + 1]
        if jumps or page.levels.count(1) != 1:
            wrong.append(f'{path}: {jumps}, {page.levels.count(1)} titles')
    assert len(pages) > 200 and not wrong, wrong


def test_docstrings_are_no_markdown(site):
    text = (site['folder'] / 'data/dynamics.html').read_text(encoding='utf-8')
    assert 'a - b*y and d*x - g' in text, 'asterisks of a formula became emphasis'
    text = (site['folder'] / 'data/token_files.html').read_text(encoding='utf-8')
    assert 'outputs/tokens/&lt;data&gt;' in text.replace('<wbr>', ''), 'a placeholder became a tag'


def test_captions_of_studies_name_what_their_figures_show(site):
    "The figure is that of the report, and another one may have taken its place since the caption was written."
    looked = 0
    for path in site['folder'].glob('studies/*/index.html'):
        text = path.read_text(encoding='utf-8')
        for picture, caption in re.findall(r'<figure class="figure"><img src="(.*?svg)".*?<figcaption>(.*?) <a', text):
            looked += 1
            drawing = (path.parent / picture).read_text(encoding='utf-8')
            title = re.search('aria-label="([^".]*)', drawing)[1]
            assert title.partition(',')[0].lower() in caption.lower(), f'{path}: {title} is called {caption}'
    assert looked >= 3


def test_words_that_are_also_names_are_no_links(site):
    text = (site['folder'] / 'guides/data-formats.html').read_text(encoding='utf-8')
    assert '<code>text</code>' in text and '<code>text</code></a>' not in text, 'a field, not the function'
    assert '<a href="../experiments/instruct.html"><code>instruct</code></a>' in text, 'an experiment, not the function'
    text = (site['folder'] / 'inference/latency.html').read_text(encoding='utf-8')
    assert '<code>generate</code> of transformers' in text, 'a function of another library'
    text = (site['folder'] / 'training/losses.html').read_text(encoding='utf-8')
    assert '<code>_head_pass</code>' in text and '<code>_head_pass</code></a>' not in text, 'a private name'
    text = (site['folder'] / 'runs/pictures.html').read_text(encoding='utf-8')
    assert '<a href="pictures.html#describe"><code>describe</code></a>' in text, 'its own function, not that of another module'
    text = (site['folder'] / 'models/meter.html').read_text(encoding='utf-8')
    assert '<code>peak_bytes</code>' in text and '<code>peak_bytes</code></a>' not in text, 'a field, not the function'


def test_outputs_are_for_readers(site, pages):
    looked = 0
    for path in pages:
        text = (site['folder'] / path).read_text(encoding='utf-8')
        if path.startswith('gallery/'):
            continue
        looked += text.count('<img alt=')
        assert 'alt="figure"' not in text, f'{path} has a figure without words'
        assert 'real_accelerator' not in text, f'{path} shows the warning of a library'
    assert looked > 40


def test_links_to_the_repository_lead_to_files(pages):
    looked = 0
    lost = []
    for path, page in pages.items():
        if path.startswith('gallery/'):
            continue
        for link in page.links:
            match = own_repository.match(link)
            if not match:
                continue
            looked += 1
            file = root / match[1]
            line = int(match[2] or 0)
            if not file.exists() or (line and line > len(file.read_text(encoding='utf-8').splitlines())):
                lost.append(f'{path}: {link}')
    assert looked > 200 and not lost, lost[:20]


def test_pages_take_nothing_from_elsewhere(site, pages):
    outside = [
        f'{path}: {link}' for path, page in pages.items() for link in page.resources if re.match(r'(https?:)?//', link)
    ]
    assert not outside, outside[:20]
    styles = list(site['folder'].rglob('*.css'))
    assert len(styles) >= 3
    for style in styles:
        assert not re.search(r'(@import|url\()\s*["\']?(https?:)?//', style.read_text(encoding='utf-8')), (
            f'{style.name} fetches from elsewhere'
        )
    text = ''.join((site['folder'] / path).read_text(encoding='utf-8') for path in pages)
    assert 'arithmatex' not in text and text.count('<math') > 50, 'formulas must be MathML'


def test_api_pages_have_signatures_and_parameter_tables(site, pages):
    text = (site['folder'] / 'training/fit.html').read_text(encoding='utf-8')
    entry = text[text.index('id="fit"') :]
    assert 'llmft/training/fit.py#L' in entry[:2000] and 'class="headerlink" href="#fit"' in entry[:500]
    for parameter in ('model', 'train', 'valid', 'folder', 'recipe'):
        assert f'<td data-label="parameter"><code>{parameter}</code></td>' in entry, f'fit has no row for {parameter}'
    assert 'from <a href="../models/load.html#load_model">' in entry, 'names in backticks lead to their pages'
    assert sum('.html#' in link and not link.startswith('http') for page in pages.values() for link in page.links) > 150
    text = (site['folder'] / 'inference/asking.html').read_text(encoding='utf-8')
    assert 'or a template with {input}</td>' in text, 'braces at the end of a meaning belong to it'


def test_reference_lists_every_parameter(site, pages):
    from llmft.runs.params import read_parameters

    experiments = sorted(root.glob('nbs/experiments/*.ipynb'))
    names = [f'{path.stem}.{p.name}' for path in experiments for p in read_parameters(path)]
    assert len(names) > 80 and not set(names) - pages['reference/parameters.html'].ids


# ---- in the browser


@pytest.fixture(scope='module')
def address(site):
    "The site on this machine."

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def translate_path(self, path):
            return super().translate_path(path.removeprefix('/llmft'))  # as published, below the project's name

    server = http.server.ThreadingHTTPServer(
        ('localhost', 0), functools.partial(Handler, directory=str(site['folder']))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://localhost:{server.server_address[1]}/llmft/'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(address):
    "A real headless Chromium."
    if not chromium:
        pytest.skip('no Chromium on this machine: install chromium to see the pages tested in it')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


@contextlib.contextmanager
def tab(browser, allowed, **settings):
    "A tab that notes what must not happen: requests to elsewhere, failed ones, messages on the console."
    context = browser.new_context(**settings)
    page = context.new_page()
    trouble = []

    def on_request(request):
        if not request.url.startswith((*allowed, 'data:', 'blob:')):
            trouble.append(f'request to {request.url}')

    def on_failure(request):
        if request.failure != 'net::ERR_ABORTED':  # aborted: the tab has left the page
            trouble.append(f'failed: {request.url}')

    def on_response(response):
        if response.status >= 400:
            trouble.append(f'{response.status}: {response.url}')

    def on_console(message):
        if message.type in ('error', 'warning'):
            trouble.append(f'console: {message.text}')

    page.on('request', on_request)
    page.on('requestfailed', on_failure)
    page.on('response', on_response)
    page.on('console', on_console)
    page.on('pageerror', lambda error: trouble.append(f'script: {error}'))
    try:
        yield page, trouble
    finally:
        context.close()


# Labels of a table shown as a list that reach below their cell, over the next label.
labels_over_others = '''() => [...document.querySelectorAll('.rows td')].filter(
  e => e.getClientRects().length && parseFloat(getComputedStyle(e, '::before').height) > e.clientHeight + 1
).map(e => e.dataset.label)'''
# Width of the page and of the window, and up to three elements that reach beyond it outside of a scrolling box.
too_wide = '''() => {
  const scrolls = e => e && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const over = [...document.querySelectorAll('article *, main *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !scrolls(e.parentElement);
  });
  return [document.documentElement.scrollWidth, innerWidth, over.slice(0, 3).map(e => e.outerHTML.slice(0, 120))];
}'''
# Every image, loaded at once, and whether it shows.
pictures = '''() => [...document.images].map(i => {
  i.loading = 'eager';
  return [i.getAttribute('src').slice(0, 60), i.complete && i.naturalWidth > 0];
})'''


def test_every_page_at_phone_width(browser, address, site, pages):
    wrong = []
    figures = 0
    index = json.loads((site['folder'] / 'search/search_index.json').read_text(encoding='utf-8'))
    short = index | dict(docs=index['docs'][:1])
    with tab(browser, [address], viewport=phone) as (page, trouble):
        page.route('**/search_index.json', lambda route: route.fulfill(json=short))  # searching has tests of its own
        for path in pages:
            page.goto(address + path, wait_until='load')
            assert page.title(), path
            width, inner, over = page.evaluate(too_wide)
            if width > inner or over:
                wrong.append(f'{path}: {width} px wide, {over}')
            wrong += [f'{path}: the label {label} covers the next' for label in page.evaluate(labels_over_others)]
            page.evaluate(pictures)
            page.wait_for_function('() => [...document.images].every(i => i.complete)', timeout=10_000)
            seen = page.evaluate(pictures)
            figures += len(seen)
            wrong += [f'{path}: {source} does not show' for source, shown in seen if not shown]
            wrong += [f'{path}: {text}' for text in trouble]
            trouble.clear()
    assert len(pages) >= 55 and figures >= 50, f'{len(pages)} pages with {figures} figures'
    assert not wrong, '\n'.join(wrong[:20])


# Shown and own width of each figure, whether its box scrolls, whether the keyboard reaches the box, width of its caption.
figure_boxes = '''() => [...document.querySelectorAll('.figure img')].map(i => {
  const box = i.closest('.figure'), caption = box.querySelector('figcaption');
  return [i.getBoundingClientRect().width, i.naturalWidth, box.scrollWidth > box.clientWidth + 1, box.tabIndex,
          caption ? caption.getBoundingClientRect().width : null, box.parentElement.clientWidth];
})'''
# Size of the letters of each block of Python, whether it wraps, whether it scrolls, whether the keyboard reaches it.
python_blocks = '''() => [...document.querySelectorAll('.language-python:not(.signature) pre > code')].filter(
  each => each.clientWidth).map(each => [parseFloat(getComputedStyle(each).fontSize),
  getComputedStyle(each).whiteSpace, each.scrollWidth > each.clientWidth + 1, each.tabIndex])'''


@pytest.mark.parametrize('width', [390, 1280])
def test_figures_can_be_read_and_scrolled(browser, address, pages, width):
    "Letters are 9 points in figures of 6.4 inches: at 540 px of their 640 they are 10 px high."
    paths = [path for path in pages if path.startswith('concepts/')] + [
        'studies/sublora/index.html',
        'runs/figures.html',
    ]
    looked = 0
    with tab(browser, [address], viewport=dict(width=width, height=844)) as (page, _):
        for path in paths:
            page.goto(address + path)
            page.evaluate(pictures)
            page.wait_for_function('() => [...document.images].every(i => i.complete)')
            page.wait_for_timeout(200)
            for shown, own, scrolls, stop, caption, column in page.evaluate(figure_boxes):
                looked += 1
                assert shown >= min(own, 540), f'{path}: a figure is {shown} px wide'
                assert scrolls == (width == 390) and (stop == 0) == scrolls, f'{path}: the keyboard and a figure'
                assert caption is None or caption >= min(shown, column) - 1, f'{path}: a caption of {caption} px'
    assert looked > 15


def test_python_on_a_phone_is_small_and_scrolls_by_keyboard(browser, address):
    with tab(browser, [address], viewport=phone) as (page, _):
        page.goto(address + 'concepts/memory.html')
        page.wait_for_timeout(200)
        blocks = page.evaluate(python_blocks)
        assert len(blocks) > 3 and any(scrolls for _, _, scrolls, _ in blocks)
        for size, space, scrolls, stop in blocks:
            assert 11 <= size < 12 and space == 'pre' and (stop == 0 or not scrolls)
        assert not page.locator('.language-python:not(.signature) .md-code__nav').filter(visible=True).count()


def test_experiments_lead_to_their_reports(site):
    text = (site['folder'] / 'experiments/profile.html').read_text(encoding='utf-8')
    assert '<p class="reports">Its report: <a href="../gallery/profile/qlora.html">qlora</a>.' in text
    assert 'class="reports"' not in (site['folder'] / 'runs/report.html').read_text(encoding='utf-8')


def test_signatures_say_how_a_class_is_made_and_options_have_plain_types(site):
    def signatures(page):
        text = (site['folder'] / page).read_text(encoding='utf-8')
        blocks = re.findall(r'(?s)<div class="language-python signature.*?</pre>', text)
        return [' '.join(re.sub('<[^>]*>', '', block).split()) for block in blocks]

    assert 'ShardedGroup(accelerator: Accelerator, processes: Processes = None)' in signatures(
        'training/strategies.html'
    ), 'as its base is made'
    assert 'class Stopped(Exception)' in signatures('runs/execute.html')
    assert not [line for line in signatures('cli.html') if re.search(r': _[A-Z]', line)]
    block = next(line for line in signatures('bench/training.html') if line.startswith('Block('))
    assert 'tokens: list' in block, 'a named tuple has fields'


def test_properties_and_made_defaults_read_as_fields(site):
    text = (site['folder'] / 'training/strategies.html').read_text(encoding='utf-8')
    words = re.sub('<[^>]*>', '', text)
    assert 'Processes.hosts: int' in words and 'Processes.hosts(' not in words
    words = re.sub('<[^>]*>', '', (site['folder'] / 'data/batches.html').read_text(encoding='utf-8'))
    assert 'MicroBatch.to(device) -&gt; MicroBatch' in words, 'no quotes around a class'
    words = re.sub('<[^>]*>', '', (site['folder'] / 'data/corpora.html').read_text(encoding='utf-8'))
    assert 'notes: dict = {}' in words and 'dict = dict' not in words


def test_no_two_pages_of_the_library_have_one_title(site, pages):
    titles = {}
    for path in pages:
        if not path.startswith(('gallery/', 'experiments/')):
            text = (site['folder'] / path).read_text(encoding='utf-8')
            titles.setdefault(re.search('<title>(.*?)</title>', text)[1], []).append(path)
    assert not {title: paths for title, paths in titles.items() if len(paths) > 1}
    text = (site['folder'] / 'studies/pdfs/published.html').read_text(encoding='utf-8')
    assert 'aria-label="Previous: PDFs: setup"' in text and 'aria-label="Next: PDFs: report"' in text


def test_pictures_have_their_size_before_they_come(site, pages):
    looked = 0
    for path in pages:
        text = (site['folder'] / path).read_text(encoding='utf-8')
        figures = re.findall(r'<img [^>]*src="[^"]*(?:figures|gallery)/[^"]*"[^>]*>', text)
        looked += len(figures)
        bare = [each for each in figures if not re.search(r' width="\d+" height="\d+"', each) and 'lazy' not in each]
        assert not bare, f'{path}: {bare[0][:200]}'
    assert looked > 60


def test_functions_in_formulas_keep_their_distance():
    sys.path.insert(0, str(root / 'tools/site'))
    from hooks import formula, with_mathml

    def shown(tex):
        text = with_mathml(formula.search(f'<span class="arithmatex">\\({tex}\\)</span>'))
        return re.sub('<[^>]*>', '', re.sub('<mspace[^>]*>', '_', text))

    assert shown(r'K \ln 2') == 'K_ln_2' and shown(r'2\log_2 L') == '2_log2_L'
    assert shown(r'-\ln(K)') == '−ln(K)', 'no space before a bracket or after a sign'


def test_boxes_that_go_on_show_it(browser, address):
    with tab(browser, [address], viewport=phone) as (page, _):
        page.goto(address + 'concepts/packing.html')
        page.wait_for_selector('.figure[data-more]')
        box = page.locator('.figure[data-more]').first
        box.evaluate('box => box.scrollLeft = box.scrollWidth')
        page.wait_for_timeout(200)
        assert page.locator('.figure').first.get_attribute('data-more') is None, 'the end is not faded'


def test_prose_keeps_numbers_with_units_and_words_whole(site):
    text = (site['folder'] / 'models/cost.html').read_text(encoding='utf-8')
    assert '<code class="flag">llmft gpu-check</code>' in text
    assert '32\u00a0MiB' in text and 'within 5%' in text
    text = (site['folder'] / 'experiments/forecast_summary.html').read_text(encoding='utf-8')
    assert 'outputs/<wbr>forecast_summary/<wbr>&lt;name&gt;' in text


def test_no_output_is_an_empty_figure_and_columns_stay_in_line(site, pages):
    for path in pages:
        assert '<div class="figure"></div>' not in (site['folder'] / path).read_text(encoding='utf-8'), path
    text = (site['folder'] / 'cli.html').read_text(encoding='utf-8')
    assert '<pre class="drawn">name     type' in text


def test_concepts_have_figures(browser, address, pages):
    concepts = [path for path in pages if path.startswith('concepts/')]
    assert len(concepts) >= 6
    for path in concepts:
        assert any('figures/' in source for source in pages[path].resources), f'{path} has no figure'


def test_studies_begin_with_question_result_figure_and_command(site):
    for name in ('code', 'finetuning', 'forecasting', 'pdfs', 'sublora'):
        text = (site['folder'] / f'studies/{name}/index.html').read_text(encoding='utf-8')
        parts = ['Question.</strong>', 'Result.</strong>', '<figure', 'Command.</strong>', '<h2 id="results"']
        places = [text.find(part) for part in parts]
        assert -1 not in places and places == sorted(places), f'{name}: {dict(zip(parts, places, strict=True))}'
        picture = re.search(r'<figure class="figure"><img src="(.*?)" alt="\w', text)[1]
        assert (site['folder'] / f'studies/{name}' / picture).resolve().exists(), picture


def search(page, words):
    "The addresses that the site's search gives."
    from playwright.sync_api import TimeoutError

    box = page.locator('.md-search__input')
    box.click()
    for _ in range(20):  # what is typed before the index has come is not answered
        box.fill('')
        box.press_sequentially(words)
        with contextlib.suppress(TimeoutError):
            page.wait_for_selector('.md-search-result__link', timeout=3_000)
            break
    return page.eval_on_selector_all('.md-search-result__link', 'links => links.map(link => link.getAttribute("href"))')


@pytest.mark.parametrize(
    'words, page_wanted',
    [
        ('linear_cross_entropy', 'training/losses.html'),
        ('gradient_checkpointing', 'reference/parameters.html'),
        ('learning rate', 'reference/parameters.html'),
        ('csv', 'guides/data-formats.html'),
        ('chat', 'guides/data-formats.html'),
        ('my own model', 'guides/add-model.html'),
        ('out of memory', 'guides/troubleshooting.html'),
        ('hf token', 'guides/troubleshooting.html'),
        ('merge', 'guides/use-it.html'),
        ('lm-eval', 'guides/lm-eval.html'),
        ('gguf', 'guides/use-it.html'),
        ('use the adapter', 'guides/use-it.html'),
        ('DPO', 'guides/faq.html'),
    ],
)
def test_search_finds_what_people_type(browser, address, words, page_wanted):
    with tab(browser, [address], viewport=desk) as (page, trouble):
        page.goto(address + 'index.html')
        found = [link.partition('?')[0].partition('#')[0] for link in search(page, words)]
        first = list(dict.fromkeys(found))[:3]  # pages, of which several places may be found
        assert any(link.endswith(page_wanted) for link in first), f'{words}: {first}'
        assert not trouble, trouble


def test_the_filter_of_the_parameters_hides_the_others(browser, address):
    with tab(browser, [address], viewport=desk) as (page, trouble):
        page.goto(address + 'reference/parameters.html')
        rows = page.locator('.parameters tbody tr')
        before = rows.count()
        page.locator('.filter').fill('learning rate')
        shown = rows.filter(visible=True).all_inner_texts()
        assert before > 150 and 0 < len(shown) < 20
        assert all('learning' in text.lower() for text in shown), shown
        assert not trouble, trouble


def test_formulas_have_a_font_that_stretches(browser, address):
    with tab(browser, [address], viewport=desk) as (page, trouble):
        page.goto(address + 'bounds/bounds.html')
        page.evaluate('() => document.fonts.ready')
        assert page.evaluate('() => document.fonts.check("16px Formulas") && document.querySelectorAll("math").length')
        root_height = page.evaluate(
            '() => Math.max(...[...document.querySelectorAll("msqrt")].map(e => e.clientHeight))'
        )
        assert root_height > 30, 'no radical is taller than a line: the fraction below it is taller'
        assert not trouble, trouble


# Names in the cells of tables that a line break divides elsewhere than at a sign or a blank.
torn_names = r'''() => [...document.querySelectorAll('td code')].flatMap(code => {
  const torn = [], walk = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) for (const word of walk.currentNode.data.matchAll(/[\w*.]+/g)) {
    const range = document.createRange();
    range.setStart(walk.currentNode, word.index);
    range.setEnd(walk.currentNode, word.index + word[0].length);
    const parts = word[0].split('_').length + (word[0].match(/\./g) || []).length;
    if (new Set([...range.getClientRects()].map(box => box.top)).size > parts) torn.push(code.textContent);
  }
  return torn;
})'''
# Boxes of wide tables and of commands whose content is cut at the right.
cut_boxes = '''() => [...document.querySelectorAll('.scroll, .signature code, .language-yaml code, ' +
  '.language-sh code, .language-bash code')].filter(
  each => each.scrollWidth > each.clientWidth + 8).map(each => each.textContent.slice(0, 60))'''
# Options with their values that are on more than one line.
torn_options = """() => [...document.querySelectorAll('.flag')].filter(
  each => new Set([...each.getClientRects()].map(box => Math.round(box.top))).size > 1).map(each => each.textContent)"""
tables_and_commands = (
    'index.html',
    'concepts/one-run.html',
    'data/tables.html',
    'guides/colab.html',
    'guides/cookbook.html',
    'guides/faq.html',
    'guides/one-gpu.html',
    'guides/papermill.html',
    'guides/use-it.html',
    'reference/hardware.html',
    'reference/models.html',
    'reference/run-folder.html',
    'reference/yaml.html',
    'runs/tables.html',
    'studies/index.html',
)


@pytest.mark.parametrize('width', [390, 1280])
def test_tables_and_commands_are_whole(browser, address, width):
    with tab(browser, [address], viewport=dict(width=width, height=900)) as (page, _):
        for path in tables_and_commands:
            page.goto(address + path)
            assert not page.evaluate(torn_names), f'{path}: names are torn'
            assert not page.evaluate(cut_boxes), f'{path}: content is cut'
            assert not page.evaluate(torn_options), f'{path}: an option is torn'
        for path, option in (('guides/use-it.html', '--to gguf'), ('guides/colab.html', '-p precision=fp16')):
            page.goto(address + path)
            whole = page.eval_on_selector_all('.flag', 'all => all.map(each => each.textContent)')
            assert option in whole, f'{path}: an option is not kept with its value'


def test_opened_as_a_file_it_shows_and_searches(browser, site):
    home = f"file://{site['folder']}/"
    with tab(browser, [home], viewport=desk) as (page, trouble):
        page.goto(home + 'training/fit.html')
        assert page.locator('h1').inner_text().startswith('fit')
        assert any('sweep_file.html' in link for link in search(page, 'expand sweep'))
        assert not trouble, trouble


# (selector, contrast, text) of up to 40 elements of each kind, by the formula of WCAG.
contrast = '''() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [r, g, b] = numbers(colour).map(linear);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, alpha = numbers(colour)[3];
      if (alpha === undefined || alpha > 0) return colour;
    }
    return 'rgb(255,255,255)';
  };
  const ratio = e => {
    const both = [luminance(getComputedStyle(e).color), luminance(ground(e))];
    return (Math.max(...both) + .05) / (Math.min(...both) + .05);
  };
  const kinds = ['article p', 'article a:not(.headerlink)', 'article pre code span', 'article td', 'article th',
                 '.lead', '.md-nav__link', '.md-footer__title'];
  return kinds.flatMap(kind => [...document.querySelectorAll(kind)].slice(0, 40).map(
    e => [kind, ratio(e), e.textContent.slice(0, 30)]));
}'''


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_both_colour_schemes(browser, address, scheme):
    "Contrast of text on its ground: 4.5 at least (WCAG AA), for body, links, code, tables and captions."
    with tab(browser, [address], viewport=desk, color_scheme=scheme) as (page, trouble):
        page.goto(address + 'training/losses.html')
        measured = page.evaluate(contrast)
        faint = [one for one in measured if one[1] < 4.5]
        assert len(measured) > 60 and len({kind for kind, *_ in measured}) >= 6
        assert not faint, faint[:8]
        ground = page.evaluate('() => getComputedStyle(document.body).backgroundColor')
        assert (sum(map(int, re.findall(r'\d+', ground)[:3])) < 200) == (scheme == 'dark')


looked_at = (
    'index.html',
    'gallery.html',
    'guides/data-formats.html',
    'reference/hardware.html',
    'reference/parameters.html',
    'studies/finetuning/index.html',
    'concepts/memory.html',
    'experiments/finetune.html',
    'training/losses.html',
)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe_finds_nothing_serious(browser, address, scheme):
    from test_pages import serious

    with tab(browser, [address], viewport=desk, color_scheme=scheme) as (page, _):
        found = {}
        for path in looked_at:
            page.goto(address + path)
            found[path] = serious(page)
    assert not any(found.values()), {path: rules for path, rules in found.items() if rules}


# ---- the Lab


@pytest.fixture
def lab(tmp_path):
    "Address of a Lab as `make lab` starts it, on a copy of one notebook, and the path of the copy."
    notebook = tmp_path / 'nbs/experiments/finetune.ipynb'
    notebook.parent.mkdir(parents=True)
    shutil.copy(root / 'nbs/experiments/finetune.ipynb', notebook)
    shutil.copytree(root / 'tools/lab', tmp_path / 'tools/lab', ignore=shutil.ignore_patterns('__pycache__'))
    words = re.search(r'jupyter lab (.*) \$\(LAB\)', (root / 'Makefile').read_text(encoding='utf-8'))[1].split()
    folders = {f'JUPYTER_{kind}_DIR': str(tmp_path / kind) for kind in ('CONFIG', 'DATA', 'RUNTIME')}
    environment = os.environ | folders | dict(JUPYTER_CONFIG_PATH=str(tmp_path / 'tools/lab'))
    options = ['--no-browser', '--allow-root', '--ServerApp.port=0', '--ServerApp.token=', '--ServerApp.ip=127.0.0.1']
    command = [sys.executable, '-m', 'jupyterlab', *words, *options]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stderr.readline, '')
        started = next(filter(None, (re.search(r'http://127\.0\.0\.1:\d+/\S*', line) for line in lines)))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield started[0], notebook
    finally:
        server.terminate()
        server.wait()


def test_lab_opens_quietly_and_a_run_and_saved_notebook_is_as_committed(browser, lab):
    started, notebook = lab
    before = notebook.read_text(encoding='utf-8')
    begin = started.split('/lab')[0]
    with tab(browser, [begin, begin.replace('http', 'ws')], viewport=desk) as (page, trouble):
        page.goto(started)
        page.wait_for_selector('.jp-Notebook .jp-RenderedMarkdown h1', timeout=90_000)
        page.wait_for_selector('text=Python 3 (ipykernel) | Idle', timeout=90_000)
        widths = page.eval_on_selector_all('img', 'all => all.map(image => image.naturalWidth)')
        assert all(widths), 'a picture is broken'
        assert page.locator('.jp-Dialog').count() == 0 and page.locator('.Toastify__toast').count() == 0

        page.locator('.jp-CodeCell .cm-content').first.click()
        page.keyboard.press('Shift+Enter')
        page.wait_for_selector('.jp-CodeCell .jp-InputPrompt:has-text("[1]")', timeout=90_000)
        stamp = notebook.stat().st_mtime_ns
        page.keyboard.press('Control+s')
        for _ in range(100):
            if notebook.stat().st_mtime_ns != stamp:
                break
            page.wait_for_timeout(100)
        assert notebook.stat().st_mtime_ns != stamp and notebook.read_text(encoding='utf-8') == before
        assert not trouble, trouble
