"""`llmft gpu-check`: on a pretended GPU it is right, a planted mistake makes it wrong, and without a GPU it says so."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pretend_cuda import device

from llmft.bench import gpu_check
from llmft.bench.checks import Scale, checks
from llmft.bench.gpu_check import Watch, check_verdict, with_status
from llmft.cli import call

tests = Path(__file__).parent
root = tests.parent
needs_compiler = pytest.mark.skipif(not device.compiler(), reason='no C++ compiler to build the pretended GPU with')


def pretending(capability='9.0', *first):
    "The environment of a process that finds the pretended GPU; the folders `first` come before all others."
    paths = [*first, tests / 'pretend_cuda' / 'site', tests, root]
    own = {name: value for name, value in os.environ.items() if not name.startswith(('PYTEST_', 'CUDA_'))}
    return own | dict(PYTHONPATH=os.pathsep.join(map(str, paths)), PRETEND_CAPABILITY=capability, OMP_NUM_THREADS='1')


def checked(folder, env, *names):
    "(exit status, output, the object that the command ends with) of `llmft gpu-check --tiny` for some checks."
    command = [sys.executable, '-m', 'llmft', 'gpu-check', '--tiny', '--json', '-p', f'outputs={folder}']
    command += ['-p', f'only=[{", ".join(names)}]'] if names else []
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1800)
    said = done.stdout + done.stderr[-3000:]
    return done.returncode, said, json.loads(done.stdout.strip().splitlines()[-1])


# ---- on a pretended GPU


@needs_compiler
def test_everything_is_right_on_a_pretended_gpu(tmp_path):
    status, said, found = checked(tmp_path, pretending())
    assert status == 0 and found['status'] == 'right', said
    rows = found['findings']
    assert {row['check'] for row in rows} == set(checks)
    assert len(with_status(rows, 'right')) > 30 and not with_status(rows, 'wrong')

    missing = {row['what'] for row in with_status(rows, 'not checked')}
    assert 'compiled decoding and its CUDA graph' in missing  # the report names what a CPU cannot show
    assert found['card']['device'] == 'Pretended GPU' and found['tiny'] is True
    assert (tmp_path / 'gpu_check/check/report.html').exists()
    kept = json.loads((tmp_path / 'gpu_check/check/gpu_check.json').read_text())
    assert kept['findings'] == rows
    files = [row for row in rows if row['check'] == 'training' and row['figures']]
    assert len(files) == 5 and all(row['figures']['foreseen_gib'] > 0 for row in files)


@needs_compiler
def test_a_card_without_bf16_is_right_and_what_needs_it_is_named(tmp_path):
    status, said, found = checked(tmp_path, pretending('7.5'), 'peaks', 'documents', 'training')
    assert status == 0, said
    named = {row['what'] for row in with_status(found['findings'], 'not checked') if 'has no bf16' in row['missing']}
    assert 'packed documents in bf16' in named and 'params/finetune/lora.yaml' in named
    right = {row['what'] for row in with_status(found['findings'], 'right')}
    assert 'bf16 is accepted where the card has it, and refused elsewhere' in right


planted = """
import runpy

kept = runpy.run_path({site!r})
from llmft.training import losses

losses._subtract_targets_ = lambda probabilities, targets: None
"""


@needs_compiler
def test_a_planted_mistake_makes_the_exit_status_1(tmp_path):
    "The gradient of the loss without its targets."
    folder = tmp_path / 'planted'
    folder.mkdir()
    site = str(tests / 'pretend_cuda/site/sitecustomize.py')
    (folder / 'sitecustomize.py').write_text(planted.format(site=site))
    status, said, found = checked(tmp_path / 'out', pretending('9.0', folder), 'loss', 'tokens')
    assert status == 1 and found['status'] == 'wrong', said
    assert {row['check'] for row in with_status(found['findings'], 'wrong')} == {'loss'}
    assert {row['check'] for row in with_status(found['findings'], 'right')} == {'tokens'}  # the rest went on


# ---- without one


def test_without_a_gpu_it_is_one_line_and_exit_status_2(tmp_path, capsys):
    assert call(['gpu-check', '-p', f'outputs={tmp_path}']) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and 'CUDA device and PyTorch finds none here' in said[0]
    assert not list(tmp_path.iterdir())


# ---- the watch

worker = """
import json, os, sys, time

