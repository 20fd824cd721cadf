"`llmft verify RUN`: a run is checked from its folder, a contradiction is named, and no folder does harm."

import json
import os
import re
import shutil
import time

import pytest
from verifying import recomputed

from llmft.cli import _study_of, call
from llmft.core import project_root, read_json, write_json
from llmft.data.hashes import sealed
from llmft.runs.checks import input_checks, seal_check
from llmft.runs.execute import execute_run
from llmft.runs.identity import read_record, seal_record
from llmft.runs.params import read_parameters, resolve_params
from llmft.runs.run import start_run

root = project_root()
gallery = sorted(path.parent for path in (root / 'outputs/gallery').glob('*/*/run.json'))


def verified(folder, capsys, *options):
    "Exit status, lines on standard output, lines on standard error."
    capsys.readouterr()
    status = call(['verify', str(folder), *options])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def reseal(folder, **sections):
    "Sign a record again, as a forger would."
    record = read_json(folder / 'run.json')
    write_json(folder / 'run.json', seal_record(folder, record | sections))


# ---- the gallery


older_than_a_parameter = ()  # runs of the gallery whose numbers cannot be computed again any more


@pytest.mark.parametrize('folder', gallery, ids=lambda path: '/'.join(path.parts[-2:]))
def test_what_is_committed_of_the_gallery_verifies(folder, capsys):
    status, lines, errors = verified(folder, capsys)
    if status == 2:
        assert '/'.join(folder.parts[-2:]) in older_than_a_parameter
        assert not lines and len(errors) == 1 and 'this run is older than' in errors[0], (lines, errors)
        assert seal_check(folder, read_record(folder)).status == 'ok'
        return
    assert status == 0 and not errors, (lines, errors)
    assert lines[0].startswith('seal ok: ') and lines[-1].startswith(f'{folder}: nothing contradicts it')
    if (folder / 'log.jsonl').exists():
        assert any(line.startswith('log ok: ') for line in lines)


def test_a_changed_page_of_the_gallery_is_found(tmp_path, capsys):
    folder = shutil.copytree(gallery[0], tmp_path / 'copy')
    page = folder / 'report.html'
    page.write_text(page.read_text().replace('0', '1', 1))
    status, lines, _ = verified(folder, capsys)
    assert status == 1 and lines[0] == 'seal altered: report.html was changed since the run ended'


# ---- a run from end to end


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    "A small finished run of finetune, and seconds of its evaluation at most."
    texts = tmp_path_factory.mktemp('texts')
    for number in range(6):
        (texts / f'{number}.txt').write_text(f'The number {number} comes before {number + 1}. ' * 40)
    values = [f'data={texts}', 'max_steps=2', 'sample_tokens=4', 'max_length=64', 'valid_share=0.4', 'method=lora']
    notebook, params = resolve_params([root / 'params/finetune/lora.yaml'], values, 'small')
    outputs = tmp_path_factory.mktemp('outputs')
    record = execute_run(notebook, params | dict(outputs=str(outputs)), on_line=lambda line: None)
    assert record['run']['status'] == 'done', record['run']['error']
    return outputs / 'finetune' / params['name'], texts


@pytest.fixture
def run(tuned, tmp_path):
    return shutil.copytree(tuned[0], tmp_path / 'outputs' / 'finetune' / 'lora')


def test_a_run_verifies_with_every_check(run, capsys):
    status, lines, errors = verified(run, capsys)
    assert status == 0 and not errors, lines
    names = [line.split(' ')[0] for line in lines[:-1]]
    assert {'seal', 'data', 'code', 'log', 'adapter', 'loss_after', 'perplexity_after'} <= set(names), lines
    assert all(line.split(' ')[1].startswith('ok') for line in lines[:-1]), lines
    assert 'the same to the last bit' in next(line for line in lines if line.startswith('loss_after'))


def test_checks_as_an_object(run, capsys):
    status, lines, _ = verified(run, capsys, '--json')
    found = json.loads(lines[-1])
    assert status == 0 and found['status'] == 'ok' and {check['status'] for check in found['checks']} == {'ok'}


def test_a_report_names_the_line_that_checks_it(run):
    assert f'llmft verify {read_json(run / "run.json")["params"]["outputs"]}/finetune/' in (run / 'report.html').read_text()


