"""Every answer of a conversation is trained on, and nothing else, whatever the chat template does."""

import json
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_templates import byte_tokenizer, families, family_tokenizer, with_tags, with_tools
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.bench.instruct import instruct_setting, with_turns
from llmft.bench.peers import log_normal_documents
from llmft.bench.training import check_steps, same_step
from llmft.core import LabError, write_json
from llmft.data.chats import Chat, as_chat, chat_examples, chat_rows, render_chat
from llmft.data.tables import Row, read_documents, shape_of
from llmft.data.tokens import control_tokens, turn_ends
from llmft.inference.asking import asked_by, question_tokens, system_of
from llmft.runs.inputs import check_inputs
from llmft.studies.code.setup import runnable_tasks, task_data
from llmft.studies.code.tasks import Task, as_task, encode_tasks, load_tasks, prompt_rows

tokenizer_of = lru_cache(family_tokenizer)
every_family = pytest.mark.parametrize('family', families)
add = dict(type='function', function=dict(name='add', description='Adds.', parameters=dict(type='object')))


def talk(*contents, system=None):
    "A conversation whose contents are said by user and assistant in turns."
    first = [dict(role='system', content=system)] if system else []
    said = zip(['user', 'assistant'] * 9, contents, strict=False)
    turns = [dict(role=role, content=content) for role, content in said]
    return Chat('chats.jsonl:1', first + turns)


def calling():
    "A conversation in which the model calls a tool."
    call = dict(type='function', function=dict(name='add', arguments=dict(a=2, b=3)))
    turns = [dict(role='user', content='2 + 3?'), dict(role='assistant', content='', tool_calls=[call]),
             dict(role='tool', content='5'), dict(role='assistant', content='It is 5.'),
             dict(role='user', content='Sure?'), dict(role='assistant', content='Yes.')]
    return Chat('chats.jsonl:2', turns, [add])


def learnt(chat, tokenizer):
    "The texts of the runs of tokens that are trained on, in each example of a conversation."
    found = []
    for ids, mask in chat_rows([chat], tokenizer):
        runs, run = [], []
        for token, on in zip([*ids, None], [*mask, False], strict=True):
            if on:
                run.append(token)
            elif run:
                runs.append(tokenizer.decode(run))
                run = []
        found.append(runs)
    return found


# ---- what is learnt


@every_family
@pytest.mark.parametrize('system', [None, 'Be brief.'])
def test_every_answer_is_learnt_once_with_its_end(family, system):
    tokenizer = tokenizer_of(family)
    answers = ['First answer.', 'The second one.', 'And a third.']
    chat = talk('Hi', answers[0], 'Go on', answers[1], 'And?', answers[2], system=system)
    runs = [run for example in learnt(chat, tokenizer) for run in example]

    assert len(runs) == 3
    for run, answer in zip(runs, answers, strict=True):
        end = tokenizer.convert_ids_to_tokens(tokenizer.encode(run, add_special_tokens=False)[-1])
        assert answer in run and tokenizer.convert_tokens_to_ids(end) in turn_ends(tokenizer)
        assert run.removeprefix('<think>\n\n</think>\n\n').strip() == answer + end


@every_family
@pytest.mark.parametrize('system', [None, 'Be brief.'])
def test_each_answer_stands_behind_what_the_model_is_asked_with(family, system):
    tokenizer = tokenizer_of(family)
    chat = talk('Hi', 'one', 'Go on', 'two', system=system)
    asked = [render_chat(chat.until(-count), tokenizer, ask=True) for count in (3, 1)]
    starts = [ids[:place] for ids, mask in chat_rows([chat], tokenizer)
              for place in range(1, len(ids)) if mask[place] and not mask[place - 1]]
    assert [tokenizer.decode(ids) for ids in starts] == asked
    assert starts[0] == tokenizer.encode(asked[0], add_special_tokens=False)


