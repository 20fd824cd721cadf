"""The command line: one line for every mistake, the right exit status, and an end that says where to look."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from house import processor_seconds, write, write_experiment

from llmft import __version__
from llmft.cli import _grouped, _in_stages, app, call, exit_status, text_table
from llmft.core import write_json
from llmft.runs import overview
from llmft.runs.differences import differences_text
from llmft.runs.identity import read_record, seal_record
from llmft.runs.params import find_notebook
from llmft.runs.report import notice_html
from llmft.runs.run import read_run
from llmft.runs.sweep_file import Point

command = [sys.executable, '-c', 'from llmft.cli import main; main()']
common = 'name: str = "first"  # name of the run\noutputs: str = "outputs"  # folder of all runs\naction: str = "none"  # what to do\nrate: float = 1e-3  # a number; above 0\nseed: int = 0  # which\n'
cells = [
    'from llmft.runs.run import start_run\nrun = start_run("act", globals())',
    'import time\nfrom llmft.core import LabError\nif action == "raise": raise ValueError("as asked")\nif action == "refuse": raise LabError("model nowhere is not here: give a folder, or --small")\n'
    'if action == "wait": print("waiting", flush=True); time.sleep(120)',
    'run.finish(dict(perplexity=4.5, rate=rate, tokens=20480), "ok")',
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_experiment('act', common, *cells)
    write('settings.ini', '')
    write('params/act/one.yaml', 'rate: 2e-4\n')
    write('params/act/two.yaml', 'seed: 2\n')
    write('params/act/_small.yaml', 'rate: 5e-5\n')
    write('params/sweeps/both.yaml', 'name: both\nstages:\n  - params: [params/act/one.yaml, params/act/two.yaml]\n')
    return tmp_path


@pytest.mark.parametrize(
    'yaml,words',
    [
        ('rate: fast', "params/act/x.yaml:1: rate: 'fast' is not a number"),
        ('seed: 1_000', 'params/act/x.yaml:1: seed:'),
        ('seed: 08', 'params/act/x.yaml:1: seed:'),
        ('action: no\nseed: yes', 'params/act/x.yaml:2: seed:'),
        ('rate: 1\nrate: 2', 'params/act/x.yaml:2: rate is given twice'),
        ('raet: 1', "did you mean 'rate'"),
        ('rate: [1', 'params/act/x.yaml:'),
    ],
)
def test_a_bad_file_is_one_line_and_exit_2_before_any_work(project, capsys, yaml, words):
    write('params/act/x.yaml', yaml + '\n')
    assert call(['run', 'params/act/one.yaml', 'params/act/x.yaml']) == 2
    out, err = capsys.readouterr()
    assert (
        words in err and err.startswith('llmft: ') and err.count('\n') == 1 and not out and not Path('outputs').exists()
    )


@pytest.mark.parametrize(
    'arguments,words',
    [
        (['run', 'params/act/oen.yaml'], "did you mean 'one.yaml'"),
        (['run', 'params/act/one.yaml', '-p', 'raet=1'], "did you mean 'rate'"),
        (['run', 'params/act/one.yaml', '-p', 'rate'], 'write -p name=value'),
        (['run', 'params/act/_small.yaml'], 'give one as well'),
        (['run', 'params/sweeps/both.yaml', 'params/act/_small.yaml'], 'cannot go over a sweep'),
        (['run', 'params/sweeps/both.yaml', '-p', 'name=x'], 'come from its file'),
        (['run', 'params/act/one.yaml', 'params/act/two.yaml', '-p', 'name=x'], 'two runs are named act/x'),
        (['run', 'params/act/one.yaml', '--workers', '0'], 'give at least 1'),
        (['run', 'params/act/one.yaml', '--workers', 'x'], '--workers'),
        (['run', 'params/act/one.yaml', '--samll'], '--small'),
        (['run', 'params/act/one.yaml', '--small', '--laptop'], 'give one of the two'),
        (['run', 'params/act/one.yaml', '--laptop'], 'act has no values for --laptop (no params/act/_laptop.yaml): use --small'),
        (['plan', 'params/act/one.yaml', '--laptop'], 'no values for --laptop'),
        (['run'], 'PARAMS'),
        (['rnu'], "'run'"),
        (['params', 'atc'], "did you mean 'act'"),
    ],
)
def test_a_bad_call_is_one_line_and_exit_2(project, capsys, arguments, words):
    assert call(arguments) == 2
    out, err = capsys.readouterr()
    assert (
        words in err and err.startswith('llmft: ') and err.count('\n') == 1 and not out and not Path('outputs').exists()
    )
    assert call([*arguments, '--json']) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['status'] == 'error'


def test_runs_end_with_the_report_to_open_and_are_not_repeated(project, capsys):
    assert call(['run', 'params/act/one.yaml', 'params/act/two.yaml', 'params/act/_small.yaml', '-p', 'seed=7']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[-2:] == ['report: outputs/act/one/report.html', 'report: outputs/act/two/report.html']
        and Path(lines[-1].split()[1]).exists()
    )
    assert '  perplexity 4.5  rate 5e-05  tokens 20,480' in lines
    for name in ('one', 'two'):
        assert {key: read_run(f'outputs/act/{name}')['params'][key] for key in ('seed', 'rate')} == dict(
            seed=7, rate=5e-5
        )
    identity = read_run('outputs/act/one')['run']['id']
    assert call(['run', 'params/act/one.yaml', '--small', '-p', 'seed=7', '--json']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == 'act/one: already done (--fresh runs it again)'
        and json.loads(lines[-1])['runs'][0]['metrics']['perplexity'] == 4.5
    )
    assert read_run('outputs/act/one')['run']['id'] == identity
    assert (
        call(['run', 'params/act/one.yaml', '--small', '-p', 'seed=7', '--fresh']) == 0
        and read_run('outputs/act/one')['run']['id'] != identity
    )


def test_a_run_that_breaks_off_while_it_trains_was_not_refused(tmp_path):
    results = [dict(status='failed', error='LabError: step 7: the loss is nan', folder=str(tmp_path))]
    assert exit_status(results) == 2
    (tmp_path / 'log.jsonl').write_text('')
    assert exit_status(results) == 2
    (tmp_path / 'log.jsonl').write_text('{"step": 6}\n')
    assert exit_status(results) == 1


def test_failed_runs_exit_1_and_refused_ones_2(project, capsys):
    assert call(['run', 'params/act/one.yaml', '-p', 'action=raise', '--json']) == 1
    lines = capsys.readouterr().out.splitlines()
    assert 'act/one: failed in cell 4: ValueError: as asked' in lines and json.loads(lines[-1])['status'] == 'failed'
    assert call(['run', 'params/act/one.yaml', '-p', 'action=refuse', '--json']) == 2
    out, err = capsys.readouterr()
    assert (
        err == 'llmft: model nowhere is not here: give a folder, or --small\n'
        and json.loads(out.splitlines()[-1])['runs'][0]['status'] == 'failed'
    )
    assert 'act/one: refused' in out.splitlines() and 'model nowhere' not in '\n'.join(out.splitlines()[:-1])


def begin(*arguments):
    "Start a run that waits, as a terminal would; returns the process once it waits."
    process = subprocess.Popen(
        [*command, 'run', 'params/act/one.yaml', '-p', 'action=wait', *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if 'waiting' in line:
            return process
    raise AssertionError(process.stderr.read())


def test_ctrl_c_is_130_and_the_record_says_so(project):
    process = begin('--json')
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert (
        process.returncode == 130 and err.splitlines()[-1].startswith('llmft: interrupted') and 'Traceback' not in err
    )
    assert err.splitlines()[-1].endswith('the same command begins anew, since no checkpoint was saved')
    assert (
        json.loads(out.splitlines()[-1])['status'] == 'interrupted'
        and json.loads(Path('outputs/act/one/run.json').read_text())['run']['status'] == 'interrupted'
    )


def test_ls_tells_the_truth_after_kill_9(project, capsys):
    assert call(['ls']) == 0 and 'no runs in outputs yet' in capsys.readouterr().out
    process = begin()
    assert call(['ls']) == 0 and ' running ' in capsys.readouterr().out
    process.kill()
    process.wait()
    time.sleep(1)
    assert call(['ls']) == 0 and ' interrupted ' in capsys.readouterr().out
    assert call(['ls', '--json']) == 0
    (row,) = json.loads(capsys.readouterr().out)['runs']
    assert row['status'] == 'interrupted' and row['name'] == 'one' and row['folder'] == 'outputs/act/one'


def test_params_lists_name_type_default_and_meaning(project, capsys):
    assert call(['params', 'act']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].split() == ['name', 'type', 'default', 'range', 'meaning']
        and any(line.split() == ['rate', 'float', '0.001', 'above', '0', 'a', 'number'] for line in lines)
        and len(lines) == 6
    )
    assert call(['params', 'act', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['parameters'][3] == dict(
        name='rate', type='float', default=1e-3, range='above 0', meaning='a number'
    )


def test_output_is_plain_unless_it_goes_to_a_terminal(project):
    done = subprocess.run([*command, 'params', 'act'], capture_output=True)
    assert b'\x1b' not in done.stdout and b'\r' not in done.stdout and done.stdout.isascii()
    parent, child = pty.openpty()
    subprocess.run([*command, 'params', 'act'], stdout=child, check=True, env=os.environ | dict(COLUMNS='24'))
    seen = os.read(parent, 4000).decode()
    assert (
        '\x1b[1m' in seen
        and max(len(line) for line in seen.replace('\x1b[1m', '').replace('\x1b[0m', '').split('\r\n')) <= 24
    )
    assert text_table([dict(a=1, b='x')], ['a', 'b']) == 'a  b\n1  x'


def test_a_closed_pipe_is_no_error(project):
    done = subprocess.run(
        ['bash', '-c', f'"{sys.executable}" -c "{command[2]}" params act | head -n 1; exit ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
    )
    assert 'Traceback' not in done.stderr and 'BrokenPipe' not in done.stderr


@pytest.mark.parametrize('arguments', [['-m', 'llmft'], ['-m', 'llmft.cli'], ['-c', command[2]]])
def test_the_command_has_several_doors(project, arguments):
    done = subprocess.run([sys.executable, *arguments, '--version'], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f'llmft {__version__}\n', '')
    done = subprocess.run([sys.executable, *arguments, 'params', 'atc'], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'act'" in done.stderr and not done.stdout
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and 'Usage: llmft [OPTIONS] COMMAND' in done.stdout and '--version' in done.stdout


def test_importing_the_command_does_not_run_it(project):
    done = subprocess.run(
        [sys.executable, '-c', 'import llmft.cli, llmft.__main__; print("imported")', 'rnu'],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, 'imported\n', '')


def test_a_run_through_the_module(project):
    done = subprocess.run(
        [sys.executable, '-m', 'llmft', 'run', 'params/act/one.yaml', '--json'], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])['status'] == 'done'


def test_help_is_quick():
    assert min(processor_seconds(*command[1:], '--help') for _ in range(5)) < 0.6


def test_the_command_line_imports_nothing_heavy():
    heavy = subprocess.run(
        [
            sys.executable,
            '-c',
            'import sys, llmft.cli; print(*({"torch", "transformers", "papermill", "distributed", "matplotlib", "pandas", "nbconvert", "IPython"} & set(sys.modules)))',
        ],
        capture_output=True,
        text=True,
    )
    assert heavy.stdout.split() == []


# ---- what a terminal shows

slow = """import json, time
for step in range(1, 9):
    with open(run.folder / "log.jsonl", "a") as log:
        row = dict(step=step, epoch=step / 4, loss=4 / step, tokens_per_sec=5700.2, seconds=step * 0.4, flops=38e9)
        log.write(json.dumps(row) + "\\n")
    time.sleep(0.4)
