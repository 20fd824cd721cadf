"""
---
title: Findings
description: What was tried, on what, with which command, and what came out, failures included. The newest stand first.
---
"""
from nbdev.config import get_config

text = (get_config().config_path/'LOG.md').read_text(encoding='utf-8')
print(text[text.index('\n## ') + 1:].strip())
