"Instruction rows: masks, ends, what is too long, leaks; and the score of programs."

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data.tokens import load_tokenizer
from llmft.studies.code.pass_at_k import Attempt, check_all, check_references, pass_at_k, program_of, score
from llmft.studies.code.setup import runnable_tasks
from llmft.studies.code.tasks import (
    Task,
    as_task,
    check_template,
    encode_tasks,
    expert_prompt,
    function_tasks,
    load_tasks,
    problem_template,
    prompt_rows,
)

tokenizer = load_tokenizer('base')
shared = os.environ.get('LLMFT_SHARED_DATA')
texts = st.text(st.characters(codec='utf-8', exclude_categories=['Cs']), min_size=1, max_size=80).filter(str.strip)


def parts(examples, row):
    "Ids of an example, and which of them are trained on."
    return examples[row].tolist(), examples.loss[examples.starts[row] : examples.ends[row]].tolist()


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.sampled_from([problem_template, 'chat']))
def test_exactly_the_answer_and_its_end_are_trained_on(problem, solution, template):
    if '<|' in problem + solution:
        return
    task = Task('t', problem, solution)
    examples, *_ = encode_tasks([task], tokenizer, 4096, template, 'Be exact.')
    ids, trained = parts(examples, 0)
    first = trained.index(True)
    assert ids[:first] == prompt_rows([task], tokenizer, template, 'Be exact.')[0] and all(trained[first:])
    assert tokenizer.decode(ids[first:]) == solution + tokenizer.eos_token
    whole, *_ = encode_tasks([task], tokenizer, 4096, template, 'Be exact.', loss_on='all')
    assert parts(whole, 0) == (ids, [True] * len(ids)) and whole.supervised()[0] == len(ids) - 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    st.integers(30, 120),
    st.sampled_from(['truncate', 'drop']),
    st.sampled_from(['completion', 'all']),
)
def test_every_row_is_accounted_for(sizes, max_length, policy, loss_on):
    tasks = [Task(str(n), 'word ' * a, 'x = 1\n' * b) for n, (a, b) in enumerate(sizes)]
    examples, notes, _ = encode_tasks(tasks, tokenizer, max_length, problem_template, '', loss_on, policy)
    full, *_ = encode_tasks(tasks, tokenizer, 10**6, problem_template, '', loss_on)
    prompts = [len(row) for row in prompt_rows(tasks, tokenizer, problem_template, '')]
    lengths = [len(full[n]) for n in range(len(tasks))]
    kept = [
        n for n in range(len(tasks)) if (lengths[n] <= max_length + 1 if policy == 'drop' else prompts[n] <= max_length)
    ]
    assert (
        len(examples) == len(kept) == notes['examples']
        and notes['rows'] == len(tasks) == notes['examples'] + notes['answer_cut_away']
    )
    for row, n in enumerate(kept):
        assert examples[row].tolist() == full[n][: max_length + 1].tolist()
        assert (examples[row][-1] == tokenizer.eos_token_id) == (lengths[n] <= max_length + 1), (
            'a shortened answer must not teach to stop'
        )
    assert notes['targets'] + notes['targets_lost'] == int(full.supervised().sum())


def test_the_reference_prompt_is_the_seeds():
    prompt = tokenizer.decode(
        prompt_rows([Task('t', 'Add two numbers.', 'x')], tokenizer, problem_template, expert_prompt)[0],
        skip_special_tokens=True,
    )
    assert (
        prompt
        == 'You are an expert Python programmer. Please read the problem carefully before writing any Python code.\n\nProblem:\nAdd two numbers.\n\nSolution:\n'
    )


@pytest.mark.parametrize(
    'template, message',
    [
        ('Problem: {input}', '{solution}'),
        ('{solution}', '{input}'),
        ('{input}{solution}{solution}', 'needs it once'),
        ('{solution}{input}', 'before it has read'),
    ],
)
def test_a_template_without_a_marker_is_refused(template, message):
    with pytest.raises(LabError, match=message.replace('{', r'\{')):
        check_template(template, tokenizer)


def test_bad_options_are_one_line():
    for options, words in (
        (dict(loss_on='completions'), "did you mean 'completion'"),
        (dict(too_long='split'), 'half an answer'),
        (dict(too_long='error'), 'max_length'),
    ):
        with pytest.raises(LabError, match=words) as raised:
            encode_tasks([Task('t', 'problem', 'solution ' * 50)], tokenizer, 20, **options)
        assert '\n' not in str(raised.value)