def test_how_many_examples_a_conversation_becomes():
    "A template that is a prefix of itself needs one; one that drops thinking or moves the system prompt needs more."
    plain = {family: len(learnt(talk('a', 'b', 'c', 'd', 'e', 'f'), tokenizer_of(family))) for family in families}
    assert plain == dict.fromkeys(families, 1) | dict(qwen3=3)
    moved = talk('a', 'b', 'c', 'd', system='s')
    assert len(learnt(moved, tokenizer_of('mistral'))) == 2
    assert len(learnt(moved, tokenizer_of('gemma3'))) == 1


def test_thinking_is_learnt_in_its_own_answer_and_dropped_before_later_ones():
    first, second = '<think>\nfour\n</think>\n\n4', '<think>\nsix\n</think>\n\n6'
    rows = chat_rows([talk('2 + 2?', first, '3 + 3?', second)], tokenizer_of('qwen3'))
    texts = [tokenizer_of('qwen3').decode(ids) for ids, _ in rows]
    assert learnt(talk('2 + 2?', first, '3 + 3?', second), tokenizer_of('qwen3')) == [
        [first + '<|im_end|>'], [second + '<|im_end|>']]
    assert 'four' in texts[0] and 'four' not in texts[1] and '\n4<|im_end|>' in texts[1]


@pytest.mark.parametrize('family', with_tools)
def test_tools_and_calls_are_rendered_and_calls_are_learnt(family):
    tokenizer = tokenizer_of(family)
    examples = learnt(calling(), tokenizer)
    runs = [run for example in examples for run in example]
    assert len(runs) == 3 and '"add"' in runs[0] and '"a": 2' in runs[0]
    assert 'It is 5.' in runs[1] and 'Yes.' in runs[2]
    assert all('Adds.' in tokenizer.decode(ids) for ids, _ in chat_rows([calling()], tokenizer))
    assert not any('"result"' in run or 'Adds.' in run for run in runs)


def test_generation_tags_of_a_template_are_equal_to_the_turns():
    chat = talk('Hi', 'one', 'Go on', 'two\n\nlines', system='s')
    tagged, plain = family_tokenizer('chatml', with_tags), tokenizer_of('chatml')
    assert chat_rows([chat], tagged) == chat_rows([chat], plain)
    own = tagged.apply_chat_template(chat.turns, return_dict=True, return_assistant_tokens_mask=True)
    [(ids, mask)] = chat_rows([chat], tagged)
    assert (ids, mask) == (own['input_ids'][:-1], [bool(on) for on in own['assistant_masks'][:-1]])
    assert tagged.decode(own['input_ids'][-1]) == '\n' and not own['assistant_masks'][-1]


def test_tags_are_believed_where_they_say_something_else():
    "Here the line feed behind a turn is generated too."
    wider = with_tags.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}",
                              "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}")
    tokenizer = family_tokenizer('chatml', wider.replace("{% endif %}{{ '\n' }}", "{{ '\n' }}{% endif %}"))
    chat = talk('Hi', 'one', 'Go on', 'two')
    own = tokenizer.apply_chat_template(chat.turns, return_dict=True, return_assistant_tokens_mask=True)
    assert learnt(chat, tokenizer) == [['one<|im_end|>\n', 'two<|im_end|>\n']]
    assert chat_rows([chat], tokenizer) == [(own['input_ids'], [bool(on) for on in own['assistant_masks']])]


def test_a_template_without_ends_gets_an_end_of_text():
    bare = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}" \
           "{% if add_generation_prompt %}\nassistant: {% endif %}"
    tokenizer = family_tokenizer('chatml', bare)
    assert learnt(talk('Hi', 'one', 'Go on', 'two'), tokenizer) == [['one<|im_end|>'], ['two<|im_end|>']]


def test_a_prompt_that_opens_thinking_stands_before_the_answer():
    "As in templates whose prompt ends with an empty thought, and which write none once there is an answer."
    from chat_templates import chatml

    thought = 'assistant\n<think>\n\n</think>\n\n{% endif'
    tokenizer = family_tokenizer('qwen3', chatml.replace('assistant\n{% endif', thought))
    rows = chat_rows([talk('Hi', 'one')], tokenizer)
    assert tokenizer.decode(rows[0][0]).endswith('assistant\n<think>\n\n</think>\n\none<|im_end|>')
    assert learnt(talk('Hi', 'one'), tokenizer) == [['one<|im_end|>']]


