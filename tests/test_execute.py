"The runner: fixture notebooks that end in every way, and what run.json, the notebook and the report say afterwards."

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from house import write_experiment

from llmft.core import LabError
from llmft.data.hashes import source_hashes
from llmft.runs import execute as execute_module
from llmft.runs import figures, provenance
from llmft.runs import report as report_module
from llmft.runs.execute import RunLog, execute_run
from llmft.runs.locks import is_held
from llmft.runs.progress import Passing, Screen
from llmft.runs.report import write_live
from llmft.runs.run import read_run

here = Path(__file__).parent / 'notebooks'
runner = '''
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmft.runs.execute import execute_run
record = execute_run(sys.argv[1], json.loads(sys.argv[2]), on_line=lambda line: print(line, flush=True))
print(json.dumps(record['run']))
'''


@pytest.fixture(autouse=True)
def same_library(monkeypatch):
    "Edits of the library while the tests run do not make a second run another one."
    monkeypatch.setattr(provenance, 'library_hashes', lambda: {})


def execute(name, tmp_path, lines=None, params=None, **kwargs):
    "Run a fixture; its record and its folder."
    lines = [] if lines is None else lines
    return execute_run(
        here / f'{name}.ipynb', dict(outputs=str(tmp_path)) | (params or {}), on_line=lines.append, **kwargs
    ), tmp_path / name / 'demo'


