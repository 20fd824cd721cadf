"""The house rules for notebooks, a test per rule that looks at all of them and names every breach; CONTRIBUTING.md explains them."""

import ast
import importlib
import re
import statistics
import subprocess
import sys

import pytest
from house import (
    body,
    cells,
    chained_conditionals,
    code,
    comments,
    count_tokens,
    directives,
    experiments,
    exported_module,
    exporting,
    functions,
    joined_assignments,
    library,
    lines_of,
    notebooks,
    only_imports,
    place,
    plain,
    prose_words,
    public_definitions,
    public_names,
    root,
    sentences,
    settings,
    source,
)


def assert_kept(wrong, looked, least):
    "Fail with every breach, and when fewer things were looked at than there must be."
    assert looked >= least, f'only {looked} were looked at, {least} at least were expected'
    assert not wrong, f'{len(wrong)} breaches:\n' + '\n'.join(wrong)


def exported():
    "(notebook, code of the cell, its syntax tree) of every export cell of the library."
    for path in library:
        for cell in code(path, 'export'):
            yield path, body(cell), ast.parse(body(cell))


def exported_functions():
    "(notebook, code of the cell, function) of every function of the library, methods and inner functions included."
    for path, text, tree in exported():
        for function in functions(tree):
            yield path, text, function


# ---- code that people can read


def test_lines_have_at_most_120_columns():
    wrong, looked = [], 0
    for path in notebooks:
        for cell in code(path):
            for line in source(cell).splitlines():
                looked += 1
                literal = cell in tagged_cells(path) and len(line.partition('  # ')[0]) > 100
                if len(line) > 120 and not literal:  # a text parameter is one literal, however long
                    wrong.append(f'{place(path)}: {len(line)} columns: {line.strip()[:60]}')
    assert_kept(wrong, looked, 8000)