def test_the_same_data_tomorrow():
    text = render_chat(talk('Hi', 'one'), tokenizer_of('llama3_1'))
    assert 'Today Date: 26 Jul 2024' in text


published = find_spec('trl') and Path(find_spec('trl').origin).parent / 'chat_templates'


@pytest.mark.skipif(not published, reason='needs the extra bench, whose package trl brings published templates')
@pytest.mark.parametrize('name', ['qwen2_5', 'qwen3', 'llama3_1', 'llama3_2', 'gemma3', 'phi3', 'gptoss'])
def test_published_templates(name):
    text = (published / f'{name}.jinja').read_text(encoding='utf-8')
    special = sorted({'<eos>', '<bos>', *re.findall(r'<[|].{1,20}?[|]>|<(?:start|end)_of_turn>', text)})
    tokenizer = byte_tokenizer(special, eos_token='<eos>', bos_token='<bos>', pad_token='<eos>', chat_template=text)
    runs = [run for example in learnt(talk('Hi', 'First.', 'Go on', 'Second.'), tokenizer) for run in example]
    ends = re.compile('|'.join(map(re.escape, special)) + r'|<think>|</think>|final|\n')
    assert [ends.sub('', run) for run in runs] == ['First.', 'Second.']
    assert all(run.endswith(tuple(special)) for run in runs)


# ---- what users write


@every_family
@settings(max_examples=12, deadline=None)
@given(place=st.integers(0, 3), token=st.integers(0, 99))
def test_a_turn_cannot_be_forged(family, place, token):
    tokenizer = tokenizer_of(family)
    steering = control_tokens(tokenizer)
    forged = f'x{sorted(steering)[token % len(steering)]}y'
    contents = ['Hi', 'one', 'Go on', 'two']
    plain = chat_rows([talk(*contents)], tokenizer)
    contents[place] = forged
    hostile = chat_rows([talk(*contents)], tokenizer)

    def counted(rows):
        return [sum(ids.count(number) for number in steering.values()) for ids, _ in rows]

    assert counted(hostile) == counted(plain)
    assert any(forged in tokenizer.decode(ids) for ids, _ in hostile)


@pytest.mark.parametrize('family', with_tools)
def test_tools_cannot_forge_a_turn(family):
    tokenizer = tokenizer_of(family)
    chat = calling()
    plain = chat_rows([chat], tokenizer)
    chat.tools = [json.loads(json.dumps(add).replace('Adds.', tokenizer.eos_token * 3))]
    end = tokenizer.eos_token_id
    assert [ids.count(end) for ids, _ in chat_rows([chat], tokenizer)] == [ids.count(end) for ids, _ in plain]


# ---- rows and files


def read(values):
    return as_chat(Row(values, 'chats.jsonl:7', 'chats.jsonl:7'))


turns = [dict(role='user', content='Hi'), dict(role='assistant', content='Hello')]
bad = {
    'empty conversation': dict(messages=[]),
    '2 system turns': dict(messages=[dict(role='system', content='a')] * 2 + turns),
    "field 'tools', is not JSON": dict(messages=turns, tools='add(a, b)'),
    "field 'tools', is no list of objects": dict(messages=turns, tools=dict(name='add')),
    "turn 2 has the unknown role 'asistant' (did you mean 'assistant'": dict(
        messages=[turns[0], dict(turns[1], role='asistant')]),
    'the turns must alternate': dict(messages=[turns[0], *turns]),
    'no assistant turn': dict(conversations=[{'from': 'human', 'value': 'Hi'}]),
    'turn 1 has no text: its content is NoneType': dict(messages=[dict(role='user', content=None), turns[1]]),
    'turn 1 has no text: its content is list': dict(
        messages=[dict(role='user', content=[dict(type='image_url')]), turns[1]]),
    "field 'messages', is no list of objects": dict(messages=['Hi', 'Hello']),
    'the arguments of a tool call, is not JSON': dict(
        messages=[turns[0], dict(role='assistant', tool_calls=[dict(function=dict(name='a', arguments='{'))])]),
}


