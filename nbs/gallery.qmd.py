"""
---
title: Gallery
description: Reports of real runs at small scale. Each is one file that opens anywhere, offline.
---
"""
import html
import json
import re

from nbdev.config import get_config

from llmft.runs.report import duration, unbroken

root = get_config().config_path
sections = {
    'First runs': ['compare/quickstart', 'finetune/quickstart-full', 'finetune/quickstart-lora', 'finetune/quickstart-qlora'],
    'A real model on a laptop': [
        'compare/smollm2', 'finetune', 'forecast_train/final', 'forecast_eval/final', 'sublora_bounds/smollm2', 'instruct/smollm2-mbpp',
        'inference/smollm2-fp32', 'inference/smollm2-int8', 'inference/smollm2-nf4', 'pdf_finetune/smollm2'
    ],
    'Memory-efficient fine-tuning': ['compare', 'inference_compare', 'profile'],
    'Forecasting dynamics': ['forecast_summary', 'forecast_train', 'forecast_eval'],
    'Instruction tuning on code': ['instruct'],
    'Fine-tuning on PDFs': ['pdf_compare', 'pdf_finetune'],
    'Generalization bounds': ['sublora_analysis', 'sublora_bounds'],
    'On a GPU': ['gpu_check'],
    'Speed compared with other libraries': [
        'bench', 'bench_instruct', 'bench_inference', 'bench_forecast', 'bench_bounds'
    ],
}


def picture_of(report, page):
    "The figure that tools/docs.py saves for a report, with its words there; '' where there is none."
    drawing = re.search('<svg role="img"[^>]*aria-label="([^"]*)"', report)
    return f'<img src="{page}.svg" alt="{drawing[1]}" loading="lazy">' if drawing else ''


def card(folder):
    "A link to a report: its first figure, its title and name, its verdict, how long it took and when."
    run = json.loads((folder / 'run.json').read_text(encoding='utf-8'))['run']
    report = (folder / 'report.html').read_text(encoding='utf-8')
    page = f'gallery/{folder.parent.name}/{folder.name}'
    title = re.search('<h1[^>]*>(.*?)</h1>', report)[1]
    verdict = unbroken(run.get('verdict') or '')
    words = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', verdict)  # its links lead into the folder of the run
    verdict = '<br>'.join(html.escape(line.removeprefix('- ')) for line in words.splitlines())
    facts = f"{duration(run['seconds'])} · {run['started'][:10].replace('-', '&#8209;')}"

    return (
        f'<a class="card" href="{page}.html">{picture_of(report, page)}<b>{title}</b>'
        f'<span class="name">{run["notebook"]}/{run["name"]}</span>'
        f'<span class="verdict">{verdict}</span><span>{facts}</span></a>'
    )


def named(folder, name):
    "Whether `name` is a report's notebook, or its notebook and run."
    return name in (folder.parent.name, f'{folder.parent.name}/{folder.name}')


left = sorted(path.parent for path in root.glob('outputs/gallery/*/*/report.html'))
print("""Each run leaves a report: the question, the parameters, the data with one example, curves, costs, a verdict in words, and the origin of every number. The code is folded under each cell. These runs used two CPU cores and no network; one checked an H100.
""")
for section, names in sections.items():
    reports = [folder for name in names for folder in left if named(folder, name)]
    reports = list(dict.fromkeys(reports))
    left = [folder for folder in left if folder not in reports]
    if reports:
        print(f'## {section}\n\n<div class="cards">', *map(card, reports), '</div>\n', sep='\n')
if left:
    raise ValueError(f'no section of the gallery takes {left[0]}')