def test_functions_are_small():
    wrong, sizes = [], []
    for path, text, function in exported_functions():
        size = count_tokens('\n'.join(lines_of(text, function)))
        statements = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
        sizes.append(size)
        if size > 400:
            wrong.append(f'{place(path)}: {function.name} has {size} tokens, 400 at most')
        if statements > 40:
            wrong.append(f'{place(path)}: {function.name} has {statements} statements, 40 at most')
    median, nine_in_ten = statistics.median(sizes), sorted(sizes)[len(sizes) * 9 // 10]
    if median > 60:
        wrong.append(f'the median function has {median} tokens: about 55 are wanted, 60 at most')
    if nine_in_ten > 180:
        wrong.append(f'nine in ten functions are below {nine_in_ten} tokens: 180 at most')
    assert_kept(wrong, len(sizes), 700)


def test_long_functions_have_paragraphs():
    wrong, looked = [], 0
    for path, text, function in exported_functions():
        inner = lines_of(text, function)[function.body[0].lineno - function.lineno :]
        if function.end_lineno - function.lineno >= 15:
            looked += 1
            if all(line.strip() for line in inner):
                wrong.append(f'{place(path)}: {function.name}: put a blank line between its steps')
    assert_kept(wrong, looked, 50)


def test_one_thing_per_statement():
    wrong, looked = [], 0
    for path, _, tree in exported():
        looked += 1
        wrong += [f'{place(path)}: several things in one assignment: {text[:80]}' for text in joined_assignments(tree)]
        wrong += [f'{place(path)}: a chained conditional: {text[:80]}' for text in chained_conditionals(tree)]
    assert_kept(wrong, looked, 500)


def test_numbers_with_nouns_have_one_home():
    own = re.compile(r"""\{\s*['"]s['"]\s*(\*|if)|['"]s['"] if """)
    wrong, looked = [], 0
    for path in [*library, *experiments]:
        for cell in code(path):
            looked += 1
            wrong += [f'{place(path)}: write {found[0]!r} by number_of' for found in own.finditer(source(cell))]
    assert_kept(wrong, looked, 1500)


def test_one_public_definition_per_export_cell():
    wrong, looked = [], 0
    for path, _, tree in exported():
        looked += 1
        names = [node.name for node in public_definitions(tree)]
        if len(names) > 1:
            wrong.append(f'{place(path)}: {", ".join(names)} stand in one cell')
    assert_kept(wrong, looked, 500)


def test_ruff_is_content():
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', 'llmft', 'tests', 'tools'], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# ---- library notebooks


def test_library_notebooks_have_a_module_and_a_promise():
    wrong = []
    for path in library:
        if directives(code(path)[0]) != {'default_exp'}:
            wrong.append(f'{place(path)}: the first code cell is `#| default_exp package.name` alone')
        titles = [source(cell) for cell in cells(path) if cell['cell_type'] == 'markdown']
        if not any(re.match(r'# \S.*\n+> \S', text) for text in titles):
            wrong.append(f'{place(path)}: a title `# name` with `> one-line promise` is missing')
        last = cells(path)[-1]
        if last['cell_type'] != 'code' or 'hide' not in directives(last) or 'nbdev.nbdev_export()' not in source(last):
            wrong.append(f'{place(path)}: end with the hidden cell `import nbdev; nbdev.nbdev_export()`')
    assert_kept(wrong, len(library), 50)


def exported_lines(path):
    return [line for cell in code(path, 'export') for line in body(cell).splitlines() if line.strip()]


def test_lessons_outweigh_exports():
    wrong = []
    for path in library:
        exports, lessons = len(code(path, 'export')), len(code(path, 'lesson'))
        lines, words = len(exported_lines(path)), prose_words(path)
        if lessons <= exports:
            wrong.append(
                f'{place(path)}: {lessons} lesson cells for {exports} export cells: show what each export does'
            )
        if words < 1.5 * lines:
            wrong.append(f'{place(path)}: {words} words for {lines} exported lines: 1.5 per line at least')
    assert_kept(wrong, len(library), 50)


def test_no_notebook_keeps_widgets():
    "A progress bar of a run that is over tells nothing, and its state is hundreds of lines of the file."
    wrong = [
        f'{place(path)}: remove the outputs of kind widget-view and the widgets in the metadata'
        for path in notebooks
        if re.search(r'^ *"(widgets|application/vnd\.jupyter\.widget-view\+json)": ', path.read_text(), re.MULTILINE)
    ]
    assert_kept(wrong, len(notebooks), 100)


def test_every_public_name_appears_in_a_lesson():
    wrong, looked = [], 0
    for path in library:
        lessons = '\n'.join(body(cell) for cell in code(path, 'lesson'))
        for cell in code(path, 'export'):
            if 'exporti' in directives(cell):
                continue
            for name in public_names(ast.parse(body(cell))):
                looked += 1
                if not re.search(rf'\b{name}\b', lessons):
                    wrong.append(f'{place(path)}: no lesson shows {name}')
    assert_kept(wrong, looked, 600)


def test_imports_have_cells_of_their_own():
    wrong, looked = [], 0
    for path in library:
        for cell in code(path):
            tree = ast.parse(plain(body(cell)))
            nodes = tree.body if directives(cell) & exporting else ast.walk(tree)
            imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
            if imports and 'nbdev_export()' not in source(cell):
                looked += 1
                if not only_imports(cell):
                    wrong.append(
                        f'{place(path)}: imports and other code in one cell, which the docs would run:\n{source(cell)}'
                    )
    assert_kept(wrong, looked, 100)


def undocumented(function, notes):
    "What is missing in the docments of `function`, whose source has the comments `notes`."
    if not ast.get_docstring(function):
        yield f'{function.name} has no docstring'
    spec = function.args
    arguments = [one for one in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg] if one]
    named = [one for one in arguments if one.arg not in ('self', 'cls', '_')]
    if len(named) < 2:
        return
    bare = [one.arg for one in named if not notes.get(one.end_lineno)]
    if bare:
        yield f'{function.name}: no comment (meaning, shape, unit) after {", ".join(bare)}'
    if len({one.lineno for one in named}) < len(named):
        yield f'{function.name}: one parameter per line'


