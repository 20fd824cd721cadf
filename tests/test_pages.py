"""The pages that runs leave, looked at in a real browser: reports of every kind, and the page over all runs."""

import importlib
import importlib.resources
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
from house import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmft.runs.figures import bars, frontier, loss_curves, memory_bars, on_deep, on_pale
from llmft.runs.locks import hold, release
from llmft.runs.overview import write_overview
from llmft.runs.pictures import inline_svg, take_picture, tones
from llmft.runs.report import next_commands, render_report, write_reports
from llmft.runs.tables import column, table

log = [dict(step=step, loss=3 - step / 40, epoch=step / 30) for step in range(1, 61)]
run = dict(
    id='1',
    notebook='finetune',
    name='first',
    status='done',
    error=None,
    cell=None,
    started='2026-08-01T10:00:00+00:00',
    ended='2026-08-01T10:00:05+00:00',
    seconds=5.0,
    command='llmft run params/finetune/lora.yaml --small',
    verdict='- LoRA lowered the perplexity from 34.2 to 26.2.\n- It took 5 s.',
)
record = dict(
    run=run,
    params=dict(name='first', outputs='outputs', method='lora', learning_rate=3e-3, lora_targets=['q', 'v'], seed=1),
    train=dict(steps=60),
    meta=dict(fingerprint='abc', machine=dict(cores=2, cpu='a processor'), versions=dict(torch='2.9')),
)
parameters = (
    'name: str = "finetune"  # name\nmethod: str = "full"  # what is trained\nlearning_rate: float = 3e-3  # peak\n'
    'lora_targets: list[str] = ["q"]  # adapted modules\nseed: int = 1  # of all draws'
)
GiB = 2**30
breakdown = dict(weights=2 * GiB, gradients=GiB, activations=3 * GiB, logits=GiB, total=5 * GiB)


def shown(value):
    "A displayed value as an output."
    if hasattr(value, '_repr_mimebundle_'):
        data, metadata = value._repr_mimebundle_()
        return new_output('display_data', data=data, metadata=metadata)
    return new_output('display_data', data={'text/html': value._repr_html_()})


def picture(name, figure):
    return shown(take_picture(figure, name))


def cell(source, *outputs, **timing):
    number = None if timing.get('status') == 'pending' else 1
    metadata = dict(papermill=timing) if timing else {}
    return new_code_cell(source, outputs=list(outputs), metadata=metadata, execution_count=number)


def notebook():
    "An executed notebook with one of everything."
    wide = [{f'a column {number}': number * 1.5 for number in range(11)} for _ in range(3)]
    one = [{f'fact {number}': number * 1.5 for number in range(10)}]
    code = [dict(problem='p', answer='def f(x):\n    return x', outcome='right')]
    pairs = [dict(prompt='a word ' * 20, answer='two\nlines', score=None), dict(prompt='a', answer='b', score=0.5)]
    texts = [dict(n=1, before='a word ' * 60, after='two\nlines ' * 6, reason='')]
    tagged = new_code_cell(parameters, metadata=dict(tags=['parameters']), execution_count=1)
    framed = '<table class="dataframe"><thead><tr><th>step</th></tr></thead><tbody><tr><th>0</th></tr></tbody></table>'
    return new_notebook(
        cells=[
            new_markdown_cell('# Fine-tuning\n\n**Question.** What is gained?'),
            cell('try: import google.colab\nexcept ImportError: pass'),
            new_markdown_cell('## Parameters'),
            tagged,
            new_markdown_cell('## Setup'),
            cell('import torch  # with a comment', duration=12.0, status='completed'),
            new_markdown_cell('## Evaluate\n\nThe numbers.'),
            cell('table(wide)', shown(table(wide))),
            cell('table(one)', shown(table(one, caption='One row'))),
            cell('table(code)', shown(table(code, ['problem', column('answer', code=True), 'outcome']))),
            cell('frame', new_output('execute_result', data={'text/html': framed})),
            cell('table(texts)', shown(table(texts, caption='What the base and the tuned model write, word by word'))),
            cell('table(pairs)', shown(table(pairs, caption='Pairs'))),
            cell('print(1)', new_output('stream', name='stdout', text='x' * 300)),
            cell('warn()', new_output('stream', name='stderr', text='a warning')),
            new_markdown_cell('## Figures'),
            cell('loss', picture('loss', loss_curves(dict(lora=log)))),
            cell('memory', picture('memory', memory_bars(dict(lora=breakdown), dict(lora=5.5 * GiB)))),
            cell('bars', picture('bars', bars(dict(full=28.4, lora=16.2), 'Peak memory', 'GiB', baseline='full'))),
            cell('front', picture('front', frontier(dict(a=(1, 2), b=(2, 1)), 'time, s', 'memory, GiB'))),
            new_markdown_cell('## Verdict'),
            cell('Markdown(verdict)', new_output('display_data', data={'text/markdown': run['verdict']})),
            new_markdown_cell('## Provenance'),
            cell('run.finish()', new_output('stream', name='stdout', text='finetune/first · run 1 · fingerprint abc\n')),
        ]
    )


