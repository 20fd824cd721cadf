"""
---
title: Changelog
description: What changed for users of llmft.
---
"""
from nbdev.config import get_config

text = (get_config().config_path / 'CHANGELOG.md').read_text(encoding='utf-8')
print(text.split('\n', 1)[1].strip().replace('](LOG.md)', '](../../LOG.md)'))
