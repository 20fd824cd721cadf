"Answers, forms of the weights and their times: what is counted, what is judged, what is refused, and the experiments end to end."

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verifying import assert_computed_again

from llmft.core import LabError, project_root
from llmft.data.tokens import load_tokenizer
from llmft.inference import latency
from llmft.inference.generation import Generated, generate
from llmft.inference.latency import answer_all, rates
from llmft.models.load import load_model
from llmft.models.meter import resident_bytes
from llmft.models.precisions import (
    Int4Linear,
    bytes_a_step,
    check_form,
    forms,
    four_bits,
    load_form,
    use_int4,
    written_out,
)
from llmft.runs.execute import execute_run
from llmft.runs.params import resolve_params
from llmft.runs.sweep_file import sweep_points
from llmft.studies.inference.word_problems import (
    ask,
    final_answer,
    read_problems,
    reference_answer,
    score,
    word_problems,
    written,
    wrong_calculations,
)

root = project_root()
gsm8k = Path(os.environ.get('LLMFT_SHARED_DATA', 'nowhere')) / 'gsm8k_test.jsonl'


# ---- answers


def test_every_built_in_problem_is_right_and_only_its_own_answer_is():
    problems = word_problems(600, 3)
    assert len({problem['question'] for problem in problems}) == 600 and not any(
        wrong_calculations(problem['answer']) for problem in problems
    )
    answers = [reference_answer(problem) for problem in problems]
    assert all(answer.isdigit() and int(answer) < 1000 for answer in answers) and len(set(answers)) > 50
    assert all(
        wrong_calculations(problem['answer'].replace(f'={answer}>>', f'={int(answer) + 1}>>'))
        for problem, answer in zip(problems, answers, strict=True)
    )
    assert score([f'so it is {int(answer) + 1}' for answer in answers], problems)['accuracy'] == 0
    assert score([f'#### {answer}.00' for answer in answers], problems)['accuracy'] == 1
    assert word_problems(600, 3) == problems != word_problems(600, 4)


@pytest.mark.skipif(not gsm8k.exists(), reason='LLMFT_SHARED_DATA does not name a folder that holds gsm8k_test.jsonl')
def test_gsm8k_is_read_whole():
    problems = read_problems(str(gsm8k))
    assert len(problems) == 1319 and score([problem['answer'] for problem in problems], problems)['accuracy'] == 1


