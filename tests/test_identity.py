"A result is believed only while what was read and what was written are what they were; each way of altering them is named."

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from llmft.core import LabError, project_root, read_json, write_atomic, write_json
from llmft.data import hashes
from llmft.data.hashes import content_hashes, sealed, source_hashes
from llmft.data.token_files import prepare_tokens, read_token_file, token_folder
from llmft.runs import provenance, sweeps
from llmft.runs import run as run_module
from llmft.runs.checks import seal_check
from llmft.runs.differences import render_again
from llmft.runs.identity import changed_inputs, declared_inputs, inputs_of, read_record, runs_by_name, seal_record
from llmft.runs.locks import is_held
from llmft.runs.params import read_parameters
from llmft.runs.results import finished_runs, read_result
from llmft.runs.run import close_folder, list_runs, open_folder, read_run, start_run
from llmft.studies.forecasting.budget import note_ledger, study_account
from llmft.studies.forecasting.prepared import prepare_series, read_split, series_documents
from llmft.training.ledger import Account


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "A cache of its own for every test, and a library whose edits while the tests run change nothing."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    monkeypatch.setattr(provenance, 'library_hashes', lambda: {})
    monkeypatch.setattr(run_module, 'check_inputs', lambda *args: None)  # files of any content stand for data here
    monkeypatch.setattr(run_module, 'say_model', lambda *args: None)  # and for models


# ---- hashes


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.fixture
def large(tmp_path, monkeypatch):
    "A file large enough to be remembered, and the list of files that are hashed by reading them."
    monkeypatch.setattr(hashes, '_settled_nanoseconds', -(10**12))
    path = tmp_path / 'folder' / 'weights'
    path.parent.mkdir()
    path.write_bytes(os.urandom(2**20 + 7))
    looked = []

    def counted(what):
        if isinstance(what, Path):
            looked.append(what)
        return hashes_before(what)

    hashes_before = hashes.sha256_of
    monkeypatch.setattr(hashes, 'sha256_of', counted)
    return path, looked


def test_a_large_file_is_read_once(large):
    path, looked = large
    first = content_hashes(path.parent)
    assert content_hashes(path.parent) == first and content_hashes(path) == first and looked == [path]
    assert content_hashes(path, fresh=True) == first and looked == [path, path]


