"The run's folder: locks, true status, fingerprint, what lies aside, and notebooks run without our runner."

import errno
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from house import write, write_experiment

from llmft.core import LabError, assets, read_json, write_atomic, write_json
from llmft.runs import provenance
from llmft.runs import run as run_module
from llmft.runs.execute import execute_run
from llmft.runs.locks import hold, is_held, now, release
from llmft.runs.provenance import fingerprint, library_hashes
from llmft.runs.run import close_folder, list_runs, open_folder, read_run, reserve_bytes, start_run

here = Path(__file__).parent / 'notebooks'
preamble = '''
import os, sys, time
from llmft.runs.locks import hold
from llmft.runs.run import open_folder, update_record
'''


def child(code, *args):
    "A Python process that runs `code` and has printed its first line."
    process = subprocess.Popen(
        [sys.executable, '-c', preamble + code, *map(str, args)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == 'ready\n'
    return process


def test_a_lock_ends_with_its_process(tmp_path):
    process = child('hold(sys.argv[1]); print("ready", flush=True); time.sleep(60)', tmp_path / 'x')
    with pytest.raises(LabError, match=f'in use by process {process.pid}'):
        hold(tmp_path / 'x')
    assert is_held(tmp_path / 'x')
    process.kill()
    process.wait()
    assert not is_held(tmp_path / 'x')
    hold(tmp_path / 'x')
    release(tmp_path / 'x')


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    code = 'hold(sys.argv[1])\npid = os.fork()\nif pid == 0: time.sleep(20); os._exit(0)\nprint("ready", flush=True); print(pid, flush=True); time.sleep(60)'
    process = child(code, tmp_path / 'x')
    worker = int(process.stdout.readline())
    time.sleep(0.2)
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)  # the worker outlives its parent
        assert not is_held(tmp_path / 'x')
    finally:
        os.kill(worker, 9)


def test_readers_never_turn_a_run_away(tmp_path):
    hold(tmp_path / 'x')
    release(tmp_path / 'x')
    stop = threading.Event()
    answers, turned_away = [], []

    def ask():
        while not stop.is_set():
            answers.append(is_held(tmp_path / 'x'))

    readers = [threading.Thread(target=ask) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(100):
            try:
                hold(tmp_path / 'x')
            except LabError as error:
                turned_away.append(str(error))
            release(tmp_path / 'x')
            time.sleep(0.001)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert len(answers) > 400, 'the readers hardly asked'
    assert turned_away == []


def test_of_many_that_start_at_once_one_runs(tmp_path):
    code = 'import json\ntry: open_folder(sys.argv[1], dict(name="x")); print("won", flush=True)\nexcept Exception as error: print("lost", error.__class__.__name__, flush=True)\ntime.sleep(3)'
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', preamble + code, str(tmp_path / 'x')], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.kill()
        process.wait()
    assert said == ['lost LabError'] * 3 + ['won']


def test_status_after_kill_9(tmp_path):
    process = child(
        'open_folder(sys.argv[1], dict(name="x")); print("ready", flush=True); time.sleep(60)', tmp_path / 'x'
    )
    assert read_run(tmp_path / 'x')['run']['status'] == 'running'
    process.kill()
    process.wait()
    assert read_json(tmp_path / 'x' / 'run.json')['run']['status'] == 'running'
    assert (
        read_run(tmp_path / 'x')['run']['status']
        == read_json(tmp_path / 'x' / 'run.json')['run']['status']
        == 'interrupted'
    )


def test_killed_at_any_moment_the_record_reads(tmp_path):
    code = 'open_folder(sys.argv[1], dict(name="x")); print("ready", flush=True)\nfor i in range(10**6): update_record(sys.argv[1], train=dict(steps=i, text="x" * 5000))'
    for moment in (0.01, 0.03, 0.06, 0.1, 0.15):
        process = child(code, tmp_path / 'x')
        time.sleep(moment)
        process.kill()
        process.wait()
        assert read_run(tmp_path / 'x')['run']['status'] == 'interrupted'


def test_same_run_resumes_and_another_moves_it_aside(tmp_path):
    folder = tmp_path / 'out' / 'demo' / 'x'
    first = open_folder(folder, dict(name='x', lr=1.0))
    (folder / 'checkpoints').mkdir()
    close_folder(folder, 'failed', 'bad', 3)
    again = open_folder(folder, dict(name='x', lr=1.0, outputs='elsewhere'))
    assert (
        again['run']['resumed'] == first['run']['id']
        and (folder / 'checkpoints').exists()
        and again['run']['error'] is None
    )
    close_folder(folder, 'done')
    assert open_folder(folder, dict(name='x', lr=1.0), keep_done=True)['run'] == read_run(folder)[
        'run'
    ] and not is_held(folder)
    other = open_folder(folder, dict(name='x', lr=2.0))
    assert other['run']['resumed'] is None and not (folder / 'checkpoints').exists()
    aside = folder.parent / '_previous' / f"x-{again['run']['id']}"
    assert read_run(aside)['run']['status'] == 'done' and (aside / 'checkpoints').exists()
    close_folder(folder, 'interrupted')
    fresh = open_folder(folder, dict(name='x', lr=2.0), fresh=True)
    assert fresh['run']['resumed'] is None and len(list((folder.parent / '_previous').iterdir())) == 2
    close_folder(folder, 'done')
    assert [record['run']['id'] for record in list_runs(tmp_path / 'out')] == [fresh['run']['id']]


def test_a_run_whose_beginning_takes_long_ends_no_later_than_now(tmp_path, monkeypatch):
    "What reads the run begins after it: an end in the future would make a sweep run what is done once more."
    monkeypatch.setattr(run_module, 'git_state', lambda: time.sleep(0.5) or dict(commit=None, dirty=None))
    folder = tmp_path / 'outputs/act/one'
    before = datetime.fromisoformat(now())
    record = open_folder(folder, dict(name='one'))
    closed = close_folder(folder, 'done')['run']
    assert before <= datetime.fromisoformat(record['run']['started']) < before + timedelta(seconds=0.4)
    assert closed['seconds'] >= 0.5 and datetime.fromisoformat(closed['ended']) <= datetime.fromisoformat(now())


def test_a_broken_record_is_moved_aside_not_deleted(tmp_path):
    write_atomic(tmp_path / 'x' / 'run.json', '{"run": ')
    write_atomic(tmp_path / 'x' / 'precious', 'data')
    open_folder(tmp_path / 'x', dict(name='x'))
    close_folder(tmp_path / 'x', 'done')
    assert (tmp_path / '_previous' / 'x-unknown' / 'precious').read_text() == 'data'


def test_fingerprint_sees_code_and_parameters_and_nothing_else(tmp_path):
    notebook = json.loads((here / 'ok.ipynb').read_text())

    def of(change=lambda nb: None, params=None):
        copy = json.loads(json.dumps(notebook))
        change(copy)
        return fingerprint(params or dict(lr=1.0), write_atomic(tmp_path / 'n.ipynb', json.dumps(copy)))

    same = of()
    assert of(lambda nb: nb['cells'][0].update(source='# another title')) == same
    assert of(lambda nb: nb['cells'][2].update(outputs=[], execution_count=7)) == same
    assert of(params=dict(lr=1.0, outputs='x')) == same
    assert (
        len(
            {
                same,
                of(lambda nb: nb['cells'][2].update(source='x = 1')),
                of(params=dict(lr=2.0)),
                of(params=dict(lr=1.0, seed=1)),
            }
        )
        == 4
    )


def test_the_library_is_part_of_the_fingerprint(monkeypatch):
    same = fingerprint({})
    monkeypatch.setattr(provenance, 'library_hashes', lambda: {'run.py': 'other'})
    assert fingerprint({}) != same


@pytest.fixture
def library(tmp_path, monkeypatch):
    "A copy of the package's modules, with small assets, that the fingerprint reads instead of the package."
    package = tmp_path / 'llmft'
    shutil.copytree(assets.parent, package, ignore=shutil.ignore_patterns('assets', '__pycache__'))
    write_atomic(package / 'assets/base/config.json', '{}')
    write_atomic(package / 'assets/report/style.css', 'body {}')
    monkeypatch.setattr(provenance, 'assets', package / 'assets')
    return package


def test_a_changed_byte_in_any_module_changes_the_fingerprint(library):
    modules = sorted(library.rglob('*.py'))
    folders = {path.parent.relative_to(library).as_posix() for path in modules}
    assert {'.', 'data', 'models', 'training', 'runs', 'studies', 'studies/sublora'} <= folders
    before = fingerprint({})
    for path in modules:
        content = path.read_bytes()
        path.write_bytes(content + b'#')
        assert fingerprint({}) != before, f'{path.relative_to(library)} is no part of the fingerprint'
        path.write_bytes(content)
    assert fingerprint({}) == before


def test_a_new_or_missing_module_in_any_package_changes_the_fingerprint(library):
    folders = {path.parent for path in library.rglob('*.py')}
    assert len(folders) >= 10
    before = fingerprint({})
    for folder in folders:
        new = write_atomic(folder / 'one_more.py', '')
        assert fingerprint({}) != before, f'a new module in {folder.relative_to(library)} changes nothing'
        new.unlink()
    assert fingerprint({}) == before
    (library / 'runs/run.py').unlink()
    assert fingerprint({}) != before


def test_of_the_assets_the_model_counts_and_the_style_of_reports_does_not(library):
    before = fingerprint({})
    write_atomic(library / 'assets/report/style.css', 'p {}')
    assert fingerprint({}) == before
    write_atomic(library / 'assets/base/config.json', '{"layers": 3}')
    assert fingerprint({}) != before


def test_the_installed_package_is_hashed_whole():
    hashed = set(library_hashes())
    assert {path.relative_to(assets.parent).as_posix() for path in assets.parent.rglob('*.py')} <= hashed
    assert 'assets/base/model.safetensors' in hashed


def test_what_a_run_exports_is_not_what_it_depends_on(monkeypatch):
    hashes = {'run.py': 'code', 'assets/base/model.safetensors': 'before'}
    monkeypatch.setattr(provenance, 'library_hashes', lambda: hashes)
    pretrain, finetune = dict(export_to='llmft/assets/base'), dict(model='base', export_to='')
    before = fingerprint(pretrain), fingerprint(finetune)
    hashes['assets/base/model.safetensors'] = 'after'
    assert fingerprint(pretrain) == before[0] and fingerprint(finetune) != before[1]
    hashes['run.py'] = 'other code'
    assert fingerprint(pretrain) != before[0]


def test_a_full_disk_leaves_room_for_the_status(tmp_path, monkeypatch):
    open_folder(tmp_path / 'x', dict(name='x'))
    assert (tmp_path / 'x' / '.reserve').stat().st_size == reserve_bytes

    refused = []

    def full(path, value):
        if (tmp_path / 'x' / '.reserve').exists():
            refused.append(path)
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write_json(path, value)

    monkeypatch.setattr(run_module, 'write_json', full)
    close_folder(tmp_path / 'x', 'failed', 'no space')
    assert refused == [tmp_path / 'x' / 'run.json']
    assert read_run(tmp_path / 'x')['run']['status'] == 'failed'


def space(tmp_path, **more):
    return (
        dict(
            __annotations__=dict(name=str, outputs=str, lr=float, tracker=str, tracking=str),
            name='x',
            outputs=str(tmp_path),
            lr='2e-4',
            tracker='off',
            tracking='offline',
        )
        | more
    )


def test_run_in_a_namespace(tmp_path, capsys):
    names = space(tmp_path)
    run = start_run('demo', names)
    assert names['lr'] == run.params.lr == 2e-4 and run.folder == tmp_path / 'demo' / 'x'
    run.note('train', steps=1, tokens=dict(real=5))
    run.note('train', tokens=dict(slots=6), loss=float('nan'))
    run.note('meta', data=dict(train='abc'))
    with pytest.raises(LabError, match='flat'):
        run.finish(dict(a=[1]))
    assert read_run(run.folder)['run']['status'] == 'running'
    run.finish(dict(loss=1.5, memory=float('inf')), 'Well.')
    record = read_run(run.folder)
    assert record['train'] == dict(steps=1, tokens=dict(real=5, slots=6), loss=None) and record['meta']['data'] == dict(
        train='abc'
    )
    assert (
        read_json(run.folder / 'metrics.json') == dict(loss=1.5, memory=None)
        and record['run']['verdict'] == 'Well.'
        and record['run']['status'] == 'done'
    )
    assert (
        capsys.readouterr().out.count('\n') == 1 and not is_held(run.folder) and not (run.folder / '.reserve').exists()
    )


def test_running_the_setup_cell_again(tmp_path):
    first = start_run('demo', space(tmp_path))
    second = start_run('demo', space(tmp_path))
    assert second.id != first.id and read_json(second.folder / 'run.json')['run']['resumed'] == first.id
    second.finish({})


@pytest.mark.parametrize(
    'more, words',
    [
        (dict(lr='fast'), 'lr'),
        (dict(tracking='ofline'), "did you mean 'offline'"),
        (dict(tracker='wnadb'), "did you mean 'wandb'"),
        (dict(In=['# Parameters\nlrr = 1']), "did you mean 'lr'"),
        (dict(name='a/b'), 'cannot name a run'),
    ],
)
def test_namespaces_that_are_refused(tmp_path, more, words):
    with pytest.raises(LabError, match=words):
        start_run('demo', space(tmp_path, **more))
    assert not is_held(tmp_path / 'demo' / 'x')


def test_figure(tmp_path):
    import matplotlib.pyplot as plt

    run = start_run('demo', space(tmp_path))
    fig, ax = plt.subplots(figsize=(4, 3))
    shown = run.figure(fig, 'loss')
    assert (
        (run.folder / 'figures' / 'loss.png').read_bytes() == shown.data
        and 300 < shown.width < 420
        and not plt.fignum_exists(fig.number)
    )
    run.finish({})


def papermill(notebook, tmp_path, *args):
    process = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            '--no-progress-bar',
            str(here / f'{notebook}.ipynb'),
            str(tmp_path / 'out.ipynb'),
            '-p',
            'outputs',
            str(tmp_path),
            *args,
        ],
        capture_output=True,
        text=True,
    )
    return process, tmp_path / notebook / 'demo'


