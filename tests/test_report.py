"The page of a run: self-contained, truthful about the status, safe whatever a cell put out."

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmft.runs.execute import execute_run
from llmft.runs.report import ansi_html, last_state, markdown_html, math_html, render_report, safe_html

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
    ] + re.findall(r'url\(|@import|<link|<script|<iframe', page)


def test_a_whole_report(tmp_path):
    execute_run(
        here / 'report.ipynb', dict(outputs=str(tmp_path), name='lora', lora_rank=16), on_line=lambda line: None
    )
    page = (tmp_path / 'report' / 'lora' / 'report.html').read_text()
    assert fetched(page) == [] and "default-src 'none'" in page and len(page) < 400_000
    assert (
        page.count('<math') >= 2
        and '<img alt="figure" src="data:image/png;base64,' in page
        and 'class="badge done"' in page
    )
    assert '1 line on stderr' in page or '2 lines on stderr' in page
    assert 'training: 100%' in page and 'Open In Colab' not in page and 'colab.research' not in page
    assert (
        '18.4 to 11.8' in page.split('<main>')[0]
        and 'fingerprint' in page.split('<footer>')[1]
        and '4 changed' not in page.split('<main>')[0]
    )
    assert 'class=changed><td>lora_rank</td><td title="16">16</td><td class="was">8</td>' in page
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
