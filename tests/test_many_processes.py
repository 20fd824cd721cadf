"""Every training experiment gives in two processes the losses it gives in one: same data, same model, same steps."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from house import code, nbs, only_imports, root, source

from llmft.runs.params import resolve_params
from llmft.studies.code.setup import instruct
from llmft.studies.finetuning.setup import finetuning, pretraining
from llmft.studies.forecasting import setup as forecasting
from llmft.studies.pdfs import setup as pdfs
from llmft.studies.sublora import setup as sublora
from llmft.training.fit import fit
from llmft.training.launch import launch, training_settings

shared = dict(lora_dropout=0.0, max_steps=2, batch_size=4, gradient_accumulation=1, log_every=1, eval_every=0, seed=7)

slow = dict(learning_rate=8e-4)  # Muon makes the rounding of the smallest gradients as large as the largest


def pdf_params(params, folder):
    "The parameters of the PDF study once its notebook has extracted and tokenised the files."
    params.batch_size = 4
    pdfs.pdf_data(params, folder)
    return pdfs.with_tokens(params, folder)


def sublora_params(params, folder):
    "The parameters of the SubLoRA study once its notebook has prepared the token files."
    params.outputs = str(folder)
    sublora.prepare_run_tokens(params)
    return params


def as_they_are(params, folder):
    return params


experiments = dict(
    finetune=('finetune/lora', finetuning, as_they_are, dict(num_samples=24, num_eval_samples=4, max_length=64)),
    pretrain=('pretrain/base', pretraining, as_they_are, dict(num_samples=12, num_eval_samples=2, max_length=64, **slow)),
    instruct=('instruct/diverse', instruct, as_they_are, dict(num_samples=24, max_length=128)),
    pdf_finetune=('pdf_finetune/all', pdfs.pdf_finetuning, pdf_params, dict(max_pages=2, max_length=64)),
    forecast_train=('forecast_train/final', forecasting.build, forecasting.with_data, dict(data='', max_length=128)),
    sublora_train=('sublora_train/d1000_uniform', sublora.build, sublora_params, dict(documents=200)),
)


def parameters(name, folder):
    "The parameters of an experiment at small scale, cut to two steps."
    config, _, prepare, settings = experiments[name]
    _, params = resolve_params([root / f'params/{config}.yaml'], [], 'small')
    given = {key: value for key, value in (shared | settings).items() if key in params}
    folder.mkdir(parents=True)
    return prepare(SimpleNamespace(**params | given), folder)


def losses(folder):
    rows = [json.loads(line) for line in (Path(folder) / 'log.jsonl').read_text().splitlines()]
    return [row.get('loss', row.get('valid_loss')) for row in rows]


@pytest.mark.parametrize('name', list(experiments))
def test_two_processes_have_the_losses_of_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv('LLMFT_MANAGED', '1')
    params = parameters(name, tmp_path / 'prepared')
    build = experiments[name][1]
    recipe, _ = training_settings(params)
    fit(*build(params), tmp_path / 'alone', recipe)

    params.nproc, params.strategy = 2, 'ddp'
    launch(build, params, *build(params), tmp_path / 'together', recipe)
    order = json.loads((tmp_path / 'together/launch/order.json').read_text())
    assert order['processes']['nproc'] == 2 and order['processes']['strategy'] == 'ddp'
    alone, together = losses(tmp_path / 'alone'), losses(tmp_path / 'together')
    assert len(alone) == len(together) >= 2
    assert together == pytest.approx(alone, rel=1e-5)


prepared = dict(
    pdf_finetune='with_tokens(run.params, run.folder)', forecast_train='setup.with_data(run.params, run.folder)'
)  # experiments whose ranks need more than the parameters of the notebook


@pytest.mark.parametrize('name', list(experiments))
def test_the_notebook_trains_through_launch(name):
    "With the build function that is tested above, and with what that function reads."
    found = code(nbs / f'experiments/{name}.ipynb')
    text = '\n'.join(map(source, found))
    tree = ast.parse(text)
    [call] = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == 'launch']
    assert ' fit(' not in text

    imported = {}
    for cell in filter(only_imports, found):
        exec(source(cell), imported)
    build, params = map(ast.unparse, call.args[:2])
    assert eval(build, imported) is experiments[name][1]
    made = {
        ast.unparse(node.targets[0]): ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign)
    }
    assert made.get(params, params) == prepared.get(name, 'run.params')

    offloading = (
        ['offload_optimiser: bool', 'offload_weights: bool'] if name != 'sublora_train' else []
    )  # shards nothing
    for parameter in ['nproc: int', 'strategy: str', *offloading]:
        assert parameter in text, f'{name} has no parameter {parameter}'
