"The page of a run: self-contained, truthful about the status, safe whatever a cell put out."

import base64
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmft.core import LabError
from llmft.runs import tables
from llmft.runs.execute import execute_run
from llmft.runs.report import (
    ansi_html,
    chips_html,
    clean_html,
    last_state,
    markdown_html,
    math_html,
    render_report,
    safe_html,
    when,
)
from llmft.runs.results import read_result

here = Path(__file__).parent / 'notebooks'
record = dict(
    run=dict(
        id='1',
        notebook='demo',
        name='first',
        status='done',
        error=None,
        cell=None,
        started='2026-08-01T10:00:00+00:00',
        ended='2026-08-01T10:00:05+00:00',
        seconds=5.0,
        command='llmft run',
    ),
    params={},
    train={},
    meta=dict(fingerprint='abc'),
)


def page_of(*outputs, **metadata):
    return render_report(new_notebook(cells=[new_code_cell('x = 1', outputs=list(outputs))], metadata=metadata), record)


def fetched(page):
    "What a browser would fetch for a page: addresses in attributes and styles that are not inside the page."
    return [
        a
        for a in re.findall(
            r'(?:src|srcset|data|poster|background)\s*=\s*["\']?([^"\'\s>]+)',
            re.sub(r'<pre>.*?</pre>', '', page, flags=re.S),
        )
        if not a.startswith('data:')
    ] + re.findall(r'url\((?!#f[0-9a-f]{8}-)|@import|<link|<script|<iframe', page)  # a drawing may refer to itself


@pytest.mark.parametrize('cores, words', [(1, '1 core, Model T'), (2, '2 cores, Model T'), (None, 'Model T')])
def test_the_head_names_the_machine(cores, words):
    host = dict(cpu='Model T') | (dict(cores=cores) if cores else {})
    page = render_report(new_notebook(), record | dict(meta=record['meta'] | dict(machine=host)))
    assert f'<span>{words}</span>' in page.split('</header>')[0]


def test_a_whole_report(tmp_path):
    execute_run(
        here / 'report.ipynb', dict(outputs=str(tmp_path), name='lora', lora_rank=16), on_line=lambda line: None
    )
    page = (tmp_path / 'report' / 'lora' / 'report.html').read_text()
    assert fetched(page) == [] and "default-src 'none'" in page and len(page) < 400_000
    assert (
        page.count('<math') >= 2
        and '<div class="figure"><svg role="img" aria-label="nats per token over optimiser step"' in page
        and '<img alt="figure"' not in page
        and 'class="badge done"' in page
    )
    assert '1 line on stderr' in page or '2 lines on stderr' in page
    assert 'training: 100%' in page and 'Open In Colab' not in page and 'colab.research' not in page
    assert (
        '18.4 to 11.8' in page.split('<main>')[0]
        and 'fingerprint' in page.split('<footer>')[1]
        and '4 changed' not in page.split('<main>')[0]
    )
    assert 'class=changed><th scope="row">lora_rank</th><td title="16">16</td><td class="was">8</td>' in page
    assert '<li title="16"><b>lora_rank</b> 16</li>' in page.split('<main')[0]
    assert len(re.findall(r'<details class="code">', page)) >= 6 and '<details class="code" open' not in page
    for table in re.finditer('<table', page):
        assert page[: table.start()].rstrip().endswith(('tabindex="0">', '"scroll table">'))


@pytest.mark.parametrize(
    'text',
    [
        '<script src="https://x.org/a.js"></script>',
        '<SCRIPT>alert(1)',
        '<iframe src="https://x.org"></iframe>',
        '<img src="https://x.org/a.png">',
        "<img src='http://x.org/a.png'>",
        '<img src=//x.org/a.png>',
        '<link rel="stylesheet" href="https://x.org/a.css">',
        '<video poster="https://x.org/a.png"></video>',
        '<object data="https://x.org/a"></object>',
    ],
)
def test_outputs_fetch_nothing(text):
    assert fetched(page_of(new_output('display_data', data={'text/html': text}))) == []


