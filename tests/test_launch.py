"Several processes train what one trains, save what any number of them can go on with, and end together."

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_runs
import torch

from llmft.core import LabError, project_root
from llmft.models.adapters import check_adapter, save_adapter
from llmft.models.load import load_model
from llmft.models.methods import Method
from llmft.training import launch as launching
from llmft.training import strategies
from llmft.training.checkpoints import checkpoints, load_checkpoint
from llmft.training.fit import fit
from llmft.training.launch import launch, take_weights
from llmft.training.ledger import Account, Ledger
from llmft.training.recipe import Recipe
from llmft.training.strategies import Processes, check_processes

with_deepspeed = strategies.importlib.util.find_spec('deepspeed') is not None
pairs = (
    [('full', strategy) for strategy in ('ddp', 'fsdp2', 'zero2', 'zero3')]
    + [('lora', strategy) for strategy in ('ddp', 'fsdp2', 'zero2', 'zero3')]
    + [('nf4', strategy) for strategy in ('ddp', 'fsdp2', 'zero2', 'zero3')]
)
pairs += [('uniform', 'ddp'), ('learned', 'ddp')]  # subspaces
pairs = [pair for pair in pairs if with_deepspeed or not pair[1].startswith('zero')]
each_pair = pytest.mark.parametrize('method,strategy', pairs)


def two_ranks(script, *arguments, timeout=400):
    environment = os.environ | dict(
        OMP_NUM_THREADS='1',
        PYTHONPATH=os.pathsep.join([str(project_root()), str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]),
    )
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node=2',
        str(script),
        *map(str, arguments),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=project_root())


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process trains; two ranks train alike, resume their own run, and resume the one of a single process. All in one job."
    folder = tmp_path_factory.mktemp('runs')
    load_model('preset:llama-tiny', seed=3).save_pretrained(folder / 'model')
    for method in dict.fromkeys(method for method, _ in pairs):
        rank_runs.train(folder / f'{method}-alone', folder / 'model', method)
    cases = []
    for method, strategy in pairs:
        cases.append(
            dict(
                folder=str(folder / f'{method}-{strategy}'),
                model=str(folder / 'model'),
                method=method,
                strategy=strategy,
                again=True,
            )
        )
        shutil.copytree(folder / f'{method}-alone', folder / f'{method}-{strategy}-from-one')
        rank_runs.drop_last(folder / f'{method}-{strategy}-from-one')
        cases.append(
            dict(
                folder=str(folder / f'{method}-{strategy}-from-one'),
                model=str(folder / 'model'),
                method=method,
                strategy=strategy,
            )
        )
    cases.append(
        dict(
            folder=str(folder / 'dropout'),
            model=str(folder / 'model'),
            method='lora',
            strategy='ddp',
            dropout=0.1,
            again=True,
        )
    )
    (folder / 'cases.json').write_text(json.dumps(cases))
    done = two_ranks(rank_runs.__file__, folder / 'cases.json')
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def log_of(folder, *keys):
    return [
        tuple(row.get(key) for key in keys) for row in map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
    ]


def final(folder):
    newest = checkpoints(folder / 'checkpoints')[0]
    assert newest.name == 'step-000004'
    return load_checkpoint(newest)[0]


def close(one, other, relative):
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            assert a == b if a is None or isinstance(a, int) else math.isclose(a, b, rel_tol=relative), (left, right)


@each_pair
def test_two_ranks_lose_what_one_process_loses(runs, method, strategy):
    keys = 'step', 'loss', 'grad_norm', 'learning_rate', 'tokens', 'targets', 'flops', 'valid_loss', 'valid_targets'
    close(log_of(runs / f'{method}-alone', *keys), log_of(runs / f'{method}-{strategy}', *keys), 2e-5)


def test_a_subspace_is_not_cut():
    net, *data = rank_runs.build(SimpleNamespace(model='preset:llama-tiny', method='uniform', dropout=0.0))
    with pytest.raises(LabError, match='strategy fsdp2 cuts weights apart.*choose ddp'):
        fit(net, *data, 'never', Recipe(**rank_runs.BASE), processes=Processes(2, 'fsdp2'))
    assert not Path('never').exists()


