"Strict YAML, typed parameters, and errors of one line that name file, line and the nearest valid name."

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError, project_root
from llmft.runs import params as params_module
from llmft.runs.params import (
    as_type,
    check_choice,
    check_name,
    check_params,
    choices_of,
    declared_choices,
    declared_names,
    parse_mapping,
    parse_overrides,
    parse_parameters,
    parse_yaml,
    read_parameters,
    read_yaml,
    resolve_params,
    split_comment,
    types,
)

here = Path(__file__).parent / 'notebooks'
cell = '''name: str = "demo"  # run
rate: float = 1e-3  # peak
rank: int = 8  # of the adapter
quick: bool = False  # small data
targets: list[str] = ["q_proj"]  # modules
lengths: list[int] = []  # tokens
shares: list[float] = [.5]  # parts
'''
declared = parse_parameters(cell, 'demo')


def values(text):
    return check_params('demo', parse_mapping(text, 'params/demo/x.yaml'), declared, defaults=False)


@pytest.mark.parametrize(
    'text, expected',
    [
        ('rate: 2e-4', 2e-4),
        ('rate: 2E-4', 2e-4),
        ('rate: -1.5e+3', -1500.0),
        ('rate: .5', 0.5),
        ('rate: 5.', 5.0),
        ('rate: 1', 1.0),
        ('rank: 16', 16),
        ('rank: -1', -1),
        ('rank: 0', 0),
        ('quick: true', True),
        ('quick: False', False),
        ('name: no', 'no'),
        ('name: 2026-08-01', '2026-08-01'),
        ('name: 1_000', '1_000'),
        ('name: "7"', '7'),
        ('name: 1:30', '1:30'),
        ('name: ""', ''),
        ('targets: [a, b]', ['a', 'b']),
        ('targets:\n- a\n- b', ['a', 'b']),
        ('lengths: [1, 2]', [1, 2]),
        ('shares: [1, 2e-4]', [1.0, 2e-4]),
        ('targets: []', []),
        ('shares: &a [1.0]\nlengths: [3]', [1.0]),
        ('<<: {rank: 4}\nrate: 1e-3', 4),
        ('<<: {rank: 4}\nrank: 5', 5),
    ],
)
def test_values_that_are_read(text, expected):
    got = values(text)
    value = got['rank'] if 'rank' in got else next(iter(got.values()))
    assert value == expected and value.__class__ is expected.__class__


@pytest.mark.parametrize(
    'text, line, words',
    [
        ('rank: 1_000', 1, "'1_000' is not a whole number: write 1000"),
        ('rate: 1_000', 1, 'write 1000'),
        ('rank: 08', 1, 'write 8'),
        ('rate: 08.5', 1, 'write 8.5'),
        ('\nrank: 0x10', 2, 'not a whole number'),
        ('quick: no', 1, "'no' is not true or false: write false"),
        ('quick: on', 1, 'write true'),
        ('quick: 1', 1, 'write true'),
        ('quick: "true"', 1, 'not true or false'),
        ('rank: 8.0', 1, 'write 8'),
        ('rank: 1e3', 1, 'write 1000'),
        ('rank: "8"', 1, 'without quotes'),
        ('rank: true', 1, 'True is not a whole number'),
        ('rank:', 1, 'nothing is not a whole number'),
        ('rate: fast', 1, "'fast' is not a number"),
        ('rate: .nan', 1, 'finite'),
        ('rate: .inf', 1, 'finite'),
        (f'rate: {10**400}', 1, 'finite'),
        ('rate: true', 1, 'True is not a number'),
        ('name: 7', 1, 'write "7" in quotes'),
        ('name: true', 1, 'in quotes'),
        ('targets: q_proj', 1, 'write [q_proj]'),
        ('targets: [1]', 1, 'in quotes'),
        ('lengths: [1, 2.5]', 1, 'not a whole number'),
        ('targets: {a: b}', 1, 'not a list'),
        ('rank: 4\nrank: 8', 2, 'rank is given twice, first in line 1'),
        ('rate: 1e-3\nrnak: 8', 2, "rnak is no parameter of demo (did you mean 'rank'?)"),
        ('7: x', 1, 'key must be text'),
        ('true: x', 1, 'key must be text'),
        ('[a]: x', 1, 'key must be text'),
        ('rank: 4\n\n\trate: 1', 3, 'not valid YAML'),
        ('targets: [a', 1, 'not valid YAML'),
        ('rank: *x', 1, 'not valid YAML'),
        ('name: !!python/name:os.system x', 1, 'not valid YAML'),
        ('rank: 1\n---\nrank: 2', 2, 'not valid YAML'),
        ('<<: 3', 1, 'not valid YAML'),
        ('targets: &a [*a]', 1, 'not valid YAML'),
    ],
)
def test_values_that_are_refused(text, line, words):
    with pytest.raises(LabError) as caught:
        values(text)
    message = str(caught.value)
    assert words in message and message.startswith('params/demo/x.yaml:') and '\n' not in message
    assert abs(int(message.split(':')[1]) - line) <= (1 if 'valid YAML' in words else 0)


