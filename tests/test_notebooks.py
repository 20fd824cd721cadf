"""Every library notebook runs from top to bottom by nbdev's own test runner, one process each."""

import importlib.util
import multiprocessing
import os
import sys
import traceback

import pytest
from house import library, nbs, root

notebooks = [*library, *sorted((nbs / 'guides').glob('*.ipynb')), nbs / 'index.ipynb']
needed = {'guides/lm-eval': 'lm_eval'}  # notebook -> the package of an extra that it runs
processes = multiprocessing.get_context(
    'forkserver'
)  # every notebook begins in a copy of one process that has imported what takes seconds
processes.set_forkserver_preload(['nbdev.test', 'torch', 'transformers', 'peft', 'accelerate', 'datasets'])


def flags():
    "The test flags of settings.ini that this machine can honour."
    import torch

    return 'gpu' if torch.cuda.is_available() else ''


def run(notebook, flags, log):
    "Run `notebook` in this process; everything it says goes to the file `log`."
    with open(log, 'w') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), 'w', buffering=1) for stream in (1, 2))
    os.chdir(root)
    from nbdev.test import nbdev_test

    try:
        nbdev_test.__wrapped__(path=str(notebook), flags=flags, n_workers=0, do_print=True)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@pytest.mark.parametrize('notebook', notebooks, ids=lambda path: path.relative_to(nbs).with_suffix('').as_posix())
def test_notebook(notebook, tmp_path):
    package = needed.get(notebook.relative_to(nbs).with_suffix('').as_posix())
    if package and not importlib.util.find_spec(package):
        pytest.skip(f'{package} is not here: pip install -e ".[lm-eval]"')
    process = processes.Process(target=run, args=(notebook, flags(), tmp_path / 'log'))
    process.start()
    process.join(600)
    said = (tmp_path / 'log').read_text() if (tmp_path / 'log').exists() else ''
    if process.is_alive():
        process.kill()
        pytest.fail(f'not done after 600 s:\n{said}'[-6000:])
    assert process.exitcode == 0, said[-6000:]
    assert 'Success.' in said and said.count('Starting') == 1, f'not exactly this notebook was tested:\n{said}'