def broken(status):
    "The same, ended in the middle of training."
    made = notebook()
    made.cells = made.cells[:6] + [new_markdown_cell('## Train'), cell('train()', status='failed')]
    made.cells += [new_markdown_cell('## Evaluate'), cell('a', status='pending'), cell('b', status='pending')]
    return made, record | dict(run=run | dict(status=status, error='stopped by SIGTERM', cell=4, verdict=None))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder of runs: one done, one interrupted, one failed, and the page over them."
    outputs = tmp_path_factory.mktemp('outputs')
    for name, status in (('first', 'done'), ('second', 'interrupted'), ('third', 'failed')):
        place = outputs / 'finetune' / name
        (place / ('adapter' if status == 'done' else 'checkpoints/step-1')).mkdir(parents=True)
        (place / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in log))
        made, facts = (notebook(), record) if status == 'done' else broken(status)
        facts = facts | dict(run=facts['run'] | dict(name=name), params=facts['params'] | dict(seed=len(name)))
        write(place / 'run.json', json.dumps(facts))
        write(place / 'metrics.json', json.dumps(dict(perplexity_after=26.2, flops=4.15e11)))
        write_reports(made, facts, place)
    write_overview(outputs)
    return outputs


pages = ['finetune/first/report.html', 'finetune/second/report.html', 'finetune/third/report.html', 'index.html']


# ---- what a reader sees


def test_the_verdict_and_its_figure_come_first_and_once(folder):
    page = (folder / pages[0]).read_text()
    top, _, main = page.partition('<main id="main">')
    assert top.index('34.2 to 26.2') < top.index('<svg role="img" aria-label="Loss.') < top.index('class="chips"')
    assert page.count('34.2 to 26.2') == 1 and page.count('aria-label="Loss.') == 1
    assert 'google.colab' not in page and 'fingerprint abc' not in page and main.count('<h2 id="verdict"') == 0
    assert 'Setup: code without output' in main and '<h2 id="setup"' not in main and '<h2 id="figures"' in main
    assert '<li title="lora"><b>method</b> lora</li>' in top and '<li title="q, v">' in top and '<b>seed' in top
    assert '<a href="#evaluate">' in top and '<a href="#setup">' not in top


def test_three_commands_under_a_verdict(folder):
    page = (folder / pages[0]).read_text()
    commands = re.findall('<dd><code>(.*?)</code></dd>', page.split('<main')[0])
    pieces = re.findall('<span>(.*?)</span>', commands[1])
    assert pieces == ['--small', '-p name=first-2', '-p learning_rate=0.0015']
    assert [re.sub('<[^>]*>', '', command) for command in commands] == [
        'llmft try outputs/finetune/first &quot;your prompt&quot;',
        'llmft run params/finetune/lora.yaml --small -p name=first-2 -p learning_rate=0.0015',
        'llmft diff finetune/first finetune/first-2',
    ]


def test_commands_of_runs_in_another_folder_name_it():
    there = record | dict(params=dict(learning_rate=3e-3, outputs='/data/my runs'), run=run | dict(command='papermill'))
    commands = next_commands(there, None, {})
    assert commands['Vary it'].startswith("llmft run nbs/experiments/finetune.ipynb -p 'outputs=/data/my runs' -p name=")
    assert commands['Compare it'].endswith(" --outputs '/data/my runs'")
    assert commands['Check it'] == "llmft verify '/data/my runs/finetune/first'"


