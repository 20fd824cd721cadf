"""
---
title: The command line
description: Every command of llmft with its options, read from the program while this page was built.
---
"""
import html
from inspect import signature
from typing import get_args

import typer

from llmft.cli import app


def code_span(text):
    return f'<code>{html.escape(text).replace("|", "&#124;")}</code>'


def plain_text(text):
    return html.escape(text or '').replace('*', '&#42;').replace('_', '&#95;')


def is_argument(option):
    return option.param_type_name == 'argument'


def argument_of(option):
    "An argument as a call has it: in capitals, in brackets where it may be left out."
    words = option.metavar.strip('[].') + ('...' if option.nargs == -1 else '')
    return words if option.required else f'[{words}]'


def usage_of(name, options):
    "How a command is called."
    arguments = [argument_of(option) for option in options if is_argument(option)]
    return ' '.join([f'llmft {name}', '[OPTIONS]', *arguments])


def value_of(option, kind):
    "The name of an option's value, which is of a type."
    if getattr(option, 'is_flag', False):
        return ''
    return option.metavar or ('NUMBER' if kind in (int, float) else 'TEXT')


def row(option, kind):
    "An option as a row of the table."
    words = argument_of(option) if is_argument(option) else f'{", ".join(option.opts)} {value_of(option, kind)}'.strip()
    shown = type(option.default) in (str, int, float) and option.default != ''
    default = code_span(str(option.default)) if shown else ''
    return f'| {code_span(words)} | {default} | {plain_text(getattr(option, "help", ""))} |'


def kinds_of(command):
    "name -> type of the options of a command."
    return {name: get_args(each.annotation)[0] for name, each in signature(command.callback).parameters.items()}


def examples_of(command):
    "The calls that end the help of a command."
    return [line.strip() for line in command.epilog.splitlines() if line.startswith('  ')]


print("""`llmft run` skips finished runs; `--fresh` repeats them. Its exit status is 0 when all runs are done, 1 when a run failed, 2 for a usage error, and 130 after Ctrl-C.
For scripts, `--json` ends the output of `run` and `gpu-check` with a line that holds one JSON object; for `run` it is `{"status": ..., "runs": [...]}`. The other commands with `--json` print the object in place of text.
""")

for name, command in typer.main.get_command(app).commands.items():
    options = [option for option in command.params if option.name != 'help']
    print(f'## llmft {name}\n\n{command.help}\n\n```text\n{usage_of(name, options)}\n```\n')
    print('```sh\n' + '\n'.join(examples_of(command)) + '\n```\n')
    print('| option | default | meaning |\n| --- | --- | --- |')
    kinds = kinds_of(command)
    print('\n'.join(row(option, kinds[option.name]) for option in options) + '\n')