print("trained")"""


@pytest.fixture
def slow_project(project):
    counted = common + 'num_epochs: float = 2.0  # passes\n'
    write_experiment('act', counted, cells[0], slow, cells[-1])
    return project


def test_in_a_terminal_one_line_rewrites_itself(slow_project):
    parent, child = pty.openpty()
    process = subprocess.Popen([*command, 'run', 'params/act/one.yaml'], stdout=child, stderr=subprocess.DEVNULL)
    os.close(child)
    seen = b''
    while True:
        try:
            piece = os.read(parent, 4000)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        seen += piece
    text = seen.decode()
    assert process.wait() == 0
    states = [part.strip() for part in re.split('[\r\n]', text) if '/8  loss' in part]
    assert len(states) >= 3 and any(re.fullmatch(r'\d/8  loss [\d.]+  5,700 tok/s  0:0\d left', state) for state in states)
    assert 'flops' not in text and not any('/8  loss' in line.split('\r')[-1] for line in text.split('\r\n'))
    assert 'report: outputs/act/one/report.html' in text and '  trained' in text


def test_in_a_pipe_progress_is_a_plain_line_now_and_then(slow_project):
    done = subprocess.run([*command, 'run', 'params/act/one.yaml'], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    progress = [line for line in lines if '/8  loss' in line]
    assert done.returncode == 0 and len(progress) == 1 and 'flops' not in done.stdout and '\r' not in done.stdout
    assert (Path('outputs/act/one/train.log').read_text().count('step ')) == 8  # the log keeps every row


def test_the_help_has_examples_and_cuts_nothing_off_at_80_columns(project):
    done = subprocess.run([*command, '--help'], capture_output=True, text=True, env=os.environ | dict(COLUMNS='80'))
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and not any(line.endswith('...') for line in lines[1:]) and max(map(len, lines)) <= 80
    assert [line for line in lines if line.strip().startswith('llmft run params/finetune/lora.yaml --small')]
    names = {line.split()[0] for line in lines if re.match('  [a-z][a-z-]+  ', line)}
    wanted = 'run ls open diff report params verify fetch try export plan gpu-check'
    assert names == set(wanted.split())


@pytest.mark.parametrize('name', typer.main.get_command(app).commands)
def test_the_help_of_each_command_ends_with_calls_that_can_be_made(name):
    environment = os.environ | dict(COLUMNS='80')
    shown = subprocess.run([*command, name, '--help'], capture_output=True, text=True, env=environment).stdout
    usage, _, rest = shown.partition('\nOptions:\n')
    calls = [line.strip() for line in rest.partition('  Examples:\n')[2].splitlines()]
    assert calls and max(map(len, shown.splitlines())) <= 80 and '...' not in calls[0]
    assert not re.search(r'[{[][a-z]', usage.splitlines()[0]), 'arguments are in capitals'
    for words in map(shlex.split, calls):
        assert words[:2] == ['llmft', name]
        typer.main.get_command(app).commands[name].make_context(name, words[2:])  # raises what the parser refuses


# ---- after a run


def test_diff_names_what_was_changed_and_what_came_of_it(project, capsys):
    assert call(['run', 'params/act/one.yaml', 'params/act/two.yaml']) == 0
    capsys.readouterr()
    assert call(['diff', 'act/one', 'outputs/act/two']) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['rate', '0.0002', '0.001'] in lines and ['seed', '0', '2'] in lines
    assert ['rate', '0.0002', '0.001', '×', '5.00'] in lines and ['versions', '(A,', 'B):', 'the', 'same', 'in', 'both'] in lines
    assert call(['diff', 'act/one', 'act/two', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['params'] == dict(rate=[0.0002, 0.001], seed=[0, 2])
    assert call(['diff', 'act/one', 'act/tow']) == 2 and "did you mean 'act/two'" in capsys.readouterr().err


def test_diff_begins_with_the_verdicts(project, capsys):
    assert call(['run', 'params/act/one.yaml', 'params/act/two.yaml']) == 0
    for name, verdict in (('one', '- Low **wins**. Next: more seeds.\n- More.'), ('two', '')):
        folder = project / 'outputs/act' / name
        record = read_record(folder)
        record['run']['verdict'] = verdict
        write_json(folder / 'run.json', seal_record(folder, record))
    capsys.readouterr()
    assert call(['diff', 'act/one', 'act/two']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('A: act/one, done') and lines[1] == '   Low wins.'
    assert lines[2].startswith('B: act/two, done') and lines[3] == 'parameters (A, B):'


def test_a_difference_shows_parameters_as_they_are_written():
    runs = [dict(run='act/one', status='done', started='2026-08-01T10:00', verdict='')] * 2
    nothing = dict(metrics=[], scores=[], versions={}, data={})
    text = differences_text(dict(runs=runs, params=dict(rate=(0.01, 0.003), targets=(['q', 'v'], None)), **nothing))
    assert [line.split() for line in text.splitlines()[3:5]] == [['rate', '0.01', '0.003'], ['targets', 'q,', 'v', '–']]


def test_open_shows_a_report_or_the_page_over_all_runs(project, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr('webbrowser.open', shown.append)
    assert call(['run', 'params/act/one.yaml']) == 0 and (project / 'outputs/index.html').exists()
    capsys.readouterr()
    assert call(['open', 'act/one']) == 0 and capsys.readouterr().out == 'report: outputs/act/one/report.html\n'
    assert call(['open']) == 0 and shown == [
        (project / 'outputs/act/one/report.html').as_uri(),
        (project / 'outputs/index.html').as_uri(),
    ]
    assert call(['open', 'act/noe']) == 2 and "did you mean 'act/one'" in capsys.readouterr().err


def test_report_makes_the_page_again_and_hides_no_change(project, capsys):
    assert call(['run', 'params/act/one.yaml']) == 0
    page = project / 'outputs/act/one/report.html'
    before = page.read_text()
    page.write_text('changed')
    assert read_run('outputs/act/one')['run']['status'] == 'altered'
    took = re.compile(r'took [0-9.]+ s|T[0-9:.]+\+00:00')  # the first page is written before the run has ended
    assert call(['report', 'outputs/act/one']) == 0 and took.sub('', page.read_text()) == took.sub('', before)
    assert read_run('outputs/act/one')['run']['status'] == 'done'
    (project / 'outputs/act/one/metrics.json').write_text('{}')
    assert call(['report', 'outputs/act/one']) == 2 and 'would hide that' in capsys.readouterr().err
    assert read_run('outputs/act/one')['run']['status'] == 'altered'
    (project / 'outputs/act/one/report.ipynb').unlink()
    assert call(['report', 'outputs/nowhere']) == 2


def test_every_command_takes_a_run_by_the_name_that_ls_shows(project, capsys):
    assert call(['run', 'params/act/one.yaml']) == 0
    capsys.readouterr()
    assert call(['report', 'act/one']) == 0 and call(['verify', 'act/one']) == 0
    assert call(['try', 'act/one', 'a word']) == 2 and 'it trained no model' in capsys.readouterr().err
    assert call(['export', 'act/one', '--to', 'merged']) == 2 and 'it trained no model' in capsys.readouterr().err
    assert call(['try', 'act/tow', 'a word']) == 2 and "there is no model 'act/tow'" in capsys.readouterr().err


def test_several_files_run_behind_what_they_read(project):
    points = {name: Point(find_notebook('act'), dict(name=name, outputs='outputs', start=start)) for name, start in
              dict(one='', two='outputs/act/one', three='', four='outputs/act/two').items()}
    stages = _in_stages(list(points.values()))
    assert [[point.name for point in stage] for stage in stages] == [['one', 'three'], ['two'], ['four']]
    assert _grouped([[[point]] for point in points.values()], 2) == [stages]


def test_a_file_behind_a_sweep_waits_for_it(project):
    point, other, last = [Point(find_notebook('act'), dict(name=name, outputs='outputs')) for name in 'abc']
    sweep = [[point], [other]]
    assert _grouped([sweep, [[last]]], 2) == [sweep, [[last]]]
    assert _grouped([[[last]], sweep], 2) == [[[last]], sweep]


def test_a_run_begun_anew_goes_on_without_the_flag(project):
    process = begin('--fresh')
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert 'the same command without --fresh begins anew' in err.splitlines()[-1]
    stopped = dict(status='interrupted', command='llmft run params/act/one.yaml --fresh -p seed=2')
    assert 'Continue: <code>llmft run params/act/one.yaml -p seed=2</code>' in notice_html(stopped)


def test_what_cannot_be_written_or_read_is_one_line(project, capsys, monkeypatch):
    assert call(['run', 'params/act/one.yaml']) == 0
    capsys.readouterr()
    write('README.md', 'no notebook')
    assert call(['report', 'outputs/act/one', 'README.md']) == 2
    assert 'README.md is no notebook' in capsys.readouterr().err
    monkeypatch.setattr(overview, 'write_atomic', lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert call(['open']) == 2 and 'outputs/index.html cannot be written' in capsys.readouterr().err
