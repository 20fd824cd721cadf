"What can be known before a kernel starts is refused there, in one line, and nothing a user writes ends in a traceback."

import ast
import math
import os
import random
import re
import subprocess
import sys
import time

import pytest
import yaml

from llmft.cli import call, check_jobs, jobs_of
from llmft.core import LabError, check_regular, find_path, project_root, read_json, write_atomic
from llmft.runs.inputs import check_inputs
from llmft.runs.params import (
    as_type,
    check_names,
    check_params,
    choices_of,
    file_names,
    limits_of,
    parse_mapping,
    parse_overrides,
    parse_parameters,
    read_parameters,
    split_comment,
)
from llmft.runs.run import check_inside, check_namespace, open_folder, run_folder, without_secret
from llmft.runs.sweep_file import expand, most_points

experiments = sorted(path.stem for path in (project_root() / 'nbs/experiments').glob('*.ipynb'))
declared = {name: read_parameters(name) for name in experiments}
every = [(name, parameter) for name in experiments for parameter in declared[name]]


def is_number(parameter):
    return 'int' in parameter.type or 'float' in parameter.type


# ---- the range stands beside the parameter


@pytest.mark.parametrize(
    'words, inside, outside',
    [
        ('above 0', [1e-9, 5], [0, -1]),
        ('1 or more', [1, 7], [0, -3]),
        ('0 to 1', [0, 1, 0.5], [-0.1, 1.1]),
        ('0 to below 1', [0, 0.99], [1, -1]),
        ('above 0 to below 1', [0.5], [0, 1]),
        ('above 0 to 1', [1], [0]),
        ('0 to 4,294,967,295', [2**32 - 1], [2**32, -1]),
        ('-2.5 to 1e3', [-2.5, 1000], [-3, 1001]),
    ],
)
def test_ranges_mean_what_they_say(words, inside, outside):
    def holds(value):
        return all(passes(value, limit) for passes, limit in limits_of(words))

    assert limits_of(words) and all(map(holds, inside)) and not any(map(holds, outside))


@pytest.mark.parametrize('words', ['', '5', 'above', 'above 0 or more', '0 is twice the rank', '1 to', 'to 3', '1-2'])
def test_other_words_are_no_range(words):
    assert limits_of(words) == () and split_comment(f'a thing; {words}', 'int')[1] == ''


def test_every_number_of_every_experiment_declares_its_range():
    numbers = [(name, parameter) for name, parameter in every if is_number(parameter)]
    lacking = [f'{name}.{parameter.name}' for name, parameter in numbers if not parameter.range]
    assert len(numbers) > 200 and not lacking, lacking
    assert not [f'{name}.{parameter.name}' for name, parameter in every if ';' in parameter.range]


def test_a_default_outside_its_range_is_refused_with_its_line():
    with pytest.raises(LabError, match=r'^demo line 2: rate is -1.0: give above 0$'):
        parse_parameters('name: str = "x"  # run\nrate: float = -1.0  # peak; above 0', 'demo')


@pytest.mark.parametrize(
    'override, words',
    [
        ('lora_dropout=1', 'lora_dropout is 1.0: give 0 to below 1'),
        ('seed=-1', 'seed is -1: give 0 to 4,294,967,295'),
        ('seed=18446744073709551616', 'seed: a whole number has at most 63 bits'),
        ('num_epochs=1e300', 'num_epochs is 1e+300: give above 0 to 10,000'),
        ('max_length=0', 'max_length is 0: give 2 to 1,048,576'),
        ('batch_size=0', 'batch_size is 0: give 1 to 65,536'),
        ('lora_rank=1' + '0' * 5000, 'lora_rank: '),
        ('strategy=zero9', "strategy is 'zero9' (did you mean 'zero3'?)"),
        ('quantisation=none', "quantisation is 'none'"),
    ],
)
@pytest.mark.parametrize('command', ['run', 'plan'])
def test_a_value_out_of_range_ends_the_command_with_one_line(capsys, tmp_path, override, words, command):
    place = f'outputs={tmp_path}/outputs'
    assert call([command, 'params/finetune/lora.yaml', '--small', '-p', place, '-p', override]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f'llmft: -p {words[:10]}') and words in err and err.count('\n') == 1 and not out
    assert len(err) < 300 and not (tmp_path / 'outputs').exists()


