"Several processes train what one trains, save what any number of them can go on with, and end together."
import json, math, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest, torch

import rank_runs
from llmft import launch as launching, strategies
from llmft.adapters import check_adapter, save_adapter
from llmft.checkpoints import checkpoints, load_checkpoint
from llmft.core import LabError, project_root
from llmft.launch import launch, take_weights
from llmft.models import load_model
from llmft.recipe import Recipe
from llmft.strategies import Processes, check_processes

with_deepspeed = strategies.importlib.util.find_spec('deepspeed') is not None
ways = [('full', way) for way in ('ddp', 'fsdp2', 'zero2', 'zero3')] + [('lora', way) for way in ('ddp', 'fsdp2', 'zero2', 'zero3')] + [('nf4', way) for way in ('ddp', 'zero2', 'zero3')]
ways = [pair for pair in ways if with_deepspeed or not pair[1].startswith('zero')]
each_way = pytest.mark.parametrize('method,strategy', ways)


def two_ranks(script, *arguments, timeout=400):
    environment = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(project_root()), str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=project_root())


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process trains; two ranks train alike, resume their own run, and resume the one of a single process. All in one job."
    folder = tmp_path_factory.mktemp('runs')
    load_model('preset:llama-tiny', seed=3).save_pretrained(folder/'model')
    for method in dict.fromkeys(method for method, _ in ways):
        rank_runs.train(folder/f'{method}-alone', folder/'model', method)
    cases = []
    for method, strategy in ways:
        cases.append(dict(folder=str(folder/f'{method}-{strategy}'), model=str(folder/'model'), method=method, strategy=strategy, again=True))
        shutil.copytree(folder/f'{method}-alone', folder/f'{method}-{strategy}-from-one')
        rank_runs.drop_last(folder/f'{method}-{strategy}-from-one')
        cases.append(dict(folder=str(folder/f'{method}-{strategy}-from-one'), model=str(folder/'model'), method=method, strategy=strategy))
    (folder/'cases.json').write_text(json.dumps(cases))
    done = two_ranks(rank_runs.__file__, folder/'cases.json')
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def log_of(folder, *keys): return [tuple(row.get(key) for key in keys) for row in map(json.loads, (folder/'log.jsonl').read_text().splitlines())]


def final(folder):
    newest = checkpoints(folder/'checkpoints')[0]
    assert newest.name == 'step-000006'
    return load_checkpoint(newest)[0]


def close(one, other, relative):
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other):
        for a, b in zip(mine, theirs): assert a == b if a is None or isinstance(a, int) else math.isclose(a, b, rel_tol=relative), (mine, theirs)


@pytest.mark.serial
@each_way
def test_two_ranks_lose_what_one_process_loses(runs, method, strategy):
    keys = 'step', 'loss', 'grad_norm', 'learning_rate', 'tokens', 'targets', 'flops', 'valid_loss', 'valid_targets'
    close(log_of(runs/f'{method}-alone', *keys), log_of(runs/f'{method}-{strategy}', *keys), 2e-5)


@each_way
def test_weights_put_together_are_those_of_one_process(runs, method, strategy):
    alone, found = final(runs/f'{method}-alone')['weights'], final(runs/f'{method}-{strategy}')['weights']
    assert set(alone) == set(found) and len(alone) > 0
    for name, weight in alone.items():
        assert found[name].shape == weight.shape and weight.numel() > 0, name
        assert torch.allclose(found[name].float(), weight.float(), atol=2e-4), (name, float((found[name] - weight).abs().max()))
    files = [file.name for file in checkpoints(runs/f'{method}-{strategy}'/'checkpoints')[0].iterdir()]
    assert ('weights.part00001.safetensors' in files) == (strategy != 'ddp')


@each_way
def test_resumed_with_as_many_ranks_is_the_same_run(runs, method, strategy):
    one, again = runs/f'{method}-{strategy}', runs/f'{method}-{strategy}-again'
    assert log_of(one, 'step', 'loss', 'valid_loss') == log_of(again, 'step', 'loss', 'valid_loss')
    for stem, tensors in final(one).items():
        for name, tensor in tensors.items(): assert torch.equal(tensor, final(again)[stem][name]), (stem, name)


@each_way
def test_two_ranks_go_on_with_the_run_of_one(runs, method, strategy):
    close(log_of(runs/f'{method}-alone', 'step', 'loss', 'valid_loss'), log_of(runs/f'{method}-{strategy}-from-one', 'step', 'loss', 'valid_loss'), 2e-5)


@each_way
def test_one_process_goes_on_with_the_run_of_two(runs, tmp_path, method, strategy):
    shutil.copytree(runs/f'{method}-{strategy}', tmp_path/'run')
    rank_runs.drop_last(tmp_path/'run')
    rank_runs.train(tmp_path/'run', runs/'model', method)
    close(log_of(runs/f'{method}-alone', 'step', 'loss', 'valid_loss'), log_of(tmp_path/'run', 'step', 'loss', 'valid_loss'), 2e-5)
