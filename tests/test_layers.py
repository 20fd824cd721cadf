"""The packages stand in layers: every import goes down or sideways, no study knows another, and there is no circle."""

import ast
from collections import defaultdict

import pytest
from house import exported_module, layer_of, library, root

package = root / 'llmft'


def imported_modules(path, text):
    "(line number, dotted name below llmft) of every module of this package that the module at `path` imports."
    here = path.relative_to(package).with_suffix('').parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith('llmft.'):
                    yield node.lineno, alias.name.removeprefix('llmft.')
        if isinstance(node, ast.ImportFrom):
            base = (node.module or '').split('.') if node.module else []
            if node.level:
                start = list(here[: len(here) - node.level])
            elif base[:1] == ['llmft']:
                start, base = [], base[1:]
            else:
                continue
            for alias in node.names:
                whole = [*start, *base, alias.name]
                yield node.lineno, '.'.join(whole if is_module(whole) else whole[:-1])


def is_module(parts):
    return (package.joinpath(*parts).with_suffix('.py')).is_file()


def edges(files):
    "(importing module, imported module, place) of every import among `files`, a dict of path -> text."
    for path, text in files.items():
        module = '.'.join(path.relative_to(package).with_suffix('').parts)
        for line, other in imported_modules(path, text):
            if other:
                yield module, other, f'{path.relative_to(root)}:{line}'


def breaches(files):
    "What is wrong with the imports of `files`, one line each."
    follows = defaultdict(dict)
    for module, other, place in edges(files):
        own, theirs = module.split('.')[0], other.split('.')[0]
        if theirs not in layer_of:
            yield f'{place}: imports {other}, and {theirs} stands in no layer'
        elif layer_of[theirs] > layer_of[own]:
            yield f'{place}: {module} imports {other}, which stands in a layer above it'
        if own == theirs == 'studies' and module.split('.')[1] != other.split('.')[1]:
            yield f'{place}: the study {module} imports the study {other}'
        follows[module][other] = place
        if own != theirs:
            follows[f'{own} (package)'][f'{theirs} (package)'] = place
    yield from circles(follows)


def circles(follows):
    "One line for every import that closes a circle, found by walking the graph depth first."
    state = {}

    def visit(module, trail):
        state[module] = 'open'
        for other, place in follows.get(module, {}).items():
            if state.get(other) == 'open':
                start = trail.index(other) if other in trail else 0
                yield f'{place}: closes the circle {" -> ".join([*trail[start:], other])}'
            elif other not in state:
                yield from visit(other, [*trail, other])
        state[module] = 'done'

    for module in list(follows):
        if module not in state:
            yield from visit(module, [module])


def library_files():
    names = [name for name in package.rglob('*.py') if not name.name.startswith('_') or name.name == '__main__.py']
    return {path: path.read_text(encoding='utf-8') for path in sorted(names)}


def test_imports_go_one_way():
    files = library_files()
    assert len(files) >= 50 and len(list(edges(files))) >= 150, 'the imports were not found'
    wrong = list(breaches(files))
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize(
    'path, line, word',
    [
        ('data/corpora.py', 'from ..training.fit import fit', 'a layer above'),
        ('training/losses.py', 'from ..studies.forecasting.codec import encode', 'a layer above'),
        ('studies/pdfs/report.py', 'from ..code.tasks import Task', 'imports the study'),
        ('core.py', 'def late():\n    from llmft.cli import app', 'a layer above'),
        ('models/load.py', 'from . import adapters', 'circle'),
        ('bounds/bounds.py', 'from .certificates import x', 'circle'),
    ],
)
def test_a_wrong_import_is_named(path, line, word):
    files = library_files()
    files[package / path] += f'\n{line}\n'
    found = [message for message in breaches(files) if word in message]
    assert found, f'{line} in {path} was not seen'
    if word != 'circle':
        last = files[package / path].count('\n')
        assert f'llmft/{path}:{last}:' in found[0]


def test_every_notebook_lies_in_the_folder_of_its_package():
    wrong = []
    for path in library:
        parts = exported_module(path).split('.')
        folder, name = '/'.join(parts[:-1]), parts[-1]
        expected = f'NN_{name}' if folder else name
        number, _, rest = path.stem.partition('_')
        if path.parent.relative_to(root / 'nbs').as_posix() != (folder or '.'):
            wrong.append(f'{path.name} exports {".".join(parts)} and lies in {path.parent.name}')
        if folder and not (rest == name and number.isdigit() and len(number) == 2):
            wrong.append(
                f'{path.relative_to(root)}: call it {expected}.ipynb, numbered in reading order without letters'
            )
        if not folder and path.stem != name.strip('_'):  # notebooks whose name begins with _ are not exported
            wrong.append(f'{path.relative_to(root)}: call it {expected}.ipynb')
    numbers = [(path.parent, path.stem.split('_')[0]) for path in library if path.parent != root / 'nbs']
    wrong += [
        f'two notebooks of {folder.name} are numbered {number}'
        for folder, number in set(numbers)
        if numbers.count((folder, number)) > 1
    ]
    assert not wrong, '\n'.join(wrong)
    packages = {exported_module(path).split('.')[0] for path in library}
    assert packages | {'__main__'} == set(layer_of), 'a package of the layers has no notebook'