@pytest.mark.parametrize('error', [AttributeError('no attribute max_size'), KeyError('max_size'), TypeError('unexpected')])
def test_an_error_of_the_computation_is_no_missing_file(run, capsys, monkeypatch, error):
    def ends(*_):
        raise error

    monkeypatch.setattr('llmft.studies.finetuning.again.judge', ends)
    status, lines, errors = verified(run, capsys)
    assert status == 2 and not errors
    assert f'numbers failed: {type(error).__name__}: {error}' in lines and '1 check ended with an error' in lines[-1]
    status, lines, _ = verified(run, capsys, '--json')
    assert status == 2 and json.loads(lines[-1])['status'] == 'failed'


def test_a_better_number_that_was_signed_again_is_found(run, capsys):
    metrics = read_json(run / 'metrics.json')
    write_json(run / 'metrics.json', metrics | dict(loss_after=metrics['loss_after'] * 0.99))
    reseal(run)
    status, lines, _ = verified(run, capsys)
    assert status == 1 and [line.split(' ')[0] for line in lines[:-1] if ' altered: ' in line] == ['loss_after'], lines


def test_another_adapter_that_was_signed_again_is_found(run, capsys):
    from safetensors.numpy import load_file, save_file

    path = run / 'adapter' / 'adapter_model.safetensors'
    save_file({name: 30 * value + 0.3 for name, value in load_file(path).items()}, path)
    reseal(run)
    status, lines, _ = verified(run, capsys)
    assert status == 1 and any(line.startswith('loss_after altered: ') for line in lines), lines


def test_other_data_are_found_and_missing_data_are_said(run, tuned, capsys):
    text = tuned[1] / '0.txt'
    before = text.read_text()
    try:
        text.write_text(before + 'more')
        status, lines, _ = verified(run, capsys)
        assert status == 1 and any(line.startswith('data altered: data changed since') for line in lines), lines
        tuned[1].rename(tuned[1].with_name('elsewhere'))
        status, lines, _ = verified(run, capsys)
        assert status == 0 and any(line.startswith('data cannot be checked because') for line in lines), lines
    finally:
        tuned[1].with_name('elsewhere').rename(tuned[1])
        text.write_text(before)


def test_a_log_that_was_cut_and_signed_again_is_found(run, capsys):
    log = run / 'log.jsonl'
    log.write_text(log.read_text().splitlines()[0] + '\n')
    reseal(run)
    status, lines, _ = verified(run, capsys)
    assert status == 1 and any(line.startswith('log altered: it ends at step 1') for line in lines), lines


def test_a_copy_without_weights_says_so(run, capsys):
    shutil.rmtree(run / 'adapter')
    reseal(run)
    status, lines, _ = verified(run, capsys)
    assert status == 0 and 'numbers cannot be checked because adapter is not in the folder' in lines


def test_checking_takes_at_most_twice_the_evaluation_of_a_run(run, capsys):
    "Of the run itself, which evaluates twice, loads the model three times and trains two steps."
    seconds = read_json(run / 'run.json')['run']['seconds']
    began = time.perf_counter()
    assert verified(run, capsys)[0] == 0
    assert time.perf_counter() - began < max(2.0, seconds)


# ---- folders that lie, and folders that are none


def folder_of(tmp_path, record, metrics=None, sign=True):
    "A folder with any record, signed where that is asked for."
    folder = tmp_path / 'outputs' / 'finetune' / 'x'
    write_json(folder / 'metrics.json', dict(loss_after=1.0) if metrics is None else metrics)
    write_json(folder / 'run.json', seal_record(folder, record) if sign else record)
    return folder


def record_of(notebook='finetune', **params):
    "A record with the parameters of its notebook, where there is one."
    known = read_parameters(notebook) if notebook in _study_of else []
    params = {each.name: each.default for each in known} | params
    return dict(run=dict(status='done', notebook=notebook, name='x'), params=params, meta={}, read={})


