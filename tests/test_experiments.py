"The experiments themselves, end to end and as small as they go: run, report, comparison, and plain papermill."

import json
import subprocess
import sys

import pytest
import yaml

from llmft.core import project_root
from llmft.runs.execute import execute_run
from llmft.runs.params import resolve_params
from llmft.runs.results import finished_runs

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
            [root / f'params/finetune/{method}.yaml'], overrides(outputs=str(outputs), **least), True
        )
        records[method] = execute_run(notebook, params, on_line=lambda line: None)
    return records


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
    if method == 'full':
        assert (folder / 'model' / 'model.safetensors').exists()
    else:
        assert (folder / 'adapter' / 'adapter_model.safetensors').exists() and metrics['reload_difference'] < 1e-4


def test_a_run_that_is_done_is_not_done_twice(runs, outputs):
    notebook, params = resolve_params(
        [root / 'params/finetune/lora.yaml'], overrides(outputs=str(outputs), **least), True
    )
    again = execute_run(notebook, params, on_line=lambda line: None)
    assert again['run']['id'] == runs['lora']['run']['id']


def test_the_comparison_reads_all_three(runs, outputs):
    notebook, params = resolve_params([root / 'nbs/experiments/compare.ipynb'], overrides(outputs=str(outputs)), False)
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
        True,
    )
    record = execute_run(notebook, params, on_line=lambda line: None)
    assert record['run']['status'] == 'done', record['run']['error']
    model = outputs / 'pretrain' / 'base' / 'model'
    assert {'model.safetensors', 'config.json', 'tokenizer.json', 'README.md', 'loss.png'} <= {
        path.name for path in model.iterdir()
    }
    assert 'bits per byte' in (model / 'README.md').read_text()


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
