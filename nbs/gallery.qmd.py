"""
---
title: Gallery
description: Reports as they came out of real runs at small scale. Each is one file that opens anywhere, offline.
---
"""
import html, json
from nbdev.config import get_config

root = get_config().config_path
records = [json.loads(path.read_text(encoding='utf-8')) | dict(page=f'gallery/{path.parent.parent.name}/{path.parent.name}') for path in sorted(root.glob('outputs/gallery/*/*/run.json'))]
print("""What a run leaves for people is its report: the question, the parameters, the data with one example, curves, costs, a verdict in words, and where every number comes from. The code is folded
away under each cell. These were made on two CPU cores without a network.
""")
for notebook in dict.fromkeys(record['run']['notebook'] for record in records):
    print(f'## {notebook}\n\n<div class="cards">')
    for record in records:
        run = record['run']
        if run['notebook'] != notebook: continue
        facts = f"{run['started'][:10]} · {run['seconds']:,.0f} s · {record['meta']['machine']['cores']} cores"
        drawn = 'src="data:image/png;base64,' in (root/'outputs'/record['page']/'report.html').read_text(encoding='utf-8')
        picture = f'<img src="{record["page"]}.png" alt="the first figure of {html.escape(run["name"])}" loading="lazy">' if drawn else ''
        print(f'<a class="card" href="{record["page"]}.html">{picture}<b>{html.escape(run["name"])}</b>'
              f'<span>{html.escape(run.get("verdict") or "")}</span><span>{facts}</span></a>')
    print('</div>\n')
