"Small trainings, in this process or in the ranks of one torchrun job; started as a script they read what to do from a JSON file."

import json
import os
import shutil
import sys
from pathlib import Path

from training_runs import examples

quantised = ('nf4', 'lora')
BASE = dict(
    learning_rate=1e-2,
    max_steps=4,
    batch_size=2,
    gradient_accumulation=2,
    max_length=24,
    save_every=2,
    eval_every=2,
    keep_best=False,
    clip=0.3,
    warmup_ratio=0.0,
    schedule='constant',
)


def build(params):
    "Model and data of a tiny run; `launch` calls it by name."
    from llmft.models.adapters import add_lora
    from llmft.models.load import load_model

    model = load_model(params.model, quantisation=params.method if params.method in ('nf4', 'int8') else 'none', seed=3)
    if params.method in ('uniform', 'learned'):
        return in_subspace(model, params.method), examples(), examples(6, seed=1)
    if params.method != 'full':
        model = add_lora(model, 4, 8, params.dropout, ['q_proj', 'v_proj', 'down_proj'], seed=1)
    if getattr(params, 'die', None) is not None:
        arrange_death(params.die)
    return model, examples(), examples(6, seed=1)


def in_subspace(model, mode):
    "The model with its adapters as a function of 40 numbers."
    from llmft.models.low_rank import add_low_rank
    from llmft.models.subspace import SubspaceConfig, attach

    subspace = attach(
        model, add_low_rank(model, ['q_proj', 'v_proj'], 4, dropout=0.0), SubspaceConfig(40, mode, anneal_steps=4)
    )
    if subspace.gates is not None:
        subspace.gates.decayed = False
    return model


def arrange_death(how):
    "Have rank 1 end in its third step."
    import signal

    from llmft.training import fit

    training = sys.modules[fit.watched_step.__module__]  # the module that looks `train_step` up
    step = training.train_step

    def dying(run, batches, targets):
        if run.progress.step == 2 and run.group.rank == 1:
            if how == 'killed':
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError('as asked')
        return step(run, batches, targets)

    training.train_step = dying


def train(folder, model, method, strategy=None, dropout=0.0, **settings):
    "Train in `folder`; strategy None is this process alone."
    from types import SimpleNamespace

    from llmft.training.fit import fit
    from llmft.training.recipe import Recipe
    from llmft.training.strategies import Processes

    net, *data = build(SimpleNamespace(model=str(model), method=method, dropout=dropout))
    result = fit(
        net, *data, folder, Recipe(**dict(BASE, **settings)), processes=Processes(2, strategy) if strategy else None
    )
    return result, net


def drop_last(folder):
    "Forget the checkpoint of the last step, as if the run had been killed before it."
    shutil.rmtree(sorted(Path(folder).glob('checkpoints/step-*'))[-1])


def job(file):
    "All cases of a job, in the ranks of one torchrun."
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ['LLMFT_MANAGED'] = '1'
    dist.init_process_group('gloo')
    for case in json.loads(Path(file).read_text()):
        folder = Path(case.pop('folder'))
        again = case.pop('again', False)
        train(folder, **case)
        if again:
            if dist.get_rank() == 0:
                shutil.copytree(folder, folder.with_name(folder.name + '-again'))
                drop_last(folder.with_name(folder.name + '-again'))
            dist.barrier()
            train(folder.with_name(folder.name + '-again'), **case)
    dist.destroy_process_group()


if __name__ == '__main__':
    job(sys.argv[1])
