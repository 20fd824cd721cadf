"""
---
title: What fits which card
description: Ten models by eight cards and three methods, planned while this page was built.
---
"""
from llmft.runs.plan import gpus
from llmft.runs.plan_table import methods_of, plan_table, table_gpus, table_says

titles = dict(full='Full fine-tuning', lora='LoRA', qlora='QLoRA')
says = dict(
    qlora='The speeds are those of LoRA: QLoRA has the same products, and its unpacking of weights is not counted.\n\n'
)


def markdown_table(rows):
    "Rows as a table in Markdown."
    names = list(rows[0])
    lines = [names, ['---'] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def card_row(name):
    "A card of the table."
    facts = gpus[name]
    half = f'{facts["bf16_tflops"]:g} TFLOP/s' + ('' if facts['capability'] >= 8 else ' (fp16; it has no bf16)')
    bandwidth = f'{facts["bandwidth_gb_per_sec"]:,} GB/s'
    memory = f'{facts["memory_gib"]:g} GiB'
    return {'card': name, 'memory': memory, 'bf16 products': half, 'memory bandwidth': bandwidth}


print(f"""{table_says}

Where a cell says `no`, the model does not fit, and the number is what it would take. A column has the name of a card as `--gpu` takes it, and its memory. `llmft plan --table` prints the same tables, with `--json` as an object. For your own model, batch and lengths use `llmft plan FILE --gpu NAME`.
""")
for method, rows in methods_of(plan_table()).items():
    print(f'## {titles[method]}\n\n{says.get(method, "")}{markdown_table(rows)}\n')
print(f'## The cards\n\nMemory as PyTorch sees it; rates by the data sheets.\n\n{markdown_table([card_row(name) for name in table_gpus])}\n')