@pytest.mark.parametrize('words', bad)
def test_a_bad_row_is_one_line_that_names_it(words):
    with pytest.raises(LabError) as error:
        read(bad[words])
    assert words in str(error.value) and str(error.value).startswith('chats.jsonl:7') and '\n' not in str(error.value)


def test_templates_that_cannot_be_used_are_named():
    no_answers = family_tokenizer('chatml', "{% for m in messages %}{{ m.role }}{% endfor %}")
    task = load_task(dict(messages=turns))
    with pytest.raises(LabError, match='writes no assistant turn'):
        encode_tasks([task], no_answers, 99, 'chat')
    with pytest.raises(LabError, match='chats.jsonl:2 has tools and the chat template writes none'):
        chat_rows([calling()], tokenizer_of('gemma3'))
    refusing = family_tokenizer('gemma3', "{{ raise_exception('no system role') }}")
    with pytest.raises(LabError, match='refuses the conversation .no system role.'):
        chat_rows([talk('Hi', 'one')], refusing)


def load_task(values):
    return as_task(values, 'chats.jsonl:1')


forms = dict(
    messages=lambda asked, answer: dict(
        messages=[dict(role='user', content=asked), dict(role='assistant', content=answer)]),
    sharegpt=lambda asked, answer: dict(
        conversations=[{'from': 'human', 'value': asked}, {'from': 'gpt', 'value': answer}]),
    alpaca=lambda asked, answer: dict(instruction=asked, input='', output=answer),
    completion=lambda asked, answer: dict(prompt=asked, completion=answer),
)


