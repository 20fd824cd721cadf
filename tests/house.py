"""The notebooks of the project and what the house rules count in them, shared by the tests that read notebooks."""

import ast
import configparser
import functools
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

root = Path(__file__).parent.parent
nbs = root / 'nbs'

layers = [
    ['core'],
    ['data', 'models'],
    ['training', 'inference'],
    ['bounds', 'runs', 'bench'],
    ['studies'],
    ['cli', '__main__'],
]
layer_of = {name: number for number, names in enumerate(layers) for name in names}


@functools.cache
def settings():
    "The settings of settings.ini."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


# ---- cells


@functools.cache
def cells(path):
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    lines = [line for line in source(cell).splitlines() if re.match(r'#\s*\|\s*\w', line)]
    return {line.split('|', 1)[1].split()[0].rstrip(':') for line in lines}


def body(cell):
    "The code of a cell without nbdev's directives."
    return '\n'.join(line for line in source(cell).splitlines() if not re.match(r'#\s*\|', line))


def plain(text):
    "`text` with IPython magics and shell lines turned into comments, so that it parses."
    return re.sub(r'^(\s*)([%!])', r'\1pass #\2', text, flags=re.MULTILINE)


def only_imports(cell):
    "Whether `cell` holds imports only; `try: import ... except ImportError: ...` counts as one."

    def is_import(node):
        if isinstance(node, ast.Try):
            return all(map(is_import, node.body))
        return isinstance(node, (ast.Import, ast.ImportFrom))

    return all(map(is_import, ast.parse(plain(body(cell))).body))


exporting = {'export', 'exports', 'exporti'}


def code(path, kind=None):
    "The code cells of the notebook at `path`: all, or those of a `kind`, export or lesson; import cells are neither."
    found = [cell for cell in cells(path) if cell['cell_type'] == 'code']
    if kind == 'export':
        return [cell for cell in found if directives(cell) & exporting and not only_imports(cell)]
    if kind == 'lesson':
        other = exporting | {'default_exp', 'hide'}
        return [cell for cell in found if not directives(cell) & other and body(cell).strip()]
    return found


def prose_words(path):
    texts = [source(cell) for cell in cells(path) if cell['cell_type'] == 'markdown']
    return sum(len(re.findall(r'\w+', text)) for text in texts)


def sentences(text):
    "The sentences of a Markdown text without its blocks of code and formulas, tables, headings and HTML; : and ; end one."
    blocks = r'\A---\n.*?^---$|^\s*```.*?^\s*```|\$\$.*?\$\$|</?\w[^>]*>'
    text = re.sub(blocks, '\n\n', text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r'`[^`]*`|\$[^$]*\$|(?<=\])\([^)]*\)', 'x', text)
    for paragraph in re.split(r'\n\s*\n|\n(?=\s*(?:[-*>|#]|\d+\.)\s)', text):
        if not paragraph.lstrip().startswith(('|', '#', ':::')):
            body = re.sub(r'^\s*(?:[-*>]|\d+\.)\s+', '', paragraph).strip()
            yield from filter(None, re.split(r'(?<=[.!?:;])[*_")]*\s+', body))


# ---- which notebooks


def exported_module(path):
    "The dotted name of the module that the notebook at `path` exports, or None."
    names = [re.search(r'^#\s*\|\s*default_exp\s+([\w.]+)', source(cell), re.MULTILINE) for cell in code(path)]
    return next((name[1] for name in names if name), None)


notebooks = sorted(path for path in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts)
library = [path for path in notebooks if exported_module(path)]
experiments = [path for path in notebooks if path.parent.name == 'experiments']


def place(path):
    "How messages name a notebook."
    return path.relative_to(nbs).as_posix()


# ---- what is counted

uncounted = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count_tokens(text):
    "Tokens of the Python `text`: names, operators, numbers, strings; line breaks and comments do not count."
    text = textwrap.dedent(text) + '\n'
    return sum(token.type not in uncounted for token in tokenize.generate_tokens(io.StringIO(text).readline))


def comments(text):
    "Line number -> comment, for every line of the Python `text` that carries one."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines_of(text, node):
    return text.split('\n')[node.lineno - 1 : node.end_lineno]


def public_definitions(tree):
    found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return [node for node in found if not node.name.startswith('_')]


def public_names(tree):
    "The functions, classes and constants that a cell defines, those with a leading underscore aside."
    names = [node.name for node in public_definitions(tree)]
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        else:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith('_')]


def joined_assignments(tree):
    "Assignments of several unrelated values in one statement; an exchange of values is one thing."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        for target in node.targets:
            if isinstance(target, ast.Tuple):
                names = {ast.unparse(one) for one in target.elts}
                values = {ast.unparse(one) for one in node.value.elts}
                if names != values:
                    yield ast.unparse(node)


def chained_conditionals(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and (isinstance(node.orelse, ast.IfExp) or isinstance(node.body, ast.IfExp)):
            yield ast.unparse(node)


# ---- what is measured


def processor_seconds(*arguments):
    "Processor time of a Python process, which other work on the machine changes far less than the clock."
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, *arguments], cwd=root, **quiet)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f'{arguments} ended with {process.returncode}'
    return used.ru_utime + used.ru_stime


# ---- projects made for a test


def write(path, text):
    "Write `text` to the file at `path`, whose folders are made; the path is returned."
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def write_experiment(name, parameters, *sources):
    "The notebook `name` among the experiments of the project in this folder: a parameters cell and code cells."
    code = [
        dict(
            cell_type='code',
            id=f'c{i}',
            metadata=dict(tags=['parameters'] if i == 0 else []),
            execution_count=None,
            outputs=[],
            source=text,
        )
        for i, text in enumerate((parameters, *sources))
    ]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    made = dict(cells=code, metadata=kernel, nbformat=4, nbformat_minor=5)
    write(f'nbs/experiments/{name}.ipynb', json.dumps(made))
