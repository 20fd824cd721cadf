"The experiments themselves, end to end and as small as they go: run, report, comparison, and plain papermill."

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from house import code, experiments, only_imports, source
from verifying import assert_computed_again

from llmft.core import LabError, project_root
from llmft.models import load as models
from llmft.runs.execute import execute_run
from llmft.runs.params import read_parameters, resolve_params
from llmft.runs.results import finished_runs
from llmft.studies.finetuning.setup import finetuning_data, finetuning_model
from llmft.training.step import evaluate_loss, judge

root = project_root()
least = dict(max_steps=3, num_samples=4, num_eval_samples=1, max_length=64, batch_size=2, sample_tokens=4, eval_every=2)


def overrides(**values):
    return [f'{name}={value if isinstance(value, str) else json.dumps(value)}' for name, value in values.items()]


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp('outputs')


@pytest.fixture(scope='module')
def runs(outputs):
    "One small run of each method, from the params file that a user would name."
    records = {}
    for method in ('full', 'lora', 'qlora'):
        notebook, params = resolve_params(
            [root / f'params/finetune/{method}.yaml'], overrides(outputs=str(outputs), **least), 'small'
        )
        records[method] = execute_run(notebook, params, on_line=lambda line: None)
    return records


def says_what_was_cut(record, folder, max_length):
    "Assert that the histogram of a report has the documents as they were before the cut."
    notes = record['meta']['notes']['train']
    page = (folder / 'report.html').read_text()
    assert notes['too_long'] and f"n = {notes['documents']:,} · " in page
    assert f"limit {max_length:,}: {notes['too_long']:,} longer" in page


def test_the_loss_before_training_is_measured_as_those_after_it():
    _, params = resolve_params([root / 'params/finetune/lora.yaml'], overrides(**least | dict(num_eval_samples=3)), 'small')
    params = SimpleNamespace(**params)
    data = finetuning_data(params)
    net = finetuning_model(params)
    judged = judge(net, data.tokenizer, data.corpus.valid, params.max_length, params.batch_size, params.layout)
    logged = evaluate_loss(net, data.valid, params.batch_size, params.max_length, params.layout)
    assert judged['loss_with_end'] == pytest.approx(logged['loss'], rel=1e-6) and judged['ends'] == 3


@pytest.mark.parametrize('method', ['full', 'lora', 'qlora'])
def test_every_method_trains_and_leaves_a_report(runs, outputs, method):
    record, folder = runs[method], outputs / 'finetune' / method
    assert record['run']['status'] == 'done', record['run']['error']
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['steps'] == 3 and metrics['method'] == method and metrics['loss_after'] != metrics['loss_before']
    assert (
        metrics['train_tokens']
        == [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines() if 'grad_norm' in line][-1][
            'tokens'
        ]
    )
    assert (metrics['quantised_share'] > 0.5) == (method == 'qlora') and metrics['peak_memory_gb'] > 0
    page = (folder / 'report.html').read_text()
    assert 'perplexity' in page and len(page) < 1.5e6 and 'Traceback' not in page
    assert {path.name for path in (folder / 'figures').iterdir()} == {'lengths.png', 'loss.png', 'memory.png'}
    says_what_was_cut(record, folder, least['max_length'])
    assert_computed_again('finetune', folder)
    assert f'{method}, step 0: held-out loss ' in page and ', before training at step 0' in page
    if method == 'full':
        assert (folder / 'model' / 'model.safetensors').exists()
    else:
        assert (folder / 'adapter' / 'adapter_model.safetensors').exists() and metrics['reload_difference'] < 1e-4


def test_a_run_that_is_done_is_not_done_twice(runs, outputs):
    notebook, params = resolve_params(
        [root / 'params/finetune/lora.yaml'], overrides(outputs=str(outputs), **least), 'small'
    )
    again = execute_run(notebook, params, on_line=lambda line: None)
    assert again['run']['id'] == runs['lora']['run']['id']


