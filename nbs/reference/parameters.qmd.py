"""
---
title: Parameters
description: Every parameter of every experiment notebook, read from its parameters cell while this page was built.
---
"""
import itertools, json, sys
from nbdev.config import get_config
root = get_config().config_path
sys.path.insert(0, str(root/'tools'))
from pages import parameter_table

print("""Each of them can stand in a YAML file or after `-p` on the command line: `llmft run params/finetune/lora.yaml --small -p lora_rank=16`.
The type is enforced, an unknown name is an error that names the nearest valid one. `llmft params finetune` prints the same table in a terminal.
""")
for path in sorted((root/'nbs/experiments').glob('*.ipynb')):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    title = ''.join(cells[0]['source']).splitlines()[0].removeprefix('# ')
    source = next(''.join(cell['source']) for cell in cells if 'parameters' in cell['metadata'].get('tags', []))
    print(f'## {path.stem}\n\n[{title}](../experiments/{path.name}).\n')
    for config in sorted((root/'params'/path.stem).glob('[!_]*.yaml')):
        head = [line.lstrip('# ') for line in itertools.takewhile(lambda line: line.startswith('#'), config.read_text(encoding='utf-8').splitlines())]
        print(f'- [`params/{path.stem}/{config.name}`](../../params/{path.stem}/{config.name}): {head[0]}')
    print('\n' + parameter_table(source, f'{path.stem}.') + '\n')