@pytest.mark.parametrize('harm', [flip, cut, zero])
def test_a_change_is_seen_although_its_time_was_set_back(large, harm):
    path, looked = large
    before, times = content_hashes(path), path.stat()
    time.sleep(0.02)  # one tick of the file system's clock
    harm(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns and content_hashes(path) != before


def test_a_file_that_may_change_within_a_tick_is_not_remembered(large, monkeypatch):
    path, looked = large
    monkeypatch.setattr(hashes, '_settled_nanoseconds', 10**12)
    content_hashes(path)
    content_hashes(path)
    assert looked == [path, path]


@pytest.mark.parametrize('memory', ['', '[]', '{"weights": 3}', '{"weights": [[1, 2, 3, 4], "0"]}', '{"weights": [[]]}'])
def test_a_broken_memory_costs_time_only(large, memory):
    path, looked = large
    first = content_hashes(path)
    (file,) = (hashes.cache_folder() / 'hashes').iterdir()
    file.write_text(memory)
    assert content_hashes(path) == first and looked == [path, path]


def test_a_cache_that_cannot_be_written_costs_time_only(large, monkeypatch):
    path, looked = large
    monkeypatch.setenv('XDG_CACHE_HOME', '/proc/no')
    assert content_hashes(path) == content_hashes(path) and len(looked) == 2


def test_a_pipe_and_a_dangling_link_hold_nothing_and_do_not_block(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    write_atomic(tmp_path / 'a.txt', 'a')
    assert list(content_hashes(tmp_path)) == ['a.txt']
    assert source_hashes(str(tmp_path / 'pipe'), 'datasets') == {str(tmp_path / 'pipe'): None}


# ---- what a run reads


def fetched_copy(cache):
    "A file where the fetched SmolLM2 lies when the cache is there."
    return write_atomic(cache / 'llmft/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf', b'GGUF of some kind')


def test_what_was_read_is_named_without_the_home_folder(tmp_path, monkeypatch):
    home = tmp_path / 'home/somebody'
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('XDG_CACHE_HOME', str(home / 'cache'))
    weights, text = fetched_copy(home / 'cache'), write_atomic(home / 'notes/a.txt', 'a text')
    run = run_it(tmp_path, model='smollm2', data=str(text), start=str(home / 'notes'))
    record = read_json(run.folder / 'run.json')
    member = 'smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
    assert record['read']['model'] == {member: content_hashes(weights)[weights.name]}
    assert record['read']['data'] == {'~/notes/a.txt': content_hashes(text)['a.txt']}
    assert list(record['read']['start']) == ['~/notes/a.txt']
    assert 'somebody' not in json.dumps(record['read'])
    write_atomic(weights, b'GGUF of another kind')
    assert changed_inputs(record['read'], inputs_of(record['params'])) == f'model changed since ({member})'


def test_an_adapter_names_the_files_of_its_fetched_base(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    weights = fetched_copy(tmp_path / 'cache')
    write_json(tmp_path / 'lora/adapter_config.json', dict(base_model_name_or_path='smollm2'))
    found = inputs_of(dict(model=str(tmp_path / 'lora'), outputs=str(tmp_path / 'outputs')))['model']
    assert found[f'smollm2/{weights.name}'] == content_hashes(weights)[weights.name] and len(found) == 2


def space(tmp_path, **more):
    "What a notebook with data and model has in its namespace."
    names = dict(name=str, outputs=str, data=str, model=str, start=str, tracker=str)
    values = dict(name='x', outputs=str(tmp_path / 'outputs'), data='', model='preset:llama-tiny', start='', tracker='off')
    return dict(__annotations__=names, **values | more)


def run_it(tmp_path, fail=False, metrics=None, log='', notebook='demo', **more):
    "One run in this process: it starts and finishes, or fails after a checkpoint."
    run = start_run(notebook, space(tmp_path, **more))
    write_atomic(run.folder / 'adapter' / 'adapter_model.safetensors', b'weights' * 20)
    if fail:
        close_folder(run.folder, 'failed', 'as asked')
        return run
    write_atomic(run.folder / 'log.jsonl', log or '{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 2.5}\n')
    write_atomic(run.folder / 'report.html', '<p>loss 2.5</p>')
    run.finish(metrics or dict(loss=2.5), 'Well.')
    return run


def as_folder(tmp_path):
    for name in ('a.txt', 'more/b.txt'):
        write_atomic(tmp_path / 'notes' / name, f'text of {name}')
    return tmp_path / 'notes', tmp_path / 'notes/more/b.txt'


def as_file(tmp_path):
    path = write_atomic(tmp_path / 'notes.jsonl', '{"text": "one"}\n')
    return path, path


@pytest.mark.parametrize('make', [as_file, as_folder])
@pytest.mark.parametrize('parameter', ['data', 'model'])
def test_another_content_under_the_same_name_is_another_run(tmp_path, capsys, make, parameter):
    source, file = make(tmp_path)
    more = {parameter: str(source)}
    first = run_it(tmp_path, **more)
    params = read_json(first.folder / 'run.json')['params']
    assert open_folder(first.folder, params, keep_done=True)['run']['id'] == first.id, 'an equal run is done'
    write_atomic(file, 'other text')
    capsys.readouterr()
    second = run_it(tmp_path, **more)
    said = capsys.readouterr().out
    assert f'{parameter} changed since' in said and file.name in said and 'begins anew' in said
    record = read_run(second.folder)
    assert record['run']['resumed'] is None and record['run']['status'] == 'done'
    aside = first.folder.parent / '_previous' / f'x-{first.id}'
    assert read_run(aside)['run']['id'] == first.id, 'the earlier run is kept'


def test_a_new_and_a_missing_file_of_a_folder_are_changes(tmp_path):
    folder, file = as_folder(tmp_path)
    before = inputs_of(dict(data=str(folder)))
    write_atomic(folder / 'c.txt', '')
    with_new = inputs_of(dict(data=str(folder)))
    file.unlink()
    assert len({json.dumps(found) for found in (before, with_new, inputs_of(dict(data=str(folder))))}) == 3


def test_an_unfinished_run_on_other_data_is_not_resumed(tmp_path, capsys):
    path, _ = as_file(tmp_path)
    first = run_it(tmp_path, fail=True, data=str(path))
    again = start_run('demo', space(tmp_path, data=str(path)))
    assert read_json(again.folder / 'run.json')['run']['resumed'] == first.id
    close_folder(again.folder, 'failed', 'as asked')
    write_atomic(path, '{"text": "two"}\n')
    other = start_run('demo', space(tmp_path, data=str(path)))
    record = read_json(other.folder / 'run.json')
    assert record['run']['resumed'] is None and not (other.folder / 'adapter').exists()
    assert f'data changed since ({path})' in capsys.readouterr().out
    close_folder(other.folder, 'failed', 'as asked')


def test_what_differs_is_said_for_parameters_and_code(tmp_path, monkeypatch):
    first = run_it(tmp_path)
    params = dict(read_json(first.folder / 'run.json')['params'])
    monkeypatch.setattr(provenance, 'library_hashes', lambda: {'fit.py': 'other'})
    assert open_folder(first.folder, params)['run']['anew'] == 'the code changed since'
    close_folder(first.folder, 'failed')
    record = open_folder(first.folder, params | dict(model='preset:gpt2-tiny'))
    assert record['run']['anew'] == 'model changed since'
    close_folder(first.folder, 'failed')


def test_data_that_changes_while_it_is_read_fails_the_run(tmp_path):
    path, _ = as_file(tmp_path)
    run = start_run('demo', space(tmp_path, data=str(path)))
    write_atomic(path, '{"text": "meanwhile"}\n')
    with pytest.raises(LabError, match='data changed since .*, while the run read it: run it again'):
        run.finish(dict(loss=1.0))
    assert read_run(run.folder)['run']['status'] == 'failed' and not is_held(run.folder)


def test_a_revision_that_was_unknown_before_the_download_is_noted_at_the_end(tmp_path, monkeypatch):
    known = {}
    monkeypatch.setattr(hashes, 'hub_revision', lambda name, kind: known.get((name, kind)))
    run = start_run('demo', space(tmp_path, model='org/name'))
    known['org/name', 'models'] = 'abc'
    run.finish({})
    assert read_run(run.folder)['read'] == dict(model={'org/name': 'abc'})
    known['org/name', 'models'] = 'def'
    again = start_run('demo', space(tmp_path, model='org/name'))
    assert read_json(again.folder / 'run.json')['run']['anew'] == 'model changed since (org/name)'
    close_folder(again.folder, 'failed')


def test_a_reader_of_an_altered_run_is_refused_before_it_starts(tmp_path):
    source = run_it(tmp_path, name='source')
    for start in (source.folder, source.folder / 'adapter'):
        assert list(inputs_of(dict(start=str(start), outputs=str(tmp_path)))) == ['start']
        flip(source.folder / 'adapter/adapter_model.safetensors')
        with pytest.raises(LabError, match='adapter/adapter_model.safetensors was changed since the run ended'):
            start_run('later', space(tmp_path, name='later', start=str(start)))
        flip(source.folder / 'adapter/adapter_model.safetensors')
    assert not (tmp_path / 'outputs/later').exists()


def test_an_adapter_outside_of_any_run_is_an_input_too(tmp_path):
    write_atomic(tmp_path / 'mine/adapter/adapter_model.safetensors', b'weights')
    before = inputs_of(dict(start=str(tmp_path / 'mine')))
    write_atomic(tmp_path / 'mine/adapter/adapter_model.safetensors', b'others!')
    assert list(before) == ['start'] and inputs_of(dict(start=str(tmp_path / 'mine'))) != before
    assert inputs_of(dict(start=str(tmp_path / 'nowhere'))) == {}


def test_a_run_that_is_named_without_its_folder_is_an_input(tmp_path):
    asked = dict(trained='x', train_run='', outputs=str(tmp_path / 'outputs'))
    assert inputs_of(asked) == {}
    run_it(tmp_path, notebook='sublora_train')
    assert list(inputs_of(asked)['trained']) == ['sublora_train/x']
    flip(tmp_path / 'outputs/sublora_train/x/adapter/adapter_model.safetensors')
    with pytest.raises(LabError, match='sublora_train/x: adapter/adapter_model.safetensors was changed'):
        inputs_of(asked)


def test_a_training_run_by_its_folder_takes_the_place_of_the_one_by_its_name(tmp_path):
    run = run_it(tmp_path, notebook='sublora_train')
    other = run_it(tmp_path, notebook='sublora_train', name='other')
    asked = dict(trained='x', train_run=str(other.folder), outputs=str(tmp_path / 'outputs'))
    assert list(inputs_of(asked)) == ['train_run']
    assert runs_by_name(asked) == {} and runs_by_name(asked | dict(train_run='')) == dict(trained=run.folder)


def test_a_page_that_is_written_anew_changes_nothing_for_those_who_read_the_run(tmp_path):
    run = run_it(tmp_path)
    asked = dict(runs=[], start=str(run.folder), outputs=str(tmp_path / 'outputs'))
    before, page = inputs_of(asked), (run.folder / 'report.html').read_text()
    nbformat.write(new_notebook(cells=[new_code_cell('1')]), tmp_path / 'ran.ipynb')

    for _ in range(2):
        render_again(run.folder, tmp_path / 'ran.ipynb')
        assert (run.folder / 'report.html').read_text() != page and inputs_of(asked) == before
    edit_metric(run.folder)
    write_json(run.folder / 'run.json', seal_record(run.folder, {
        name: value for name, value in read_json(run.folder / 'run.json').items() if name != 'given'}))
    assert inputs_of(asked) != before


def test_a_file_whose_name_is_no_text_is_noted_and_found_again(tmp_path):
    name = os.fsdecode(b'caf\xe9.txt')
    write_atomic(tmp_path / 'notes' / name, 'text')
    write_atomic(tmp_path / 'notes' / os.fsdecode(b'old\xe9') / 'b.txt', 'more')
    run = run_it(tmp_path, data=str(tmp_path / 'notes'))
    record = read_run(run.folder)
    assert record['run']['status'] == 'done' and set(record['read']['data']) == {
        f'{tmp_path}/notes/{name}', os.fsdecode(os.fsencode(tmp_path) + b'/notes/old\xe9/b.txt')}
    assert b'caf\\udce9.txt' in (run.folder / 'run.json').read_bytes()
    assert inputs_of(record['params']) == record['read']


def test_outputs_inside_of_a_folder_of_data_are_no_data(tmp_path):
    write_atomic(tmp_path / 'a.txt', 'text')
    run = run_it(tmp_path, data=str(tmp_path))
    assert list(read_run(run.folder)['read']['data']) == [f'{tmp_path}/a.txt']


def test_every_parameter_that_names_something_to_read_is_declared():
    notebooks = sorted((project_root() / 'nbs/experiments').glob('*.ipynb'))
    named = {}
    for parameter in (parameter for notebook in notebooks for parameter in read_parameters(notebook)):
        if parameter.type in ('str', 'list[str]') and re.search(r'\b(hub name|folders?|files?|presets?)\b', parameter.help):
            named[parameter.name] = parameter.help
    written = {'name', 'outputs', 'export_to'}
    assert len(named) >= 10 and set(named) - written <= set(declared_inputs), set(named) - written - set(declared_inputs)


def test_runs_that_a_summary_finds_by_itself_are_its_inputs(tmp_path):
    asked = dict(runs=[], outputs=str(tmp_path / 'outputs'))
    run_it(tmp_path, name='a')
    one = inputs_of(asked)
    run_it(tmp_path, name='b')
    two = inputs_of(asked)
    assert list(one['runs']) == ['demo/a'] and list(two['runs']) == ['demo/a', 'demo/b']
    assert one['runs']['demo/a'] == two['runs']['demo/a']


# ---- what a run wrote


def edit_metric(folder):
    write_json(folder / 'metrics.json', dict(loss=0.5))


def forge_record(folder):
    record = read_json(folder / 'run.json')
    record['run']['verdict'] = 'Very well.'
    write_json(folder / 'run.json', record)


def strip_record(folder):
    record = read_json(folder / 'run.json')
    edit_metric(folder)
    write_json(folder / 'run.json', {name: record[name] for name in ('run', 'params', 'train', 'meta', 'read')})


harms = {
    'metrics.json was changed': edit_metric,
    'log.jsonl was changed': lambda folder: write_atomic(folder / 'log.jsonl', '{"step": 1, "loss": 0.1}\n'),
    'log.jsonl is missing': lambda folder: (folder / 'log.jsonl').unlink(),
    'report.html was changed': lambda folder: write_atomic(folder / 'report.html', '<p>loss 0.1</p>'),
    'adapter/adapter_model.safetensors was changed': lambda folder: flip(folder / 'adapter/adapter_model.safetensors'),
    'adapter/adapter_model.safetensors was changed ': lambda folder: cut(folder / 'adapter/adapter_model.safetensors'),
    'adapter/adapter_model.safetensors is missing': lambda folder: (folder / 'adapter/adapter_model.safetensors').unlink(),
    'run.json was changed': forge_record,
    'run.json has no hashes': strip_record,
}


@pytest.mark.parametrize('words', harms)
def test_an_altered_run_is_named_and_not_believed(tmp_path, capsys, words):
    from llmft.cli import call

    run = run_it(tmp_path)
    run_it(tmp_path, name='good')
    outputs = tmp_path / 'outputs'
    params = read_json(run.folder / 'run.json')['params']
    point = SimpleNamespace(folder=run.folder, params=params, notebook=None)
    assert sweeps.finished_record(point)['run']['id'] == run.id
    assert read_run(run.folder)['run']['status'] == 'done' and seal_check(run.folder, read_record(run.folder)).status == 'ok'
    harms[words](run.folder)
    words = words.strip()

    shown = read_run(run.folder)['run']
    assert shown['status'] == 'altered' and shown['error'].startswith(words)
    check = seal_check(run.folder, read_record(run.folder))
    assert check.status == 'altered' and check.text.startswith(words)
    capsys.readouterr()
    assert call(['ls', '--outputs', str(outputs)]) == 0
    listed = capsys.readouterr().out
    row = next(line for line in listed.splitlines() if 'demo/x' in line)
    assert 'altered' in row and words in row and '0.5' not in row and 'demo/good' in listed
    assert list(finished_runs([], str(outputs), 'demo')) == ['good']
    assert f'left out: demo/x: {words}' in capsys.readouterr().out
    with pytest.raises(LabError, match='is altered, not done'):
        read_result(run.folder)

    assert sweeps.finished_record(point) is None
    record = open_folder(run.folder, params, keep_done=True)
    assert record['run']['status'] == 'running' and record['run']['resumed'] is None
    close_folder(run.folder, 'failed')


def test_files_that_others_add_do_not_alter_a_run(tmp_path):
    run = run_it(tmp_path)
    for name in ('wandb/run-1/x.wandb', '.DS_Store', 'my_notes.md'):
        write_atomic(run.folder / name, 'added')
    assert read_run(run.folder)['run']['status'] == 'done'


# ---- broken folders, half-written files, disks and clocks

broken = [
    '',
    '{"run": ',
    '[]',
    '3',
    '{"run": []}',
    '{"run": {}}',
    '{"run": {"status": 3}}',
    '{"run": {"status": "done"}}',
    '{"run": {"status": "done", "name": ["x"], "started": "2026-01-01T00:00:00+00:00"}}',
    '{"run": {"status": "failed", "name": "x", "notebook": "demo", "started": "yesterday"}}',
    '{"run": {"status": "failed", "name": "x", "notebook": "demo", "started": "2026-01-01"}}',
    '{"run": {"status": "running", "name": "x", "notebook": "demo"}, "params": [1], "meta": "x"}',
    '[' * 100_000,
    '{"run": {"status": "failed", "seconds": ' + '9' * 6000 + '}}',
    b'\xff\xfe\x00',
]


@pytest.mark.parametrize('content', broken, ids=range(len(broken)))
def test_one_broken_folder_never_hides_the_others(tmp_path, capsys, content):
    from llmft.cli import call

    run_it(tmp_path, name='good')
    folder = tmp_path / 'outputs/demo/bad'
    write_atomic(folder / 'run.json', content)
    write_atomic(folder / 'metrics.json', content)
    states = {record['run']['name']: record['run']['status'] for record in list_runs(tmp_path / 'outputs')}
    assert states['good'] == 'done' and len(states) == 2 and set(states) - {'good'} <= {'bad', 'x'}
    for options in ([], ['--json']):
        assert call(['ls', '--outputs', str(tmp_path / 'outputs'), *options]) == 0
    assert 'demo/good' in capsys.readouterr().out
    assert list(finished_runs([], str(tmp_path / 'outputs'), 'demo')) == ['good']
    record = open_folder(folder, dict(name='bad'), keep_done=True)
    assert record['run']['status'] == 'running', 'what lies there is moved aside'
    close_folder(folder, 'failed')


def test_bad_metrics_of_an_unfinished_run_hide_nothing(tmp_path, capsys):
    from llmft.cli import call

    run_it(tmp_path, name='good')
    bad = run_it(tmp_path, name='bad', fail=True)
    for content in (*broken[:4], *broken[-3:]):
        write_atomic(bad.folder / 'metrics.json', content)
        capsys.readouterr()
        assert call(['ls', '--outputs', str(tmp_path / 'outputs')]) == 0
        listed = capsys.readouterr().out
        assert 'demo/good' in listed and 'demo/bad' in listed


def test_half_written_files_are_gone_when_a_resumed_run_is_done(tmp_path):
    first = run_it(tmp_path, fail=True)
    for name in ('.adapter.ab12.partial/new/adapter_model.safetensors', 'checkpoints/.step-000040.partial/weights',
                 '.report.partial.ipynb', '.metrics.json.x1.partial', 'best_ckpt.partial'):
        write_atomic(first.folder / name, 'half')
    second = run_it(tmp_path)
    assert read_json(second.folder / 'run.json')['run']['resumed'] == first.id
    assert [path.name for path in second.folder.rglob('*partial*')] == []


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize('place', ['hold', 'write_atomic', 'save_record'])
def test_a_disk_that_cannot_be_written_is_one_line_and_loses_nothing(tmp_path, monkeypatch, number, place):
    first = run_it(tmp_path)
    before = content_hashes(first.folder)

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(run_module, place, refuse)
        for name in ('x', 'new'):
            with pytest.raises(LabError, match=f"cannot be written .{os.strerror(number)}") as caught:
                start_run('demo', space(tmp_path, name=name, model='preset:gpt2-tiny'))
            assert '\n' not in str(caught.value)
    assert content_hashes(first.folder) == before and not (first.folder.parent / 'new').exists()
    assert not is_held(first.folder) and list((tmp_path / 'outputs/demo').glob('_previous/*')) == []


small_disk = '''
import subprocess, sys
folder, options, notebook = sys.argv[1:]
subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], check=True)
from llmft.cli import call
sys.exit(call(['run', notebook, '-p', f'outputs={folder}']))
'''


@pytest.mark.parametrize('options', ['size=200k', 'ro,size=3m'])
def test_a_tiny_and_a_read_only_disk_end_with_status_2(tmp_path, options):
    notebook = Path(__file__).parent / 'notebooks' / 'ok.ipynb'
    command = ['unshare', '-rm', sys.executable, '-c', small_disk, str(tmp_path), options, str(notebook)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if 'mount' in done.stderr or 'unshare' in done.stderr:
        pytest.skip(f'no small file system can be made here: {done.stderr.splitlines()[-1]}')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "cannot be written" in done.stderr, done.stderr


def test_a_clock_that_is_set_back_gives_no_negative_time(tmp_path, monkeypatch):
    run = start_run('demo', space(tmp_path))
    monkeypatch.setattr(run_module, 'now', lambda: '2001-01-01T00:00:00.000+00:00')
    run.finish({})
    facts = read_run(run.folder)['run']
    assert facts['seconds'] >= 0 and facts['ended'] >= facts['started']


def test_an_id_from_elsewhere_leads_nowhere(tmp_path):
    write_json(tmp_path / 'a/b/x/run.json', dict(run=dict(status='failed', id='../../../gone')))
    open_folder(tmp_path / 'a/b/x', dict(name='x'))
    close_folder(tmp_path / 'a/b/x', 'failed')
    assert [path.name for path in (tmp_path / 'a/b/_previous').iterdir()] == ['x-unknown']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a']


# ---- token files and series

letters = 'characters:abcdefghijklmno'


def forge_facts(folder):
    facts = read_json(folder / 'tokens.json')
    write_json(folder / 'tokens.json', facts | dict(vocabulary=99))


def move_boundary(folder):
    offsets = np.load(folder / 'train_offsets.npy')
    offsets[1] += 1
    np.save(folder / 'train_offsets.npy', offsets)


def beyond_vocabulary(folder):
    ids = np.fromfile(folder / 'train.bin', np.uint16)
    ids[5] = 60_000
    ids.tofile(folder / 'train.bin')


def same_sides(folder):
    for end in ('.bin', '_offsets.npy'):
        (folder / f'val{end}').write_bytes((folder / f'train{end}').read_bytes())


token_harms = dict(
    flip=lambda folder: flip(folder / 'train.bin'),
    zero=lambda folder: zero(folder / 'train.bin'),
    cut=lambda folder: cut(folder / 'train.bin'),
    garbage=lambda folder: (folder / 'train_offsets.npy').write_bytes(b'no numpy'),
    gone=lambda folder: (folder / 'train_offsets.npy').unlink(),
    facts=forge_facts,
    boundary=move_boundary,
    vocabulary=beyond_vocabulary,
    sides=same_sides,
)


@pytest.mark.parametrize('harm', token_harms)
def test_altered_token_files_are_refused_when_they_are_opened(tmp_path, harm):
    source = dict(data='simulated:predator_prey', tokenizer=letters, documents=40, valid_documents=4)
    prepare_tokens(tmp_path / 't', **source)
    token_harms[harm](tmp_path / 't')
    with pytest.raises(LabError, match='was changed|was cut|is missing') as caught:
        for side in ('train', 'val'):
            read_token_file(tmp_path / 't', side)
    assert '\n' not in str(caught.value)
    with pytest.raises(LabError):
        prepare_tokens(tmp_path / 't', **source)


def test_token_files_are_found_by_the_content_of_their_source(tmp_path):
    text = tmp_path / 'notes.jsonl'
    lines = [json.dumps(dict(text=f'abc{"d" * i}')) for i in range(40)]
    text.write_text('\n'.join(lines))
    source = dict(data=str(text), tokenizer=letters, valid_share=0.3)
    folder = token_folder(tmp_path, **source)
    first = prepare_tokens(folder, **source)
    text.write_text('\n'.join(lines).replace('abc', 'cba'))
    assert token_folder(tmp_path, **source) != folder
    with pytest.raises(LabError, match='as it was before it changed'):
        prepare_tokens(folder, **source)
    assert prepare_tokens(token_folder(tmp_path, **source), **source)['train']['sha256'] != first['train']['sha256']


def swap_lines(folder):
    first, second, *rest = (folder / 'train_texts.txt').read_text().splitlines(keepends=True)
    write_atomic(folder / 'train_texts.txt', ''.join([second, first, *rest]))


def other_alpha(folder):
    write_json(folder / 'metadata.json', read_json(folder / 'metadata.json') | dict(alpha=5.0))


def validation_is_training(folder):
    write_atomic(folder / 'val_texts.txt', (folder / 'train_texts.txt').read_bytes())


def other_factors(folder):
    prepare_series(folder.parent / 'other', simulate_count=20, seed=2, alpha=5.0, steps=30, context=20)
    write_atomic(folder / 'factors.npz', (folder.parent / 'other/factors.npz').read_bytes())


@pytest.mark.parametrize('harm', [swap_lines, other_alpha, validation_is_training, other_factors])
def test_altered_series_are_refused_when_they_are_opened(tmp_path, harm):
    from llmft.data.tokens import load_tokenizer

    folder = tmp_path / 's'
    prepare_series(folder, simulate_count=20, seed=1, steps=30, context=20)
    assert len(read_split(folder, 'train')) == 14
    harm(folder)
    for read in (lambda: read_split(folder, 'valid'), lambda: series_documents(folder, 'train', load_tokenizer('base'))):
        with pytest.raises(LabError, match='was changed since it was written: prepare the data again') as caught:
            read()
        assert '\n' not in str(caught.value)


def test_tokens_of_other_texts_are_not_used(tmp_path):
    from llmft.data.tokens import encode, load_tokenizer

    tokenizer = load_tokenizer('base')
    prepare_series(tmp_path, simulate_count=20, seed=1, steps=30, context=20)
    right = series_documents(tmp_path, 'train', tokenizer)
    encode(['stale'] * 14, tokenizer, tmp_path / 'tokens' / 'train')
    again = series_documents(tmp_path, 'train', tokenizer)
    assert np.array_equal(right.ids, again.ids) and len(right) == len(again) == 14


# ---- the ledger


def paid(path):
    account = Account(path, 100.0)
    account.begin('a', 'x')
    for step in (1, 2, 3):
        account.reserve('a', step, 10.0, 1.0)
        account.book('a', step, 10.0, 1.0, 5)
    return account


def edited(old, new, number):
    def harm(lines):
        assert old in lines[number - 1]
        return [*lines[: number - 1], lines[number - 1].replace(old, new), *lines[number:]]

    return harm


ledger_harms = {
    'zero': (edited('"study": 10.0', '"study": 0', 3), 3),
    'negative': (edited('"study": 10.0', '"study": -10.0', 7), 7),
    'nothing': (edited('"study": 10.0', '"study": null', 2), 2),
    'not a number': (edited('"study": 10.0', '"study": NaN', 3), 3),
    'infinite': (edited('"study": 10.0', '"study": Infinity', 3), 3),
    'text': (edited('"study": 10.0', '"study": "10"', 3), 3),
    'less': (edited('"study": 10.0', '"study": 1.0', 3), 4),
    'another run': (edited('"run": "a"', '"run": "b"', 4), 5),
    'no JSON': (edited('{', '(', 4), 4),
    'a list': (lambda lines: [*lines[:3], '[]', *lines[4:]], 4),
    'without its beginning': (lambda lines: lines[1:], 1),
    'without its middle': (lambda lines: lines[:3] + lines[5:], 4),
    'swapped': (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 4),
    'twice': (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4),
}


@pytest.mark.parametrize('harm', ledger_harms)
def test_an_edited_ledger_is_refused_with_its_line(tmp_path, harm):
    path = tmp_path / 'l.jsonl'
    paid(path)
    assert Account(path, 100.0).left() == 70
    change, line = ledger_harms[harm]
    path.write_text(''.join(f'{text}\n' for text in change(path.read_text().splitlines())))
    with pytest.raises(LabError, match=rf'l.jsonl:{line} ') as caught:
        Account(path, 100.0).left()
    assert '\n' not in str(caught.value)


def test_no_amount_below_zero_is_ever_written(tmp_path):
    account = Account(tmp_path / 'l.jsonl', 100.0)
    for amount in (0.0, -1.0, float('nan'), float('inf')):
        with pytest.raises(LabError, match='no finite number above zero'):
            account.book('a', 1, amount, 1.0)
    assert (tmp_path / 'l.jsonl').read_text() == '' and account.left() == 100


@pytest.mark.parametrize('kept', [0, 1, 6])
def test_a_ledger_that_lost_its_end_is_refused_while_a_run_remembers_it(tmp_path, kept):
    path = tmp_path / 'forecast_ledger' / 's.jsonl'
    account = paid(path)
    write_json(tmp_path / 'forecast_train/a/run.json', dict(run=dict(status='done'), train={}))
    note_ledger(tmp_path / 'forecast_train/a', 's', account)
    assert study_account(str(tmp_path), 's', 100.0).left() == 70
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:kept]))
    with pytest.raises(LabError, match=f's.jsonl ends at line {kept}, before the line at which forecast_train/a'):
        study_account(str(tmp_path), 's', 100.0)
    assert study_account(str(tmp_path), 'another', 100.0).left() == 100


def test_a_seal_covers_every_fact():
    facts = sealed(dict(a=1, b=dict(c=[2.5, None, 'ü']), d=float(np.float32(0.1))))
    assert hashes.is_sealed(json.loads(json.dumps(facts)))
    assert not hashes.is_sealed(facts | dict(e=1)) and not hashes.is_sealed(facts | dict(b=dict(c=[2.5, None])))