def start(name, tmp_path, wait_for='kernel.pid'):
    "A runner in its own process, once the notebook has written `wait_for`; the process and the kernel's process."
    process = subprocess.Popen(
        [sys.executable, '-c', runner, str(here / f'{name}.ipynb'), json.dumps(dict(outputs=str(tmp_path)))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    file = tmp_path / name / 'demo' / wait_for
    for _ in range(600):
        if file.exists() and file.read_text():
            break
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    return process, psutil.Process(int(file.read_text()))


def gone(process, seconds=5):
    "Whether `process` ends within `seconds`."
    end = time.time() + seconds
    while time.time() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def check_folder(folder, record):
    "What holds for every run: the files are there and agree, nothing is left over."
    assert read_run(folder) == record and json.loads((folder / 'run.json').read_text()) == record
    notebook = nbformat.read(folder / 'report.ipynb', 4)
    nbformat.validate(notebook)
    assert notebook.metadata.llmft == dict(id=record['run']['id'], status=record['run']['status'])
    page = (folder / 'report.html').read_text()
    assert record['run']['status'] in page and len(page) < 1_500_000
    assert [p.name for p in folder.iterdir() if 'partial' in p.name or p.name == '.reserve'] == []
    banner = notebook.cells[0].metadata.get('tags') == ['llmft-status']
    assert banner == (record['run']['status'] != 'done')
    states = [c.metadata.papermill.status for c in notebook.cells if c.cell_type == 'code']
    if record['run']['status'] == 'done':
        assert set(states) == {'completed'}
    return notebook, page, states


def test_done_and_again(tmp_path):
    lines = []
    record, folder = execute('ok', tmp_path, lines, dict(learning_rate=2e-4))
    assert (record['run']['status'], record['run']['error'], record['params']['learning_rate']) == ('done', None, 2e-4)
    assert json.loads((folder / 'metrics.json').read_text()) == dict(learning_rate=2e-4, steps=3)
    check_folder(folder, record)
    env = json.loads(next(line for line in lines if line.startswith('environment')).split(' ', 1)[1].rsplit(' ', 1)[0])
    assert env == dict(
        MPLBACKEND='module://matplotlib_inline.backend_inline',
        TOKENIZERS_PARALLELISM=os.environ.get('TOKENIZERS_PARALLELISM', 'false'),
        HF_HUB_DISABLE_TELEMETRY='1',
        WANDB_MODE=os.environ.get('WANDB_MODE', 'disabled'),
        LLMFT_RUN=None,
    )
    kept = [line for line in lines if not isinstance(line, Passing)]  # progress is for the terminal alone
    assert kept == (folder / 'train.log').read_text().splitlines()
    started = time.time()
    assert execute('ok', tmp_path, params=dict(learning_rate=2e-4))[0] == record and time.time() - started < 1
    other, _ = execute('ok', tmp_path, params=dict(learning_rate=1e-3))
    assert (
        other['run']['id'] != record['run']['id']
        and read_run(tmp_path / 'ok' / '_previous' / f"demo-{record['run']['id']}") == record
    )
    fresh, _ = execute('ok', tmp_path, params=dict(learning_rate=1e-3), fresh=True)
    assert fresh['run']['id'] != other['run']['id'] and fresh['meta']['fingerprint'] == other['meta']['fingerprint']


@pytest.mark.parametrize(
    'name, words, cell, states',
    [
        ('raises', 'ValueError: loss is not a number', 5, 'CCCCFPP'),
        ('laberror', 'LabError: rank is 0', 4, 'CCCFP'),
        ('sysexit0', 'sys.exit(0)', 4, 'CCCFP'),
        ('sysexit1', 'sys.exit(1)', 4, 'CCCFP'),
        ('osexit', 'exit status 3', 4, 'CCCFP'),
        ('killed', 'killed (signal 9)', 4, 'CCCFP'),
        ('unfinished', 'without run.finish', None, 'CCCC'),
        ('after_finish', 'after the finish', 5, 'CCCCF'),
    ],
)
def test_failures(tmp_path, name, words, cell, states):
    record, folder = execute(name, tmp_path)
    assert record['run']['status'] == 'failed' and words in record['run']['error'] and record['run']['cell'] == cell
    notebook, page, stamped = check_folder(folder, record)
    assert ''.join(state[0].upper() for state in stamped) == states
    assert words.split(':')[-1] in notebook.cells[0].source


def test_a_failed_run_is_tried_again_in_its_folder(tmp_path):
    first, folder = execute('raises', tmp_path)
    (folder / 'checkpoints').mkdir()
    again, _ = execute('raises', tmp_path)
    assert again['run']['resumed'] == first['run']['id'] and (folder / 'checkpoints').exists()


def test_timeout(tmp_path):
    record, folder = execute('sleeps', tmp_path, timeout_seconds=8)
    assert record['run']['status'] == 'failed' and record['run']['error'] == 'ran longer than 8 s'
    notebook, page, states = check_folder(folder, record)
    assert states == ['completed'] * 3 + ['failed', 'pending']
    assert any(
        o.output_type == 'error' and o.ename == 'KeyboardInterrupt' for o in notebook.cells[-2].outputs
    )  # where it hung
    assert not psutil.pid_exists(int((folder / 'kernel.pid').read_text()))


@pytest.mark.parametrize('number, words', [(signal.SIGINT, 'Ctrl-C'), (signal.SIGTERM, 'SIGTERM')])
def test_ctrl_c(tmp_path, number, words):
    process, kernel = start('sleeps', tmp_path)
    process.send_signal(number)
    out = process.communicate(timeout=30)[0]
    record = json.loads(out.splitlines()[-1])
    assert (
        process.returncode == 0
        and record['status'] == 'interrupted'
        and words in record['error']
        and record['cell'] == 4
    )
    check_folder(tmp_path / 'sleeps' / 'demo', read_run(tmp_path / 'sleeps' / 'demo'))
    assert gone(kernel) and 'Traceback' not in out


def test_second_ctrl_c_kills_a_kernel_that_does_not_listen(tmp_path):
    process, kernel = start('deaf', tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert kernel.is_running() and process.poll() is None
    process.send_signal(signal.SIGINT)
    assert json.loads(process.communicate(timeout=30)[0].splitlines()[-1])['status'] == 'interrupted' and gone(kernel)


def test_kill_9_of_the_kernel(tmp_path):
    process, kernel = start('sleeps', tmp_path)
    kernel.kill()
    record = json.loads(process.communicate(timeout=30)[0].splitlines()[-1])
    assert record['status'] == 'failed' and 'signal 9' in record['error'] and record['cell'] == 4


def test_kill_9_of_the_runner(tmp_path):
    process, kernel = start('deaf', tmp_path)
    folder = tmp_path / 'deaf' / 'demo'
    assert read_run(folder)['run']['status'] == 'running'
    with pytest.raises(LabError, match=f'in use by process {process.pid}'):
        execute('deaf', tmp_path)
    process.kill()
    process.wait()
    assert gone(kernel, 3)
    assert json.loads((folder / 'run.json').read_text())['run']['status'] == 'running'
    end = time.time() + 5  # a zombie's other threads may hold the lock a moment longer
    while is_held(folder) and time.time() < end:
        time.sleep(0.05)
    assert (
        read_run(folder)['run']['status']
        == 'interrupted'
        == json.loads((folder / 'run.json').read_text())['run']['status']
    )


@pytest.mark.parametrize(
    'name, words', [('no_tag', 'no cell tagged'), ('two_tags', '2 cells tagged'), ('derived', 'not a literal')]
)
def test_refused_before_any_work(tmp_path, name, words):
    with pytest.raises(LabError, match=words):
        execute(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'params, words',
    [
        (dict(learning_rat=1.0), "did you mean 'learning_rate'"),
        (dict(learning_rate='2e-4'), 'not a number'),
        (dict(name='../x'), 'cannot name a run'),
    ],
)
def test_parameters_are_refused_before_any_work(tmp_path, params, words):
    with pytest.raises(LabError, match=words):
        execute('ok', tmp_path, params=params)
    assert list(tmp_path.iterdir()) == []


def test_parameters_arrive_as_they_were_given(tmp_path):
    given = dict(
        learning_rate=1e-323, steps=-(2**62), quick=False, targets=['a"b', "c'd\\n", 'e\nf', 'größe ☃', '{x}', '%s', '']
    )
    record, folder = execute('ok', tmp_path, params=given)
    assert record['run']['status'] == 'done' and {k: record['params'][k] for k in given} == given
    assert json.loads((folder / 'metrics.json').read_text()) == dict(learning_rate=1e-323, steps=-(2**62))


def test_braces_in_paths(tmp_path):
    record, folder = execute('ok', tmp_path / '{x}')
    assert record['run']['status'] == 'done' and (folder / 'report.html').exists()


def test_ten_megabytes_of_output(tmp_path):
    lines = []
    record, folder = execute('prints', tmp_path, lines)
    assert record['run']['status'] == 'done' and len(lines) < 50
    check_folder(folder, record)
    assert (folder / 'report.ipynb').stat().st_size < 1_500_000 and (folder / 'train.log').stat().st_size > 10_000_000


def test_rows_of_the_log_reach_the_terminal(tmp_path):
    lines = []
    record, folder = execute('logs', tmp_path, lines)
    rows = ['step 1  loss 3', 'step 2  loss 1.5', 'step 3  loss 1']
    assert [line for line in (folder / 'train.log').read_text().splitlines() if line.startswith(('---', 'step'))] == [
        '--- Train',
        *rows,
    ]
    shown = [line for line in lines if isinstance(line, Passing)]
    steps = ['step 1  loss 3.00', 'step 2  loss 1.50', 'step 3  loss 1.00']
    assert lines[0] == '--- Train' and 1 <= len(shown) <= 2 and set(shown) <= set(steps)


def in_two_threads(*actions):
    "Run the actions at the same time, each in its own thread."
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class SlowTerminal(io.StringIO):
    "A terminal that takes a moment for each piece of text, so that another thread gets its turn in between."

    def write(self, text):
        time.sleep(0.0005)
        return super().write(text)


def test_progress_never_shares_a_line_with_what_a_cell_prints():
    terminal = SlowTerminal()
    screen = Screen(terminal, in_terminal=True)
    in_two_threads(
        lambda: [screen.show(Passing(f'{step}/100  loss 2.50')) for step in range(100)],
        lambda: [screen.show(f'printed {number}') for number in range(100)],
    )
    lines = [line.rsplit('\r', 1)[-1] for line in terminal.getvalue().split('\n')]
    assert [line for line in lines if 'printed' in line] == [f'  printed {number}' for number in range(100)]


def test_a_row_is_kept_once_although_two_threads_read_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLog, 'follow', lambda self: None)
    log = RunLog(SimpleNamespace(folder=tmp_path, on_line=print, row_seconds=1000, params={}))
    log.next_row = float('inf')
    new_bytes = log._new_bytes

    def slowly():
        data = new_bytes()
        log.offset -= len(data)
        time.sleep(0.05)
        log.offset += len(data)
        return data

    monkeypatch.setattr(log, '_new_bytes', slowly)
    (tmp_path / 'log.jsonl').write_text(''.join(f'{{"step": {step}, "loss": 2.5}}\n' for step in range(100)))
    in_two_threads(log.new_rows, log.new_rows)
    assert (tmp_path / 'train.log').read_text().splitlines() == [f'step {step}  loss 2.5' for step in range(100)]


def test_a_run_that_goes_on_has_a_page_which_ends_with_it(tmp_path, monkeypatch):
    assert figures.loss_curves  # loaded before the clock runs
    monkeypatch.setattr(execute_module, 'live_seconds', 0)
    seen = []

    def write(*args):
        seen.append(write_live(*args).read_text())

    monkeypatch.setattr(execute_module, 'write_live', write)
    record, folder = execute('logs', tmp_path, params=dict(steps=40))
    assert record['run']['status'] == 'done' and not (folder / 'live.html').exists()
    assert seen and 'http-equiv="refresh"' in seen[-1] and 'this run is in progress: step ' in seen[-1]
    assert 'aria-label="Loss so far' in seen[-1] and 'refresh' not in (folder / 'report.html').read_text()


def test_a_report_that_cannot_be_made_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, 'render_report', lambda *args: 1 / 0)
    record, folder = execute('ok', tmp_path)
    assert (
        record == read_run(folder)
        and record['run']['status'] == 'failed'
        and 'ZeroDivisionError' in record['run']['error']
        and not (folder / 'report.html').exists()
    )


full_disk = '''
import json, os, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', str(folder)], check=True)
from llmft.runs.execute import execute_run
record = execute_run(sys.argv[2], dict(outputs=str(folder)), on_line=lambda line: None)
print(json.dumps([record['run'], json.loads((folder/'full_disk'/'demo'/'run.json').read_text())['run'], (folder/'full_disk'/'demo'/'big').stat().st_size]))
'''


def test_full_disk(tmp_path):
    process = subprocess.run(
        ['unshare', '-rm', sys.executable, '-c', full_disk, str(tmp_path), str(here / 'full_disk.ipynb')],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if 'mount' in process.stderr or 'unshare' in process.stderr:
        pytest.skip(f'no small file system can be made here: {process.stderr.splitlines()[-1]}')
    run, on_disk, big = json.loads(process.stdout.splitlines()[-1])
    assert run == on_disk and run['status'] == 'failed' and 'space' in run['error'].lower() and big == 1000


def test_a_long_loop_outside_training_shows_how_far_it_is(tmp_path):
    lines = []
    record, folder = execute('counts', tmp_path, lines, row_seconds=0.5)
    shown = [line for line in lines if 'pages read' in line]
    assert record['run']['status'] == 'done' and all(isinstance(line, Passing) for line in shown)
    assert any('/60 pages read' in line and line.endswith('left') for line in shown)
    assert 'pages read' not in (folder / 'train.log').read_text()
    assert not list(folder.glob('*counting*'))


def test_a_relative_path_means_the_same_to_the_runner_and_to_the_notebook(tmp_path, monkeypatch):
    for place, text in (('project', 'the wrong file'), ('here', 'the file')):
        (tmp_path / place).mkdir()
        (tmp_path / place / 'notes.txt').write_text(text)
    monkeypatch.chdir(tmp_path / 'project')
    write_experiment(
        'reads',
        'name: str = "demo"  # name of the run\noutputs: str = "outputs"  # folder of all runs\ndata: str = "a"  # a file',
        'from llmft.runs.run import start_run\nfrom llmft.core import find_path\nrun = start_run("reads", globals())',
        'run.finish(dict(size=len(find_path(data).read_text())), "ok")',
    )
    monkeypatch.chdir(tmp_path / 'here')
    Path('results').mkdir()
    notebook = tmp_path / 'project/nbs/experiments/reads.ipynb'
    record = execute_run(notebook, dict(outputs='results', data='notes.txt'), on_line=lambda line: None)
    folder = tmp_path / 'here/results/reads/demo'
    assert record['run']['status'] == 'done', record['run']
    assert json.loads((folder / 'metrics.json').read_text())['size'] == len('the file')
    assert record['read']['data'] == source_hashes('notes.txt', 'datasets')