@each_pair
def test_weights_put_together_are_those_of_one_process(runs, method, strategy):
    alone, found = final(runs / f'{method}-alone')['weights'], final(runs / f'{method}-{strategy}')['weights']
    assert set(alone) == set(found) and len(alone) > 0
    for name, weight in alone.items():
        assert found[name].shape == weight.shape and weight.numel() > 0, name
        assert torch.allclose(found[name].float(), weight.float(), atol=2e-4), (
            name,
            float((found[name] - weight).abs().max()),
        )
    files = [file.name for file in checkpoints(runs / f'{method}-{strategy}' / 'checkpoints')[0].iterdir()]
    assert ('weights.part00001.safetensors' in files) == (strategy != 'ddp')


@each_pair
def test_resumed_with_as_many_ranks_is_the_same_run(runs, method, strategy):
    one, again = runs / f'{method}-{strategy}', runs / f'{method}-{strategy}-again'
    assert log_of(one, 'step', 'loss', 'valid_loss') == log_of(again, 'step', 'loss', 'valid_loss')
    for stem, tensors in final(one).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, final(again)[stem][name]), (stem, name)


def test_each_rank_draws_its_own_dropout_and_draws_it_again_after_a_resume(runs):
    assert (
        log_of(runs / 'dropout', 'step', 'loss', 'valid_loss')
        == log_of(runs / 'dropout-again', 'step', 'loss', 'valid_loss')
        != log_of(runs / 'lora-ddp', 'step', 'loss', 'valid_loss')
    )
    one, again = final(runs / 'dropout'), final(runs / 'dropout-again')
    assert not torch.equal(one['random']['torch'], one['random.rank00001']['torch'])
    for stem in ('weights', 'random', 'random.rank00001'):
        for name, tensor in one[stem].items():
            assert torch.equal(tensor, again[stem][name]), (stem, name)


@each_pair
def test_two_ranks_go_on_with_the_run_of_one(runs, method, strategy):
    close(
        log_of(runs / f'{method}-alone', 'step', 'loss', 'valid_loss'),
        log_of(runs / f'{method}-{strategy}-from-one', 'step', 'loss', 'valid_loss'),
        2e-5,
    )


@each_pair
def test_one_process_goes_on_with_the_run_of_two(runs, tmp_path, method, strategy):
    shutil.copytree(runs / f'{method}-{strategy}', tmp_path / 'run')
    rank_runs.drop_last(tmp_path / 'run')
    rank_runs.train(tmp_path / 'run', runs / 'model', method)
    close(
        log_of(runs / f'{method}-alone', 'step', 'loss', 'valid_loss'),
        log_of(tmp_path / 'run', 'step', 'loss', 'valid_loss'),
        2e-5,
    )


tiny = dict(method='lora', dropout=0.0, die=None)


def launched(folder, model, **params):
    params = SimpleNamespace(**dict(tiny, model=str(model), nproc=2, strategy='ddp') | params)
    heard = []
    recipe = Recipe(**rank_runs.BASE)
    net, train, valid = rank_runs.build(SimpleNamespace(**vars(params) | dict(die=None)))
    return launch(rank_runs.build, params, net, train, valid, folder, recipe, heard.append), net, heard


def alive(text):
    "Processes that have `text` on their command line."
    import psutil

    return [
        process.pid for process in psutil.process_iter(['cmdline']) if text in ' '.join(process.info['cmdline'] or [])
    ]