def test_the_comparison_reads_all_three(runs, outputs):
    notebook, params = resolve_params([root / 'nbs/experiments/compare.ipynb'], overrides(outputs=str(outputs)))
    record = execute_run(notebook, params, on_line=lambda line: None)
    assert record['run']['status'] == 'done', record['run']['error']
    metrics = json.loads((outputs / 'compare' / 'compare' / 'metrics.json').read_text())
    assert metrics['runs'] == 3 and metrics['best'] in ('full', 'lora', 'qlora')
    figures = {path.name for path in (outputs / 'compare' / 'compare' / 'figures').iterdir()}
    assert {
        'finetune_time.png',
        'finetune_time_per_epoch.png',
        'finetune_memory.png',
        'loss.png',
        'frontier.png',
    } <= figures


def test_pretraining_exports_a_model_with_its_card(outputs):
    notebook, params = resolve_params(
        [root / 'params/pretrain/base.yaml'],
        overrides(outputs=str(outputs), max_steps=3, num_samples=4, num_eval_samples=1),
        'small',
    )
    record = execute_run(notebook, params, on_line=lambda line: None)
    assert record['run']['status'] == 'done', record['run']['error']
    model = outputs / 'pretrain' / 'base' / 'model'
    assert {'model.safetensors', 'config.json', 'tokenizer.json', 'README.md', 'loss.png'} <= {
        path.name for path in model.iterdir()
    }
    assert 'bits per byte' in (model / 'README.md').read_text()
    says_what_was_cut(record, outputs / 'pretrain' / 'base', 128)
    assert_computed_again('pretrain', outputs / 'pretrain' / 'base')
    assert 'base, step 0: held-out loss ' in (outputs / 'pretrain' / 'base' / 'report.html').read_text()


def test_plain_papermill_takes_the_same_files(tmp_path):
    small = tmp_path / 'least.yaml'
    small.write_text(yaml.safe_dump(dict(least, outputs=str(tmp_path), name='plain')))
    command = [
        sys.executable,
        '-m',
        'papermill',
        '--no-progress-bar',
        '--log-level',
        'ERROR',
        'nbs/experiments/finetune.ipynb',
        str(tmp_path / 'out.ipynb'),
        '-f',
        'params/finetune/qlora.yaml',
        '-f',
        'params/finetune/_small.yaml',
        '-f',
        str(small),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'unknown parameter' not in done.stderr
    assert list(finished_runs([], str(tmp_path), 'finetune')) == ['plain']


def test_the_shipped_base_model_is_what_its_card_says():
    from llmft.core import assets, sha256_of

    card, weights = (assets / 'base' / 'README.md').read_text(), assets / 'base' / 'model.safetensors'
    assert sha256_of(weights) in card and weights.stat().st_size <= 8_000_000


# ---- what this machine cannot do

beyond_this_machine = dict(attention='flash_attention_2', precision='bf16', mixed_precision='bf16')
refusals = [
    pytest.param(path, parameter.name, id=f'{path.stem}-{parameter.name}')
    for path in experiments
    for parameter in read_parameters(path)
    if parameter.name in beyond_this_machine and isinstance(parameter.default, str)
]


@pytest.mark.parametrize('path, name', refusals)
def test_every_experiment_refuses_what_the_device_lacks_in_its_first_cell(path, name, tmp_path, monkeypatch):
    "On a pretended GPU that only emulates bf16, and without flash attention: nothing but imports has run before."
    monkeypatch.setattr(models, '_emulates_bf16', lambda: True)
    monkeypatch.setattr(models.torch.cuda, 'get_device_name', lambda: 'old card')
    found = code(path)
    place = next(i for i, cell in enumerate(found) if 'parameters' in cell['metadata'].get('tags', []))
    parameters, *others = found[place:]
    namespace = {}
    exec(source(parameters), namespace)
    namespace |= {name: beyond_this_machine[name], 'outputs': str(tmp_path)}

    first = next(i for i, cell in enumerate(others) if not only_imports(cell))
    for cell in others[:first]:
        exec(source(cell), namespace)
    words = 'old card. has no bf16' if name != 'attention' else 'attention flash_attention_2 needs'
    with pytest.raises(LabError, match=words):
        exec(source(others[first]), namespace)
    assert not list(tmp_path.iterdir()), 'a folder was made for a run that cannot be'


def test_all_experiments_with_formats_are_seen():
    assert len(refusals) >= 17