def test_summaries_have_three_commands_too():
    for command, repeated in (
        ('llmft run params/sweeps/quickstart.yaml --fresh', 'llmft run params/sweeps/quickstart.yaml --fresh'),
        ('llmft gpu-check', 'llmft gpu-check'),
        ('papermill', """llmft run nbs/experiments/compare.ipynb -p 'runs=["a"]' -p name=all --fresh"""),
    ):
        made = dict(run, notebook='compare', name='all', command=command)
        commands = next_commands(record | dict(params=dict(runs=['a']), run=made), None, dict(runs=['a']))
        assert commands == {
            'Check it': 'llmft verify outputs/compare/all',
            'Repeat it': repeated,
            'See all runs': 'llmft open',
        }


@pytest.mark.parametrize('name', ['second', 'third'])
def test_a_run_that_broke_off_shows_what_was_logged_and_how_to_go_on(folder, name):
    page = (folder / f'finetune/{name}/report.html').read_text()
    top, _, main = page.partition('<main id="main">')
    assert 'llmft run params/finetune/lora.yaml --small' in top and 'continues from the last checkpoint' in top
    assert 'aria-label="Loss so far' in top and top.count('<title>first') + top.count(f'<title>{name}') == 60
    assert main.count('2 cells did not run') == 1 and 'This cell did not run' not in page
    assert '<h2 id="evaluate"' in main.split('2 cells did not run')[1] and 'llmft try' not in page


def test_figures_say_what_they_show(folder):
    page = (folder / pages[0]).read_text()
    labels = re.findall('<svg role="img" aria-label="([^"]*)"', page)
    assert len(labels) == 4 and 'figure' not in labels and all(len(label) > 10 for label in labels)
    assert '<title>lora, step 7: loss 2.83</title>' in page and '<title>full: 28.4</title>' in page
    assert '<title>a: 1.00, 2.00</title>' in page and '<title>activations: 3.00</title>' in page


def test_memory_bars_do_not_contradict_themselves():
    (axes,) = memory_bars(dict(lora=breakdown), dict(lora=4 * GiB)).axes
    words = [text.get_text() for text in axes.texts]
    assert 'peak 5.00, parts 7.00' in words and 'measured 4.00 (prediction +25%)' in words
    assert any('black line: peak' in word for word in words)
    lines = [path.vertices[0][0] for each in axes.collections for path in each.get_paths()]
    assert lines and set(lines) == {5.0}  # the line stands at the peak


def test_numbers_of_the_page_have_three_digits_and_prefixes(folder):
    page = (folder / pages[0]).read_text()
    assert '<td class="number">415.00 GFLOP</td>' in page and 'e+11' not in page


def test_tables_are_whole(folder):
    page = (folder / pages[0]).read_text()
    for part in ('table', 'thead', 'tbody', 'tr', 'th', 'td'):
        assert len(re.findall(f'<{part}[ >]', page)) == page.count(f'</{part}>') > 0, part


def test_programs_keep_their_lines(folder):
    assert '<pre>def f(x):\n    return x</pre>' in (folder / pages[0]).read_text()


def test_pages_stay_small(folder):
    for page in pages:
        assert (folder / page).stat().st_size < 1_500_000


def test_a_picture_that_cannot_be_read_gives_way_to_its_pixels():
    output = picture('loss', loss_curves(dict(lora=log)))
    output.data['image/svg+xml'] = '<svg'
    page = render_report(new_notebook(cells=[cell('x', output)]), record)
    assert '<img alt="Loss.' in page and '<svg' not in page


@pytest.mark.parametrize(
    'inside',
    [
        '<foreignObject>x</foreignObject>',
        '<script>hacked</script>',
        '<animate attributeName="href" to="x"/>',
        '<g onclick="hacked"/>',
        '<g onload="hacked()"/>',
        '<a href="https://x.org">x</a>',
        '<image href="https://x.org/a.png"/>',
        '<use href="https://x.org/a.svg#b"/>',
        '<path style="fill: url(https://x.org/a)"/>',
        '<path style="fill: image-set(x)"/>',
        '<text class="skip" id="main">x</text>',
    ],
)
def test_a_drawing_keeps_only_shapes(inside):
    text = f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    kept = inline_svg(text)
    assert not re.search(r'foreignObject|script|animate|on\w+=|http|image-set|class|id="main"|<a\b', kept), kept
    assert kept.startswith('<svg role="img"')