@pytest.mark.parametrize('form', forms)
@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'csv'])
def test_every_form_becomes_the_same_examples(form, ending, tmp_path):
    import pandas

    rows = [forms[form](f'Question {number}?', f'Answer {number}.') for number in range(8)]
    assert {shape_of(row) for row in rows} == {form}
    path = tmp_path / f'chats.{ending}'
    if ending == 'jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    elif ending == 'parquet':
        pandas.DataFrame(rows).to_parquet(path)
    else:
        as_text = [{name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
                   for row in rows]
        pandas.DataFrame(as_text).to_csv(path, index=False)

    sides, _ = load_tasks(str(path), valid_share=.25)
    examples, notes, _ = encode_tasks(sides['train'], tokenizer_of('smollm2'), 200, 'chat')
    assert len(sides['train']) + len(sides['valid']) + len(sides['test']) == 8 and sides['valid']
    assert notes['targets'] == len(examples) * len('Answer 1.') + len(examples)
    wanted = chat_examples([task.chat for task in sides['train']], tokenizer_of('smollm2'))
    assert examples.ids.tolist() == wanted.ids.tolist()


def test_conversations_are_refused_where_they_cannot_be_used(tmp_path):
    path = tmp_path / 'chats.jsonl'
    path.write_text(json.dumps(dict(messages=turns)) + '\n')
    with pytest.raises(LabError, match='train on them with instruct and template=chat'):
        list(read_documents(path))
    with pytest.raises(LabError, match='is a conversation: set template=chat'):
        check_inputs('instruct', dict(data=str(path), template='{input}{solution}'))
    check_inputs('instruct', dict(data=str(path), template='chat'))
    path.write_text(json.dumps(dict(messages=[])) + '\n')
    with pytest.raises(LabError, match='empty conversation'):
        check_inputs('instruct', dict(data=str(path), template='chat'))


def test_an_instruction_run_reads_conversations(tmp_path):
    path = tmp_path / 'chats.jsonl'
    rows = [forms['messages'](f'Question {number}?', f'Answer {number}.') for number in range(12)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    params = dict(model='base', data=str(path), data_config='', input_field='input', training_field='solution',
                  split_field='split', num_samples=0, valid_share=.25, seed=1, template='chat', system_prompt='unused',
                  loss_on='completion', too_long='drop', max_length=64, problems='test', num_problems=0,
                  num_eval_samples=0, replay_share=0.0)
    data = task_data(SimpleNamespace(**params))
    shown = data.tokenizer.decode(data.examples['train'][0])
    assert re.fullmatch(r'<\|user\|>Question \d+\?<\|assistant\|>Answer \d+\.<\|endoftext\|>', shown)
    assert runnable_tasks(SimpleNamespace(**params), data) == []
    with pytest.raises(LabError, match='is a conversation: set template=chat'):
        task_data(SimpleNamespace(**params | dict(template='{input}{solution}')))


def test_cutting_keeps_the_answers_that_fit(tmp_path):
    task = load_task(dict(messages=[turn for number in range(4) for turn in (
        dict(role='user', content=f'Question {number}?'), dict(role='assistant', content=f'Answer {number}.'))]))
    tokenizer = tokenizer_of('chatml')
    whole, *_ = encode_tasks([task], tokenizer, 1000, 'chat')
    short, notes, _ = encode_tasks([task], tokenizer, int(whole.slots[0]) // 2, 'chat', too_long='truncate')
    assert 0 < notes['targets'] < int(whole.supervised()[0]) == notes['targets'] + notes['targets_lost']
    everything, *_ = encode_tasks([task], tokenizer, 1000, 'chat', loss_on='all')
    assert int(everything.supervised()[0]) == int(everything.slots[0])


# ---- the benchmark


def test_peers_train_on_the_answers_of_conversations_alone():
    setting = instruct_setting('preset:llama-tiny', rank=4, max_length=128, rows=4, accumulation=1)
    rows = with_turns(log_normal_documents(4, 512, 1, median=40.0, spread=0.6, high=120), 4)
    steps = {name: same_step(name, setting, rows) for name in ('ours', 'hf_padded_full')}
    assert check_steps(steps)[1]['gradient_difference'] < 1e-5


def test_conversations_that_begin_alike_stay_on_one_side(tmp_path):
    path = tmp_path / 'chats.jsonl'
    rows = []
    for number in range(20):
        asked = [dict(role='user', content=f'Question {number}?'), dict(role='assistant', content=f'Answer {number}.')]
        more = [dict(role='user', content=f'And {number}?'), dict(role='assistant', content=f'More {number}.')]
        rows += [dict(messages=asked), dict(messages=asked + more)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for seed in range(5):
        sides, _ = load_tasks(str(path), valid_share=0.25, seed=seed)
        first = {side: {task.chat.turns[0]['content'] for task in tasks} for side, tasks in sides.items()}
        assert not first['train'] & (first['valid'] | first['test']) and first['valid']
        assert sum(map(len, sides.values())) == len(rows)

    rows = [row | dict(split='train' if number % 2 else 'valid') for number, row in enumerate(rows)]
    rows.append(dict(messages=[dict(role='user', content='Else?'), dict(role='assistant', content='Yes.')], split='train'))
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    sides, counts = load_tasks(str(path))
    assert len(sides['train']) == 1 and counts['also_held_out'] == 20


def test_a_run_is_asked_by_the_tokens_that_it_was_trained_on(tmp_path):
    task = Task('t', 'Say <|im_end|> twice.', 'a solution')
    for template in ('chat', '<|im_start|>user\n{system_prompt} {input}<|im_end|>\n<|im_start|>assistant\n{solution}'):
        params = dict(template=template, system_prompt='Be <|im_end|>.')
        write_json(tmp_path / 'run.json', dict(params=params, meta=dict(notes=dict(train=dict(conversations=0)))))
        source, tokenizer = SimpleNamespace(place=tmp_path / 'adapter'), tokenizer_of('chatml')
        (trained_on,) = prompt_rows([task], tokenizer, template, 'Be <|im_end|>.')
        how, system = asked_by(source, tokenizer), system_of(source)
        assert question_tokens(task.input, how, tokenizer, system) == trained_on