def test_launched_ranks_give_what_one_process_gives_and_a_death_is_told(runs, tmp_path, monkeypatch):
    "First rank 1 is killed in its third step; then the same run goes on from its checkpoint, by the strategy that cuts weights, and ends as one process does."
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]))
    monkeypatch.setenv('LLMFT_MANAGED', '1')
    monkeypatch.setitem(rank_runs.BASE, 'save_every', 1)
    rank_runs.train(tmp_path / 'alone', runs / 'model', 'lora')
    with pytest.raises(
        ChildProcessError, match=r'rank 1 of 2 .process \d+. died and the others were stopped: killed by signal 9'
    ) as caught:
        launched(tmp_path / 'run', runs / 'model', die='killed')
    assert '\n' not in str(caught.value) and not alive(str(tmp_path / 'run')), 'a rank was left behind'
    assert [path.name for path in checkpoints(tmp_path / 'run' / 'checkpoints')] == ['step-000002', 'step-000001']
    result, net, heard = launched(tmp_path / 'run', runs / 'model', strategy='fsdp2')
    assert (
        result.progress.step == 4
        and result.progress.stopped == 'finished'
        and result.peak_bytes > 0
        and result.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)
    )
    assert [row for row in heard if 'loss' in row] == [row for row in result.log if 'loss' in row][2:], (
        'what is heard is what is logged'
    )
    close(
        log_of(tmp_path / 'alone', 'step', 'loss', 'valid_loss'),
        log_of(tmp_path / 'run', 'step', 'loss', 'valid_loss'),
        2e-5,
    )
    for name, weight in final(tmp_path / 'alone')['weights'].items():
        assert torch.allclose(dict(net.named_parameters())[name], weight, atol=2e-4), name
    save_adapter(net, tmp_path / 'adapter')
    assert (
        check_adapter(net, tmp_path / 'adapter', lambda: load_model(str(runs / 'model')), torch.arange(2, 12)[None])
        < 1e-4
    )


def ledgered(folder, budget=0.0, **params):
    "A launched run that books its operations: (its result, its account)."
    params = SimpleNamespace(**dict(tiny, model='preset:llama-tiny') | params)
    net, train, valid = rank_runs.build(params)
    account = Account(folder / 'ledger.jsonl', budget)
    ledger = Ledger(account, 'run', 'mark', net.config, 4, ['q_proj', 'v_proj', 'down_proj'])
    recipe = Recipe(**rank_runs.BASE)
    return launch(rank_runs.build, params, net, train, valid, folder, recipe, ledger=ledger), account


def booked(account):
    "The lines of an account, as often as they were written."
    return [json.loads(line) for line in account.path.read_text().splitlines()]


def test_ranks_book_in_one_ledger_what_one_process_books(tmp_path, monkeypatch):
    "Without a limit, and with a budget that refuses the third step: all ranks stop there together."
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]))
    monkeypatch.setenv('LLMFT_MANAGED', '1')
    two = dict(nproc=2, strategy='ddp')
    _, account = ledgered(tmp_path / 'free', nproc=1, strategy='none')
    study = [account.steps['run']['train', step]['study'] for step in (1, 2, 3, 4)]
    budget = sum(study[:3]) - 1

    results = {}
    for name, limit, params in (
        ('free-two', 0.0, two),
        ('short', budget, dict(nproc=1, strategy='none')),
        ('short-two', budget, two),
    ):
        results[name] = ledgered(tmp_path / name, limit, **params)

    keys = 'step', 'loss', 'grad_norm', 'tokens', 'flops', 'valid_loss'
    for alone, together in (('free', 'free-two'), ('short', 'short-two')):
        close(log_of(tmp_path / alone, *keys), log_of(tmp_path / together, *keys), 2e-5)
        assert booked(Account(tmp_path / alone / 'ledger.jsonl')) == booked(
            Account(tmp_path / together / 'ledger.jsonl')
        )
    result, account = results['short-two']
    assert result.progress.stopped == 'FLOP budget' and result.progress.step == 2
    assert account.spent == sum(study[:2]), 'the notebook sees what its ranks booked'
    assert [line['kind'] for line in booked(account)] == ['begin'] + ['reserved', 'booked'] * 2


def test_a_budget_below_one_step_is_refused_by_all_ranks_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]))
    monkeypatch.setenv('LLMFT_MANAGED', '1')
    with pytest.raises(LabError, match='max_flops is 10 for the whole study and one step takes'):
        ledgered(tmp_path, 10.0, nproc=2, strategy='ddp')
    errors = [json.loads(file.read_text()) for file in sorted((tmp_path / 'launch').glob('error-*.json'))]
    assert {error['kind'] for error in errors} == {'LabError'}, 'no rank was left waiting'
    assert not alive(str(tmp_path))