def test_plain_papermill(tmp_path):
    (tmp_path / 'a.yaml').write_text('learning_rate: 2e-4\n')  # text to papermill
    process, folder = papermill('ok', tmp_path, '-f', str(tmp_path / 'a.yaml'))
    record = read_run(folder)
    assert process.returncode == 0 and record['run']['status'] == 'done' and record['params']['learning_rate'] == 2e-4


def test_plain_papermill_leaves_the_report_of_the_runner(tmp_path, monkeypatch):
    "The same page, but for what a run has of its own: times, id, command."
    monkeypatch.chdir(tmp_path)
    common = 'name: str = "first"  # name\noutputs: str = "outputs"  # folder\nsteps: int = 3  # count'
    cells = [
        'from llmft.runs.run import start_run\nrun = start_run("act", globals())',
        'print("counted to", steps)',
        'from IPython.display import HTML\nHTML("<b>bold</b>")',
        'run.finish(dict(steps=steps), "It counted.")',
    ]
    write_experiment('act', common, *cells)
    write('settings.ini', '')
    arguments = ['nbs/experiments/act.ipynb', 'out.ipynb', '-p', 'name', 'plain', '-p', 'steps', '4']
    done = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    execute_run('act', dict(name='managed', steps=4), on_line=lambda line: None)

    pages = {}
    for name in ('plain', 'managed'):
        assert read_run(f'outputs/act/{name}')['run']['status'] == 'done'  # sealed with the page in it
        page = Path(f'outputs/act/{name}/report.html').read_text()
        assert 'counted to 4' in page and '<b>bold</b>' in page and page.split('<main')[0].count('It counted.') == 1
        own = rf'<span class="time">.*?</span>|(?<=class="cell )completed|{name}'
        pages[name] = re.sub(own, '', page.split('<main')[1].split('<footer')[0])
    assert pages['plain'] == pages['managed']
    notebook = nbformat.read('out.ipynb', 4)
    printed = ''.join(output.get('text', '') for output in notebook.cells[-1].outputs)  # a kernel sends it in pieces
    assert 'report: outputs/act/plain/report.html' in printed
    assert 'act/plain' in Path('outputs/index.html').read_text()


