"The forecasting study end to end, as small as it goes: data, training with an account that ends inside a run, evaluation, summary."

import csv
import json

import pytest
from verifying import assert_computed_again

from llmft.core import project_root
from llmft.models.load import model_config
from llmft.runs.execute import execute_run
from llmft.runs.params import resolve_params
from llmft.training.ledger import Account, statement, study_step

root = project_root()
step = study_step(model_config('preset:llama-base'), [32] * 2, 2, ['q_proj', 'v_proj'])


def execute(config, outputs, **values):
    values['outputs'] = str(outputs)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    notebook, params = resolve_params([root / config], [f'{name}={text}' for name, text in texts.items()], 'small')
    record = execute_run(notebook, params, on_line=lambda line: None)
    folder = outputs / notebook.stem / params['name']
    return (
        record,
        json.loads((folder / 'metrics.json').read_text()) if record['run']['status'] == 'done' else None,
        folder,
    )


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "The results of all stages, by name."
    outputs, found = tmp_path_factory.mktemp('outputs'), {}
    found['data'] = execute('params/forecast_data/p2.yaml', outputs, simulate=40, steps=24, given=14)
    common = dict(
        data=str(found['data'][2]),
        ledger='s',
        max_flops=5.5 * step,
        shorten=False,
        given=14,
        max_length=32,
        lora_rank=2,
        lora_targets=['q_proj', 'v_proj'],
        num_eval_samples=2,
        valid_horizon=2,
        valid_samples=2,
        max_steps=4,
        eval_every=2,
    )
    found['search'] = execute('params/forecast_train/search.yaml', outputs, **common)
    found['final'] = execute('params/forecast_train/final.yaml', outputs, **dict(common, start=str(found['search'][2])))
    found['test'] = execute(
        'params/forecast_eval/final.yaml',
        outputs,
        data=str(found['data'][2]),
        start=str(found['final'][2]),
        given=14,
        horizon=10,
        num_eval_samples=3,
        samples=2,
        ledger='s',
    )
    found['page'] = execute('params/forecast_summary/study.yaml', outputs, ledger='s', max_flops=5.5 * step)
    return found


def test_every_stage_is_done(study):
    assert {name: record['run']['status'] for name, (record, _, _) in study.items()} == dict.fromkeys(study, 'done'), {
        name: record['run']['error'] for name, (record, _, _) in study.items()
    }


def test_the_errors_of_forecasts_are_computed_again(study):
    assert_computed_again('forecast_train', study['search'][2])
    assert_computed_again('forecast_train', study['final'][2])
    assert_computed_again('forecast_eval', study['test'][2])


def test_a_run_that_finds_the_budget_used_up_says_so_before_training(study):
    outputs = study['data'][2].parents[1]
    record, _, folder = execute(
        'params/forecast_train/search.yaml',
        outputs,
        name='late',
        data=str(study['data'][2]),
        ledger='s',
        max_flops=5.5 * step,
        given=14,
        max_length=32,
        lora_rank=2,
        lora_targets=['q_proj', 'v_proj'],
        num_eval_samples=2,
        valid_horizon=2,
        valid_samples=2,
        max_steps=4,
    )
    assert (
        record['run']['status'] == 'failed'
        and 's.jsonl has booked' in record['run']['error']
        and 'name another ledger' in record['run']['error']
    )
    assert not (folder / 'checkpoints').exists()


def test_data_leaves_texts_tokens_and_metadata(study):
    _, metrics, folder = study['data']
    assert (metrics['train'], metrics['valid'], metrics['test']) == (28, 6, 6) and len(
        (folder / 'train_texts.txt').read_text().splitlines()
    ) == 28
    assert {path.name for path in (folder / 'tokens').iterdir()} == {'train', 'valid', 'test'} and {
        path.name for path in (folder / 'figures').iterdir()
    } == {'lengths.png', 'series.png', 'spectra.png', 'clusters.png'}
    assert (
        json.loads((folder / 'metadata.json').read_text())['scaling'] == 'context'
        and 'only the first 14 steps' in (folder / 'report.html').read_text()
    )


def test_the_budget_of_the_study_ends_the_final_run(study):
    _, search, _ = study['search']
    record, final, folder = study['final']
    assert (search['steps'], search['stopped']) == (4, 'finished') and search['flops_study'] == 4 * step
    assert (final['steps'], final['stopped']) == (
        1,
        'FLOP budget',
    ) and 'stopped where the budget of the study ends' in record['run']['verdict']
    sentence = 'Judged on 2 of the 10 steps that follow'
    assert sentence in record['run']['verdict'] and sentence in (folder / 'report.html').read_text()
    assert final['best_step'] == 1 and final['valid_mae'] is not None and final['reload_difference'] < 1e-2
    rows = statement(Account(folder.parents[1] / 'forecast_ledger' / 's.jsonl', 5.5 * step))
    assert [row['run'] for row in rows] == [
        'forecast_train/search',
        'forecast_train/final',
        'forecast_eval/final',
        'all',
    ]
    assert (
        rows[-1]['study'] == 5 * step
        and rows[-1]['open'] == 0
        and rows[2]['forecasts'] > 0
        and rows[0]['hardware'] == search['flops_hardware']
    )


def test_the_evaluation_has_all_rows_and_pictures(study):
    _, metrics, folder = study['test']
    page = (folder / 'report.html').read_text()
    assert (
        metrics['success_rate'] == 1
        and metrics['untrained_mae_median'] > 0
        and metrics['true_equations_refitted_mae'] < metrics['last_value_mae']
    )
    assert all(name in page for name in ('seasonal', 'linear autoregression', 'published: LoRA, 2 decimals', 'original units'))
    assert all(name in page for name in ('context parroting', 'Lotka-Volterra refitted', 'The ceiling, ', 'MASE', 'WQL'))
    by_step = json.loads((folder / 'by_step.json').read_text())
    assert all(len(curves['mean_H']) == 10 for curves in by_step.values()) and 'fine-tuned' in by_step
    nll_H = by_step['fine-tuned']['nll_H']
    assert len(nll_H) == 10 and sum(nll_H) / 10 == pytest.approx(metrics['nll_per_value'], abs=1e-4)
    assert by_step['seasonal']['nll_H'] is None and 'NLL, nats/value' in page
    assert {path.stem for path in (folder / 'figures').iterdir()} == {
        'forecasts',
        'phase',
        'horizon',
        'distribution',
        'boxes',
    }


def test_the_page_sums_up(study):
    record, metrics, folder = study['page']
    assert metrics['flops_study'] == 5 * step and metrics['share_of_budget'] == pytest.approx(5 / 5.5)
    assert f'{5 / 5.5:.2%} of the budget' in record['run']['verdict']
    assert 'Judged on 2 of the 10 steps' in (folder / 'report.html').read_text()
    budget = list(csv.DictReader((folder / 'budget.csv').open()))
    assert sum(float(row['study']) for row in budget[:-1]) == float(budget[-1]['study']) == 5 * step
    assert len(list(csv.DictReader((folder / 'search.csv').open()))) == 1