# ---- in the browser


@pytest.fixture(scope='module')
def browser():
    "A real headless Chromium."
    api = pytest.importorskip('playwright.sync_api')
    from test_site import chromium, flags

    if not chromium:
        pytest.skip('no Chromium on this machine: install chromium to see the pages tested in it')
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


def opened(browser, path, width=1200, scheme='light'):
    "A page at a width and in a colour scheme, and what went wrong while it was opened."
    tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    trouble = []
    tab.on('request', lambda each: each.url.startswith('http') and trouble.append(each.url))
    tab.on('console', lambda message: trouble.append(message.text))
    tab.on('pageerror', lambda error: trouble.append(str(error)))
    tab.goto(Path(path).as_uri())
    return tab, trouble


@pytest.mark.parametrize('page', pages)
@pytest.mark.parametrize('width', [390, 1200])
def test_nothing_overflows_and_nothing_is_fetched(browser, folder, page, width):
    tab, trouble = opened(browser, folder / page, width)
    tab.locator('details').evaluate_all('all => all.forEach(each => each.open = true)')
    assert tab.evaluate('document.documentElement.scrollWidth') <= width and not trouble
    tab.close()


def test_captions_prose_and_printed_lines_have_room(browser, folder):
    tab, _ = opened(browser, folder / pages[0], 1280)
    measured = """() => {
      const named = [...document.querySelectorAll('caption')].find(each => each.textContent.startsWith('What the base'));
      const row = named.parentElement.tBodies[0].rows[0];
      const printed = [...document.querySelectorAll('.out')].find(each => each.textContent.startsWith('xxx'));
      return [named.clientHeight, row.cells[1].clientWidth, printed.scrollWidth - printed.clientWidth,
              getComputedStyle(row.cells[3]).display]; }"""
    caption, prose, beyond, _ = tab.evaluate(measured)
    assert caption < 60, 'a caption above a narrow table runs down its side'
    assert prose < 450, 'a column of prose takes the width of the others'
    assert beyond <= 1, 'a printed line is cut'
    tab.set_viewport_size(dict(width=390, height=800))
    caption, _, beyond, empty = tab.evaluate(measured)
    assert caption < 60 and beyond <= 1 and empty == 'none'
    tab.close()


own_checks = """() => {
  const found = [];
  const say = (what, node) => found.push(what + ': ' + node.outerHTML.slice(0, 90));
  for (const each of document.querySelectorAll('img')) if (!each.alt || each.alt === 'figure') say('no alt', each);
  for (const each of document.querySelectorAll('svg')) if (!each.getAttribute('aria-label')) say('no label', each);
  for (const each of document.querySelectorAll('th')) if (!each.scope) say('no scope', each);
  for (const each of document.querySelectorAll('table')) if (!each.caption) say('no caption', each);
  for (const each of document.querySelectorAll('button, a')) if (!each.textContent.trim()) say('no name', each);
  if (!document.documentElement.lang || !document.title || !document.querySelector('main')) found.push('no language, title or main');
  const ids = [...document.querySelectorAll('[id]')].map(each => each.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push('twice: ' + id);

  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                           const d = canvas.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255]; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => { const l = c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * l[0] + .7152 * l[1] + .0722 * l[2]; };
  const behind = node => { const layers = []; for (let n = node; n; n = n.parentElement) layers.push(rgba(getComputedStyle(n).backgroundColor));
                           return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]); };
  const fade = node => { let all = 1; for (let n = node; n; n = n.parentElement) all *= getComputedStyle(n).opacity; return all; };
  for (const node of document.querySelectorAll('body *')) {
    const text = [...node.childNodes].some(each => each.nodeType === 3 && each.data.trim());
    if (!text || !node.getClientRects().length || node.closest('.unseen, .skip, title, script, style')) continue;
    const style = getComputedStyle(node), ground = behind(node.closest('svg') ? node.closest('svg').parentElement : node);
    const colour = rgba(node.closest('svg') ? style.fill : style.color);
    colour[3] *= fade(node);
    const a = light(over(colour, ground)), b = light(ground);
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) say('contrast ' + contrast.toFixed(2), node);
  }
  return found;
}"""


