"Instruction rows: masks, ends, what is too long, leaks; and the score of programs."

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data.tokens import load_tokenizer
from llmft.studies.code.pass_at_k import Attempt, check_all, check_references, pass_at_k, score
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
    examples, _ = encode_tasks([task], tokenizer, 4096, template, 'Be exact.')
    ids, trained = parts(examples, 0)
    first = trained.index(True)
    assert ids[:first] == prompt_rows([task], tokenizer, template, 'Be exact.')[0] and all(trained[first:])
    assert tokenizer.decode(ids[first:]) == solution + tokenizer.eos_token
    whole, _ = encode_tasks([task], tokenizer, 4096, template, 'Be exact.', loss_on='all')
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
    examples, notes = encode_tasks(tasks, tokenizer, max_length, problem_template, '', loss_on, policy)
    full, _ = encode_tasks(tasks, tokenizer, 10**6, problem_template, '', loss_on)
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
    with pytest.raises(LabError, match="no usable row in the split 'valid'"):
        load_tasks(write(tmp_path, good[:3] + good[4:], 'b.jsonl'))


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