@pytest.mark.parametrize(
    'text, number',
    [
        ('#### 72', '72'),
        ('It is #### $1,234.50 in all', '1234.5'),
        ('#### -3', '-3'),
        ('a 5 and 7.', '7'),
        ('5-3 = 2', '2'),
        ('', None),
        ('####', None),
        ('4 #### none', '4'),
        ('#### 8 #### 9', '8'),
        ('#### Step 1\n1 + 1\n#### Step 2: more\n#### 20', '20'),
        ('#### 1. Add\n7 + 1 = 8\n#### 2. Double\n#### **16** apples', '16'),
        ('#### Answer: 20', '20'),
        ('#### The final answer is $20$.', '20'),
        ('#### 3 + 4 = 7', '7'),
        ('#### 20\n\nQuestion 2: 3 and 5?\n#### 8', '20'),
        ('It is .5', '0.5'),
        ('#### -.5', '-0.5'),
        ('#### 0.50', '0.5'),
        ('It is 12.', '12'),
        ('It is -5', '-5'),
        ('It is \u22125', '-5'),
        ('It is \u20135', '-5'),
        ('It is \uff0d5', '-5'),
        ('#### \u2212$1,234.50', '-1234.5'),
        ('#### $-5', '-5'),
        ('#### +5', '5'),
        ('10\u201320', '20'),
        ('8\u22123', '3'),
        ('-0', '0'),
        ('1.5e3', '1500'),
        ('2E-3', '0.002'),
        ('1.5 \u00d7 10^3', '1500'),
        ('1.5 \u00d7 10\u00b3', '1500'),
        (r'$2 \times 10^{-2}$', '0.02'),
        ('3/4', '0.75'),
        ('-1/3', '-1/3'),
        ('2/6', '1/3'),
        ('1 3/4 cups', '1.75'),
        ('2\u00bd', '2.5'),
        ('\u2212\u00bd', '-0.5'),
        (r'#### \frac{3}{4}', '0.75'),
        (r'1\frac12', '1.5'),
        ('50%', '50'),
        (r'12.5\%', '12.5'),
        ('#### 50 percent', '50'),
        ('1,450,000', '1450000'),
        ('#### 1 450 000', '1450000'),
        ('1\u202f450\u00a0000', '1450000'),
        ("1'450'000", '1450000'),
        ('1_450_000', '1450000'),
        (r'1{,}450\,000', '1450000'),
        ('3 eggs, 450 pens', '450'),
        ('5 kg', '5'),
        ('5kg', '5'),
        ('25 cm^2', '25'),
        ('\u20ac5', '5'),
        ('5 \u00a3', '5'),
        (r'\boxed{42}', '42'),
        (r'so $\boxed{-\dfrac{1}{2}}$ of 3', '-0.5'),
        (r'#### \boxed{7}', '7'),
        (r'\boxed{5\text{ cm}^2}', '5'),
        (r'\boxed{50\%}', '50'),
        (r'\boxed{x = 1{,}000}', '1000'),
        (r'\boxed{ \left( 3, 4 \right) }', '(3,4)'),
        (r'\boxed{2x}', '2x'),
        (r'\boxed{\{1, 2\}} and 3', r'\{1,2\}'),
        ('1/2/2024', None),
        ('7/0', None),
        ('1e999999999', None),
        ('9' * 5000, None),
        (r'\boxed{', None),
    ],
)
def test_answers_are_read(text, number):
    assert final_answer(text) == number


def test_a_number_is_the_same_however_it_is_spelled():
    problem = [dict(question='?', answer='#### 1,234.50')]
    for text in ('$1234.5', '1.2345e3', '2469/2', r'\boxed{1\,234.5}', '#### 1 234.5', '1,234 1/2'):
        assert score([text], problem)['correct'] == 1, text
    for text in ('-1234.5', '1234', '12345', '1.2345'):
        assert score([text], problem)['correct'] == 0, text


def test_answers_that_were_cut_off_stand_beside_accuracy():
    problems = word_problems(4)
    marks = score([problem['answer'] for problem in problems], problems, ['stop', 'length', 'stop', 'stop'])
    assert (marks['accuracy'], marks['cut_off']) == (1, 0.25) and score(['4'], problems[:1])['cut_off'] is None


@settings(max_examples=200, deadline=None)
@given(st.fractions(max_denominator=10**6), st.sampled_from(['#### {}', 'It is {}.', r'\boxed{{{}}}', '= {} apples']))
def test_every_fraction_is_read_back(number, sentence):
    assert final_answer(sentence.format(written(number))) == written(number)
    assert final_answer(sentence.format(f'{number.numerator}/{number.denominator}')) == written(number)


@settings(max_examples=200, deadline=None)
@given(st.text('0123456789.,/-+#$%eE{}\\ boxdfrac\n\u2212\u00bd\u00b3x^', max_size=60))
def test_no_text_stops_the_judge(text):
    answer = final_answer(text)
    assert answer is None or isinstance(answer, str)


def test_rows_of_math_are_read(tmp_path):
    rows = [dict(problem='1 + 1?', solution=r'It is $\boxed{\frac{4}{2}}$.', level='Level 1', type='Algebra')]
    rows.append(dict(problem='?', solution=r'So $\boxed{x^2 + 1}$', answer='x^2+1', unique_id='test/a/1.json'))
    (tmp_path / 'math.json').write_text(json.dumps(rows))
    problems = read_problems(str(tmp_path / 'math.json'))
    assert [reference_answer(problem) for problem in problems] == ['2', 'x^2+1']
    assert score([r'\boxed{2}', r'\boxed{x^2+1}'], problems)['accuracy'] == 1