@pytest.mark.parametrize('page', pages)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_pages_can_be_read_by_everyone(browser, folder, page, scheme):
    tab, _ = opened(browser, folder / page, scheme=scheme)
    tab.locator('details').evaluate_all('all => all.forEach(each => each.open = true)')
    assert tab.evaluate(own_checks) == []
    tab.close()


def test_the_checks_see_what_is_wrong(browser, tmp_path):
    bad = '<p style="color:#999">pale</p><img src="a.png" alt="figure"><table><tr><th>a</th></tr></table><svg></svg>'
    write(tmp_path / 'bad.html', f'<html>{bad}</html>')
    tab, _ = opened(browser, tmp_path / 'bad.html')
    found = ' '.join(tab.evaluate(own_checks))
    for word in ('contrast 2.85', 'no alt', 'no scope', 'no caption', 'no label', 'no language'):
        assert word in found, word
    tab.close()


def serious(tab):
    "What axe finds in a tab that keeps a person out: rule and first place of each serious or critical finding."
    axe = importlib.resources.files('axe_playwright_python') / 'axe.min.js'
    tab.evaluate(axe.read_text(encoding='utf-8'))
    found = tab.evaluate('axe.run({resultTypes: ["violations"]}).then(found => found.violations)')
    return [
        (each['id'], each['nodes'][0]['html'][:120]) for each in found if each['impact'] in ('serious', 'critical')
    ]


@pytest.mark.parametrize('page', pages)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe_finds_nothing_serious(browser, folder, page, scheme):
    tab, _ = opened(browser, folder / page, scheme=scheme)
    tab.locator('details').evaluate_all('all => all.forEach(each => each.open = true)')
    assert serious(tab) == []
    tab.close()


def test_axe_sees_what_is_wrong(browser, tmp_path):
    write(tmp_path / 'bad.html', '<html><p style="color:#999">pale</p><img src="data:,"></html>')
    tab, _ = opened(browser, tmp_path / 'bad.html')
    assert {rule for rule, _ in serious(tab)} >= {'color-contrast', 'image-alt', 'html-has-lang', 'document-title'}
    tab.close()


def test_figures_can_be_read_on_a_phone(browser, folder):
    tab, _ = opened(browser, folder / pages[0], 390)
    small, beyond = tab.evaluate("""() => {
      const texts = [...document.querySelectorAll('.figure svg text')];
      const size = each => parseFloat(getComputedStyle(each).fontSize) * each.getScreenCTM().a;
      const ends = texts.map(each => each.getBoundingClientRect()).filter(each => each.left < 0 || each.right > 390);
      return [Math.min(...texts.filter(each => each.getAttribute('transform').includes('rotate(-0')).map(size)),
              ends.length]; }""")
    assert small >= 9 and beyond == 0
    tab.close()


def test_columns_of_prose_become_cards_without_what_is_unknown(browser, folder):
    tab, _ = opened(browser, folder / pages[0], 390)
    shown = tab.evaluate("""() => {
      const named = [...document.querySelectorAll('caption')].find(each => each.textContent == 'Pairs');
      const rows = [...named.parentElement.tBodies[0].rows];
      return rows.map(row => [...row.cells].map(each => getComputedStyle(each).display)); }""")
    assert shown == [['block', 'block', 'none'], ['block', 'block', 'flex']]
    tab.close()


def test_a_wide_table_shows_that_it_scrolls_and_cards_have_no_blanks(browser, tmp_path):
    rows = [{f'a long column {number}': size for number in range(16)} for size in (10.0, 5.25)]
    page = render_report(new_notebook(cells=[cell('table(rows)', shown(table(rows)))]), record)
    write(tmp_path / 'wide.html', page)
    tab, _ = opened(browser, tmp_path / 'wide.html', 1280)
    box = tab.evaluate("""() => {
      const box = document.querySelector('.scroll.table');
      return [box.scrollWidth > box.clientWidth, box.getBoundingClientRect().right <= innerWidth,
              getComputedStyle(box).backgroundAttachment]; }""")
    assert box == [True, True, 'local, local, scroll, scroll']
    blanks = "getComputedStyle(document.querySelector('td .pad')).display"
    assert tab.evaluate(blanks) == 'inline'
    tab.set_viewport_size(dict(width=390, height=800))
    assert tab.evaluate(blanks) == 'none'
    tab.close()


