"""
---
title: Errors and what to do
description: Usage errors and their fixes. Every message was raised while this page was built.
---
"""
import contextlib
import html
import io
import os
import tempfile
from pathlib import Path

from nbdev.config import get_config

from llmft.cli import call

root = get_config().config_path
files = dict(FILE='params/finetune/mine.yaml', SWEEP='params/sweeps/mine.yaml')  # that a reader would write
cases = [  # title, arguments of llmft, content of the file they name, remedy
    (
        'A mistyped parameter',
        ['run', 'params/finetune/lora.yaml', '-p', 'lora_rnak=2'],
        None,
        'Take the name it proposes, or look it up with `llmft params finetune`.',
    ),
    (
        'A value of another type',
        ['run', 'params/finetune/lora.yaml', '-p', 'lora_rank=eight'],
        None,
        'Give a value of the type that `llmft params finetune` shows.',
    ),
    (
        'A value outside its range',
        ['run', 'params/finetune/lora.yaml', '-p', 'lora_dropout=1.5'],
        None,
        'Give a value in the range that `llmft params finetune` shows.',
    ),
    (
        'Data that is not there',
        ['run', 'params/finetune/lora.yaml', '--small', '-p', 'data=my_note.jsonl'],
        None,
        'Correct the path; it counts from the folder you are in, or from the project.',
    ),
    (
        'A duplicate key',
        ['run', 'FILE'],
        'name: twice\nseed: 1\nseed: 2\n',
        'Keep one of the two lines.',
    ),
    (
        'Not YAML',
        ['run', 'FILE'],
        'name: broken\nlora_targets: [q_proj\n',
        'Close the bracket that is still open, here `[` in line 2.',
    ),
    (
        'A file that is not there',
        ['run', 'params/finetune/lroa.yaml'],
        None,
        'Take the name it proposes, or look into `params`.',
    ),
    (
        'Nothing but an overlay',
        ['run', 'params/finetune/_small.yaml'],
        None,
        'Give the file that it overrides as well.',
    ),
    (
        'A name that cannot be a folder',
        ['run', 'params/finetune/lora.yaml', '-p', 'name=../x'],
        None,
        'Use letters, digits and `-_.+=@`.',
    ),
    (
        'No such notebook',
        ['params', 'finetuning'],
        None,
        'Take the name it proposes; the notebooks are in `nbs/experiments`.',
    ),
    (
        'A typo in a sweep',
        ['run', 'SWEEP'],
        'name: ranks\n'
        'stages:\n'
        '  - notebook: finetune\n'
        '    nmae: ranks-{lora_rank}\n'
        '    matrix: {lora_rank: [2, 4]}\n',
        'The keys of a sweep are listed in [Parameter files](yaml.qmd).',
    ),
    (
        'Two runs of one name',
        ['run', 'SWEEP'],
        'name: ranks\n'
        'stages:\n'
        '  - notebook: finetune\n'
        '    name: rank\n'
        '    matrix: {lora_rank: [2, 4]}\n',
        'Put what differs into the name: `rank-{lora_rank}`.',
    ),
]


def message(arguments, text):
    "What the command line says to the call, and its exit status; `text` is the content of the file it names."
    with tempfile.TemporaryDirectory() as folder:
        for word, place in files.items():
            file = Path(folder) / place
            if word in arguments:
                file.parent.mkdir(parents=True)
                file.write_text(text)
                arguments = [str(file) if argument == word else argument for argument in arguments]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = call(arguments)
        return said.getvalue().strip().replace(f'{folder}/', ''), status


os.chdir(root)
print("""A usage error is one line: what is wrong, where, and how to fix it. The exit status is 2, and nothing has run. A run that fails later has the status `failed` and keeps its folder; its report shows
the cell and the traceback. Fix the cause and give the same command again.
""")
for title, arguments, text, remedy in cases:
    said, status = message(arguments, text)
    if status != 2:
        raise SystemExit(f'llmft {" ".join(arguments)} should have been refused')
    example = f'```sh\nllmft {" ".join(files.get(word, word) for word in arguments)}\n```'
    if text:
        example = f'`{files[arguments[-1]]}`:\n\n```yaml\n{text.rstrip()}\n```\n\n{example}'
    print(f'## {title}\n\n{example}\n')
    print(f'<div class="said"><code>{html.escape(said)}</code></div>\n\n{remedy}\n')
print("""## While a run trains

| what you see | why | what to do |
| --- | --- | --- |
| `model ... cannot be loaded` | no network, no such name, or a licence to accept | give a folder or another name, or run with `--small` |
| `... is in use by process ...` | another process has the folder | wait for it, or give this run another name |
| `the loss is nan` or `inf` | the learning rate is too high, or fp16 overflowed | lower `learning_rate`, or use `precision: bf16` |
| `max_flops is ... and one optimiser step takes ...` | the budget is smaller than one step | raise `max_flops`, or make the step smaller |
| `has no field 'text'` | a table without that column | set `text_field` to one of the names it lists |
| status `interrupted` | the process was killed | the same command resumes from the last checkpoint |
""")