names, tiny, file = json.loads(sys.argv[1])

def write(**values):
    with open(file, 'a') as lines:
        lines.write(json.dumps(values) + chr(10))

for name in names:
    if name == 'absent':
        sys.exit(3)
    write(begins=name)
    if name == 'hangs':
        time.sleep(600)
    if name == 'dies':
        print('illegal memory access', flush=True)
        os.abort()
    write(check=name, status='right', what=name, ok=True, figures={}, missing='')
    write(ends=name, seconds=0.0)
    if name == 'breaks':
        sys.exit(1)
"""


def watched(tmp_path, monkeypatch, names, seconds=60, bound=60):
    "The findings of a worker that does what the names of its checks say."
    monkeypatch.setattr(gpu_check, '_worker', worker)
    watch = Watch(names, dict.fromkeys(names, bound), True, seconds, tmp_path / 'events.jsonl', lambda line: None)
    rows = [dict(error='') | event for event in watch.run() if 'status' in event]
    return {row['check']: (row['status'], row['error'] or row['missing']) for row in rows}


def test_a_check_that_kills_its_process_costs_itself_only(tmp_path, monkeypatch):
    found = watched(tmp_path, monkeypatch, ['first', 'dies', 'last'])
    assert found['first'] == found['last'] == ('right', '')
    assert found['dies'][0] == 'wrong' and 'illegal memory access' in found['dies'][1]


def test_a_check_that_hangs_is_ended_at_its_bound(tmp_path, monkeypatch):
    started = time.monotonic()
    found = watched(tmp_path, monkeypatch, ['hangs', 'last'], bound=1)
    assert time.monotonic() - started < 30
    assert found['hangs'][0] == 'wrong' and 'no end within' in found['hangs'][1] and found['last'] == ('right', '')


def test_the_whole_keeps_to_its_budget_and_names_what_is_left(tmp_path, monkeypatch):
    started = time.monotonic()
    found = watched(tmp_path, monkeypatch, ['first', 'hangs', 'last'], seconds=3)
    assert time.monotonic() - started < 30
    assert found['first'] == ('right', '')
    assert found['hangs'] == found['last'] == ('not checked', 'the budget of time was spent')


def test_one_row_is_no_rows():
    named = [finding.what for finding in checks['decoding'].run(Scale(tiny=True))]
    assert [what for what in named if 'compiled' not in what] == ['decoding 1 row', 'decoding 16 rows']


def test_the_verdict_names_what_is_wrong_and_what_was_not_checked():
    row = dict(figures={}, error='', missing='')
    rows = [
        dict(row, check='loss', status='right', what='loss'),
        dict(row, check='tokens', status='wrong', what='tokens', error='others'),
        dict(row, check='formats', status='not checked', what='nf4', missing='no bitsandbytes'),
    ]
    said = check_verdict(rows, dict(device='a card'))
    assert '1 right finding and 1 wrong' in said and 'tokens (others)' in said and 'nf4 (no bitsandbytes)' in said


def test_a_check_after_which_the_device_is_gone_costs_no_other(tmp_path, monkeypatch):
    found = watched(tmp_path, monkeypatch, ['breaks', 'next', 'last'])
    assert found == dict.fromkeys(['breaks', 'next', 'last'], ('right', ''))


def test_a_worker_that_never_begins_is_not_started_for_ever(tmp_path, monkeypatch):
    found = watched(tmp_path, monkeypatch, ['absent', 'last'])
    assert found['absent'][0] == 'wrong' and 'the process ended with 3' in found['absent'][1]
    assert found['last'] == ('right', '')
