"""
---
title: Models
description: Which architectures are tested, which attention keeps packed documents apart, and what is refused.
tags: [architecture, compatibility, supported models, Llama, Qwen, Gemma, Mistral, Phi, Mamba, attention, targets]
---
"""

import sys

from nbdev.config import get_config

sys.path.insert(0, str(get_config().config_path / 'tests'))
from architectures import attentions_that_keep_apart, shapes

from llmft.models.cost import families

priced = {'gpt2', 'llama', 'mistral', 'qwen2', 'qwen3'} & set(families)
targets = {
    'Llama, Mistral, Qwen, Gemma, SmolLM, OLMo, Granite, StarCoder2': 'q_proj k_proj v_proj o_proj',
    'Phi-3': 'qkv_proj o_proj',
    'Phi, StableLM': 'q_proj k_proj v_proj dense',
    'GPT-NeoX, Falcon, BLOOM': 'query_key_value dense',
    'GPT-2': 'c_attn c_proj',
}

print("""Tests build a tiny model of each architecture below from its configuration. They compare loss and gradients of packed, bucketed and padded batches with documents read alone, under every form of attention,
and check that generation equals the model's own. `llmft plan` prices the families marked exact; for others FLOPs and predicted memory stay empty. The names are transformers' model types. A model of another type is tried before training: where its documents are not read alone, the run is refused with the setting that works.
""")
print('| model type | packed under `attention` | otherwise | `llmft plan` |\n| --- | --- | --- | --- |')
for name in shapes:
    forms = attentions_that_keep_apart(name)
    packed = ', '.join(f'`{form}`' for form in forms) or 'refused'
    instead = 'packed is the default' if 'documents' in forms else '`layout: bucketed`'
    if forms and 'documents' not in forms:
        instead = f'`attention: {forms[0]}` or `layout: bucketed`'
    plan = 'exact' if name in priced else 'not priced'
    print(f'| `{name}` | {packed} | {instead} | {plan} |')

print("""
## Names of the adapted modules

A name that matches no module is an error that lists the names there are. `all-linear` works everywhere.

| family | `lora_targets` |
| --- | --- |""")
for family, names in targets.items():
    print(f'| {family} | {", ".join(f"`{name}`" for name in names.split())} |')

print("""
## Where a model may come from

| form | example | note |
| --- | --- | --- |
| the shipped base | `model: base` | 3.9 million parameters, for trying things out |
| a real small model | `model: smollm2` after `llmft fetch smollm2` | SmolLM2-135M-Instruct, Apache-2.0 |
| a folder | `model: my_model_folder` | what `save_pretrained` wrote |
| a name on the hub | `model: Qwen/Qwen2.5-0.5B` | downloaded once |
| a GGUF file | `model: model.gguf` | unpacked to 32 or 16 bits; the report names the packing it was rounded from |
| an adapter or a finished run | `model: outputs/finetune/mine` | its base and its adapter |
| random weights of a known shape | `model: preset:qwen2.5-0.5b` | for tests and prices |

## Refused

- Vision, audio and encoder-decoder models: only causal language models train here.
- A folder whose weights are incomplete: nothing is filled with random numbers.
- Code that comes with a model (`trust_remote_code`): it is never run.
- An adapter on an adapter when the base is quantised: merge the first one.
""")
