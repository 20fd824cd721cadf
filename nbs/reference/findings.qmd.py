"""
---
title: Findings
description: What was tried, on which data, with which command, and the result, failures included; newest first.
---
"""
from nbdev.config import get_config

text = (get_config().config_path / 'LOG.md').read_text(encoding='utf-8')
print(text.removeprefix('# Log').strip())
