"""Which notebooks there are, and their cells: shared by the tests that read them."""

import ast
import functools
import json
import re
from pathlib import Path

root = Path(__file__).parent.parent
nbs = root / 'nbs'
packages = ['data', 'models', 'training', 'inference', 'bounds', 'runs', 'bench', 'studies']


@functools.cache
def cells(path):
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


def exported_module(path):
    "The dotted name of the module that the notebook at `path` exports, or None."
    found = (re.search(r'^#\s*\|\s*default_exp\s+([\w.]+)', source(cell), re.M) for cell in cells(path) if cell['cell_type'] == 'code')
    return next((match[1] for match in found if match), None)


library = sorted(path for path in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts and exported_module(path))
experiments = sorted((nbs / 'experiments').glob('*.ipynb'))