def test_a_range_is_refused_with_file_and_line(tmp_path):
    folder = tmp_path / 'forecast_data'
    folder.mkdir()
    (folder / 'big.yaml').write_text('name: big\nsimulate: 1000000000\n')
    with pytest.raises(LabError, match=r'big.yaml:2: simulate is 1000000000: give 1 to 1,000,000$'):
        jobs_of([folder / 'big.yaml'])


def cell_of(notebook):
    "The namespace and the history that plain papermill leaves to the setup cell."
    cells = [cell for cell in read_json(project_root() / f'nbs/experiments/{notebook}.ipynb')['cells']]
    (source,) = [''.join(cell['source']) for cell in cells if 'parameters' in cell['metadata'].get('tags', [])]
    namespace = dict(In=['', source])
    exec(compile(ast.parse(source), 'parameters', 'exec'), namespace)
    return namespace


@pytest.mark.parametrize('notebook', experiments)
def test_the_setup_cell_refuses_what_papermill_let_pass(notebook):
    space = cell_of(notebook)
    assert check_namespace(notebook, dict(space))['name'] == space['name']
    for parameter in filter(is_number, declared[notebook]):
        is_list = parameter.type.startswith('list')
        for value in (-1e6, '-1000000'):
            value = int(value) if 'int' in parameter.type else value
            with pytest.raises(LabError, match=f'^{notebook}: {parameter.name} is -1000000') as caught:
                check_namespace(notebook, space | {parameter.name: [value] if is_list else value})
            assert '\n' not in str(caught.value)


def test_the_setup_cell_reads_the_cell_as_it_was_executed_last():
    first = 'name: str = "a"  # run\nrate: float = 1.0  # peak; above 0'
    space = dict(name='a', rate=0.0, __annotations__=dict(name=str, rate=float))
    with pytest.raises(LabError, match='rate is 0.0: give above 0'):
        check_namespace('demo', space | dict(In=[first]))
    assert check_namespace('demo', space | dict(In=[first, first.replace('above 0', '0 or more')]))['rate'] == 0


# ---- text after -p


@pytest.mark.parametrize(
    'text',
    [
        'Answer in C # not C++',
        'issue #12.jsonl',
        'line one\nline two',
        '--- x',
        'You are: a helper: yes',
        '[INST] hi',
        '### Q\n{input}\n### A\n{solution}',
        '"quoted"',
        "it's",
        ' blanks around ',
        'a=b=c',
        '',
        '7',
        '*x',
        '!!python/name:os.system',
        '\ttab',
    ],
)
def test_text_after_p_is_taken_as_it_is(text):
    given = parse_overrides([f'system_prompt={text}'], declared['instruct'])
    assert check_params('instruct', given, declared['instruct'])['system_prompt'] == text


def test_other_types_after_p_stay_strict():
    given = parse_overrides(['max_steps=08'], declared['instruct'])
    with pytest.raises(LabError, match="^-p max_steps: '08' is not a whole number: write 8$"):
        check_params('instruct', given, declared['instruct'])
    given = parse_overrides(['lora_targets=[q_proj, "v_proj"]  # two'], declared['instruct'])
    assert given['lora_targets'] == ['q_proj', 'v_proj']


# ---- what a run reads


