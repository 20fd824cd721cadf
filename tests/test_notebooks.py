"""Every library notebook runs from top to bottom by nbdev's own test runner, one process each."""
import subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
notebooks = sorted(root.glob('nbs/[0-9]*.ipynb')) + sorted(root.glob('nbs/guides/*.ipynb')) + [root/'nbs/index.ipynb']


def flags():
    "The test flags of settings.ini that this machine can honour."
    import torch
    return 'gpu' if torch.cuda.is_available() else ''


@pytest.mark.parametrize('notebook', notebooks, ids=lambda path: path.stem)
def test_notebook(notebook):
    run = 'import sys; from nbdev.test import nbdev_test; nbdev_test.__wrapped__(path=sys.argv[1], flags=sys.argv[2], n_workers=0, do_print=True)'
    done = subprocess.run([sys.executable, '-c', run, str(notebook), flags()], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'[-6000:]
    assert 'Success.' in done.stdout and done.stdout.count('Starting') == 1, f'not exactly this notebook was tested:\n{done.stdout}'