def write(folder, rows, name='rows.jsonl'):
    (folder / name).write_text('\n'.join(map(json.dumps, rows)))
    return str(folder / name)


def test_rows_without_the_field_and_empty_ones(tmp_path):
    good = [dict(input=f'p{n}', solution='s', split=split) for n, split in enumerate(['train'] * 3 + ['valid', 'test'])]
    data = write(
        tmp_path,
        good
        + [
            dict(input='p9', solution='', split='train'),
            dict(input='p8', solution=None, split='train'),
            dict(input=' ', solution='s', split='valid'),
            dict(input='p3', solution='leak', split='train'),
            dict(input='x', solution='s', split='other'),
        ],
    )
    sides, counts = load_tasks(data)
    assert {split: [task.input for task in side] for split, side in sides.items()} == dict(
        train=['p0', 'p1', 'p2'], valid=['p3'], test=['p4']
    )
    assert counts == dict(rows=10, empty=3, also_held_out=1, other_splits=1)
    with pytest.raises(LabError, match="no field 'output'.*input, solution, split"):
        load_tasks(data, training_field='output')
    sides, _ = load_tasks(write(tmp_path, good[:3] + good[4:], 'b.jsonl'))
    assert {split: len(side) for split, side in sides.items()} == dict(train=2, valid=1, test=1)
    with pytest.raises(LabError, match="no usable row in the split 'valid'"):
        load_tasks(write(tmp_path, good[:1] + good[4:], 'c.jsonl'))


def test_parquet_and_hashed_splits(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = [dict(input=f'problem {n}', output=f'reason {n}') for n in range(200)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / 'rows.parquet'))
    sides, _ = load_tasks(str(tmp_path / 'rows.parquet'), training_field='output', valid_share=0.2)
    assert sum(map(len, sides.values())) == 200 and 15 < len(sides['valid']) < 65 and 15 < len(sides['test']) < 65
    again, _ = load_tasks(write(tmp_path, rows[::-1]), training_field='output', valid_share=0.2)
    assert {task.input for task in again['test']} == {task.input for task in sides['test']}


def test_no_function_or_module_stands_on_two_sides():
    tasks, counts = function_tasks()
    modules = {
        split: {task.name.split(':')[0].split('/')[0] for task in tasks if task.split == split}
        for split in ('train', 'valid', 'test')
    }
    assert (
        not modules['train'] & modules['valid']
        and not modules['train'] & modules['test']
        and not modules['valid'] & modules['test']
    )
    bodies = {
        split: {' '.join(task.solution.split()) for task in tasks if task.split == split and len(task.solution) > 200}
        for split in modules
    }
    assert not bodies['train'] & (bodies['valid'] | bodies['test'])
    assert len(tasks) + counts['empty'] == counts['rows'] and len(tasks) > 500


def test_builtin_references_pass_and_mutants_do_not():
    from dataclasses import replace

    tasks = [task for task in function_tasks()[0] if task.tests]
    assert len(tasks) >= 20
    solvable, broken = check_references(tasks)
    assert not broken, broken
    _, broken = check_references([replace(task, solution='    return "nonsense"\n') for task in tasks])
    assert len(broken) == len(tasks)


@pytest.mark.parametrize(
    'answer',
    [
        '    return a + b',
        '    return a + b\n\n\nprint(add(1, 2))\nraise ValueError',
        'return a + b',
        '```python\ndef add(a, b):\n    return a + b\n```',
        'Sure:\n\n```py\n    return a + b\n```\nbye',
        'def add(a, b):\n    return a + b\n',
        'import math\n\ndef add(a, b):\n    return a + b',
        '    c = (a +\n         b\n    )\n    return c',
    ],
)
def test_every_form_of_an_answer_is_understood(answer):
    task = Task('t', 'p', '', lead='def add(a, b):\n    "Add."\n', tests=['assert add(1, 2) == 3'])
    assert check_all([(task, answer, 0)])[0].passed
    assert not check_all([(task, answer.replace('+', '-'), 0)])[0].passed