def test_public_definitions_are_documented():
    wrong, looked = [], 0
    for path, text, tree in exported():
        for node in public_definitions(tree):
            looked += 1
            if not isinstance(node, ast.ClassDef):
                wrong += [f'{place(path)}: {message}' for message in undocumented(node, comments(text))]
            elif not ast.get_docstring(node):
                wrong.append(f'{place(path)}: {node.name} has no docstring')
    assert_kept(wrong, looked, 500)


# ---- experiment notebooks

types = {'int', 'float', 'str', 'bool', 'list[int]', 'list[float]', 'list[str]'}


def tagged_cells(path):
    return [cell for cell in cells(path) if 'parameters' in cell['metadata'].get('tags', [])]


def wrong_parameters(path):
    "What is wrong in the parameters cell of the experiment at `path`."
    if len(tagged_cells(path)) != 1:
        yield f'{len(tagged_cells(path))} cells are tagged `parameters`: exactly one must be'
        return

    text = body(tagged_cells(path)[0])
    notes, names = comments(text), {}
    for node in ast.parse(text).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            yield f'line {node.lineno}: write `name: type = value  # meaning, unit`'
            continue
        name, annotation = node.target.id, ast.unparse(node.annotation)
        try:
            names[name] = ast.literal_eval(node.value)
        except ValueError:
            yield f'{name}: {ast.unparse(node.value)} is no literal; derive values in the next cell'
            continue
        if annotation not in types or type(names[name]).__name__ != annotation.split('[')[0]:
            yield f'{name}: the default {names[name]!r} is no {annotation}, or that is not one of {sorted(types)}'
        if not notes.get(node.lineno):
            yield f'{name}: the comment (meaning, unit) is missing'

    if len(names) < 3 or names.get('outputs') != 'outputs' or 'name' not in names:
        yield 'every experiment has `name` and `outputs: str = "outputs"`'


# words for which there is a plainer one: continue, cover, is given, next to, compared with, cannot
unplain = re.compile(
    r'\b(whoever|somebody|go(?:es)? on|going on|lays? over|can not|'
    r'stands? (?:twice|alone|beside|before|after|in|at|where))\b'
)


def prose():
    "(place, Markdown) of every text that people read: cells of the notebooks, pages, the log and what changed."
    for path in notebooks:
        for cell in cells(path):
            if cell['cell_type'] == 'markdown':
                yield place(path), source(cell)
    for path in [*root.glob('nbs/**/*.qmd'), root / 'LOG.md', root / 'CHANGELOG.md']:
        yield str(path.relative_to(root)), path.read_text(encoding='utf-8')


def files(*patterns):
    "(place, text) of the files below the root that fit a pattern."
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        yield str(path.relative_to(root)), path.read_text(encoding='utf-8')


def test_words_are_plain():
    texts = [*prose(), *files('nbs/**/*.qmd.py', 'llmft/**/*.py', 'params/**/*.yaml')]
    wrong = [f'{where}: {word}' for where, text in texts for word in unplain.findall(text)]
    assert_kept(wrong, len(texts), 1600)
    assert unplain.findall('whoever can not stand, stands in front') == ['whoever', 'can not', 'stands in']


def test_sentences_have_at_most_30_words():
    "Code, and a formula, is one word; the target of a link is none."
    pieces = [(where, sentence.split()) for where, text in prose() for sentence in sentences(text)]
    wrong = [f'{where}: {len(words)} words: {" ".join(words)[:70]}' for where, words in pieces if len(words) > 30]
    assert_kept(wrong, len(pieces), 7500)
    text = 'One `two of code` [three](a b).** Four\nfive: $s i x$\n\n| a | b |\n\n- seven'
    assert list(sentences(text)) == ['One x [three]x.', 'Four\nfive:', 'x', 'seven']