@pytest.mark.parametrize(
    'text, words',
    [
        ('- a\n- b', 'not `name: value` lines'),
        ('just text', 'not `name: value` lines'),
        ('\x00', 'not valid YAML'),
        ('rank: "\\q"', 'not valid YAML'),
    ],
)
def test_files_that_are_refused(tmp_path, text, words):
    (tmp_path / 'x.yaml').write_text(text)
    with pytest.raises(LabError, match='x.yaml') as caught:
        read_yaml(tmp_path / 'x.yaml')
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_empty_and_binary_files(tmp_path):
    (tmp_path / 'empty.yaml').write_text('# nothing\n')
    (tmp_path / 'binary.yaml').write_bytes(b'\xff\xfe\x00')
    assert read_yaml(tmp_path / 'empty.yaml') == {}
    with pytest.raises(LabError, match='UTF-8'):
        read_yaml(tmp_path / 'binary.yaml')
    with pytest.raises(LabError, match="did you mean 'empty.yaml'"):
        read_yaml(tmp_path / 'emty.yaml')


def test_nested_mappings_know_their_lines():
    read = parse_yaml('stages:\n- name: a\n  params:\n    rank: 8\n    rate: x\n', 's.yaml')
    assert read['stages'][0]['params'].lines == dict(rank=4, rate=5) and read['stages'][0].file == 's.yaml'


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**12), 10**12))
@settings(max_examples=200, deadline=None)
def test_every_number_that_python_prints_is_read_back(x, n):
    assert values(f'rate: {x!r}\nrank: {n}') == dict(rate=x, rank=n)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_no_text_gives_anything_but_values_or_one_line(text):
    try:
        values(text)
    except LabError as error:
        assert '\n' not in str(error)


@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**53), 2**53),
        st.floats(),
        st.text(),
        st.lists(st.integers(-(2**53), 2**53)),
    ),
    st.sampled_from(types),
)
@settings(max_examples=300, deadline=None)
def test_a_value_has_its_declared_type_or_is_refused(value, kind):
    try:
        got = as_type(value, kind)
    except ValueError:
        return
    assert got.__class__.__name__ == kind.split('[')[0] and (got == value or got == list(value))


def test_parameters_cell():
    parameters = read_parameters(here / 'ok.ipynb')
    assert [(p.name, p.type, p.line) for p in parameters][2] == ('learning_rate', 'float', 3)
    assert parameters[2].help == 'peak, per optimiser step' and parameters[2].default == 1e-3


@pytest.mark.parametrize(
    'notebook, words',
    [
        ('no_tag', 'no cell tagged'),
        ('two_tags', '2 cells tagged'),
        ('derived', 'line 7: the value of warmup is not a literal'),
    ],
)
def test_notebooks_that_are_refused(notebook, words):
    with pytest.raises(LabError, match=words):
        read_parameters(here / f'{notebook}.ipynb')


@pytest.mark.parametrize(
    'source, words',
    [
        ('a = 1', 'must read'),
        ('a: int', 'must read'),
        ('import os', 'must read'),
        ('a: int = 1.5', 'not a whole number'),
        ('a: dict = {}', 'has type dict'),
        ('a: int = 1\na: int = 2', 'is given twice'),
        ('a: int = 10**6', 'not a literal'),
        ('a: str = f"{1}"', 'not a literal'),
        ('a: int = (', 'line 1'),
        ('a: str = None', 'nothing is not text'),
    ],
)
def test_cells_that_are_refused(source, words):
    with pytest.raises(LabError, match=words.replace('(', r'\(')):
        parse_parameters(source, 'demo')