def test_cases_are_read_and_printed():
    row = as_task(
        dict(
            input='Sum.',
            solution='print(sum(map(int, input().split())))',
            input_output=json.dumps(dict(inputs=['1 2\n', '3 4\n'], outputs=['3\n', '7'])),
        ),
        'r',
    )
    good, wrong, slow = check_all(
        [(row, row.solution, 0), (row, 'print(3)', 0), (row, 'while True: pass', 0)], seconds=1
    )
    assert (good.status, wrong.status, slow.status) == ('passed', 'wrong', 'timeout') and 'case 1' in wrong.reason


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_mean_over_all_draws(samples, data):
    from itertools import combinations

    passed, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_scores_need_equally_many_answers():
    attempts = [
        Attempt('a', 0, '', 'passed', '', 0.0),
        Attempt('a', 1, '', 'wrong', '', 0.0),
        Attempt('b', 0, '', 'wrong', '', 0.0),
    ]
    with pytest.raises(LabError, match='equally many'):
        score(attempts)
    found = score(attempts[:2], (1, 2))
    assert (found['pass@1'], found['pass@2'], found['problems'], found['pass@1_error']) == (0.5, 1.0, 1, None)


def test_human_eval_and_mbpp_shapes():
    human = as_task(
        dict(
            task_id='HumanEval/0',
            prompt='def f(x):\n    """Double."""\n',
            canonical_solution='    return 2*x\n',
            test='def check(candidate):\n    assert candidate(2) == 4\n',
            entry_point='f',
        ),
        'h',
    )
    mbpp = as_task(
        dict(
            task_id=11,
            text='Double.',
            code='def f(x):\r\n  return 2*x',
            test_list=['assert f(2) == 4'],
            test_setup_code='import math',
        ),
        'm',
    )
    assert (
        check_references([human, mbpp]) == ([human, mbpp], [])
        and mbpp.split == 'test'
        and 'assert f(2) == 4' in mbpp.input
    )


@pytest.mark.skipif(not shared, reason='LLMFT_SHARED_DATA is not set: no MBPP here')
def test_mbpp_references_pass():
    sides, counts = load_tasks(str(Path(shared) / 'mbpp.jsonl'))
    assert {split: len(side) for split, side in sides.items()} == dict(train=374, valid=90, test=500) and counts[
        'other_splits'
    ] == 10
    assert not check_references(sides['valid'][:20])[1]
    for fields in named:
        again, _ = load_tasks(str(Path(shared) / 'mbpp.jsonl'), '', *fields)
        assert again == sides


adds = 'def add(a, b):\n    return a + b\n'
indented = adds.replace('\n', '\n   ')
right_answers = {
    'Python': f'```Python\n{adds}```\nIt adds.',
    'python3': f'```python3\n{adds}```',
    'PY': f'```PY\n{adds}```',
    'spaces': f'```  python  \n{adds}```',
    'no label': f'Sure.\n```\n{adds}```',
    'an attribute': f'```python title="a.py"\n{adds}```',
    'braces': f'```{{.python .numberLines}}\n{adds}```',
    'another label': f'```code\n{adds}```',
    'tildes': f'~~~python\n{adds}~~~',
    'four backticks': f'````python\n{adds}````',
    'in a list': f'1. This:\n   ```python\n   {indented}```',
    'after a colon': f'The answer: ```python\n{adds}```',
    'not closed': f'```python\n{adds}',
    'CRLF': f'```python\n{adds}```\n'.replace('\n', '\r\n'),
    'CRLF without a fence': adds.replace('\n', '\r\n'),
    'bash first': f'```bash\npip install numpy\n```\n```python\n{adds}```',
    'output first': f'```\n>>> add(1, 2)\n3\n```\n```python\n{adds}```',
    'an example after it': f'```python\n{adds}```\nUse it:\n```python\nprint(add(input()))\n```',
    'an example before it': f'```python\nprint(add(input()))\n```\nwith\n```python\n{adds}```',
    'a fence in a docstring': '```python\ndef add(a, b):\n    """\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n```',
    'a fence at the margin': '```python\ndef add(a, b):\n    """\n```\nadd(1, 2)\n```\n    """\n    return a + b\n```\nbye',
    'a draft': f'<think>\n```python\ndef add(a, b): return 0\n```\n</think>\n```python\n{adds}```',
    'a draft that the prompt began': f'```python\ndef add(a, b): return 0\n```\n</think>\n{adds}',
    'from __future__': f'from __future__ import annotations\n{adds}',
    'from __future__ in a fence': f'```python\n# adds\nfrom __future__ import (annotations,\n division)\n{adds}```',
    'text at the margin': '    s = """\nabc\nimport x\n"""\n    return a + b\n',
    'a bracket at the margin': '    c = [\na,\nb]\n    return sum(c)\n\nprint(c)',
    'a main guard': f'{adds}\nif __name__ == "__main__":\n    import sys\n    print(add(*input().split()))\n    sys.exit(1)',
    'a guard in the middle': f'if "__main__" == __name__:\n    raise SystemExit\n{adds}',
    'input afterwards': f'{adds}\na, b = input().split()\nprint(add(int(a), int(b)))',
    'a wrong assertion afterwards': f'{adds}\nassert add(1, 1) == 3',
    'an end afterwards': f'{adds}\nimport sys\nsys.exit(0)',
    'a table before it': 'import sys\nsys.setrecursionlimit(5000)\nones = []\nfor n in range(3):\n    ones.append(1)\n'
    'def add(a, b):\n    return a + b if len(ones) == 3 and sys.getrecursionlimit() == 5000 else None\n',
    'a lambda': 'add = lambda a, b: a + b',
    'a body without its indentation': 'c = a + b\nreturn c',
    'a first line without its indentation': 'c = a + b\n    return c\n\ndef main():\n    main()\n\nmain(',
    'a whole function with its indentation': '    def add(a, b):\n        return a + b\n',
}
begun = dict(lead='def add(a: int, b: int) -> int:\n    """Add."""\n', tests=['assert add(1, 2) == 3'])
asked = dict(tests=['assert add(1, 2) == 3'])


