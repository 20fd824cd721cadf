"""
---
title: The command line
description: Every command of llmft with its options, read from the program while this page was built.
---
"""
import html

import typer

from llmft.cli import app


def code_span(text):
    return f'<code>{html.escape(text).replace("|", "&#124;")}</code>'


def plain_text(text):
    return html.escape(text or '').replace('*', '&#42;').replace('_', '&#95;')


def is_argument(option):
    return option.param_type_name == 'argument'


def usage_of(name, options):
    "How a command is called, its arguments in capitals."
    named = [option for option in options if is_argument(option)]
    arguments = [option.name.upper() + ('...' if option.nargs == -1 else '') for option in named]
    return ' '.join([f'llmft {name}', '[OPTIONS]', *arguments])


def value_of(option):
    "The name of an option's value."
    if getattr(option, 'is_flag', False):
        return ''
    return option.metavar or ('NUMBER' if isinstance(option.default, (int, float)) else 'TEXT')


def row(option):
    "An option as a row of the table."
    words = option.name.upper() if is_argument(option) else f'{", ".join(option.opts)} {value_of(option)}'.strip()
    shown = type(option.default) in (str, int, float) and option.default != ''
    default = code_span(str(option.default)) if shown else ''
    return f'| {code_span(words)} | {default} | {plain_text(getattr(option, "help", ""))} |'


def examples_of(command):
    "The calls that end the help of a command."
    return [line.strip() for line in command.epilog.splitlines() if line.startswith('  ')]


print("""Finished runs are skipped; `--fresh` repeats them. The exit status is 0 when all runs are done, 1 when a run failed, 2 for a usage error, and 130 after Ctrl-C.
With `--json` the last line of the output is one JSON object, `{"status": ..., "runs": [...]}`, for scripts.
""")

for name, command in typer.main.get_command(app).commands.items():
    options = [option for option in command.params if option.name != 'help']
    print(f'## llmft {name}\n\n{command.help}\n\n```text\n{usage_of(name, options)}\n```\n')
    print('```sh\n' + '\n'.join(examples_of(command)) + '\n```\n')
    print('| option | default | meaning |\n| --- | --- | --- |')
    print('\n'.join(map(row, options)) + '\n')
