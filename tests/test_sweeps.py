"""Sweeps: refused before any work when anything is wrong, and finished whatever happens to single runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import pytest
from house import write, write_experiment

from llmft.cli import as_json, closing
from llmft.core import LabError, write_json
from llmft.runs import sweeps
from llmft.runs.identity import seal_record
from llmft.runs.params import find_notebook
from llmft.runs.run import read_run
from llmft.runs.sweep_file import Point, expand, needs, sweep_points
from llmft.runs.sweeps import run_stages, sweep_report
from llmft.runs.workers import local_workers

common = 'name: str = "first"  # name of the run\noutputs: str = "outputs"  # folder of all runs\n'
start = 'from llmft.runs.run import start_run\nrun = start_run("{0}", globals())'
count = '''import os
from pathlib import Path
attempts = Path("attempts")/run.folder.name
attempts.parent.mkdir(exist_ok=True)
with attempts.open("a") as file: file.write("x")
tries = len(attempts.read_text())'''
actions = '''
import signal, time
if action == "raise": raise ValueError("as asked")
if action == "lose worker" and tries == 1:
    (run.folder/"checkpoint").write_text("step 17")
    os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)
if action == "lose every worker": os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)
if action == "meet":
    Path(f"here-{seed}").touch()
    for _ in range(300):
        if len(list(Path().glob("here-*"))) == 2: break
        time.sleep(.1)
    else: raise TimeoutError("nobody came")
if action == "wait": print("waiting", flush=True); time.sleep(120)
'''
finish = '''kept = int((run.folder/"checkpoint").exists())
(run.folder/"adapter").mkdir(exist_ok=True)
(run.folder/"adapter/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
run.finish(dict(tries=tries, kept=kept, threads=os.environ.get("OMP_NUM_THREADS", "")), "ok")'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with two notebooks: act, which does what it is told, and total, which sums up."
    monkeypatch.chdir(tmp_path)
    write('settings.ini', '')
    write_experiment(
        'act',
        common
        + 'action: str = "none"  # what to do\nseed: int = 0  # which\n'
        + 'rate: float = 1e-3  # a number\nmodel: str = "base"  # where from',
        start.format('act'),
        count,
        actions,
        finish,
    )
    write_experiment(
        'total',
        common + 'runs: list[str] = []  # folders of the runs',
        start.format('total'),
        'run.finish(dict(count=len(runs)), "ok")',
    )
    write('params/act/one.yaml', 'seed: 1\nrate: 2e-4\n')
    write('params/act/two.yaml', 'seed: 2\n')
    write('params/act/_small.yaml', 'rate: 5e-5\n')
    return tmp_path


def sweep(text):
    return write('params/sweeps/s.yaml', text)


def outcomes(results):
    return {result['name']: result['status'] for result in results}


def attempts(name):
    return len(Path(f'attempts/{name}').read_text()) if Path(f'attempts/{name}').exists() else 0


stage = 'name: s\nstages:\n  - notebook: act\n'


@pytest.mark.parametrize(
    'text,place,words',
    [
        ('stages: [{notebook: act}]\n', 1, 'a sweep needs name'),
        ('name: s\n', 1, 'a sweep needs stages'),
        ('name: s\nstages: []\n', 2, 'a sweep needs stages'),
        ('name: s\nstagse: []\n', 2, "did you mean 'stages'"),
        ('name: s\nname: t\nstages: []\n', 2, 'name is given twice'),
        ('name: s\nstages: 3\n', 2, 'stages must be a list'),
        ('name: s\nstages: [3]\n', 2, 'a stage must be'),
        ('name: s\nstages:\n  - notebok: act\n', 3, "did you mean 'notebook'"),
        ('name: s\nstages:\n  - notebook: atc\n', 3, "there is no notebook atc (did you mean 'act'?)"),
        ('name: s\nstages:\n  - name: x\n', 3, 'give one of the two'),
        (
            'name: s\nstages:\n  - params: [params/act/oen.yaml]\n',
            3,
            "params/act/oen.yaml is no file (did you mean 'one.yaml'?)",
        ),
        ('name: s\nstages:\n  - params: [params/act/_small.yaml]\n', 3, 'lists no parameter file'),
        (stage + '    params: {sede: 1}\n', 4, "sede is no parameter of act (did you mean 'seed'?)"),
        (stage + '    params: {seed: 1.5}\n', 4, 'seed: 1.5 is not a whole number'),
        (stage + '    params: {seed: 1_000}\n', 4, 'write 1000'),
        (stage + '    params: {name: x}\n', 4, 'move it there'),
        (stage + '    matrix: {sede: [1]}\n', 4, "sede is no parameter of act (did you mean 'seed'?)"),
        (stage + '    matrix:\n      rate: [1e-3]\n      seed: [1, 2, x]\n', 6, "seed: 'x' is not a whole number"),
        (stage + '    matrix: {seed: 1}\n', 4, 'seed must be a list'),
        (stage + '    matrix: {seed: []}\n', 4, 'seed must be a list'),
        (stage + '    points:\n      - {seed: 1}\n      - {rate: fast}\n', 6, "rate: 'fast' is not a number"),
        (stage + '    points: [{seed: 1}]\n    matrix: {seed: [1]}\n', 4, 'is in points and in matrix'),
        (
            stage + '    name: s-{sede}\n    matrix: {seed: [1]}\n',
            4,
            "{sede} is no parameter of the notebook (did you mean 'seed'?)",
        ),
        ('name: s\nseeds: [1, 2]\nstages:\n  - notebook: act\n    points: [8, 16]\n', 5, 'a point must be'),
        (stage + '    name: s-{seed\n', 4, "name 's-{seed'"),
        (stage + '    name: s/{seed}\n', 4, 'cannot name a run'),
        (stage + '    name: s-{rate}\n    matrix: {seed: [1, 2]}\n', 4, 'two runs of act are named s-0.001'),
        (stage + '    name: x\n  - notebook: act\n    name: x\n', 6, 'two runs of act are named x'),
        (stage + 'summary: {name: x}\n', 4, 'the summary needs a notebook'),
        (stage + 'summary: {notebook: act}\n', 4, 'its parameters need `runs: list[str]`'),
        (stage + 'summary: {notebook: total, params: {runs: []}}\n', 4, 'runs is set by the sweep'),
        (stage + 'small: {stages: [{}, {}]}\n', 4, 'small has 2 stages and the sweep 1'),
        (stage + 'small: {stages: [{matirx: {}}]}\n', 4, "did you mean 'matrix'"),
        (stage + 'laptop: {stages: [{}, {}]}\n', 4, 'laptop has 2 stages and the sweep 1'),
        (stage + 'laptop: {summary: {nmae: x}}\n', 4, "did you mean 'name'"),
    ],
)
def test_mistakes_are_found_with_file_and_line(project, text, place, words):
    with pytest.raises(LabError) as caught:
        expand(sweep(text))
    assert f'params/sweeps/s.yaml:{place}: ' in str(caught.value) and words in str(caught.value), caught.value
    assert '\n' not in str(caught.value) and not Path('outputs').exists()


def test_points_are_complete_and_in_order(project):
    text = (
        'name: s\nstages:\n  - notebook: act\n    name: a-{seed}-{rate}\n    params: {action: none}\n'
        '    matrix: {seed: [1, 2], rate: [1e-3, 2e-4]}\n'
        '  - params: [params/act/one.yaml, params/act/two.yaml]\n    name: b-{config}\n    override: {action: x}\n'
        'summary: {notebook: total}\n'
        'small: {stages: [{matrix: {seed: [7]}}]}\n'
        'laptop: {stages: [{matrix: {seed: [8, 9]}}]}\n'
    )
    first, second, (last,) = expand(sweep(text))
    assert [p.name for p in first] == ['a-1-0.001', 'a-1-0.0002', 'a-2-0.001', 'a-2-0.0002']
    assert first[1].params == dict(name='a-1-0.0002', outputs='outputs', action='none', seed=1, rate=2e-4, model='base')
    assert [(p.name, p.params['seed'], p.params['rate'], p.params['action']) for p in second] == [
        ('b-one', 1, 2e-4, 'x'),
        ('b-two', 2, 1e-3, 'x'),
    ]
    assert last.summary and last.params['runs'] == [f'outputs/act/{p.name}' for p in first + second]
    small = sweep_points('params/sweeps/s.yaml', 'small')
    assert [p.name for p in small] == ['a-7-0.001', 'a-7-0.0002', 'b-one', 'b-two', 's'] and small[2].params[
        'rate'
    ] == 5e-5
    write('params/act/_laptop.yaml', 'rate: 7e-5\n')
    laptop = sweep_points('params/sweeps/s.yaml', 'laptop')
    assert [p.name for p in laptop[::2]] == ['a-8-0.001', 'a-9-0.001', 'b-one', 's'] and laptop[4].params['rate'] == 7e-5
    assert {
        p.params['model'] for stage in expand('params/sweeps/s.yaml', overrides=['model=x'])[:2] for p in stage
    } == {'x'}
    with pytest.raises(LabError, match='s.yaml:3: -p seed: seed varies in this stage'):
        expand('params/sweeps/s.yaml', overrides=['seed=9'])
    with pytest.raises(LabError, match="did you mean 'seed'"):
        expand('params/sweeps/s.yaml', overrides=['sede=9'])


def test_a_failed_point_stops_only_what_needs_it(project):
    heard = []
    results = run_stages(
        expand(
            sweep('''name: s
stages:
  - notebook: act
    name: "{action}"
    matrix: {action: ['raise', fine]}
  - notebook: act
    name: after-{seed}
    points: [{seed: 1, model: outputs/act/raise/adapter}, {seed: 2, model: outputs/act/fine/adapter}]
summary: {notebook: total}
''')
        ),
        on_line=heard.append,
    )
    assert outcomes(results) == {
        'raise': 'failed',
        'fine': 'done',
        'after-1': 'not run',
        'after-2': 'done',
        's': 'done',
    }
    assert (
        results[0]['cell'] == 5
        and results[0]['error'] == 'ValueError: as asked'
        and 'failed in cell 5: ValueError: as asked' in sweep_report(results)
    )
    assert 'needs act/raise' in sweep_report(results) and not Path('outputs/act/after-1').exists()
    assert json.loads(Path('outputs/total/s/metrics.json').read_text())['count'] == 2
    assert all(line.startswith(('[act/', '[total/')) for line in heard) and any(
        '[act/fine] done in' in line for line in heard
    )


def test_finished_points_are_skipped_and_the_summary_is_current(project, monkeypatch):
    text = stage + '    name: p-{seed}\n    matrix: {seed: [1]}\nsummary: {notebook: total}\n'
    assert set(outcomes(run_stages(expand(sweep(text)))).values()) == {'done'}
    with monkeypatch.context() as without:
        without.setattr(sweeps, 'local_workers', lambda *_: pytest.fail('a worker was started for finished work'))
        assert set(outcomes(run_stages(expand(sweep(text)))).values()) == {'done'}
    record = json.loads(Path('outputs/act/p-1/run.json').read_text())
    identity = read_run('outputs/total/s')['run']['id']
    record['run']['ended'] = '2999-01-01T00:00:00+00:00'  # as if p-1 had been run again by hand
    write_json('outputs/act/p-1/run.json', seal_record(Path('outputs/act/p-1'), record))
    run_stages(expand(sweep(text)))
    assert attempts('p-1') == 1 and read_run('outputs/total/s')['run']['id'] != identity


def test_an_unfinished_point_begins_anew_when_what_it_reads_was_made_since(project):
    source, reader = [
        Point(find_notebook('act'), dict(name=name, outputs='outputs', start=start))
        for name, start in (('a', ''), ('b', str(Path('outputs/act/a/adapter').absolute())))
    ]
    for point, status, started, ended in ((source, 'done', 3, 4), (reader, 'interrupted', 1, None)):
        run = dict(
            status=status,
            started=f'2026-01-01T00:00:0{started}+00:00',
            ended=ended and f'2026-01-01T00:00:0{ended}+00:00',
        )
        write_json(point.folder / 'run.json', seal_record(point.folder, dict(run=run, meta={})))
    results = {source.folder: sweeps.point_result(source, read_run(source.folder))}
    assert sweeps.ready_points([reader], results, [source], False, lambda *_: None) == [reader] and reader.again
    write_json(
        reader.folder / 'run.json',
        dict(run=dict(status='interrupted', started='2026-01-01T00:00:05+00:00', ended=None), meta={}),
    )
    reader.again = False
    assert sweeps.ready_points([reader], results, [source], False, lambda *_: None) == [reader] and not reader.again


def test_a_run_that_did_not_begin_gives_no_numbers_and_no_report_of_an_earlier_one(project):
    text = stage + """    name: first
    params: {action: none, seed: 1}
  - notebook: act
    name: after
    params: {model: outputs/act/first/adapter}