def test_overrides():
    assert parse_overrides(['name=7', 'rate=1', 'targets=[a,b]', 'quick=true'], declared) == dict(
        name='7', rate=1, targets=['a', 'b'], quick=True
    )
    for text, words in [
        ('rate', 'write -p name=value'),
        ('=3', 'write -p name=value'),
        ('rnak=3', "did you mean 'rank'"),
        ('rate=fast', "^-p rate: 'fast' is not a number"),
    ]:
        with pytest.raises(LabError, match=words):
            check_params('demo', parse_overrides([text], declared), declared)


def test_declared_choices_are_refused_with_their_place(monkeypatch):
    monkeypatch.setitem(declared_choices, 'name', ('runs.colours', 'red_and_green'))
    monkeypatch.setitem(declared_choices, 'targets', ('runs.layers', 'queries_and_values'))
    names = {'red_and_green': ('red', 'green'), 'queries_and_values': ('q_proj', 'v_proj')}
    monkeypatch.setattr(params_module, 'declared_names', lambda module, name: names[name])
    assert values('name: red\ntargets: [v_proj, q_proj]') == dict(name='red', targets=['v_proj', 'q_proj'])
    for text, words in {
        'rank: 1\nname: gren': "params/demo/x.yaml:2: name is 'gren' (did you mean 'green'?): choose from red, green",
        'targets: [q_proj, q_porj]': "params/demo/x.yaml:1: targets is 'q_porj' (did you mean 'q_proj'?)",
    }.items():
        with pytest.raises(LabError) as caught:
            values(text)
        assert str(caught.value).startswith(words)
    with pytest.raises(LabError, match='^-p name is'):
        check_params('demo', parse_overrides(['name=blue'], declared), declared)
    check_choice('rank', 8)


def test_declarations_are_read_without_importing_their_module(tmp_path, monkeypatch):
    source = """
import a_package_that_is_not_there
by_call = dict(cosine=min, linear=max)
by_literal = {'adamw': 1, 'muon': 2}
in_a_row = ('packed', 'bucketed')
"""
    (tmp_path / 'llmft/training').mkdir(parents=True)
    (tmp_path / 'llmft/training/demo.py').write_text(source)
    monkeypatch.setattr(params_module, 'assets', tmp_path / 'llmft/assets')
    assert declared_names('training.demo', 'by_call') == ('cosine', 'linear')
    assert declared_names('training.demo', 'by_literal') == ('adamw', 'muon')
    assert declared_names('training.demo', 'in_a_row') == ('packed', 'bucketed')
    with pytest.raises(LabError, match='declares no other'):
        declared_names('training.demo', 'other')


def test_every_declared_choice_lists_names_and_loads_nothing_heavy():
    code = """
import sys
from llmft.runs.params import declared_choices, declared_names
assert all(declared_names(*declaration) for declaration in declared_choices.values())
print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr


experiments = sorted(path.stem for path in (project_root() / 'nbs/experiments').glob('*.ipynb'))
# what a notebook leaves out of a declaration, and its own check refuses
narrower = {
    ('finetune', 'quantisation'): ('nf4', 'int8'),
    ('profile', 'quantisation'): ('nf4', 'int8'),
    ('instruct', 'too_long'): ('truncate', 'drop', 'error'),
    ('sublora_train', 'strategy'): ('none', 'ddp'),
}


def choice_parameters(notebook):
    return [each for each in read_parameters(notebook) if 'str' in each.type and choices_of(each.name, notebook)]


@pytest.mark.parametrize('notebook', experiments)
def test_comments_of_parameters_agree_with_the_declarations(notebook):
    for parameter in read_parameters(notebook):
        names = parameter.choices
        declared = choices_of(parameter.name, notebook) if parameter.type == 'str' else ()
        if not declared:
            continue
        assert names == narrower.get((notebook, parameter.name), declared), (notebook, parameter.name)
        assert set(names) <= set(declared) and parameter.default in names


fragment = re.compile(r'(?:of|or|on|in|with|for|its|peak|constant)\b(?! learning rate)|[\w-]+ \|')


@pytest.mark.parametrize('notebook', experiments)
def test_meanings_of_parameters_begin_with_the_thing(notebook):
    "A reader of `llmft params` sees the meaning without the lines around it: no 'of the draws', no bare list."
    for parameter in read_parameters(notebook):
        assert not fragment.match(parameter.help), (notebook, parameter.name, parameter.help)
        assert len(parameter.help) <= 95, (notebook, parameter.name, parameter.help)
        assert '|' not in parameter.help or parameter.choices, (notebook, parameter.name, parameter.help)


def test_names_of_a_choice_are_listed_at_the_beginning_or_after_a_colon():
    for comment in ('a | b-c', 'a | b-c: of the data', 'what is read: a | b-c', 'what is read: a | b-c; a reads all'):
        assert split_comment(comment, 'str') == (comment, '', ('a', 'b-c'))
    assert split_comment('either a | b', 'str')[2] == ()


@pytest.mark.parametrize('notebook', experiments)
def test_a_typo_in_a_choice_is_refused_before_a_kernel_starts(notebook):
    for parameter in choice_parameters(notebook):
        known = choices_of(parameter.name, notebook)[-1]
        typo = [known + 'x'] if parameter.type.startswith('list') else known + 'x'
        with pytest.raises(LabError, match=f"{parameter.name} is '{known}x' .did you mean '") as caught:
            check_params(notebook, {parameter.name: typo})
        assert '\n' not in str(caught.value)


def test_a_typo_in_a_choice_ends_the_command_with_status_2_and_without_pytorch():
    code = """