def test_plain_papermill_that_fails_leaves_a_report_too(tmp_path):
    process, folder = papermill('raises', tmp_path)
    page = (folder / 'report.html').read_text()
    assert 'badge failed' in page and 'loss is not a number' in page and process.returncode != 0


def test_plain_papermill_with_a_slip(tmp_path):
    process, folder = papermill('ok', tmp_path, '-p', 'learning_rat', '1.0')
    assert process.returncode != 0 and "did you mean 'learning_rate'" in process.stderr and not folder.exists()


def test_plain_papermill_that_fails(tmp_path):
    process, folder = papermill('raises', tmp_path)
    run = read_run(folder)['run']
    assert process.returncode != 0 and (run['status'], run['error']) == ('failed', 'ValueError: loss is not a number')


def tracked_run(tmp_path, tracker):
    "The folder of a run that logged two steps and its results to a tracker."
    run = start_run('demo', space(tmp_path, tracker=tracker))
    run.log(dict(step=1, loss=1.5, best=True))
    run.log(dict(step=2, loss=1.25))
    run.finish(dict(loss=1.0, method='lora'))
    assert not run.tracker.lost
    return run.folder


def test_wandb_offline_stays_here(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'disabled')  # what the runner's kernels have
    assert list(tracked_run(tmp_path, 'wandb').glob('wandb/offline-run-*/*.wandb'))