"""
    before = run_stages(expand(sweep(text)))
    assert [bool(result['report']) for result in before] == [True, True]
    assert [len(run['metrics']) for run in json.loads(as_json(before))['runs']] == [2, 2]

    results = run_stages(expand(sweep(text.replace('action: none', 'action: "raise"'))))
    assert outcomes(results) == {'first': 'failed', 'after': 'not run'}
    assert results[1]['report'] is None and 'after/report' not in closing(results)
    assert json.loads(as_json(results))['runs'][1]['metrics'] == {}


def test_the_command_line_wins_over_what_a_sweep_fills_in(project):
    text = stage + '    name: p-{seed}\n    params: {model: "{outputs}/act/one"}\n    matrix: {seed: [1]}\n'
    (point,) = expand(sweep(text), overrides=['outputs=elsewhere'])[0]
    assert point.params['model'] == 'elsewhere/act/one'
    (point,) = expand(sweep(text), overrides=['model=mine'])[0]
    assert point.params['model'] == 'mine'
    own = text.replace('matrix: {seed: [1]}', 'points: [{seed: 1}, {seed: 2, model: mine}]')
    assert [point.params['model'] for point in expand(sweep(own))[0]] == ['outputs/act/one', 'mine']


@pytest.mark.parametrize('name', ['own_series', 'forecast_study', 'forecast_search'])
@pytest.mark.parametrize('scale', ['', 'small'])
def test_a_sweep_reads_its_own_runs_wherever_its_outputs_lie(name, scale, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    stages = expand(f'params/sweeps/{name}.yaml', scale, overrides=['outputs=second'])
    earlier = []
    for number, points in enumerate(stages):
        assert all(needs(point, earlier) for point in points if number and not point.summary), name
        earlier += points
    named = [text for point in earlier for text in point.params.values() if isinstance(text, str)]
    assert not [text for text in named if text.startswith('outputs/')]


def test_a_killed_worker_costs_one_attempt(project):
    "The point is scheduled again and finds what it saved; what was done is not done twice."
    results = run_stages(
        expand(sweep(stage + '    name: p-{seed}\n    points: [{seed: 1, action: lose worker}, {seed: 2}]\n')),
        fresh=True,
    )
    assert set(outcomes(results).values()) == {'done'}
    metrics = [json.loads(Path(f'outputs/act/p-{seed}/metrics.json').read_text()) for seed in (1, 2)]
    assert [m['tries'] for m in metrics] == [2, 1] and metrics[0]['kept'] == 1
    assert read_run('outputs/act/p-1')['run']['resumed']


def test_a_run_that_kills_every_worker_fails_alone(project):
    results = run_stages(
        expand(sweep(stage + '    name: p-{seed}\n    points: [{seed: 1, action: lose every worker}, {seed: 2}]\n'))
    )
    assert outcomes(results) == {'p-1': 'failed', 'p-2': 'done'} and attempts('p-1') == sweeps.tries
    assert 'worker process' in results[0]['error'] and read_run('outputs/act/p-1')['run']['status'] == 'interrupted'


class FakeFuture:
    def __init__(self, error):
        self.error = error

    def exception(self):
        return self.error

    def result(self):
        return dict(run=dict(status='done'))


def test_a_point_that_only_waited_on_a_dying_worker_is_tried_again(project, monkeypatch):
    "Dask blames every task of a worker that died; only those that had begun there are to blame."
    import distributed

    class Completed(list):
        "What as_completed gives: futures in order, with more to be added on the way."

        def __init__(self, futures, loop=None):
            super().__init__(futures)

        def add(self, future):
            self.append(future)

        def __iter__(self):
            while len(self):
                yield self.pop(0)

    class Client:
        loop, submitted = None, []

        def submit(self, function, notebook, params, *args, **kwargs):
            self.submitted.append(params['name'])
            return FakeFuture(
                distributed.KilledWorker('key', None, 2)
                if params['name'] == 'p-1' or self.submitted.count('p-2') == 1 and params['name'] == 'p-2'
                else None
            )

    monkeypatch.setattr(distributed, 'as_completed', Completed)
    (points,), results = expand(sweep(stage + '    name: p-{seed}\n    matrix: {seed: [1, 2]}\n')), {}
    sweeps.run_stage(Client(), points, results, {'act/p-1': sweeps.tries, 'act/p-2': 0}, workers=2, say=lambda *_: None)
    assert [results[point.folder]['status'] for point in points] == ['failed', 'done'] and sorted(Client.submitted) == [
        'p-1',
        'p-2',
        'p-2',
    ]


def test_two_workers_run_at_the_same_time_and_share_the_cores(project, monkeypatch):
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
        monkeypatch.delenv(name, raising=False)
    text = (
        stage
        + '    name: p-{seed}\n    params: {action: meet}\n    matrix: {seed: [1, 2]}\n'
        + '  - params: [params/act/one.yaml]\n    name: alone\n'
    )
    assert set(outcomes(run_stages(expand(sweep(text)), workers=2)).values()) == {'done'}
    threads = {
        name: json.loads(Path(f'outputs/act/{name}/metrics.json').read_text())['threads']
        for name in ('p-1', 'p-2', 'alone')
    }
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert threads == {'p-1': share, 'p-2': share, 'alone': ''}, 'a run that is alone in its stage uses all cores'


def test_clusters_do_not_get_in_each_others_way(project):
    with local_workers() as one, local_workers() as other:
        assert one.submit(os.getpid).result() != other.submit(os.getpid).result()
        assert dask.utils.parse_timedelta(dask.config.get('distributed.deploy.lost-worker-timeout')) > 86400, (
            'Dask gives up workers that are being replaced'
        )
        scratch = {
            Path(worker['local_directory']).parent
            for client in (one, other)
            for worker in client.scheduler_info()['workers'].values()
        }
    assert len(scratch) == 2 and not any(path.exists() for path in scratch)


def descendants(pid):
    "Process ids below `pid`."
    import psutil

    return [p.pid for p in psutil.Process(pid).children(recursive=True)]


def test_interrupting_a_sweep_leaves_nothing_running_and_the_truth(project):
    sweep(stage + '    name: p-{seed}\n    points: [{seed: 1}, {seed: 2, action: wait}, {seed: 3}]\n')
    process = subprocess.Popen(
        [sys.executable, '-c', 'from llmft.cli import main; main()', 'run', 'params/sweeps/s.yaml', '--json'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if 'waiting' in line:
            break
    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=120)
    assert (
        process.returncode == 130 and err.splitlines()[-1].startswith('llmft: interrupted') and 'Traceback' not in err
    ), err
    report = json.loads(out.splitlines()[-1])
    assert report['status'] == 'interrupted' and [run['status'] for run in report['runs']] == [
        'done',
        'interrupted',
        'not run',
    ]
    time.sleep(0.5)
    assert len(below) >= 2 and not [
        pid
        for pid in below
        if Path(f'/proc/{pid}').exists() and 'Z' not in Path(f'/proc/{pid}/stat').read_text().split()[2]
    ]
    assert json.loads(Path('outputs/act/p-2/run.json').read_text())['run']['status'] == 'interrupted'
    assert read_run('outputs/act/p-1')['run']['status'] == 'done' and not Path('outputs/act/p-3').exists()


def test_an_interruption_mends_the_records(project):
    "Also where nobody reads them afterwards, as from a notebook."
    point = expand(sweep(stage))[0][0]
    write(
        point.folder / 'run.json',
        json.dumps(dict(run=dict(status='running', notebook='act', name='s'), params={}, meta={})),
    )
    with pytest.raises(KeyboardInterrupt), sweeps.correct_when_interrupted([point]):
        raise KeyboardInterrupt
    assert json.loads((point.folder / 'run.json').read_text())['run']['status'] == 'interrupted'


def test_a_sweep_that_fails_exits_with_1_and_says_nothing_else(project):
    sweep(stage + "    name: p-{seed}\n    points: [{seed: 2, action: 'raise'}, {seed: 3, action: lose worker}]\n")
    done = subprocess.run(
        [sys.executable, '-c', 'from llmft.cli import main; main()', 'run', 'params/sweeps/s.yaml', '--json'],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr == '', done.stderr
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result['status'] == 'failed' and [run['status'] for run in result['runs']] == ['failed', 'done']
    assert '1 of 2 runs are done' in lines and '  act/p-2: failed in cell 5: ValueError: as asked' in lines