BROKEN = {
    'a list': [], 'a number': 7, 'no run': {}, 'run is text': dict(run='done'), 'status is a number': dict(run=dict(status=1)),
    'params is a list': record_of() | dict(params=[]), 'read is a list': record_of() | dict(read=[]),
    'wrote is a list': record_of() | dict(wrote=[]), 'hash is a number': record_of() | dict(wrote=dict(a=7)),
    'a file outside': record_of() | dict(wrote={'../../../etc/passwd': '0' * 64}),
    'an absolute file': record_of() | dict(wrote={'/etc/passwd': '0' * 64}),
    'read holds text': record_of() | dict(read=dict(data='x')), 'hash of a source is a list': record_of() | dict(read=dict(data=dict(a=[]))),
    'started is no time': dict(run=dict(status='done', started='yesterday')), 'notebook is a list': dict(run=dict(status='done', notebook=[])),
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_a_record_of_wrong_types_is_refused_in_one_line(tmp_path, capsys, name):
    folder = folder_of(tmp_path, BROKEN[name], sign=False)
    status, lines, errors = verified(folder, capsys)
    assert status == 2 and not lines and len(errors) == 1 and len(errors[0]) < 500, (lines, errors)


@pytest.mark.parametrize('notebook', _study_of)
def test_a_run_older_than_a_parameter_is_refused_in_one_line(tmp_path, capsys, notebook):
    record = record_of(notebook) | dict(meta=dict(git=dict(commit='54b15b3d9870223a')))
    last = list(record['params'])[-1]
    del record['params'][last]
    status, lines, errors = verified(folder_of(tmp_path, record), capsys)
    assert status == 2 and not lines and len(errors) == 1, (lines, errors)
    assert f'older than 1 parameter of {notebook} ({last})' in errors[0] and 'git checkout 54b15b3d98' in errors[0]


def test_every_kind_of_run_is_computed_again_in_a_test():
    "By `assert_computed_again`, on a run that its study's own tests make."
    texts = ''.join(path.read_text() for path in (root / 'tests').glob('test_*.py'))
    assert set(re.findall(r"assert_computed_again\('(\w+)'", texts)) == set(recomputed) == set(_study_of)


def test_numbers_are_computed_from_parameters_that_their_notebooks_have():
    wrong, looked = [], 0
    for study in set(_study_of.values()):
        notebooks = [notebook for notebook in _study_of if _study_of[notebook] == study]
        known = {each.name for notebook in notebooks for each in read_parameters(notebook)}
        used = re.findall(r'\bparams\.(\w+)', (root / f'llmft/studies/{study}/again.py').read_text())
        looked += len(used)
        wrong += [f'{study}: {name}' for name in set(used) - known]
    assert not wrong and looked >= 40, (wrong, looked)


LYING = {
    'nothing in it': record_of(),
    'no seal': (record_of(), 'unsigned'),
    'a notebook outside': record_of('../../etc/x'),
    'a notebook that is none': record_of('no_such'),
    'every parameter of another type': record_of(method=[], model={}, data=7, max_length='x', batch_size=None),
    'the whole disk': record_of(data='/') | dict(read=dict(data=dict(a='0'))),
    'the system': record_of(data='/proc') | dict(read=dict(data=dict(a='0'))),
    'a device': record_of(data='/dev/zero') | dict(read=dict(data=dict(a='0'))),
    'no path': record_of(data='a\0b') | dict(read=dict(data=dict(a='0'))),
    'outputs is a list': record_of(data='x', outputs=[]) | dict(read=dict(data=dict(a='0'))),
    'a model that is a number': record_of(model=7) | dict(read=dict(model=dict(a='0'))),
    'an account outside': record_of('forecast_train') | dict(train=dict(ledger=dict(name='../../x', head='0'))),
    'an account of another type': record_of('forecast_train') | dict(train=dict(ledger=dict(name=[], head=3))),
    'data of another type': record_of(model='base', data='builtin:topics') | dict(meta=dict(data=[1])),
    'a status with a line feed': record_of() | dict(run=dict(status='done\nseal ok: fine \x1b[31m', notebook='finetune', name='x')),
    'a run that goes on': record_of() | dict(run=dict(status='running', notebook='finetune', name='x')),
    'seconds without end': record_of() | dict(run=dict(status='done', notebook='compare', name='x', seconds=1e308)),
}


@pytest.mark.parametrize('name', LYING)
def test_a_folder_that_lies_gets_one_line_per_check(tmp_path, capsys, name):
    record, unsigned = LYING[name] if isinstance(LYING[name], tuple) else (LYING[name], None)
    folder = folder_of(tmp_path, record, sign=not unsigned)
    began = time.process_time()
    status, lines, errors = verified(folder, capsys)
    assert status in (0, 1) and not errors and 2 <= len(lines) < 12 and max(map(len, lines)) < 500, (lines, errors)
    assert not any('\x1b' in line for line in lines) and time.process_time() - began < 20
    assert not any(line.startswith(('loss_after ok', 'numbers ok')) for line in lines)
    assert status == (1 if name in ('no seal', 'an account outside') else 0), lines


@pytest.mark.parametrize('metrics', [[], 7, 'x'])
def test_metrics_of_another_type_contradict_the_run(tmp_path, capsys, metrics):
    folder = folder_of(tmp_path, record_of(), metrics)
    status, lines, _ = verified(folder, capsys)
    assert status == 1 and any(line.startswith('metrics altered: ') for line in lines)


@pytest.mark.parametrize('number', [None, [], 'x', True, 10**400, float('nan')])
def test_a_number_that_is_none_is_not_compared(tmp_path, capsys, number):
    from llmft.runs.checks import check_run

    folder = folder_of(tmp_path, record_of(), dict(loss_after=number))
    last = check_run(folder, lambda *_: dict(loss_after=(1.5, 1e-3)))[-1]
    assert last.what == 'loss_after' and last.status in ('cannot be checked', 'altered')


@pytest.mark.parametrize('name, status', [('run.json', 2), ('metrics.json', 1), ('log.jsonl', 1), ('ledger.jsonl', 1),
                                          ('adapter/adapter_model.safetensors', 1)])  # fmt: skip
def test_a_pipe_never_makes_it_wait(tmp_path, capsys, name, status):
    record = record_of('compare') | dict(train=dict(ledger=dict(name='', head='')))
    folder = folder_of(tmp_path, record)
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    if name != 'run.json':
        write_json(folder / 'run.json', sealed(read_json(folder / 'run.json') | dict(wrote={})))
    found, lines, errors = verified(folder, capsys)
    assert found == status and len(errors) == (status == 2), (lines, errors)


@pytest.mark.parametrize('line', [b'\xff\n', b'[]\n', b'{"step": "x"}\n', b'{"step": 2}\n{"step": 1}\n', b'{"step": 1e3}\n',
                                  b'[' * 100_000])  # fmt: skip
def test_a_log_that_is_none_contradicts_the_run(tmp_path, capsys, line):
    folder = folder_of(tmp_path, record_of('compare'))
    (folder / 'log.jsonl').write_bytes(line)
    reseal(folder)
    status, lines, _ = verified(folder, capsys)
    assert status == 1 and any(text.startswith('log altered: ') for text in lines), lines


@pytest.mark.parametrize('name', ['', 'nowhere', 'a\0b'])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, name):
    status, lines, errors = verified(tmp_path / name if name != 'a\0b' else name, capsys)
    assert status == 2 and not lines and len(errors) == 1, (lines, errors)


# ---- a summary of all runs


def test_a_summary_of_all_runs_is_not_altered_by_later_ones(tmp_path, capsys):
    outputs = tmp_path / 'outputs'

    def finish(notebook, name, loss=1.0, **params):
        values = dict(name=name, outputs=str(outputs)) | params
        types = {key: list[str] if value == [] else type(value) for key, value in values.items()}
        run = start_run(notebook, values | dict(__annotations__=types))
        run.finish(dict(loss=loss), 'ok')
        return run.folder

    finish('act', 'first')
    summary = finish('total', 'all', runs=[])
    assert list(read_record(summary)['read']['runs']) == ['act/first']
    finish('act', 'later')
    assert [(check.what, check.status) for check in input_checks(read_record(summary))] == [('runs', 'ok')]

    shutil.rmtree(outputs / 'act/first')
    time.sleep(1.1)  # a run's start is compared by the clock
    finish('act', 'first', loss=2.0)
    (check,) = input_checks(read_record(summary))
    assert (check.status, check.text) == ('cannot be checked', 'act/first was run again since')