@pytest.mark.parametrize(
    'lines, message',
    [
        (['{"question": 5, "answer": "#### 1"}'], ":1 has no text in the field 'question': it holds int"),
        (['{"problem": "a", "solution": "It is 5."}'], ":1 has no line '#### n'.*boxed"),
        (['{"question": "a"}'], "no field 'answer'"),
        (['{"question": "a", "answer": "5"}'], ":1 has no line '#### n'"),
        (['{"question": "a", "answer": "#### x"}'], 'no line'),
        (['[1]'], 'no JSON object'),
        (['{"question": "a", "answer": "#### 1"}', '{'], ':2 is not JSON'),
        ([], '0 rows and 1 are asked'),
    ],
)
def test_problem_files_are_refused_with_the_row(tmp_path, lines, message):
    (tmp_path / 'p.jsonl').write_text('\n'.join(lines))
    with pytest.raises(LabError, match=message) as caught:
        read_problems(str(tmp_path / 'p.jsonl'))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'data, message',
    [
        ('builtin:algebra', 'builtin:arithmetic'),
        ('nowhere.jsonl', 'no such file'),
        ('nobody/nothing', 'the hub gave nothing'),
    ],
)
def test_problems_that_are_not_there_are_one_line(data, message):
    with pytest.raises(LabError, match=message):
        read_problems(data)


def test_the_chat_template_is_used_when_there_is_one():
    tokenizer, problems = load_tokenizer('base'), word_problems(2)
    assert tokenizer.decode(ask(problems, tokenizer)[0]).startswith('<|user|>' + problems[0]['question'])
    plain = ask(problems, tokenizer, False)[0]
    tokenizer.chat_template = None
    assert ask(problems, tokenizer)[0] == plain and tokenizer.decode(plain).endswith('Answer:')


# ---- forms of the weights


@pytest.mark.parametrize('group', [32, 64])
def test_four_bits_keep_the_ends_and_lose_at_most_half_a_step(group):
    torch.manual_seed(0)
    weight = torch.randn(48, 256) * torch.logspace(-3, 1, 48)[:, None]
    back, span = (
        written_out(*four_bits(weight, group)),
        weight.unflatten(1, (-1, group)).amax(-1) - weight.unflatten(1, (-1, group)).amin(-1),
    )
    assert (
        (back - weight).abs().unflatten(1, (-1, group)).amax(-1)
        <= span / 30 * 1.2 + 0.01 * weight.abs().amax(1)[:, None]
    ).all()
    assert not torch.equal(back, weight)


@pytest.mark.parametrize('rows', [1, 3, 17])
def test_the_packed_product_is_the_product_with_the_matrix_written_out(rows):
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(256, 96), torch.randn(rows, 256)
    exact = inputs @ written_out(*four_bits(layer.weight.detach(), 64)).t() + layer.bias
    assert (Int4Linear(layer)(inputs) - exact).abs().max() < 0.02 * exact.abs().max()


def test_int4_holds_what_it_says_and_leaves_embedding_and_head():
    model = load_model('base', 'bf16')
    linears = (
        sum(layer.weight.numel() for layer in model.modules() if type(layer) is torch.nn.Linear)
        - model.lm_head.weight.numel()
    )
    before = resident_bytes(model)
    assert use_int4(model) == linears
    assert type(model.lm_head) is torch.nn.Linear and resident_bytes(model) - before == pytest.approx(
        linears * (0.5 + 4 / 55 - 2), rel=0.05
    )
    with pytest.raises(LabError, match='no linear layer'):
        use_int4(load_model('preset:gpt2-tiny'))


def test_a_head_whose_logits_are_scaled_is_not_held_in_four_bits():
    model = load_model('base', 'bf16')
    model.config.logits_scaling = 4.0
    use_int4(model)
    assert type(model.lm_head) is torch.nn.Linear and bytes_a_step(model) > 0


@pytest.mark.parametrize('form', forms)
def test_every_form_answers_nearly_as_full_precision(form):
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        exact, mine = load_form('base', 'fp32')(ids).logits, load_form('base', form)(ids).logits.float()
    distance = ((mine - exact).std() / exact.std()).item()
    assert distance < dict(fp32=1e-6, bf16=0.03, fp16=0.01, int8=0.05, nf4=0.3, int4_fast=0.3)[form]
    assert generate(load_form('base', form), ids.tolist(), 3).new_tokens == 3