def test_markdown_fetches_nothing():
    assert '<img' not in markdown_html('![x](https://x.org/a.png) ![y](//x.org/b.png) ![z](../../etc/passwd)')


def test_images_beside_the_notebook_are_taken_in(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'\x89PNG')
    assert 'src="data:image/png;base64,' in markdown_html('![x](a.png)', tmp_path)


@pytest.mark.parametrize(
    'value, words',
    [(5e13, '5e13'), (1234567890.0, '1234567890.0'), (100_000, '100,000'), (2e-5, '2e-5'), (0.004, '0.004')],
)
def test_numbers_among_the_parameters_are_short_and_whole_in_the_title(value, words):
    tagged = new_code_cell(f'budget: {type(value).__name__} = 1  # most', metadata=dict(tags=['parameters']))
    page = render_report(new_notebook(cells=[tagged]), record | dict(params=dict(budget=value)))
    assert f'<li title="{value}"><b>budget</b> {words}</li>' in page
    assert f'<td title="{value}">{words}</td>' in page


def test_a_long_value_is_cut_between_its_signs():
    chips = chips_html(dict(prompts='a' * 58 + '<b>' * 9))
    assert 'a' * 58 + '&lt;…</li>' in chips


def test_the_line_that_checks_a_run_can_be_pasted(tmp_path):
    page = render_report(new_notebook(), record | dict(params=dict(outputs='my runs')))
    assert "llmft verify &#x27;my runs/" in page


def test_text_is_escaped():
    assert '<b>' not in ansi_html('<b>') and '<evil' not in page_of(new_output('stream', name='stdout', text='<evil>'))
    assert '<evil' not in render_report(
        new_notebook(), record | dict(run=record['run'] | dict(status='failed', error='<evil>'))
    )


def test_errors():
    tall = new_output('error', ename='ValueError', evalue='x', traceback=['\x1b[31mValueError\x1b[39m: x'])
    assert '<span class="a1">ValueError</span>: x' in page_of(tall)
    short = page_of(new_output('error', ename='LabError', evalue='rank is 0', traceback=['line'] * 40))
    assert 'rank is 0' in short and short.count('line\n') == 0


def test_carriage_returns():
    assert last_state('1%\r2%\r\n3%\r4%') == '2%\n4%'


def test_what_went_to_stderr_is_one_fold_behind_the_printed_lines():
    lines = [('stdout', 'first'), ('stderr', 'a warning'), ('stdout', 'second'), ('stderr', 'another')]
    notebook = new_notebook(
        cells=[new_code_cell('x', outputs=[new_output('stream', name=name, text=f'{text}\n') for name, text in lines])]
    )
    page = render_report(notebook, record)
    assert page.count('on stderr') == 1 and '2 lines on stderr' in page
    assert page.index('first\nsecond') < page.index('a warning\nanother')
    assert [output.text for output in notebook.cells[0].outputs] == [f'{text}\n' for _, text in lines]


def test_a_time_says_of_which_zone_it_is():
    assert when('2026-08-01T10:00:00+00:00') == '1 August 2026, 10:00 UTC'
    assert when('2026-08-01T10:00:00+02:00') == '1 August 2026, 10:00 UTC+02:00'


def test_huge_outputs_stay_small():
    big = [
        new_output('stream', name='stdout', text='x' * 10**7),
        new_output('display_data', data={'text/html': '<p>' + 'y' * 10**7}),
        new_output('stream', name='stderr', text='z' * 10**7),
    ]
    assert len(page_of(*big)) < 300_000


def test_formulas_that_cannot_be_drawn_are_shown_as_text():
    assert '<math' in math_html('x^2') and '</div>' in math_html('x', block=True)
    assert math_html('') is not None


