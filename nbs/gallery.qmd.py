"""
---
title: Gallery
description: Reports as they came out of real runs at small scale. Each is one file that opens anywhere, offline.
---
"""
import html, json, re
from nbdev.config import get_config

root = get_config().config_path
sections = {'First runs': ['compare/quickstart', 'finetune'],
            'Memory-efficient fine-tuning': ['compare', 'inference_compare', 'profile'],
            'Forecasting dynamics': ['forecast_summary', 'forecast_train', 'forecast_eval'],
            'Instruction tuning on code': ['instruct'],
            'Fine-tuning on PDFs': ['pdf_compare', 'pdf_finetune'],
            'Generalization bounds': ['sublora_analysis', 'sublora_bounds'],
            'Speed beside other libraries': ['bench', 'bench_instruct', 'bench_inference', 'bench_forecast', 'bench_bounds']}


def card(folder):
    "A link to a report: its richest figure, its title, its verdict, how long it took and when."
    record, report, page = json.loads((folder/'run.json').read_text(encoding='utf-8')), (folder/'report.html').read_text(encoding='utf-8'), f'gallery/{folder.parent.name}/{folder.name}'
    run, title = record['run'], re.search('<h1[^>]*>(.*?)</h1>', report)[1]
    facts = f"{run['notebook']}/{run['name']} · {run['seconds']:,.0f} s · {run['started'][:10]}"
    picture = f'<img src="{page}.png" alt="a figure of {html.escape(run["name"])}" loading="lazy">' if 'src="data:image/png;base64,' in report else ''
    return f'<a class="card" href="{page}.html">{picture}<b>{title}</b><span class="verdict">{html.escape(run.get("verdict") or "")}</span><span>{facts}</span></a>'


left = sorted(path.parent for path in root.glob('outputs/gallery/*/*/report.html'))
print("""What a run leaves for people is its report: the question, the parameters, the data with one example, curves, costs, a verdict in words, and where every number comes from. The code is folded
away under each cell. These were made on two CPU cores without a network.
""")
for section, names in sections.items():
    found = [folder for name in names for folder in left if name in (folder.parent.name, f'{folder.parent.name}/{folder.name}')]
    found, left = list(dict.fromkeys(found)), [folder for folder in left if folder not in found]
    if found: print(f'## {section}\n\n<div class="cards">', *map(card, found), '</div>\n', sep='\n')
if left: raise ValueError(f'no section of the gallery takes {left[0]}')