def passes(task, answer):
    "Whether the program of an answer passes its tests; in this process, because starting one for each takes time."
    try:
        exec('\n'.join([program_of(task, answer), *task.tests]), dict(__name__='__main__'))
    except BaseException:
        return False
    return True


@pytest.mark.parametrize('name', right_answers)
def test_right_programs_pass_however_they_are_written(name, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO())
    limit = sys.getrecursionlimit()
    whole = 'def ' in right_answers[name].partition('\n\n')[0] or 'lambda' in name
    wrong = right_answers[name].replace('a + b', 'a - b').replace('sum(c)', '0')
    for task in [Task('t', 'p', '', **begun)] + ([Task('t', 'p', '', **asked)] if whole else []):
        assert passes(task, right_answers[name]) and not passes(task, wrong)
    sys.setrecursionlimit(limit)


def test_a_main_guard_does_not_run():
    assert check_all([(Task('t', 'p', '', **asked), f'{adds}if __name__ == "__main__":\n    while 1: pass', 0)], 2)[
        0
    ].passed


@pytest.mark.parametrize(
    'answer',
    [
        '<think>\n```python\ndef add(a, b): return a + b\n```\nis it?',
        'I cannot do that.',
        '```bash\nls\n```',
        'def add(a, b): return a + b\n\nimport os\nos._exit(0)',
        'try:\n    def add(a, b): return a\nexcept: pass\nassert False',
    ],
)
def test_what_is_no_right_program_fails_whatever_surrounds_it(answer):
    assert not check_all([(Task('t', 'p', '', **begun), answer, 0)])[0].passed


def test_programs_that_read_run_as_main():
    task = Task('t', 'p', '', cases=[('1 2', '3')])
    answer = 'def main():\n    print(sum(map(int, input().split())))\nif __name__ == "__main__":\n    main()\n'
    assert check_all([(task, f'```python\n{answer}```', 0)])[0].passed


mbpp_row = dict(
    task_id=11,
    text='Add.',
    code='def add(a, b):\r\n  return a + b',
    test_list=['assert add(1, 2) == 3'],
    test_setup_code='',
)
named = [('input', 'solution'), ('text', 'solution'), ('text', 'code'), ('test_list', 'task_id'), ('prompt', 'output')]