# 95%: in prose, strings and comments, but for templates of Jinja
blank_before_percent = re.compile(r'(?:\d|^) %(?!\}| \d)|\d per ?cent\b')


def words_of(text):
    "The strings of a module, its docstrings and the parts of f-strings included, and its comments."
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return [*(one for one in strings if isinstance(one, str)), *comments(text).values()]


def test_percent_signs_follow_their_number():
    modules = files('nbs/**/*.qmd.py', 'llmft/**/*.py')
    texts = [*prose(), *files('params/**/*.yaml'), *((where, one) for where, text in modules for one in words_of(text))]
    found = [(where, text[: one.end()]) for where, text in texts for one in blank_before_percent.finditer(text)]
    wrong = [f'{where}: ...{text[-30:]}' for where, text in found]
    assert_kept(wrong, len(texts), 10000)
    assert all(map(blank_before_percent.search, ['95 % of it', '5 per cent']))
    assert [one for one in words_of("f'{x:.1f} %'  # 1%") if blank_before_percent.search(one)] == [' %']


def test_titles_say_what_is_compared():
    "A title that ends in 'beside the study' or 'side by side' leaves open what is asked of the two."
    written = [(path, cell) for path in notebooks for cell in cells(path) if cell['cell_type'] == 'markdown']
    titles = [(place(path), line) for path, cell in written for line in re.findall('^[#>].*', source(cell), re.MULTILINE)]
    wrong = [f'{where}: {line}' for where, line in titles if re.search(r'(?i)\b(beside|side by side)\b', line)]
    assert_kept(wrong, len(titles), 1000)


def test_parameters_are_literals_with_comments():
    wrong = [f'{place(path)}: {message}' for path in experiments for message in wrong_parameters(path)]
    assert_kept(wrong, len(experiments), 20)


def defined_names(tree):
    "The names that `tree` imports or defines, those of a star import included."
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield from star_names(node.module) if alias.name == '*' else [alias.asname or alias.name]


def star_names(module):
    "What `from module import *` binds."
    found = importlib.import_module(module)
    return getattr(found, '__all__', [name for name in vars(found) if not name.startswith('_')])


def hidden_parameters(parameters, others):
    "Parameters of an experiment whose names its other cells import or define."
    names = {node.target.id for node in ast.parse(parameters).body if isinstance(node, ast.AnnAssign)}
    bound = {name for text in others for name in defined_names(ast.parse(text))}
    return sorted(names & bound)


def test_nothing_takes_the_name_of_a_parameter():
    "A parameter that an import hides has the value of the import, whatever the user asked for."
    wrong, looked = [], 0
    for path in experiments:
        others = [
            re.sub(r'^\s*[!%].*$', 'pass', body(cell), flags=re.M)
            for cell in code(path)
            if cell not in tagged_cells(path)
        ]
        hidden = hidden_parameters(body(tagged_cells(path)[0]), others)
        wrong += [f'{place(path)}: another cell imports or defines the parameter {name}' for name in hidden]
        looked += len(others)
    assert_kept(wrong, looked, 200)


def test_hidden_parameters_are_seen():
    parameters = 'rank: int = 4  # rank\nmodel: str = "base"  # model'
    seen = ['from a import rank', 'import x as rank', 'def rank(): pass']
    assert [hidden_parameters(parameters, [text]) for text in seen] == [['rank']] * len(seen)
    assert hidden_parameters('LabError: str = ""  # text', ['from llmft.core import *']) == ['LabError']
    assert not hidden_parameters(parameters, ['from a import b as ranked\nx = rank', 'f(rank=rank)'])


