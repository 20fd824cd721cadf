"""What fits which card: the table, what parameter files say of a T4, and the guide for Colab, all by the same plan."""

import json
import re

import pytest

from llmft.cli import call
from llmft.core import project_root
from llmft.runs.params import resolve_params
from llmft.runs.plan import gpus, make_plan, trains_a_model
from llmft.runs.plan_table import cell_text, plan_cell, plan_table, table_gpus, table_methods, table_models
from llmft.training.launch import training_settings

root = project_root()


def test_ten_models_by_eight_cards_as_text_and_as_an_object(capsys):
    assert call(['plan', '--table', '--json']) == 0
    cells = json.loads(capsys.readouterr().out)['cells']
    assert len(cells) == len(table_models) * len(table_gpus) * len(table_methods) == 10 * 8 * 3
    by_place = {(cell['method'], cell['model'], cell['gpu']): cell for cell in cells}

    assert call(['plan', '--table']) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith('llama-3.1-8b ')]
    assert len(rows) == 3 and cell_text(by_place['qlora', 'llama-3.1-8b', 't4']) in rows[2]
    assert 'no (' in rows[0] and 'Predicted, not measured' in lines[-1]


def test_the_table_is_what_single_plans_say_and_grows_with_model_and_card():
    cells = plan_table(('llama-3.2-1b', 'llama-3.1-8b'), ('l4', 'h100'), ('lora',))
    small, _, large, faster = cells
    assert small['gib'] < large['gib'] and large['tokens_per_sec'] < faster['tokens_per_sec']
    for cell in cells:
        assert cell['fits'] == (cell['gib'] < cell['memory_gib'])
    eight_billion = 2 * 8.03e9 / 2**30
    assert eight_billion < large['gib'] < 1.4 * eight_billion


def test_a_card_must_have_more_than_the_tensors():
    params = dict(model='preset:llama-3.2-3b', method='lora', precision='bf16', lora_rank=8, lora_targets=['q_proj'])
    plan = make_plan(params, 'l4')
    assert plan['card']['total'] > plan['card']['reserved'] > plan['memory']['total'] == plan['card']['allocated']
    assert make_plan(params)['card'] is None  # nothing of the kind on a CPU


def test_the_table_stands_alone(capsys):
    assert call(['plan', str(root / 'params/finetune/lora.yaml'), '--table']) == 2
    assert 'takes no files' in capsys.readouterr().err
    assert call(['plan']) == 2
    assert 'give a parameter file' in capsys.readouterr().err


def t4_lines():
    "(path, what its line about a T4 says) of every parameter file that has one."
    for path in sorted(root.glob('params/*/[!_]*.yaml')):
        for line in path.read_text().splitlines():
            if line.startswith('# T4:'):
                yield path, line.removeprefix('# T4:').strip().rstrip('.')


def test_full_scale_files_say_what_fits_a_t4():
    looked = 0
    for path, said in t4_lines():
        _, params = resolve_params([path], re.findall(r'-p (\S+)', said))
        if not trains_a_model(params):
            continue
        looked += 1
        training_settings_of(params)
        plan = make_plan(params, 't4', rows=100)
        assert not plan['refused'], (path, plan['refused'])
        assert plan['fits'] == said.startswith('fits'), (path, said, plan['card'])
    assert looked >= 30


def training_settings_of(params):
    "A `LabError` for a precision that the strategy of the file does not take."
    from types import SimpleNamespace

    training_settings(SimpleNamespace(**params | dict(nproc=min(params.get('nproc', 1), 1))))


@pytest.mark.parametrize('name', ['finetune', 'instruct', 'pdf_finetune', 'forecast_train', 'sublora_train', 'pretrain'])
def test_every_full_scale_training_has_such_a_line(name):
    files = {path for path, _ in t4_lines()}
    missing = [path.name for path in root.glob(f'params/{name}/[!_]*.yaml') if path not in files]
    assert not missing


def test_the_colab_guide_says_what_the_table_says():
    text = (root / 'nbs/guides/colab.qmd').read_text()
    rows = re.findall(r'^\| ([\w.-]+) \| (full|lora|qlora) \| (.*) \| (.*) \| (.*) \|$', text, re.M)
    assert len(rows) >= 7
    for model, method, *texts in rows:
        assert texts == [cell_text(plan_cell(model, method, gpu)) for gpu in ('t4', 'l4', 'a100-40gb')], (model, method)
    assert f'{gpus["t4"]["memory_gib"]:g} GiB' in text