@pytest.fixture
def files(tmp_path):
    (tmp_path / 'rows.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / 'broken.jsonl').write_text('{"text": \n')
    (tmp_path / 'number.jsonl').write_text('{"text": 5}\n')
    (tmp_path / 'empty.jsonl').write_text('\n')
    (tmp_path / 'rows.zip').write_bytes(b'PK')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_text('x')
    os.mkfifo(tmp_path / 'pipe.jsonl')
    (tmp_path / 'loop.jsonl').symlink_to(tmp_path / 'loop.jsonl')
    return tmp_path


@pytest.mark.parametrize(
    'notebook, name, value, words',
    [
        ('finetune', 'data', 'row.jsonl', 'there is no such file'),
        ('finetune', 'data', 'rows.zip', "ends in '.zip'"),
        ('finetune', 'data', 'broken.jsonl', ':1 is not JSON'),
        ('finetune', 'data', 'number.jsonl', "no text in the field 'text'"),
        ('finetune', 'data', 'empty.jsonl', 'holds no document'),
        ('finetune', 'data', 'folder', 'holds no file'),
        ('finetune', 'data', 'pipe.jsonl', 'is no regular file'),
        ('finetune', 'data', 'loop.jsonl', 'loop.jsonl'),
        ('pretrain', 'data', 'pipe.jsonl', 'is no regular file'),
        ('sublora_train', 'data', 'pipe.jsonl', 'is no regular file'),
        ('instruct', 'data', 'pipe.jsonl', 'is no regular file'),
        ('instruct', 'problems', 'row.jsonl', 'there is no such file'),
        ('inference', 'text', 'rows.zip', "ends in '.zip'"),
        ('pdf_finetune', 'data', 'folder', 'holds no file that ends in .pdf'),
        ('forecast_data', 'data', 'pipe.jsonl', 'is no regular file'),
        ('forecast_data', 'data', 'folder', 'holds no file'),
        ('forecast_data', 'data', 'no_series.csv', 'there is no file'),
        ('forecast_train', 'data', 'folder', 'run forecast_data first'),
        ('forecast_train', 'start', 'folder', 'adapter_config.json'),
        ('finetune', 'model', 'folder', 'has no config.json'),
        ('finetune', 'model', 'file', 'is a file'),
        ('finetune', 'model', 'no/such/folder', 'no model folder'),
        ('compare', 'runs', 'folder', 'has no run.json'),
        ('sublora_bounds', 'train_run', 'nowhere', 'there is no folder'),
    ],
)
def test_what_is_not_there_is_refused_before_a_kernel_starts(capsys, files, notebook, name, value, words):
    given = [str(files / value)] if name == 'runs' else files / value
    place = find_path(f'nbs/experiments/{notebook}.ipynb')
    begun = time.monotonic()
    assert call(['run', str(place), '-p', f'outputs={files}/outputs', '-p', f'{name}={given}']) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith(f'llmft: {name}') and err.count('\n') == 1 and not out
    assert time.monotonic() - begun < 30 and not (files / 'outputs').exists()


def test_the_first_row_says_whether_the_field_is_there(files):
    with pytest.raises(LabError, match="has no field 'body': its fields are text; set text_field"):
        check_inputs('finetune', dict(data=str(files / 'rows.jsonl'), text_field='body'))
    check_inputs('finetune', dict(data=str(files / 'rows.jsonl'), text_field='text'))


def test_series_may_be_a_folder_of_tables(files):
    check_inputs('forecast_data', dict(data=str(files / 'rows.jsonl')))
    (files / 'folder' / 'prey.csv').write_text('time,prey\n0,1.0\n1,2.0\n')
    check_inputs('forecast_data', dict(data=str(files / 'folder')))
    (files / 'folder' / 'prey.csv').write_text('time,prey\n')
    with pytest.raises(LabError, match='data: .*folder holds no row: give a folder of tables'):
        check_inputs('forecast_data', dict(data=str(files / 'folder')))


@pytest.mark.parametrize(
    'notebook, data, meant',
    [('finetune', 'builtin:topic', 'builtin:topics'), ('sublora_train', 'simulated:prey', 'simulated:predator_prey')],
)
def test_a_built_in_source_that_is_none_is_refused(notebook, data, meant):
    check_inputs(notebook, dict(data=meant))
    with pytest.raises(LabError, match=f"^data is '{data}' .did you mean '{meant}'"):
        check_inputs(notebook, dict(data=data))


def test_what_load_model_takes_is_let_through(tmp_path):
    write_atomic(tmp_path / 'run/adapter/adapter_config.json', '{}')
    write_atomic(tmp_path / 'run/run.json', '{"run": {"status": "done"}}')
    write_atomic(tmp_path / 'packed/model.GGUF', 'GGUF')
    write_atomic(tmp_path / 'one/model.gguf', 'GGUF')
    for name in ('run', 'run/adapter', 'packed/model.GGUF', 'one'):
        check_inputs('finetune', dict(model=str(tmp_path / name), max_length=512))
    write_atomic(tmp_path / 'run/run.json', '{"run": {"status": "failed"}}')
    with pytest.raises(LabError, match='^model: the run in .* is failed'):
        check_inputs('finetune', dict(model=str(tmp_path / 'run')))


def test_a_length_beyond_the_positions_is_refused():
    assert check_inputs('finetune', dict(model='base', max_length=2048)) is None
    with pytest.raises(LabError, match='max_length is 2049 and the model .* has 2048 positions'):
        check_inputs('finetune', dict(model='base', max_length=2049))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr('llmft.runs.inputs.find_spec', lambda name: None)
    with pytest.raises(LabError, match='strategy zero2 needs the package deepspeed'):
        check_inputs('finetune', dict(strategy='zero2'))
    with pytest.raises(LabError, match='optimiser adamw_8bit needs the package bitsandbytes'):
        check_inputs('finetune', dict(optimiser='adamw_8bit'))
    check_inputs('finetune', dict(strategy='ddp', optimiser='muon'))


def test_refusing_loads_nothing_heavy(files):
    code = f"""
import sys
from llmft.cli import call
status = call(['run', 'params/finetune/lora.yaml', '--small', '-p', 'data={files}/row.jsonl'])
print(status, {{'torch', 'transformers', 'peft', 'datasets'}} & set(sys.modules))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=project_root())
    assert done.stdout == '2 set()\n' and 'there is no such file' in done.stderr, done.stderr


def test_pipes_and_devices_do_not_block_the_readers_of_records(files):
    begun = time.monotonic()
    (files / 'outputs/act/one').mkdir(parents=True)
    os.mkfifo(files / 'outputs/act/one/run.json')
    assert call(['ls', '--outputs', str(files / 'outputs')]) == 0
    for path in ('/dev/null', files / 'pipe.jsonl'):
        with pytest.raises(LabError, match='is no regular file'):
            check_regular(path)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize('text', ['x' * 5000, '~no_such_user/x'])
def test_what_can_be_no_path_is_one_line(text):
    with pytest.raises(LabError, match='cannot be a path') as caught:
        find_path(text)
    assert len(str(caught.value)) < 200


# ---- nothing leaves outputs


@pytest.mark.parametrize('name', file_names)
@pytest.mark.parametrize('text', ['../x', '/tmp/x', 'a/b', '..', '.hidden', 'x' * 101, 'a\nb', ' '])
def test_names_cannot_lead_out(name, text):
    with pytest.raises(LabError, match=f'^{name}: .* cannot name a (run|file)') as caught:
        check_names({name: text})
    assert '\n' not in str(caught.value)


def test_a_ledger_cannot_lead_out(capsys):
    for text in ('../../../x', '/tmp/x'):
        assert call(['run', 'nbs/experiments/forecast_train.ipynb', '-p', f'ledger={text}']) == 2
        assert f"-p ledger: '{text}' cannot name a file" in capsys.readouterr().err
    from llmft.studies.forecasting.budget import study_account

    with pytest.raises(LabError, match='cannot name a file'):
        study_account('outputs', '../../x', 0.0)


def test_links_cannot_lead_out(tmp_path):
    outputs, away = tmp_path / 'outputs', tmp_path / 'away'
    away.mkdir()
    (outputs / 'finetune').mkdir(parents=True)
    (outputs / 'finetune/linked').symlink_to(away)
    (outputs / 'profile').symlink_to(away)
    (outputs / 'finetune/loop').symlink_to(outputs / 'finetune/loop')
    for notebook, name in (('finetune', 'linked'), ('profile', 'any')):
        params = dict(name=name, outputs=str(outputs))
        with pytest.raises(LabError, match='is a link that leads out of'):
            open_folder(run_folder(notebook, params), params)
    assert not list(away.iterdir())
    (tmp_path / 'other').symlink_to(outputs)
    check_inside(tmp_path / 'other/finetune/plain', tmp_path / 'other')  # the user's own link to outputs


# ---- sweeps


def sweep(tmp_path, text):
    path = tmp_path / 'sweep.yaml'
    path.write_text('name: s\nstages:\n' + text)
    return path


def test_a_sweep_is_counted_before_it_is_made(tmp_path):
    axes = ', '.join(f'{name}: {list(range(1, 21))}' for name in (
        'seed', 'lora_rank', 'max_steps', 'batch_size', 'eval_every', 'patience', 'save_every', 'log_every'))
    begun = time.monotonic()
    with pytest.raises(LabError, match=r'sweep.yaml:4: 25,600,000,000 runs are more than the 2,000 a sweep may have'):
        expand(sweep(tmp_path, f'  - notebook: finetune\n    matrix: {{{axes}}}\n'))
    assert time.monotonic() - begun < 20

    half = f'seed: {list(range(most_points // 2 + 1))}'
    stages = ''.join(f'  - {{notebook: finetune, name: "{name}-{{seed}}", matrix: {{{half}}}}}\n' for name in 'ab')
    with pytest.raises(LabError, match='2,002 runs are more'):
        expand(sweep(tmp_path, stages))


@pytest.mark.parametrize('template', ['p-{seed:d}', 'p-{seed!r}', 'p-{seed.real}', 'p-{seed[0]}', 'p-{}', 'p-{0}', 'p-{'])
@pytest.mark.parametrize('key', ['name', 'data'])
def test_only_plain_names_stand_in_braces(tmp_path, template, key):
    given = f'name: "{template}"' if key == 'name' else f'params: {{data: "{template}"}}'
    with pytest.raises(LabError, match=r'sweep.yaml:4: .*in braces, as in \{seed\}'):
        expand(sweep(tmp_path, f'  - notebook: finetune\n    {given}\n    matrix: {{seed: [1, 2]}}\n'))


@pytest.mark.parametrize('name', ['../x', '/tmp/x-{seed}', 'a/{seed}', '{data}/../../y-{seed}'])
def test_names_of_a_sweep_cannot_lead_out(tmp_path, name):
    with pytest.raises(LabError, match='sweep.yaml:4: name: .*cannot name a run'):
        expand(sweep(tmp_path, f'  - notebook: finetune\n    name: "{name}"\n    matrix: {{seed: [1, 2]}}\n'))


def test_a_stage_cannot_read_itself_or_a_later_one(tmp_path):
    one = '  - {{notebook: forecast_train, name: {name}, params: {{start: "{start}"}}}}\n'
    later = one.format(name='a', start='outputs/forecast_train/b') + one.format(name='b', start='')
    itself = one.format(name='a', start='outputs/forecast_train/../forecast_train/a')
    for stages in (later, itself):
        with pytest.raises(LabError, match='reads outputs/forecast_train/., made in the same stage or a later one'):
            expand(sweep(tmp_path, stages))
    earlier = one.format(name='a', start='') + one.format(name='b', start='outputs/forecast_train/a')
    check_jobs([expand(sweep(tmp_path, earlier))])  # what an earlier stage will leave need not be there


# ---- run.json


@pytest.mark.parametrize(
    'argument, kept',
    [
        ('seed=7', 'seed=7'),
        ('max_new_tokens=48', 'max_new_tokens=48'),
        ('tokenizer=base', 'tokenizer=base'),
        ('HF_TOKEN=hello', 'HF_TOKEN=[left out]'),
        ('wandb_api_key=1', 'wandb_api_key=[left out]'),
        ('db_password=x=y', 'db_password=[left out]'),
        ('data=https://me:word@host/x', 'data=https://[left out]@host/x'),
        ('model=hf_abcdefghijklmnop', 'model=[left out]'),
    ],
)
def test_secrets_stay_out_of_the_command(argument, kept):
    assert without_secret(argument) == kept


def test_the_record_holds_neither_secret_nor_host(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(sys, 'argv', ['/bin/llmft', 'run', '-p', 'hub_token=abc123'])
    params = dict(name='a', outputs=str(tmp_path))
    folder = run_folder('finetune', params)
    text = str(open_folder(folder, params))
    assert "llmft run -p 'hub_token=[left out]'" in text and 'abc123' not in text
    assert 'host' not in read_json(folder / 'run.json')['meta']['machine'] and socket.gethostname()


# ---- any value at all

numbers = ['0', '-0', '-1', '1', '2', '0.5', '1e300', '-1e-300', '1e999', '.nan', '.inf', '2' * 30, '1' * 5000, '08']
others = ['', 'true', 'no', 'null', '~', '[]', '[1, x]', '{a: 1}', '"1"', '- 1', '&a [*a]', '!!int 3', '\0', '\udcff', '#']
texts = ['', ' ', 'x', '../x', '/', '/dev/zero', '~nobody/x', 'a\0b', 'a\nb', '\udc80', 'é', '{seed}', '{', '%s', '*' * 9]
texts += ['x' * 3000, 'preset:', 'preset:x', 'builtin:', 'builtin:x', 'a/b/c', '-x', '=', '"', 'null', '\u202e', ':' * 3]


def values_for(parameter, rng):
    "Texts to try for a parameter: nasty ones, and some in and about its range."
    if parameter.type == 'str':
        return rng.sample(texts, 8) + [parameter.default, *parameter.choices[:2]]
    if parameter.type == 'list[str]':
        return rng.sample(texts + others, 8) + [yaml.safe_dump([text]) for text in rng.sample(texts, 2)]

    edges = [limit for _, limit in limits_of(parameter.range)] or [0, 1]
    near = [f'{number:g}' for edge in edges for number in (edge - 1, edge, edge + 1)]
    near += [str(int(number)) for number in (edges[0], rng.uniform(edges[0], edges[-1] + 1))]
    chosen = rng.sample(numbers + others, 7) + rng.sample(near, 3)
    return [f'[{text}]' for text in chosen] if parameter.type.startswith('list') else chosen


def lies_in_range(parameter, notebook, value):
    "Whether an accepted value is what its declaration says, judged without the code that refuses."
    entry_type = parameter.type.removeprefix('list[').removesuffix(']')
    if isinstance(value, list) != (entry_type != parameter.type):
        return False
    entries = value if isinstance(value, list) else [value]
    if not all(type(entry).__name__ == entry_type for entry in entries):
        return False
    if entry_type == 'str':
        options = parameter.choices or choices_of(parameter.name, notebook)
        return all((not options or text in options) and text.encode() and '\0' not in text for text in entries if text)

    words = re.findall(r'(above |below |)(-?\d[\d.,]*)', parameter.range)
    low, *high = [(word.strip(), float(number.replace(',', ''))) for word, number in words] or [('', -math.inf)]
    above = all(entry > low[1] if low[0] else entry >= low[1] for entry in entries)
    return above and all(entry < limit if word else entry <= limit for word, limit in high for entry in entries)


def try_value(notebook, parameter, text, in_file):
    "The accepted value, or None for a refusal of one line; any other exception fails the test."
    try:
        if in_file:
            given = parse_mapping(f'{parameter.name}: {text}', 'x.yaml')
        else:
            given = parse_overrides([f'{parameter.name}={text}'], declared[notebook])
        values = check_params(notebook, given, declared[notebook])
        check_names(given)
        return values.get(parameter.name)
    except LabError as error:
        assert '\n' not in str(error) and len(str(error)) < 700, (notebook, parameter.name, text[:50], str(error)[:900])


def test_any_value_is_accepted_in_its_range_or_refused_in_one_line():
    rng = random.Random(15)
    tried = accepted = 0
    for notebook, parameter in every:
        for text in values_for(parameter, rng) if parameter.type != 'bool' else rng.sample(others + numbers, 8):
            for in_file in rng.sample([False, True], 1 + (tried % 9 == 0)):
                tried += 1
                value = try_value(notebook, parameter, text, in_file)
                if value is not None:
                    accepted += 1
                    assert lies_in_range(parameter, notebook, value), (notebook, parameter, text[:50], value)
    assert tried > 4000 and 500 < accepted < tried - 1000, (tried, accepted)


def test_any_text_names_an_input_or_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = [(notebook, parameter) for notebook, parameter in every if 'str' in parameter.type]
    tried = 0
    for notebook, parameter in named:
        for text in set(texts) - {'/', '', ' '}:  # the folders / and . would be read as a whole
            try:
                value = as_type([text] if parameter.type != 'str' else text, parameter.type)
                check_inputs(notebook, {parameter.name: value})
            except (LabError, ValueError) as error:
                assert '\n' not in str(error) and len(str(error)) < 700, (notebook, parameter.name, text[:50])
            tried += 1
    assert tried > 1500