import sys
from llmft.cli import call
status = call(['run', 'params/finetune/lora.yaml', '--small', '-p', 'name=never', '-p', 'schedule=cosin'])
print(status, {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=project_root())
    assert done.stdout == '2 set()\n', done.stdout
    assert done.stderr.strip().count('\n') == 0 and "schedule is 'cosin' (did you mean 'cosine'?)" in done.stderr
    assert not (project_root() / 'outputs/finetune/never').exists()


def test_precision_is_a_choice_only_where_it_is_a_text():
    check_params('forecast_data', dict(precision=3))
    check_params('inference', dict(precision='int4_fast'))
    with pytest.raises(LabError, match="precision is 'int4_fast'"):
        check_params('finetune', dict(precision='int4_fast'))


def test_layers(tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'nbs' / 'experiments').mkdir(parents=True)
    (tmp_path / 'nbs' / 'experiments' / 'ok.ipynb').write_text((here / 'ok.ipynb').read_text())
    folder = tmp_path / 'params' / 'ok'
    folder.mkdir(parents=True)
    (folder / 'lora.yaml').write_text('learning_rate: 2e-4\nsteps: 100\n')
    (folder / 'more.yaml').write_text('quick: false\n')
    (folder / '_small.yaml').write_text('steps: 5\n')
    monkeypatch.chdir(tmp_path)
    notebook, params = resolve_params(['params/ok/lora.yaml'], ['learning_rate=1e-5'], 'small')
    assert notebook.name == 'ok.ipynb' and list(params) == [p.name for p in read_parameters(notebook)]
    assert (params['name'], params['steps'], params['learning_rate'], params['quick']) == ('lora', 5, 1e-5, True)
    assert resolve_params(['params/ok/lora.yaml', 'params/ok/more.yaml'])[1]['name'] == 'lora-more'
    assert resolve_params(['params/ok/lora.yaml', 'params/ok/_small.yaml'])[1]['steps'] == 5
    with pytest.raises(LabError, match='^ok has no values for --laptop .no params/ok/_laptop.yaml.: use --small$'):
        resolve_params(['params/ok/lora.yaml'], scale='laptop')
    (folder / '_laptop.yaml').write_text('steps: 50\n')
    assert resolve_params(['params/ok/lora.yaml'], scale='laptop')[1]['steps'] == 50
    assert resolve_params(['nbs/experiments/ok.ipynb'], scale='laptop')[1]['steps'] == 50
    with pytest.raises(LabError, match="scale is 'lapotp' .did you mean 'laptop'"):
        resolve_params(['params/ok/lora.yaml'], scale='lapotp')
    with pytest.raises(LabError, match="params/ok/lra.yaml is no file .did you mean 'lora.yaml'"):
        resolve_params(['params/ok/lra.yaml'])
    (folder / 'bad.yaml').write_text('# header\nlearning_rat: 1\n')
    with pytest.raises(
        LabError, match="^params/ok/bad.yaml:2: learning_rat is no parameter of ok .did you mean 'learning_rate'"
    ):
        resolve_params(['params/ok/bad.yaml'])
    with pytest.raises(LabError, match='cannot name a run'):
        resolve_params(['params/ok/lora.yaml'], ['name=../x'])


@pytest.mark.parametrize('name', ['', '_x', '.x', 'a/b', 'a b', '..', 'x' * 101, 'a\n'])
def test_names_that_are_refused(name):
    with pytest.raises(LabError):
        check_name(name)