@pytest.mark.parametrize('fields', named)
def test_a_known_form_stays_known_whatever_fields_are_named(fields):
    mbpp = as_task(mbpp_row, 'mbpp.jsonl:1', *fields)
    assert (mbpp.split, mbpp.solution) == ('test', 'def add(a, b):\n  return a + b') and len(mbpp.tests) == 1
    assert as_task(dict(mbpp_row, task_id=700), 'mbpp.jsonl:1', *fields).split == 'train'
    human = dict(
        prompt='def f(x):\n', canonical_solution='    return x\n', test='', entry_point='f', text='t', code='c'
    )
    assert as_task(human, 'h:1', *fields).lead == 'def f(x):\n' and as_task(human, 'h:1', *fields).split == 'test'
    gsm8k = dict(question='1 + 1?', answer='#### 2')
    assert as_task(gsm8k, 'gsm8k_test.jsonl:1', *fields).split == 'test' and as_task(gsm8k, 'a:1', *fields).split == ''
    math = dict(problem='1 + 1?', solution='\\boxed{2}', unique_id='test/x/1.json')
    assert as_task(math, 'a:1', *fields).input == '1 + 1?' and as_task(math, 'a:1', *fields).split == 'test'
    apps = dict(question='Add.', solutions='["one", "two"]', input_output='{"inputs": ["1"], "outputs": ["2"]}')
    task = as_task(apps, 'a/test.jsonl:1', *fields)
    assert (task.solution, task.cases, task.split) == ('one', [('1', '2')], 'test')


def test_mbpp_from_a_table_of_text_is_the_same(tmp_path):
    import csv

    with (tmp_path / 'mbpp.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, mbpp_row)
        writer.writeheader()
        writer.writerow(dict(mbpp_row, test_list=json.dumps(mbpp_row['test_list'])))
    task = load_tasks(str(tmp_path / 'mbpp.csv'), needs=())[0]
    assert [found.tests for side in task.values() for found in side] == [mbpp_row['test_list']]


def test_official_test_sets_are_never_trained_on(tmp_path):
    rows = [dict(question=f'{n} + 1?', answer=f'#### {n + 1}') for n in range(20)]
    with pytest.raises(LabError, match="no usable row in the split 'train'"):
        load_tasks(write(tmp_path, rows, 'gsm8k_test.jsonl'), input_field='question', training_field='answer')
    write(tmp_path, rows, 'test.jsonl')
    (tmp_path / 'gsm8k_test.jsonl').unlink()
    write(tmp_path, [dict(row, question='of ' + row['question']) for row in rows], 'train.jsonl')
    sides, _ = load_tasks(str(tmp_path))
    assert len(sides['test']) == 20 and sides['valid'] and len(sides['train']) + len(sides['valid']) == 20
    assert all(task.input.startswith('of') for task in sides['train'] + sides['valid'])


def test_eval_plus_compares_with_the_reference_on_its_inputs():
    row = dict(
        task_id='HumanEval/0',
        prompt='def half(x):\n    """Half of x."""\n',
        canonical_solution='    return x / 2\n',
        entry_point='half',
        base_input=[[1]],
        plus_input=[[0.3], [-7]],
        atol=0,
    )
    task = as_task(row, 'plus:1', 'prompt', 'canonical_solution')
    answers = ['    return x * 0.5', '    return x / 2 if x > 0 else 0', '    return "half"', '    return x / 2 + 1e-9']
    attempts = check_all([(task, answer, 0) for answer in (row['canonical_solution'], *answers)])
    assert [attempt.passed for attempt in attempts] == [True, True, False, False, True] and task.split == 'test'
    plus = dict(mbpp_row, test='assert add(1, 2) == 3\nassert add(2, 2) == 4', task_id=700, prompt='Add.')
    assert as_task(plus, 'm:1').split == 'test' and as_task(plus, 'm:1').tests == [plus['test']]


@pytest.mark.parametrize(
    'row, words',
    [
        (dict(input=5, solution='x'), "r:7 has no text in the field 'input': it holds int"),
        (dict(input='x', solution=['y']), "'solution': it holds list"),
        (dict(input='x', solution='y', split=3), "'split': it holds int"),
        (dict(input='x', solution='y', tests=5), "no list in the field 'tests': it holds int"),
        (dict(mbpp_row, code=5), "'code': it holds int"),
        (dict(mbpp_row, test_list=dict(a=1)), "no list in the field 'test_list'"),
        (dict(question=1, answer='#### 2'), "'question': it holds int"),
        (dict(prompt=1, canonical_solution='', test='', entry_point=''), "'prompt': it holds int"),
    ],
)
def test_rows_of_the_wrong_kind_are_one_line(row, words):
    with pytest.raises(LabError, match=words) as error:
        as_task(row, 'r:7')
    assert '\n' not in str(error.value)


def test_numbers_without_end_in_tests_are_no_cases():
    pairs = '{"inputs": ["' + '1"], "outputs": [' + '9' * 5000 + ']}'
    assert as_task(dict(question='q', solutions='[]', input_output=pairs), 'a:1').cases == []
    assert as_task(dict(question='q', solutions='[]', input_output='[' * 100_000), 'a:1').cases == []


@pytest.mark.parametrize('count', range(2, 9))
def test_few_rows_have_a_validation_row_and_a_training_row(tmp_path, count):
    rows = [dict(input=f'problem {n}', solution='s') for n in range(count)]
    for share in (0.001, 0.05, 0.5):
        sides, counts = load_tasks(write(tmp_path, rows), valid_share=share)
        assert sides['train'] and sides['valid'] and sum(map(len, sides.values())) == counts['rows'] == count


def test_answers_that_were_cut_off_are_counted():
    attempts = [Attempt('a', 0, '', 'passed', '', 0.0), Attempt('b', 0, '', 'wrong', '', 0.0, cut_off=True)]
    assert score(attempts)['cut_off'] == 0.5


def test_solving_ends_at_every_end_of_a_turn_and_marks_what_was_cut_off(monkeypatch):
    from llmft.inference.generation import Generated
    from llmft.models.load import load_model
    from llmft.studies.code import pass_at_k as module

    model = load_model('base')
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 77]
    asked = {}

    def generate(model, rows, *arguments, **options):
        asked.update(options)
        return Generated(ids=[[5], [6]], stopped=['stop', 'length'])

    monkeypatch.setattr(module, 'generate', generate)
    attempts = module.solve(model, tokenizer, [Task(n, 'p', '', **begun) for n in 'ab'], problem_template, '')
    assert asked['stop_ids'] == {tokenizer.eos_token_id, 77} and [attempt.cut_off for attempt in attempts] == [
        False,
        True,
    ]


