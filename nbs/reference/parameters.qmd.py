"""
---
title: Parameters
description: Every parameter of every experiment notebook, read from its parameters cell while this page was built.
tags: [parameter, option, learning rate, max_length, batch size, lora_rank, seed, gradient_checkpointing, YAML]
---
"""
import itertools
import json
import sys
from collections import defaultdict

from nbdev.config import get_config

from llmft.runs.params import parse_parameters

root = get_config().config_path
sys.path.insert(0, str(root / 'tools'))
from api_pages import parameter_row, parameter_table

order = (
    'finetune instruct pretrain pdf_finetune inference forecast_data forecast_train forecast_eval sublora_train '
    'sublora_bounds profile compare inference_compare pdf_compare forecast_summary sublora_analysis'
).split()
shared_by = 4  # notebooks that have a parameter of the same meaning


def first_comment(file):
    "The first line of the comment that a parameter file begins with."
    lines = file.read_text(encoding='utf-8').splitlines()
    said = [line.lstrip('# ') for line in itertools.takewhile(lambda line: line.startswith('#'), lines)][0]
    return said if said.endswith(('.', '?', '!')) else f'{said}.'


def read(path):
    "(title, parameters) of an experiment."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    tagged = next(cell for cell in cells if 'parameters' in cell['metadata'].get('tags', []))
    title = ''.join(cells[0]['source']).splitlines()[0].removeprefix('# ')
    return title, parse_parameters(''.join(tagged['source']), path.stem)


def place(path):
    "Experiments by use; those that the list does not name come last."
    return (order.index(path.stem) if path.stem in order else len(order), path.stem)


def meaning(parameter):
    "What two parameters have in common that are explained once."
    return parameter.name, parameter.type, parameter.range, parameter.help


def differ(found):
    "Whether the defaults of a parameter in several notebooks are not the same."
    return len({json.dumps(each.default) for _, each in found}) > 1


def named(parameter):
    "The name of a parameter that several notebooks have, with its default where the others have another one."
    if not differ(shared[meaning(parameter)]):
        return f'`{parameter.name}`'
    return f'`{parameter.name}: {json.dumps(parameter.default, ensure_ascii=False)}`'


def shared_row(parameter, found):
    "The row of a parameter that several notebooks have."
    anchors = [f'{notebook}.{parameter.name}' for notebook, _ in found]
    return parameter_row(parameter, anchors, 'differs' if differ(found) else None)


print("""Set a parameter in a YAML file or after `-p` on the command line: `llmft run params/finetune/lora.yaml --small -p lora_rank=16`.
A value of another type or outside its range is an error before anything starts. So is an unknown name, and the error names the nearest valid one. `llmft params finetune` prints one notebook's table in a terminal.

The range of a list holds for each of its entries. A meaning that begins with names, as in `cosine | linear`, lists all that the parameter may be.
""")
experiments = {path.stem: read(path) for path in sorted((root / 'nbs/experiments').glob('*.ipynb'), key=place)}
users = defaultdict(list)
for notebook, (_, parameters) in experiments.items():
    for parameter in parameters:
        users[meaning(parameter)].append((notebook, parameter))
shared = {key: found for key, found in users.items() if len(found) >= shared_by}

print('## In several experiments\n\nUnless an experiment lists them again, these mean the same everywhere. Each experiment below gives its own default where defaults differ.\n')
print(parameter_table([shared_row(found[0][1], found) for found in shared.values()]) + '\n')
for notebook, (title, parameters) in experiments.items():
    print(f'## {notebook}\n\n[{title}](../experiments/{notebook}.ipynb){"" if title.endswith("?") else "."}\n')
    for config in sorted((root / 'params' / notebook).glob('[!_]*.yaml')):
        name = f'params/{notebook}/{config.name}'
        print(f'- [`{name}`](../../{name}): {first_comment(config)}')
    own = [parameter_row(each, [f'{notebook}.{each.name}']) for each in parameters if meaning(each) not in shared]
    also = ', '.join(named(each) for each in parameters if meaning(each) in shared)
    print('\n' + parameter_table(own) + f'\n\nAlso, explained above: {also}.\n')