def test_bytes_a_step_leave_out_an_embedding_that_is_only_looked_up():
    from llmft.models.load import presets

    tied = load_model('preset:llama-tiny')
    presets['llama-untied'] = presets['llama-tiny'] | dict(tie_word_embeddings=False)
    untied = load_model('preset:llama-untied')
    assert bytes_a_step(tied) == resident_bytes(tied) == bytes_a_step(untied) == resident_bytes(untied) - 512 * 64 * 4


@pytest.mark.parametrize(
    'form, compute, message',
    [
        ('fp8', 'fp32', "precision is 'fp8'"),
        ('nf5', 'fp32', "did you mean 'nf4'"),
        ('nf4', 'half', "compute is 'half'"),
    ],
)
def test_unknown_forms_are_one_line(form, compute, message):
    with pytest.raises(LabError, match=message):
        check_form(form, compute)


def test_a_form_whose_library_is_missing_names_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    for form in ('nf4', 'int8'):
        with pytest.raises(LabError, match='bitsandbytes is not installed'):
            check_form(form)
    check_form('int4_fast')


# ---- times


def test_the_warm_up_is_made_and_not_counted(monkeypatch):
    calls, inner = [], latency.generate
    monkeypatch.setattr(
        latency,
        'generate',
        lambda model, rows, new, **options: calls.append((len(rows), new)) or inner(model, rows, new, **options),
    )
    parts, _ = answer_all(load_model('preset:llama-tiny'), [[5], [6], [7]], 2, 6, warmup_tokens=3)
    answered = [(2, 6), (1, 6)]
    again = (
        [] if torch.cuda.is_available() else [(2, 6)]
    )  # on a CPU one batch is answered a second time, for its memory
    assert calls == [(2, 3)] + answered + again and sum(part.new_tokens for part in parts) == 18


def test_every_shape_of_a_compiled_step_is_warmed_up(monkeypatch):
    calls, inner = [], latency.generate

    def plain(model, rows, new, compiled, **options):
        calls.append((len(rows), max(map(len, rows)), new))
        return inner(model, rows, new, **options)

    monkeypatch.setattr(latency, 'generate', plain)
    rows = [[5] * 3, [6] * 4, [7] * 125, [8] * 2, [9] * 3]
    answer_all(load_model('preset:llama-tiny'), rows, 2, 6, compiled=True)
    warm, answered = calls[:3], [(2, 4, 6), (2, 125, 6), (1, 3, 6)]
    assert sorted(warm) == sorted(answered) and calls[3:6] == answered


def test_tokens_are_counted_from_ids_and_prompts_apart():
    model, rows = load_model('preset:llama-tiny'), [[5, 6, 7], [8], [9, 10]]
    free = generate(model, rows, 8)
    stop = free.ids[1][3]
    parts, _ = answer_all(model, rows, 2, 8, {stop})
    found = rates(parts)
    ended = sum(part.stopped.count('stop') for part in parts)
    assert ended >= 1 and found['total_tokens'] == sum(len(ids) for part in parts for ids in part.ids) + ended
    assert (
        found['total_tokens_with_prompt'] - found['total_tokens'] == 6
        and found['total_queries'] == 3
        and found['bandwidth_share'] is None
    )


def test_rates_of_known_times():
    parts = [
        Generated([[1] * 4], ['length'], 10, 4, 2.0, 1.0, [0.2, 0.3, 0.4]),
        Generated([[1] * 4], ['length'], 20, 4, 4.0, 3.0, [0.2, 0.3, 0.5]),
    ]
    found = rates(parts, 3000, 1e5)
    assert (
        found['total_time'] == 6
        and found['avg_latency'] == 3
        and found['throughput_tokens_per_sec'] == pytest.approx(8 / 6)
        and found['throughput_with_prompt_tokens_per_sec'] == pytest.approx(38 / 6)
    )
    assert (
        found['throughput_queries_per_sec'] == pytest.approx(1 / 3)
        and found['time_to_first_token'] == 2
        and found['time_per_output_token'] == pytest.approx(0.3)
        and found['time_per_output_token_p95'] == pytest.approx(0.475)
    )
    assert found['bandwidth_share'] == pytest.approx(0.1)