def test_a_build_that_depends_on_more_than_its_params_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]))
    params = SimpleNamespace(**dict(tiny, model='preset:llama-tiny', nproc=2, strategy='ddp'))
    net, train, valid = rank_runs.build(params)
    with torch.no_grad():
        next(p for p in net.parameters() if p.requires_grad).add_(1)
    with pytest.raises(LabError, match='a rank built other held-out data and trained weights than the notebook'):
        launch(rank_runs.build, params, net, train, train, tmp_path, Recipe(**rank_runs.BASE))
    assert not (tmp_path / 'checkpoints').exists()


def test_a_method_that_the_strategy_cannot_take_is_refused_before_a_rank_starts(tmp_path):
    with pytest.raises(LabError, match='strategy fsdp2 would cut int8 weights apart'):
        launched(tmp_path, 'preset:llama-tiny', method='int8', strategy='fsdp2')
    assert not list(tmp_path.iterdir())


def failing(*codes):
    return [dict(rank=rank, pid=100 + rank, exitcode=code, time=moment) for rank, code, moment in codes]


@pytest.mark.parametrize(
    'failures,errors,kind,words',
    [
        (
            [(0, 1, 5.0), (1, -9, 6.0)],
            {0: ('RuntimeError', 'Connection closed by peer')},
            ChildProcessError,
            'rank 1 of 2 .process 101.*signal 9 .SIGKILL., most often because memory ran out',
        ),
        (
            [(0, 1, 5.0), (1, 1, 6.0)],
            {0: ('DistBackendError', 'NCCL error'), 1: ('OutOfMemoryError', 'CUDA out of memory')},
            ChildProcessError,
            'rank 1 of 2.*OutOfMemoryError: CUDA out of memory',
        ),
        ([(0, -15, 5.0), (1, 1, 6.0)], {1: ('ValueError', 'no')}, ChildProcessError, 'rank 1 of 2.*ValueError: no'),
        (
            [(0, 1, 5.0), (1, 1, 6.0)],
            {0: ('LabError', 'step 3: the loss is nan'), 1: ('LabError', 'step 3: the loss is nan')},
            LabError,
            '^step 3: the loss is nan$',
        ),
        ([(1, 3, 5.0)], {}, ChildProcessError, 'rank 1 of 2.*exit status 3'),
        ([], {}, ChildProcessError, 'torchrun failed before any rank did'),
    ],
)
def test_the_cause_is_told_and_not_what_followed(tmp_path, failures, errors, kind, words):
    if failures:
        (tmp_path / 'failures.json').write_text(json.dumps(failing(*failures)))
    for rank, (name, text) in errors.items():
        (tmp_path / f'error-{rank:05d}.json').write_text(json.dumps(dict(rank=rank, kind=name, text=text)))
    error = launching.tell_failure(tmp_path, 2)
    with pytest.raises(kind, match=words):
        raise error