def test_trackio_offline_holds_the_steps(tmp_path):
    if not find_spec('trackio'):  # importing it would fix its folder
        pytest.skip("trackio is not installed: pip install -e '.[trackers]'")
    database = sqlite3.connect(tracked_run(tmp_path, 'trackio') / 'trackio/llmft.db')
    rows = database.execute('select step, metrics from metrics order by id').fetchall()
    told = [(step, json.loads(metrics)['loss']) for step, metrics in rows]
    assert told[:2] == [(1, 1.5), (2, 1.25)] and told[-1][1] == 1.0


def test_mlflow_offline_holds_the_steps(tmp_path):
    mlflow = pytest.importorskip('mlflow', reason="mlflow is not installed: pip install -e '.[trackers]'")
    folder = tracked_run(tmp_path, 'mlflow')
    client = mlflow.MlflowClient(tracking_uri=(folder / 'mlflow').as_uri())
    [run] = client.search_runs([client.get_experiment_by_name('llmft').experiment_id])
    told = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, 'loss')]
    assert sorted(told) == [(0, 1.0), (1, 1.5), (2, 1.25)]
    assert run.info.status == 'FINISHED' and run.data.tags['method'] == 'lora' and run.data.params['lr'] == '0.0002'


def test_a_resumed_run_continues_the_same_tracked_run(tmp_path):
    mlflow = pytest.importorskip('mlflow', reason="mlflow is not installed: pip install -e '.[trackers]'")
    for step in (1, 2, 3):
        run = start_run('demo', space(tmp_path, tracker='mlflow'))
        run.log(dict(step=step, loss=2.0 - step / 10))
        write_json(run.folder / 'checkpoints/step.json', dict(step=step))
        if step < 3:
            close_folder(run.folder, 'failed', 'as asked')
    run.finish(dict(loss=1.0))
    client = mlflow.MlflowClient(tracking_uri=(run.folder / 'mlflow').as_uri())
    [tracked] = client.search_runs([client.get_experiment_by_name('llmft').experiment_id])
    steps = [metric.step for metric in client.get_metric_history(tracked.info.run_id, 'loss')]
    assert sorted(steps) == [0, 1, 2, 3] and tracked.info.status == 'FINISHED'