def assigned_names(tree):
    "Names to which the statements of `tree` give a value; those within functions and comprehensions are their own."
    waiting, own = list(tree.body), (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if not isinstance(node, (*own, ast.GeneratorExp)):
            waiting += ast.iter_child_nodes(node)


def module_names(tree):
    "The names that a module of the code `tree` has by imports and definitions, without methods added by `patch`."
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from defined_names(node)
        elif not any('patch' in ast.unparse(decorator) for decorator in node.decorator_list):
            yield node.name


def taken_names(exports, lesson):
    "Names that the code of `exports` imports or defines and to which a lesson gives another value."
    bound = {name for text in exports for name in module_names(ast.parse(text))}
    return sorted(bound & set(assigned_names(ast.parse(lesson))))


def test_lessons_take_no_name_of_their_module():
    "A notebook runs its export cells itself: what a lesson calls by a name of theirs, they then call too."
    wrong, looked = [], 0
    for path in library:
        exports = [plain(body(cell)) for cell in code(path) if directives(cell) & exporting]
        for cell in code(path, 'lesson'):
            taken = taken_names(exports, plain(body(cell)))
            wrong += [f'{place(path)}: a lesson gives another value to {name}' for name in taken]
            looked += 1
    assert_kept(wrong, looked, 1000)


def test_taken_names_are_seen():
    exports = ['from a import b', 'def f(c):\n    d = c', '@patch\ndef e(self: A): pass']
    assert [taken_names(exports, text) for text in ('b = [1]', 'for b in c: pass', 'x, f = y')] == [['b'], ['b'], ['f']]
    assert not taken_names(exports, '[b for b in c]\nf(b=2)\ndef g(): b = 1\nc = d = e = 1')


def test_experiments_leave_the_work_to_the_library():
    wrong, looked = [], 0
    for path in experiments:
        for cell in code(path):
            looked += 1
            lines = [line for line in body(cell).splitlines() if line.strip()]
            if cell['outputs']:
                wrong.append(f'{place(path)}: outputs are left in:\n{source(cell)[:200]}')
            if len(lines) > 10 and cell not in tagged_cells(path):
                wrong.append(f'{place(path)}: {len(lines)} lines in a cell, ten at most: {lines[0][:70]}')
    assert_kept(wrong, looked, 200)


def test_experiments_open_in_colab():
    wrong, address = [], 'https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/experiments/'
    for path in experiments:
        link = address.format(**settings()) + path.name
        if not any(f'[Open in Colab]({link})' in source(cell) for cell in cells(path)[:3]):
            wrong.append(f'{place(path)}: a link [Open in Colab]({link}) is missing; a picture would be broken offline')
        if sum('google.colab' in source(cell) for cell in code(path)) != 1:
            wrong.append(f'{place(path)}: one install cell that asks whether `google.colab` is there is missing')
        lines = [line for cell in code(path) for line in source(cell).splitlines()]
        unguarded = [line for line in lines if re.match(r'[!%]\s*pip|get_ipython', line)]
        if unguarded:
            wrong.append(f'{place(path)}: outside Colab this must do nothing: {unguarded}')
    assert_kept(wrong, len(experiments), 20)


# ---- the rules see what they must


@pytest.mark.parametrize(
    'rule, text, seen',
    [
        (joined_assignments, 'a, b = 1, x', True),
        (joined_assignments, 'a, b = b, a', False),
        (joined_assignments, 'a, b = pair', False),
        (chained_conditionals, 'x = 1 if a else 2 if b else 3', True),
        (chained_conditionals, 'x = 1 if a else 2', False),
    ],
)
def test_rules_see_breaches(rule, text, seen):
    assert bool(list(rule(ast.parse(text)))) is seen


def test_tokens_are_counted_without_line_breaks():
    assert count_tokens('def f(a): return a + 1') == count_tokens('def f(a):  # why\n    return (\n        a + 1)') - 2
    assert exported_module(root / 'nbs/core.ipynb') == 'core'


def test_stored_outputs_hold_no_warning_of_a_library():
    streams = [
        (path, line)
        for path in notebooks
        for cell in cells(path)
        for output in cell.get('outputs', [])
        if output.get('name') == 'stderr'
        for line in ''.join(output['text']).splitlines()
    ]
    wrong = [f'{place(path)}: {line}' for path, line in streams if not line.startswith(('llmft: ', '(llmft '))]
    assert_kept(wrong, len(streams), 2)
