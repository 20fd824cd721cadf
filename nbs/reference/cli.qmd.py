"""
---
title: The command line
description: Every command of llmft with its options, read from the program while this page was built.
---
"""
import html
import typer
from llmft.cli import app

print("""A run that is done is not done twice. The exit status is 0 when all is done, 1 when a run failed, 2 when something in the call must be mended, and 130 after Ctrl-C.
With `--json` the last line of the output is one JSON object, `{"status": ..., "runs": [...]}`, for scripts.
""")
group = typer.main.get_command(app)
span = lambda text: f'<code>{html.escape(text).replace("|", "&#124;")}</code>'
is_argument = lambda option: option.param_type_name == 'argument'
for name, command in group.commands.items():
    shown = [option for option in command.params if option.name != 'help']
    usage = ' '.join([f'llmft {name}', '[OPTIONS]', *(option.name.upper() + ('...' if option.nargs == -1 else '') for option in shown if is_argument(option))])
    print(f'## llmft {name}\n\n{command.help}\n\n```text\n{usage}\n```\n\n| option | default | meaning |\n| --- | --- | --- |')
    for option in shown:
        value = '' if getattr(option, 'is_flag', False) else option.metavar or ('NUMBER' if isinstance(option.default, int) else 'TEXT')
        words = option.name.upper() if is_argument(option) else f'{", ".join(option.opts)} {value}'.strip()
        default = span(str(option.default)) if isinstance(option.default, (str, int, float)) and not isinstance(option.default, bool) else ''
        print(f'| {span(words)} | {default} | {html.escape(getattr(option, "help", "") or "").replace("*", "&#42;").replace("_", "&#95;")} |')
    print()
