"""What a page says about a function, a class or an experiment's parameters, read from the source without running it."""

import ast
import copy
import functools
import html
import io
import json
import re
import tokenize
from dataclasses import dataclass, replace

from links import branch, linked, repository, root

from llmft.runs.params import parse_parameters

longest_default = 60  # characters
records = 'dataclass', 'NamedTuple'  # what makes a class of its fields
longest_signature = 84  # columns on one line, as many as a page of 1280 pixels has
functions = (ast.FunctionDef, ast.AsyncFunctionDef)
empty = dict(dict='{}', list='[]', set='set()', tuple='()')  # what these make when they are called


# ---- the source of a module


@dataclass
class Module:
    "The source of a module of the library, parsed."

    body: list  # syntax trees of its statements
    notes: dict  # line number -> comment


def comments(text):
    "Line number -> comment of a source; lines that hold nothing else continue the comment before them."
    notes = {}
    started = {}  # line number -> the line where its comment begins
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        alone = token.line.strip().startswith('#')
        started[line] = started.get(line - 1, line) if alone else line
        words = [notes.get(started[line], ''), token.string.lstrip('# ')]
        notes[started[line]] = ' '.join(filter(None, words))
    return notes


@functools.cache
def module_source(
    module,  # its path below llmft: data/corpora
):
    text = (root / 'llmft' / f'{module}.py').read_text(encoding='utf-8')
    return Module(ast.parse(text).body, comments(text))


def patched_class(node):
    "The class that a function with the decorator `@patch` is a method of, or None."
    decorators = [ast.unparse(decorator).partition('(')[0] for decorator in getattr(node, 'decorator_list', [])]
    if not isinstance(node, functions) or not {'patch', 'patch_to'} & set(decorators) or not node.args.args:
        return None
    owner = node.args.args[0].annotation
    return ast.unparse(owner) if owner is not None else None


def definition(module, name):
    "The node that defines `name` or `Class.method` in the module; None when it is not there."
    statements = module_source(module).body
    owner, _, method = name.rpartition('.')
    for node in statements:
        if owner and getattr(node, 'name', '') == method and patched_class(node) == owner:
            return node

    node = None
    for part in name.split('.'):
        defined = [one for one in statements if isinstance(one, (*functions, ast.ClassDef)) and one.name == part]
        node = next((one for one in defined if not patched_class(one)), None)
        statements = getattr(node, 'body', [])
    return node


def methods(node):
    "The names of a class's public methods that have a docstring."
    if not isinstance(node, ast.ClassDef):
        return []
    defined = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    return [one.name for one in defined if not one.name.startswith('_') and ast.get_docstring(one)]


# ---- parameters


@dataclass
class Parameter:
    "A parameter of a function, or a field of a dataclass."

    name: str
    type: str
    default: str
    line: int  # where it ends, and where its comment stands


class Unquoted(ast.NodeTransformer):
    "Turns names in quotes, which mean classes defined further down, into names."

    def visit_Subscript(self, node):
        return node if ast.unparse(node.value) == 'Literal' else self.generic_visit(node)

    def visit_Constant(self, node):
        return ast.parse(node.value, mode='eval').body if isinstance(node.value, str) else node


def type_text(node):
    "An annotation as a reader wants to see it."
    return ast.unparse(Unquoted().visit(copy.deepcopy(node))) if node is not None else ''


def is_property(node):
    "Whether a method is read as a field: `run.status`."
    decorators = [ast.unparse(one).rpartition('.')[2] for one in getattr(node, 'decorator_list', [])]
    return bool({'property', 'cached_property'} & set(decorators))


def made_by(factory):
    "What a factory of defaults makes: {} for dict."
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    name = ast.unparse(factory)
    return empty.get(name, f'{name}()')


def default_text(node):
    "A default as a reader wants to see it: of a command-line option the value it has when it is not given."
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith('typer.') and node.args:
        node = node.args[0]
    text = ast.unparse(node) if node is not None else ''
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'field':
        given = {word.arg: word.value for word in node.keywords}
        text = made_by(given['default_factory']) if 'default_factory' in given else type_text(given.get('default'))
    if text == '...':
        return ''
    return text if len(text) <= longest_default else text[: longest_default - 3] + '...'