@pytest.mark.parametrize(
    'asked,settings,words',
    [
        (Processes(2, 'zero1'), {}, "strategy is 'zero1'.*choose from none, ddp, fsdp2, zero2, zero3"),
        (Processes(2), {}, 'nproc is 2 and strategy none'),
        (Processes(-1, 'ddp'), {}, 'nproc is -1'),
        (Processes(5, 'ddp'), {}, '5 processes share 4 rows'),
        (Processes(2, 'fsdp2'), dict(method=Method(quantisation='int8')), 'cut int8 weights apart'),
        (Processes(2, 'zero3'), dict(method=Method(quantisation='int8')), 'cut int8 weights apart'),
        (Processes(2, 'zero2'), dict(method=Method(precision='fp16')), 'choose bf16 or fp32'),
        (Processes(2, 'zero2'), dict(optimiser='adamw_8bit'), 'choose adamw'),
        (Processes(2, 'fsdp2'), dict(optimiser='muon'), 'choose adamw'),
        (Processes(2, 'ddp', offload_optimiser=True), {}, 'offload_optimiser is for'),
        (Processes(2, 'zero2', offload_weights=True), {}, 'offload_weights is for'),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(asked, settings, words):
    recipe = Recipe(batch_size=2, gradient_accumulation=2, optimiser=settings.pop('optimiser', 'adamw'))
    with pytest.raises(LabError, match=words) as caught:
        check_processes(asked, recipe, **settings)
    assert '\n' not in str(caught.value)


def test_a_missing_deepspeed_names_the_extra(monkeypatch):
    monkeypatch.setattr(strategies.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(LabError, match=r'zero2 needs deepspeed: DS_BUILD_OPS=0 pip install -e "\.\[zero\]"'):
        check_processes(Processes(2, 'zero2'), Recipe())


def test_weights_of_another_model_are_not_taken(tmp_path):
    from llmft.training.checkpoints import save_checkpoint

    save_checkpoint(tmp_path / 'checkpoints', 3, dict(weights={'w': torch.ones(2)}), {})
    with pytest.raises(LabError, match='built differently'):
        take_weights(torch.nn.Linear(2, 1), tmp_path, 3)
    save_checkpoint(tmp_path / 'checkpoints', 4, dict(weights={'weight': torch.empty(0), 'bias': torch.ones(1)}), {})
    with pytest.raises(LabError, match=r'weight has shape \(0,\)'):
        take_weights(torch.nn.Linear(2, 1), tmp_path, 4)


@pytest.mark.skipif(not with_deepspeed, reason='deepspeed is not installed')
def test_the_experiment_reads_the_same_with_two_ranks(tmp_path):
    "QLoRA by ZeRO-3, from the file of the study, at a small scale: the report, the adapter and the numbers of a run in one process."
    from llmft.runs.execute import execute_run
    from llmft.runs.params import resolve_params

    least = dict(
        max_steps=3,
        num_samples=4,
        num_eval_samples=1,
        max_length=64,
        batch_size=2,
        sample_tokens=4,
        eval_every=2,
        outputs=str(tmp_path),
    )
    notebook, params = resolve_params(
        [project_root() / 'params/finetune/qlora_zero3.yaml'],
        [f'{name}={value if isinstance(value, str) else json.dumps(value)}' for name, value in least.items()],
        'small',
    )
    record = execute_run(notebook, params, on_line=lambda line: None)
    assert record['run']['status'] == 'done', record['run']['error']
    folder = tmp_path / 'finetune' / 'qlora_zero3'
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert (
        metrics['steps'] == 3
        and metrics['reload_difference'] < 1e-4
        and metrics['quantised_share'] > 0.5
        and metrics['loss_after'] < metrics['loss_before']
    )
    judged = math.log(metrics['perplexity_with_end_after'])  # the loss of a training counts the tokens that end documents
    assert metrics['best_step'] == 3 and math.isclose(judged, log_of(folder, 'valid_loss')[-1][0], rel_tol=1e-6), (
        'the notebook judges the weights that the ranks trained'
    )
    assert (folder / 'adapter' / 'adapter_model.safetensors').exists() and (
        folder / 'checkpoints' / 'step-000003' / 'weights.part00001.safetensors'
    ).exists()


@pytest.mark.parametrize(
    'shown, local, gpu',
    [
        (None, 0, '0'),
        (None, 3, '3'),
        ('4,6', 1, '6'),
        ('GPU-aa,GPU-bb', 0, 'GPU-aa'),
        ('', 0, None),
        ('-1', 1, None),
        ('3', 1, None),
    ],
)
def test_a_rank_sees_its_own_gpu(shown, local, gpu):
    environment = dict(LOCAL_RANK=str(local)) | ({} if shown is None else dict(CUDA_VISIBLE_DEVICES=shown))
    assert launching.own_gpu(environment) == ({} if gpu is None else dict(CUDA_VISIBLE_DEVICES=gpu))
    imports = launching.rank_code.index('from llmft')
    assert (
        launching.rank_code.index('os.environ.update(own_gpu(os.environ))') < imports
        and 'torch' not in launching.rank_code[:imports]
    )