def test_wandb_resumes_under_the_same_id(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    for status in ('failed', 'done'):
        run = start_run('demo', space(tmp_path, tracker='wandb'))
        run.log(dict(step=1, loss=1.5))
        if status == 'failed':
            close_folder(run.folder, 'failed', 'as asked')
    run.finish(dict(loss=1.0))
    names = [path.name.split('-')[-1] for path in run.folder.glob('wandb/offline-run-*')]
    assert len(names) >= 1 and len(set(names)) == 1


def test_a_tracker_that_dies_does_not_stop_the_run(tmp_path, capsys):
    run = start_run('demo', space(tmp_path, tracker='wandb'))
    run.tracker.send = lambda values: 1 / 0
    run.log(dict(step=1, loss=1.5))
    run.finish(dict(loss=1.0))
    assert read_run(run.folder)['run']['status'] == 'done'
    assert capsys.readouterr().out.count('wandb failed and is left out from here on: division by zero') == 1


heavy = 'torch transformers papermill nbclient nbconvert nbformat IPython numpy matplotlib wandb'.split()


@pytest.mark.parametrize('module', ['params', 'locks', 'provenance', 'run', 'results', 'report', 'verdict', 'execute'])
def test_imports_stay_light(module):
    code = f'import llmft.runs.{module}, sys; print([m for m in {heavy!r} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stderr