def as_parameter(arg, default=None, stars=''):
    return Parameter(stars + arg.arg, type_text(arg.annotation), default_text(default), arg.end_lineno)


def noted_type(node):
    "The type of `Annotated[type, ...]`, or None for another expression."
    noted = isinstance(node, ast.Subscript) and ast.unparse(node.value) == 'Annotated'
    return type_text(node.slice.elts[0]) if noted else None


def private_types(statements):
    "Name -> type of the private names of a module for types with notes: `_Rows = Annotated[int, ...]` is `int`."
    types = {}

    def found(node):
        return types.get(ast.unparse(node.func)) if isinstance(node, ast.Call) else noted_type(node)

    for one in statements:
        if isinstance(one, functions) and isinstance(one.body[-1], ast.Return):
            types[one.name] = found(one.body[-1].value)  # of what a function makes
        elif isinstance(one, ast.Assign):
            types[ast.unparse(one.targets[0])] = found(one.value)
    return {name: kind for name, kind in types.items() if kind and name.startswith('_')}


def parameters(node, statements=()):
    "The parameters of a function, or of the calls that make a class; `statements` are those of its module."
    if isinstance(node, ast.ClassDef):
        return class_parameters(node, statements)

    spec = node.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    rows = [as_parameter(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if spec.vararg:
        rows.append(as_parameter(spec.vararg, stars='*'))
    rows += [as_parameter(arg, default) for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    if spec.kwarg:
        rows.append(as_parameter(spec.kwarg, stars='**'))
    return [row for row in rows if row.name not in ('self', 'cls')]


def class_parameters(node, statements):
    "The public fields of a record, or the parameters of the `__init__` of a class or of its base in the module."
    if any(kind in ast.unparse(one) for kind in records for one in (*node.decorator_list, *node.bases)):
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and not one.target.id.startswith('_')]
        return [
            Parameter(one.target.id, type_text(one.annotation), default_text(one.value), one.end_lineno)
            for one in fields
        ]
    start = next((one for one in node.body if isinstance(one, functions) and one.name == '__init__'), None)
    bases = [ast.unparse(base) for base in node.bases]
    base = next((one for one in statements if isinstance(one, ast.ClassDef) and one.name in bases), None)
    if start is None and base is not None:
        return class_parameters(base, statements)
    return parameters(start) if start else []


# ---- tables


def cell_text(text):
    "Markdown within a table's cell."
    line = text.replace('|', '\\|').replace('\n', ' ')
    return re.sub(r'\{([^{}`]*)\}\s*$', r'\\{\1\\}', line)  # braces at the end of a cell would be its attributes


def code_span(text):
    "Text as code within a table's cell."
    if not text:
        return ''
    return f'<code>{html.escape(text).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")}</code>'


def parameters_box(head, rows):
    "A table of parameters, in the box that the style sheet knows."
    rule = '| --- ' * (head.count('|') - 1) + '|'
    table = '\n'.join([head, rule, *rows])
    return f'<div class="parameters" markdown="1">\n\n{table}\n\n</div>'


def parameter_row(
    parameter,  # one of `parse_parameters`
    anchors,  # ids that lead to the row
    default=None,  # what the column says instead of the parameter's own default
):
    "A parameter as a row of four columns; its range ends its meaning."
    spans = ''.join(f'<span id="{anchor}"></span>' for anchor in anchors)
    shown = default or code_span(json.dumps(parameter.default, ensure_ascii=False))
    meaning = cell_text(html.escape(parameter.help, quote=False))
    if parameter.range:
        meaning += f' <span class="range">{parameter.range}</span>'
    name = f'{spans}{code_span(parameter.name)}'
    return f'| {name} | {code_span(parameter.type)} | {shown} | {meaning} |'


def parameter_table(rows):
    "Rows of `parameter_row` as a table."
    return parameters_box('| parameter | type | default | meaning, unit, range |', rows)


def experiment_parameters(
    source,  # the parameters cell
):
    "The parameters of an experiment as a table, each row with an anchor."
    rows = parse_parameters(source, 'parameters cell')
    return parameter_table([parameter_row(each, [f'parameter-{each.name}']) for each in rows])


# ---- one entry


def prose(text, page):
    "What a docstring or a comment says, as Markdown: signs outside of code are no emphasis and no HTML."
    pieces = re.split(r'(`[^`]*`)', text)
    pieces[::2] = [piece.replace('*', r'\*').replace('->', '→').replace('<', '&lt;') for piece in pieces[::2]]
    return linked(''.join(pieces), page)


def same_in_small(module, name):
    "Whether another name of the module differs from `name` by capitals only: Flips and flips."
    names = {getattr(node, 'name', '') for node in module_source(module).body} - {name}
    return name.lower() in {each.lower() for each in names}


def anchor(module, name):
    "The id of an entry, in small letters as nbdev links to it, unless that of another one is the same."
    return name if same_in_small(module, name) else name.lower()


def returns_note(node, rows, notes):
    "The comment on what a function returns: the last one of its head that belongs to no parameter."
    taken = {row.line for row in rows}
    last = node.body[0].lineno - 1 if node.body else node.lineno
    free = [line for line in range(last, node.lineno - 1, -1) if line in notes and line not in taken]
    return notes[free[0]] if free else ''


def entry_table(node, rows, notes, page):
    "The parameters and the result of a function as a table, or '' where nothing explains them."
    lines = []
    for row in rows:
        meaning = cell_text(prose(notes.get(row.line, ''), page))
        lines.append(f'| {code_span(row.name)} | {code_span(row.type)} | {code_span(row.default)} | {meaning} |')

    returns = getattr(node, 'returns', None)
    note = returns_note(node, rows, notes)
    if note:
        lines.append(f'| *returns* | {code_span(type_text(returns))} | | {cell_text(prose(note, page))} |')

    documented = note or any(notes.get(row.line) for row in rows)
    return parameters_box('| parameter | type | default | meaning |', lines) if lines and documented else ''


def parameter_text(row):
    "A parameter as a signature shows it."
    text = f'{row.name}: {row.type}' if row.type else row.name
    return f'{text} = {row.default}' if row.default else text


def signature(node, name, rows):
    "The signature as code, one parameter per line where it is long; of a class made as its base is, the base."
    if is_property(node):
        return f'{name}: {type_text(node.returns)}' if node.returns is not None else name
    if isinstance(node, ast.ClassDef) and node.bases and not rows:
        return f'class {name}({", ".join(map(ast.unparse, node.bases))})'
    shown = [parameter_text(row) for row in rows]
    returns = getattr(node, 'returns', None)
    result = f' -> {type_text(returns)}' if returns is not None else ''

    line = f'{name}({", ".join(shown)}){result}'
    if len(line) <= longest_signature:
        return line
    return f'{name}(\n' + ''.join(f'    {one},\n' for one in shown) + f'){result}'


def api_entry(
    module,  # its path below llmft: data/corpora
    name,  # `name` or `Class.method`
    page,  # the page it is for
    level=3,  # of the heading
):
    "One function or class as Markdown: heading, signature, docstring, parameters, methods."
    node = definition(module, name)
    if node is None:
        raise SystemExit(f'{page}: llmft/{module}.py does not define {name}')

    statements = module_source(module).body
    types = private_types(statements)
    rows = [replace(row, type=types.get(row.type, row.type)) for row in parameters(node, statements)]
    heading = name.replace('_', r'\_')
    address = f'{repository}/blob/{branch}/llmft/{module}.py#L{node.lineno}'
    parts = [
        f'{"#" * level} {heading} {{ #{anchor(module, name)} .api }}',
        f'<a class="source" data-search-exclude href="{address}">source</a>',
        f'```python {{ .signature }}\n{signature(node, name, rows)}\n```',
        prose(ast.get_docstring(node) or '', page),
        entry_table(node, rows, module_source(module).notes, page),
    ]
    parts += [api_entry(module, f'{name}.{method}', page, level + 1) for method in methods(node)]
    return '\n\n'.join(part for part in parts if part)
