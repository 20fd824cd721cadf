"Small training runs in processes of their own, which may be killed at a chosen moment."

import multiprocessing
import os
import signal

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['llmft.training.fit', 'llmft.models.adapters'])
STEPS = 40  # four epochs of ten steps


def examples(count=40, length=24, seed=0):
    import numpy as np

    from llmft.data.tokens import Examples

    rng = np.random.default_rng(seed)
    sizes = rng.integers(6, length, size=count)
    ends = np.cumsum(sizes)
    return Examples(rng.integers(1, 500, ends[-1]).astype(np.uint16), ends - sizes, ends)


def tiny_lora():
    from llmft.models.adapters import add_lora
    from llmft.models.load import load_model

    return add_lora(load_model('preset:llama-tiny'), 4, 8, 0.1, ['q_proj', 'v_proj'], seed=1)


def recipe(**settings):
    "Four epochs of ten steps, changed by `settings`."
    from llmft.training.recipe import Recipe

    usual = dict(
        learning_rate=1e-2,
        num_epochs=4,
        batch_size=2,
        gradient_accumulation=2,
        max_length=24,
        save_every=7,
        keep_best=False,
    )
    return Recipe(**usual | settings)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point):
    "Arrange that this process kills itself at `point`; an `on_log` callback comes back."
    from llmft.training import checkpoints
    from llmft.training import fit as training

    if point == 'between writing and renaming':
        rename, calls = os.replace, []

        def replace(source, target):
            if str(source).endswith('.partial') and os.path.isdir(source):
                calls.append(source)
                if len(calls) == 3:
                    die()
            rename(source, target)

        checkpoints.os.replace = replace
    if point == 'during an evaluation':
        evaluate, calls = training.evaluate_loss, []

        def evaluate_loss(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                die()
            return evaluate(*args, **kwargs)

        training.evaluate_loss = evaluate_loss
    steps = {'inside an epoch': 17, 'at the end of an epoch': 20, 'in the first step': 1}
    presses = {'Ctrl-C': 1, 'Ctrl-C twice': 2}.get(point, 0)
    if presses:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_log(entry):
        if entry['step'] == steps.get(point) and 'loss' in entry:
            die()
        if entry['step'] == 12 and 'loss' in entry:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    return on_log


def train(folder, point=None, **settings):
    "Train a tiny LoRA with dropout in `folder`; kill the process at `point`."
    import torch

    from llmft.training.fit import fit

    torch.set_num_threads(1)
    os.environ['LLMFT_MANAGED'] = '1'
    on_log = kill_at(point)
    fit(tiny_lora(), examples(), examples(6, seed=1), folder, recipe(**settings), on_log)


def run(folder, point=None, **settings):
    "Exit code of `train` in a process of its own."
    process = context.Process(target=train, args=(folder, point), kwargs=settings)
    process.start()
    process.join(120)
    return process.exitcode
