"""
---
title: Parameters
description: Every parameter of every experiment notebook, read from its parameters cell while this page was built.
---
"""
import itertools
import json
import sys

from nbdev.config import get_config

root = get_config().config_path
sys.path.insert(0, str(root / 'tools'))
from api_pages import experiment_parameters


def first_comment(file):
    "The first line of the comment that a parameter file begins with."
    lines = file.read_text(encoding='utf-8').splitlines()
    return [line.lstrip('# ') for line in itertools.takewhile(lambda line: line.startswith('#'), lines)][0]


print("""Set a parameter in a YAML file or after `-p` on the command line: `llmft run params/finetune/lora.yaml --small -p lora_rank=16`.
A value of another type or outside its range is an error before anything starts. So is an unknown name, and the error names the nearest valid one. `llmft params finetune` prints the same table in a terminal.

The range of a list holds for each of its entries. A meaning that begins with names, as in `cosine | linear`, lists all that the parameter may be.
""")
for path in sorted((root / 'nbs/experiments').glob('*.ipynb')):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    title = ''.join(cells[0]['source']).splitlines()[0].removeprefix('# ')
    tagged = [cell for cell in cells if 'parameters' in cell['metadata'].get('tags', [])]
    print(f'## {path.stem}\n\n[{title}](../experiments/{path.name}).\n')
    for config in sorted((root / 'params' / path.stem).glob('[!_]*.yaml')):
        name = f'params/{path.stem}/{config.name}'
        print(f'- [`{name}`](../../{name}): {first_comment(config)}')
    print('\n' + experiment_parameters(''.join(tagged[0]['source']), f'{path.stem}.') + '\n')
