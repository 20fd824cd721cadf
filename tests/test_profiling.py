"""The profile experiment end to end: its table, its trace, its chart, and training that is none the different for being watched."""

import gzip
import json

import numpy as np
import torch

from llmft.core import project_root
from llmft.data.tokens import Examples
from llmft.models.adapters import add_lora, trainable_parameters, weights_hash
from llmft.models.load import load_model
from llmft.runs.execute import execute_run
from llmft.runs.params import resolve_params
from llmft.training.fit import fit
from llmft.training.profiling import named_parts, profile_fit
from llmft.training.recipe import Recipe


def test_the_experiment_leaves_table_trace_and_chart(tmp_path):
    overrides = [f'outputs={tmp_path}', 'profiled_steps=2', 'num_samples=3', 'max_length=64', 'batch_size=2']
    notebook, params = resolve_params([project_root() / 'params/profile/qlora.yaml'], overrides, 'small')
    record, folder = execute_run(notebook, params, on_line=lambda line: None), tmp_path / 'profile' / 'qlora'
    assert record['run']['status'] == 'done', record['run']['error']
    rows = [
        line
        for line in (folder / 'qlora_profile_table.txt').read_text().splitlines()
        if line.strip() and not line.startswith('-')
    ]
    assert (
        rows[0].split()[0] == 'Name'
        and len(rows) == 1 + 30 + 1
        and any('aten::mm' in row for row in rows)
        and 'CPU Mem' in rows[0]
    )
    events = json.loads(gzip.open(folder / 'qlora_trace.json.gz').read())['traceEvents']
    assert sum(event.get('name') == 'Optimizer.step#AdamW.step' and event.get('ph') == 'X' for event in events) == 2
    metrics = json.loads((folder / 'metrics.json').read_text())
    for key in ('kind', 'part', 'phase'):
        assert abs(sum(value for name, value in metrics.items() if name.startswith(f'{key}_')) - 1) < 1e-6
    assert (
        metrics['profiled_steps'] == 2
        and metrics['kind_quantised_weights'] > 0
        and metrics['part_mlp'] > 0
        and 0.5 < metrics['quantised_share'] < 1
    )
    assert {path.stem for path in (folder / 'figures').glob('*.png')} >= {'kinds', 'parts'}


def test_watching_changes_no_bit(tmp_path):
    "The same steps with and without the profiler and its hooks end in the same weights."
    ids = np.random.default_rng(0).integers(5, 500, 33 * 8).astype(np.uint16)
    some, recipe = (
        Examples(ids, np.arange(8) * 33, np.arange(8) * 33 + 33),
        Recipe(batch_size=4, max_length=32, gradient_checkpointing=True),
    )

    def build():
        return add_lora(load_model('preset:llama-tiny'), 4, 8, 0.1, ['q_proj', 'v_proj'], seed=0)

    watched, plain = build(), build()
    seen = profile_fit(watched, some, recipe, steps=2)
    with torch.random.fork_rng():
        fit(plain, some, None, tmp_path, Recipe(batch_size=4, max_length=32, gradient_checkpointing=True, max_steps=7))
    assert seen.steps == 2 and weights_hash(trainable_parameters(watched)) == weights_hash(trainable_parameters(plain))
    with named_parts(watched):
        assert any(module._forward_hooks for module in watched.modules())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in watched.modules()
        if 'lora' in type(module).__name__.lower()
    )