# ---- the experiments

least = dict(num_questions=2, batch_sizes=[1, 2], max_new_tokens=4, num_eval_samples=1, max_length=128)
keys = {
    'total_queries',
    'total_time',
    'avg_latency',
    'total_tokens',
    'throughput_tokens_per_sec',
    'throughput_queries_per_sec',
    'peak_memory_gb',
    'total_tokens_with_prompt',
    'time_to_first_token',
    'time_per_output_token',
    'time_per_output_token_p95',
    'bandwidth_share',
    'model_size_gb',
    'accuracy',
    'perplexity',
}


def overrides(**values):
    return [f'{name}={value if isinstance(value, str) else json.dumps(value)}' for name, value in values.items()]


def test_the_experiment_and_the_comparison_leave_reports(tmp_path):
    for form in ('fp16', 'int4_fast'):
        notebook, params = resolve_params(
            [root / f'params/inference/{form}.yaml'], overrides(outputs=str(tmp_path), **least), 'small'
        )
        record = execute_run(notebook, params, on_line=lambda line: None)
        assert record['run']['status'] == 'done', record['run']['error']
        metrics = json.loads((tmp_path / 'inference' / form / 'metrics.json').read_text())
        assert (
            keys <= set(metrics)
            and None not in [metrics[key] for key in keys]
            and metrics['total_tokens'] <= 8
            and 'throughput_tokens_per_sec_batch2' in metrics
        )
        answers = (tmp_path / 'inference' / form / 'answers.jsonl').read_text().splitlines()
        assert answers and all(isinstance(json.loads(line)['right'], bool) for line in answers)
        assert_computed_again('inference', tmp_path / 'inference' / form)
    notebook, params = resolve_params(
        [root / 'nbs/experiments/inference_compare.ipynb'], overrides(outputs=str(tmp_path))
    )
    record = execute_run(notebook, params, on_line=lambda line: None)
    assert record['run']['status'] == 'done', record['run']['error']
    folder = tmp_path / 'inference_compare' / 'inference'
    assert {'inference_latency.png', 'inference_memory.png', 'inference_throughput.png', 'inference_quality.png'} <= {
        path.name for path in (folder / 'figures').iterdir()
    }
    page, metrics = (folder / 'report.html').read_text(), json.loads((folder / 'metrics.json').read_text())
    assert (
        '70.99' in page
        and '40.71' in page
        and metrics['runs'] == 2
        and metrics['baseline'] == 'fp16'
        and metrics['same_terms']
    )


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(precision='fp8'), "precision is 'fp8'"),
        (dict(max_new_tokens=0), 'max_new_tokens is 0'),
        (dict(max_new_tokens=2000), 'do not fit the 2048 positions'),
        (dict(batch_sizes=[]), 'batch_sizes'),
    ],
)
def test_bad_parameters_end_the_run_before_a_model_is_loaded(tmp_path, wrong, message):
    source = [
        cell
        for cell in json.loads((root / 'nbs/experiments/inference.ipynb').read_text())['cells']
        if cell['cell_type'] == 'code'
    ]
    texts = [''.join(cell['source']) for cell in source]
    upto = next(number for number, text in enumerate(texts) if 'load_form(' in text and 'import' not in text)
    names = dict(display=lambda *_: None)
    exec(texts[1], names)
    names.update(wrong, outputs=str(tmp_path), name='wrong')
    with pytest.raises(LabError, match=message):
        for text in texts[2:upto]:
            exec(text, names)


def test_the_sweep_runs_every_form():
    for scale in ('', 'small'):
        points = sweep_points(root / 'params/sweeps/inference.yaml', scale)
        assert len(points) == len(forms) + 1 and {point.params['precision'] for point in points[:-1]} == set(forms)