def test_provenance_has_a_line_per_part_without_what_is_empty():
    meta = record['meta'] | dict(
        data=dict(train=dict(documents=1234, sha256='ab' * 32, lost=0), valid=dict(documents=8), config='')
    )
    page = render_report(notebook(), record | dict(meta=meta)).split('<footer>')[1]
    assert '<dd><div>train: documents 1,234 · sha256 <span title="' in page and '>abababababab</span></div>' in page
    assert '<div>valid: documents 8</div></dd>' in page and 'config' not in page and 'lost' not in page
    assert 'Provenance: code' not in render_report(notebook(), record)


def test_text_on_coloured_cells_does_not_follow_the_page():
    assert {on_pale.lower(), on_deep.lower()}.isdisjoint(tones)


def test_the_page_over_all_runs_fits_a_phone_and_shows_curves_whole(browser, folder):
    tab, _ = opened(browser, folder / 'index.html', 1280)
    hint, curve = tab.locator('.lead .wide'), tab.locator('td svg').first
    assert hint.is_visible() and curve.bounding_box()['width'] == 100
    tab.set_viewport_size(dict(width=390, height=800))
    assert not hint.is_visible() and tab.evaluate('document.documentElement.scrollWidth') == 390
    tab.close()


def test_figures_follow_the_page_into_the_dark(browser, folder):
    colours = {}
    for scheme in ('light', 'dark'):
        tab, _ = opened(browser, folder / pages[0], scheme=scheme)
        colours[scheme] = tab.evaluate("""() => {
          const svg = document.querySelector('.figure svg');
          return [getComputedStyle(svg.querySelector('text')).fill, getComputedStyle(svg.querySelector('path')).fill];
        }""")
        tab.close()
    assert colours['light'] != colours['dark']
    assert colours['dark'] == ['rgb(223, 226, 229)', 'rgb(21, 24, 28)'], colours  # ink and paper of the dark page


def test_printing_shows_every_table_whole_and_the_parameters_open(browser, folder):
    tab, _ = opened(browser, folder / pages[0], width=718)  # A4 without its margins, at 96 dots per inch
    tab.emulate_media(media='print')
    wide = tab.evaluate("""() => [...document.querySelectorAll('table')].filter(each => each.getClientRects().length)
      .map(each => each.getBoundingClientRect().right).filter(right => right > innerWidth)""")
    assert wide == [], wide
    assert tab.locator('.params table').first.bounding_box()['height'] > 40
    assert not tab.locator('nav').is_visible() and not tab.locator('text=Setup: code').is_visible()
    assert tab.pdf(format='A4')[:4] == b'%PDF'
    tab.close()


def test_the_keyboard_reaches_the_content_first(browser, folder):
    tab, _ = opened(browser, folder / pages[0])
    tab.keyboard.press('Tab')
    assert tab.evaluate('document.activeElement.textContent') == 'Skip to the content'
    assert tab.locator('.skip').bounding_box()['width'] > 50
    tab.keyboard.press('Enter')
    assert tab.evaluate('location.hash') == '#main'
    tab.close()


# ---- the page over all runs


def test_the_page_over_all_runs_says_what_there_is(folder):
    page = (folder / 'index.html').read_text()
    assert page.count('<tr>') == 4 and page.count('aria-label="loss from') == 3
    for words in ('LoRA lowered the perplexity from 34.2 to 26.2.', 'badge done', 'badge interrupted', 'badge failed'):
        assert words in page, words
    assert page.count('class="chip">seed') == 3 and 'class="chip">method' not in page
    assert 'It took 5 s' not in page and 'href="finetune/first/report.html"' in page