@given(st.text(), st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_makes_a_page(markdown, output):
    notebook = new_notebook(
        cells=[
            new_markdown_cell(markdown),
            new_code_cell(
                output,
                outputs=[
                    new_output('stream', name='stdout', text=output),
                    new_output('display_data', data={'text/plain': output}),
                ],
            ),
        ]
    )
    page = render_report(notebook, record)
    assert page.endswith('</html>\n') and page.encode()


@pytest.mark.parametrize(
    'tag',
    [
        '<img alt="a>b" src="http://x/y.png">',
        "<img title=it's src=http://x/y.png>",
        '<img\nsrc = "http://x/y.png" alt="z">',
        "<td background='http://x/y.png'>",
    ],
)
def test_what_would_be_fetched_goes_and_text_stays(tag):
    text = '<pre>    src = os.fspath(src)\n    background="blue", poster = 1\n</pre>'
    page = safe_html(tag + text)
    assert 'http' not in page and text in page


# ---- hostile text, in every place that a report reads

payloads = [
    '<meta http-equiv="refresh" content="0;url=http://evil.test/refresh">',
    '<img src=x onerror="window.hacked=1">',
    '"><img src=x onerror=window.hacked=2>',
    "'><img src=x onerror=window.hacked=3>",
    '<scr<script></script>ipt>window.hacked=4</script>',
    '<svg onload="window.hacked=5"><script>window.hacked=6</script></svg>',
    '<svg><style><img src=x onerror=window.hacked=7></style></svg>',
    '<math><mtext></form><form><mglyph><style></math><img src=x onerror=window.hacked=8>',
    '<iframe srcdoc="<script>parent.hacked=9</script>"></iframe><iframe src="http://evil.test/frame"></iframe>',
    '<a href="javascript:window.hacked=10">link</a>[link](javascript:window.hacked=11)',
    '<a href="  jAvAsCrIpT:window.hacked=12" onmouseover="window.hacked=13">link</a><http://evil.test/auto>',
    '<div style="background:url(http://evil.test/style)">x</div><style>@import "http://evil.test/import";</style>',
    '<div style="background:\\75rl(http://evil.test/escaped)">x</div>',
    '<link rel="stylesheet" href="http://evil.test/a.css"><base href="http://evil.test/">',
    '<object data="http://evil.test/o"></object><embed src="http://evil.test/e"><video poster="http://evil.test/v" autoplay>',
    '<form action="http://evil.test/f"><input autofocus onfocus="window.hacked=14"></form>',
    '<details open ontoggle="window.hacked=15">x</details><body onload="window.hacked=16">',
    '<img srcset="http://evil.test/set 1x"><picture><source srcset="http://evil.test/p"></picture>',
    '![x](http://evil.test/image.png)![y](data:image/png,"onerror="window.hacked=17)',
    '$\\text{<img src=x onerror=window.hacked=18>}$',
    '</title></head><script>window.hacked=19</script>',
    '<math href="javascript:window.hacked=20"><mi xlink:href="javascript:window.hacked=21">x</mi></math>',
    '<template><script>window.hacked=22</script></template><noscript><p title="</noscript><img src=x onerror=window.hacked=23>">',
]
hostile = '\n\n'.join(payloads)


def hostile_outputs():
    "Every kind of output that a cell can have, full of hostile text."
    svg = '<svg xmlns="http://www.w3.org/2000/svg" onload="window.hacked=30"><image href="http://evil.test/svg"/></svg>'
    kinds = ['text/plain', 'text/html', 'text/markdown', 'text/latex', 'image/png', 'image/jpeg']
    outputs = [new_output('display_data', data={kind: hostile}) for kind in kinds]
    outputs += [new_output('display_data', data={kind: payload}) for kind in kinds for payload in payloads]
    outputs += [new_output('display_data', data={'image/svg+xml': svg})]
    outputs += [new_output('stream', name=name, text=hostile) for name in ('stdout', 'stderr')]
    outputs += [new_output('error', ename=name, evalue=hostile, traceback=[hostile]) for name in ('LabError', hostile)]
    view = {'application/vnd.jupyter.widget-view+json': dict(model_id='w'), 'text/plain': hostile}
    table_rows = [{hostile: hostile, 'name': payload} for payload in payloads]
    shown = tables.table(table_rows, caption=hostile)._repr_html_()
    return [*outputs, new_output('display_data', data=view), new_output('display_data', data={'text/html': shown})]


def hostile_page(**changed):
    "A report in which whatever is text is hostile."
    facts = dict.fromkeys(('notebook', 'name', 'verdict', 'error', 'cell', 'command', 'id', 'resumed'), hostile)
    run = record['run'] | facts | changed
    meta = dict(fingerprint=hostile, machine={hostile: hostile, 'gpus': [hostile]}, data={hostile: [hostile]})
    image = {'a.png': {'image/png': '" onerror="window.hacked=40', f'image/"{hostile}': 'iVBORw0K'}}
    parameters = new_code_cell(f'rank: str = {hostile!r}  # {payloads[1]}', metadata=dict(tags=['parameters']))
    cells = [
        new_markdown_cell(f'# {payloads[1]}\n> {payloads[5]}\n\n{hostile}\n\n## {payloads[2]}\n'),
        *(new_markdown_cell(f'{payload}\n\n| a |\n|---|\n| {payload} |\n\n- {payload}') for payload in payloads),
        new_markdown_cell('![a](attachment:a.png)', attachments=image),
        parameters,
        new_code_cell(hostile, outputs=hostile_outputs(), metadata=dict(papermill=dict(status=hostile))),
    ]
    state = dict(w=dict(state=dict(_model_name='HTMLModel', value=hostile, children=[])))
    widgets = {'application/vnd.jupyter.widget-state+json': dict(state=state)}
    notebook = new_notebook(cells=cells, metadata=dict(widgets=widgets))
    page_record = dict(run=run, params=dict(rank=payloads[2]), train={hostile: hostile}, meta=meta)
    return render_report(notebook, page_record, {hostile: hostile})


@pytest.fixture(scope='module')
def browser():
    "A real headless Chromium."
    api = pytest.importorskip('playwright.sync_api')
    from test_site import chromium, flags

    if not chromium:
        pytest.skip('no Chromium on this machine: install chromium to see the report tested in it')
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


looks_for_trouble = """() => {
  const found = window.hacked === undefined ? [] : ['ran: ' + window.hacked];
  const drawn = 'svg g path defs use clipPath rect circle ellipse line polyline polygon text tspan title image'.split(' ');
  for (const node of document.querySelectorAll('svg, svg *')) if (!drawn.includes(node.localName)) found.push('<' + node.localName + '> in svg');
  for (const node of document.querySelectorAll('*')) {
    if (/^(script|iframe|object|embed|form|input|link|base|video|audio|template|foreignObject|animate|set)$/i.test(node.localName))
      found.push('<' + node.localName + '>');
    for (const each of node.attributes) {
      if (/^on/i.test(each.name)) found.push(node.localName + ' ' + each.name);
      const value = each.value.replace(/\\s/g, '');
      if (/^(href|src|xlink:href|action|srcset)$/i.test(each.name) && /^(javascript|data:text|vbscript)/i.test(value))
        found.push(node.localName + ' ' + value);
    }
  }
  return found;
}"""


def opened(browser, path):
    "What a page did that a report must not: requests, navigations, dialogs, messages, and what its nodes could do."
    tab = browser.new_page()
    trouble = []
    own = path.as_uri()
    tab.on(
        'request', lambda each: each.url != own and not each.url.startswith('data:image/') and trouble.append(each.url)
    )
    tab.on('framenavigated', lambda frame: frame.url not in (own, 'about:blank') and trouble.append(f'to {frame.url}'))
    tab.on('dialog', lambda dialog: trouble.append(dialog.message) or dialog.dismiss())
    tab.on('console', lambda message: trouble.append(message.text))
    tab.on('pageerror', lambda error: trouble.append(str(error)))
    tab.goto(own)
    tab.locator('summary').evaluate_all('all => all.forEach(each => each.parentElement.open = true)')
    tab.locator('a').evaluate_all('all => all.forEach(each => each.dispatchEvent(new MouseEvent("mouseover")))')
    tab.wait_for_timeout(150)
    trouble += tab.evaluate(looks_for_trouble)
    assert tab.locator('.cell').count() >= 2, 'the page was not drawn'
    tab.close()
    return trouble


@pytest.mark.parametrize('status', ['done', 'failed', payloads[2]])
@pytest.mark.parametrize('locked', [True, False], ids=['with policy', 'without policy'])
def test_nothing_in_a_hostile_report_loads_runs_or_navigates(browser, tmp_path, status, locked):
    page = hostile_page(status=status)
    if not locked:  # the sanitiser alone has to do: the policy is the second lock
        page, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', '', page)
        assert count == 1
    path = tmp_path / 'report.html'
    path.write_text(page)
    assert opened(browser, path) == []


def test_the_browser_sees_what_would_run(browser, tmp_path):
    path = tmp_path / 'bad.html'
    path.write_text('<div class="cell"><img src=x onerror="window.hacked=1"></div><div class="cell"></div>')
    assert any('ran: 1' in each for each in opened(browser, path))


@pytest.mark.parametrize('payload', payloads)
def test_cleaned_twice_is_cleaned_once(payload):
    assert clean_html(clean_html(payload)) == clean_html(payload)


def test_good_markup_stays():
    kept = '<p>a <b>bold</b> <a href="#data">link</a> <code>x</code></p><ul><li>one</li></ul>'
    assert clean_html(kept).replace(' rel="noopener noreferrer"', '') == kept
    assert '<mfrac>' in math_html(r'\frac{a}{b}') and 'stretchy' in math_html(r'\left(\frac{a}{b}\right)')
    assert 'background' in clean_html('<span style="background:#0072b233">x</span>')
    assert clean_html('<td colspan="2">x</td>') == 'x' and 'colspan' in clean_html(
        '<table><tbody><tr><td colspan="2">x</td></tr></tbody></table>'
    )


@pytest.mark.parametrize('place', ['../secret.png', '{absolute}', 'link.png', 'file://{absolute}', 'pipe.png', 'a.txt'])
def test_markdown_carries_off_no_file_from_outside_the_run(tmp_path, place):
    secret = tmp_path / 'secret.png'
    secret.write_bytes(b'\x89PNG secret')
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'own.png').write_bytes(b'\x89PNG own')
    (folder / 'a.txt').write_text('text')
    (folder / 'link.png').symlink_to(secret)
    os.mkfifo(folder / 'pipe.png')
    shown = markdown_html(f'![x]({place.format(absolute=secret)}) ![own](own.png)', folder)
    assert shown.count('<img') == 1 and base64.b64encode(b'\x89PNG own').decode() in shown
    assert '<img' not in markdown_html(f'![x]({secret})') and '<img' not in markdown_html('![x](own.png)')


@pytest.mark.parametrize('part', ['name', 'notebook'])
@pytest.mark.parametrize('value', [payloads[0], '../x', '', None, 3, 'a\nb'])
def test_names_in_run_json_are_checked(tmp_path, part, value):
    folder = tmp_path / 'finetune' / 'x'
    folder.mkdir(parents=True)
    run = dict(notebook='finetune', name='x', status='done', id='1', started='2026-08-01T10:00:00+00:00') | {
        part: value
    }
    (folder / 'run.json').write_text(json.dumps(dict(run=run, params={}, meta={})))
    (folder / 'metrics.json').write_text('{}')
    with pytest.raises(LabError, match=f'{part} is .* names no run|no record of a run .{part} has another type'):
        read_result(folder)