def test_a_file_of_problems_needs_no_training_rows(tmp_path):
    problem = dict(
        task_id='HumanEval/0',
        prompt='def add(a, b):\n',
        canonical_solution='    return a + b\n',
        test='def check(f): assert f(1, 2) == 3',
        entry_point='add',
    )
    data = write(tmp_path, [problem], 'HumanEval.jsonl')
    assert [task.split for task in load_tasks(data, needs=())[0]['test']] == ['test']
    with pytest.raises(LabError, match="no usable row in the split 'train'"):
        load_tasks(data)


def test_odd_rows_of_apps_are_no_programs_that_print():
    for pairs in (
        'null',
        '',
        None,
        '[]',
        json.dumps(dict(fn_name='f', inputs=[[1]], outputs=[2])),
        json.dumps(dict(inputs=[[1, 2]], outputs=[3])),
    ):
        assert as_task(dict(input='Add.', solution='x', input_output=pairs), 'r:0').cases == []
    assert as_task(
        dict(input='Add.', solution='x', input_output=json.dumps(dict(inputs=['1\n', [1]], outputs=['2\n', [2]]))),
        'r:0',
    ).cases == [('1\n', '2\n')]


def test_a_string_may_hold_unicode_line_ends(tmp_path):
    rows = [dict(input=f'a\u2028b\u0085c {split}', solution='s', split=split) for split in ('train', 'valid')]
    (tmp_path / 'rows.jsonl').write_text(
        '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8'
    )
    assert load_tasks(str(tmp_path / 'rows.jsonl'))[0]['train'][0].input == 'a\u2028b\u0085c train'


def test_problems_that_the_run_trains_on_are_not_judged(tmp_path, capsys):
    rows = [dict(input=f'Add {n}.', solution=f'def add(x): return x + {n}', tests=f'assert add(1) == {n + 1}')
            for n in range(30)]
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    tasks, _ = load_tasks(str(path), valid_share=0.2, seed=1)
    data = SimpleNamespace(tasks=tasks)
    asked = SimpleNamespace(problems=str(path), split_field='split', num_problems=0, seed=1)
    judged = runnable_tasks(asked, data)
    assert {task.input for task in judged} == {task.input for task in tasks['test']} and judged
    assert f'{30 - len(judged)} problems of {path} left out: the run trains on them' in capsys.readouterr().out
    own = runnable_tasks(SimpleNamespace(**vars(asked) | dict(problems='test')), data)
    assert {task.input for task in own} == {task.input for task in judged}