def test_the_page_over_all_runs_sorts_and_leads_to_reports(browser, folder):
    tab, trouble = opened(browser, folder / 'index.html')
    names = "() => [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)"
    tab.click('th button:text-is("run")')
    ascending = tab.evaluate(names)
    tab.click('th button:text-is("run")')
    assert ascending == ['finetune/first', 'finetune/second', 'finetune/third'] == tab.evaluate(names)[::-1]
    assert tab.locator('th[aria-sort=descending]').count() == 1
    tab.click('text=finetune/second')
    assert 'stopped by SIGTERM' in tab.content() and not trouble
    tab.close()


def test_a_live_page_is_that_of_a_run_in_progress_only(tmp_path):
    place = tmp_path / 'outputs' / 'finetune' / 'x'
    for status in ('running', 'interrupted'):
        write(place / 'run.json', json.dumps(record | dict(run=run | dict(status=status))))
        write(place / 'live.html', 'in progress')
        assert 'x/live.html' not in write_overview(tmp_path / 'outputs').read_text()

    hold(place)
    try:
        assert 'x/live.html' not in write_overview(tmp_path / 'outputs').read_text()
        write(place / 'run.json', json.dumps(record | dict(run=run | dict(status='running'))))
        assert 'x/live.html' in write_overview(tmp_path / 'outputs').read_text()
    finally:
        release(place)


def test_hostile_names_and_verdicts_stay_text(browser, tmp_path):
    place = tmp_path / 'outputs' / 'finetune' / 'x'
    evil = '<img src=x onerror="window.hacked=1">'
    facts = record | dict(run=run | dict(verdict=evil, error=evil), params=dict(a=evil))
    write(place / 'run.json', json.dumps(facts))
    other = tmp_path / 'outputs' / 'finetune' / 'y'
    shutil.copytree(place, other)
    write(other / 'run.json', json.dumps(facts | dict(params=dict(a=1))))
    tab, trouble = opened(browser, write_overview(tmp_path / 'outputs'))
    assert tab.evaluate('window.hacked') is None and not trouble and tab.locator('img').count() == 0
    assert tab.locator('tbody tr').count() == 2
    tab.close()


def test_copies_in_the_gallery_lead_back_and_have_a_thumbnail(folder, tmp_path, monkeypatch):
    pytest.importorskip('mkdocs')
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / 'tools'))
    docs = importlib.import_module('docs')
    monkeypatch.setattr(docs, 'root', tmp_path)
    shutil.copytree(folder, tmp_path / 'outputs/gallery')
    report = tmp_path / 'outputs/gallery/finetune/first/report.html'
    report.write_text(report.read_text().replace('<main', '<a href="certificate.llmft">a certificate</a><main', 1))
    docs.copy_reports(tmp_path / 'site')
    copy = (tmp_path / 'site/gallery/finetune/first.html').read_text()
    assert 'a certificate<main' in copy
    assert copy.index('href="../../gallery.html"') < copy.index('<header>')
    drawing = (tmp_path / 'site/gallery/finetune/first.svg').read_text()
    assert ElementTree.fromstring(drawing).get('aria-label').startswith('Loss.')
    assert len(list((tmp_path / 'site/gallery').rglob('*.html'))) == 3


def test_links_of_a_copy_lead_somewhere(tmp_path, monkeypatch):
    pytest.importorskip('mkdocs')
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / 'tools'))
    docs = importlib.import_module('docs')
    write(tmp_path / 'two words.html', 'a page')
    live = ['#data', 'https://example.org/a', 'mailto:a@example.org', 'two%20words.html#data']
    dead = ['certificate.llmft', '../../x/report.html', 'a.txt?b#c']
    texts = [f'<a class="x" href="{address}" rel="y">the <b>words</b>\nof it</a>' for address in [*live, *dead]]
    found = docs.without_dead_links(' and '.join(texts), tmp_path)
    assert found == ' and '.join([*texts[:4], *['the <b>words</b>\nof it'] * 3])


def test_a_report_is_written_for_a_notebook_that_was_saved(tmp_path):
    path = write_reports(notebook(), record, tmp_path)
    again = nbformat.read(tmp_path / 'report.ipynb', 4)
    assert render_report(again, record, {}, tmp_path) == path.read_text()
