"Where texts begin and end, which tokens only a template may write, and what a perplexity counts."

import math
import types

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmft.data.corpora import builtin_part
from llmft.data.pdfs import PdfFile, pdf_corpus
from llmft.data.tables import Documents
from llmft.data.token_files import Subwords
from llmft.data.tokens import (
    are_rendered,
    control_tokens,
    cut,
    edges,
    encode,
    load_tokenizer,
    looks_like_control,
    prompt_tokens,
    rendered_rows,
    scored_bytes,
    show_tokens,
    text_notes,
    text_rows,
    turn_ends,
)
from llmft.inference import generation
from llmft.inference.generation import complete, end_tokens, written_text
from llmft.models.load import load_model
from llmft.runs.report import clean_html
from llmft.studies.code import pass_at_k
from llmft.studies.code.tasks import Task, encode_tasks, prompt_rows
from llmft.studies.inference.word_problems import ask
from llmft.training.step import evaluate_loss, judge

_characters = [chr(point) for point in range(32, 127)]

_chatml = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_llama3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_llama2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(special, plain=(), rule=None, **options):
    "A byte-level tokenizer with a few merges; `rule` says what it puts around a text."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [('d', 'e'), ('de', 'f'), ('Ġ', 'a'), ('<', '|')]
    words = [*alphabet, *map(''.join, merges)]
    raw = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.add_tokens([AddedToken(token, special=False) for token in plain])
    if rule:
        known = [(token, raw.token_to_id(token)) for token in special if token in rule]
        raw.post_processor = processors.TemplateProcessing(single=rule, special_tokens=known)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **options)


def qwen_like():
    "No beginning; a token that steers and is not called special; an added one that is only text."
    return byte_level(['<|endoftext|>', '<|im_start|>', '<|im_end|>'], ['<|fim_prefix|>', '<tool_call>'],
                      eos_token='<|im_end|>', pad_token='<|endoftext|>', chat_template=_chatml)


def smollm_like():
    "A beginning-of-text token that the tokenizer puts nowhere."
    return byte_level(['<|endoftext|>', '<|im_start|>', '<|im_end|>'], bos_token='<|im_start|>', eos_token='<|im_end|>',
                      pad_token='<|im_end|>', chat_template=_chatml)


def llama3_like():
    "A beginning by the tokenizer's rule, which its template writes too; turns end otherwise than texts."
    special = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
    return byte_level(special, rule='<|begin_of_text|> $A', bos_token='<|begin_of_text|>',
                      eos_token='<|end_of_text|>', pad_token='<|end_of_text|>', chat_template=_llama3)


def both_ends():
    "A beginning and an end by the tokenizer's rule."
    return byte_level(['<s>', '</s>'], rule='<s> $A </s>', bos_token='<s>', eos_token='</s>', pad_token='</s>')


def _pieces(words, kind, **options):
    "A tokenizer of SentencePiece's kind: a space before each text, spaces as ▁."
    raw = Tokenizer(kind(words))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    raw.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    raw.add_special_tokens(['<unk>', '<s>', '</s>'])
    raw.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token='<s>', eos_token='</s>', pad_token='</s>',
                                   unk_token='<unk>', **options)


_words = ['<unk>', '<s>', '</s>', '▁', '▁▁', '▁▁▁', '▁▁▁▁', *_characters[1:], '\n']


def llama2_like():
    "Merges of spaces; the template writes the beginning too."
    merges = [('▁', '▁'), ('▁▁', '▁▁'), ('▁▁', '▁')]
    return _pieces({word: number for number, word in enumerate(_words)},
                   lambda words: models.BPE(words, merges, unk_token='<unk>', fuse_unk=True), chat_template=_llama2)


def unigram():
    "A vocabulary in which the control tokens are pieces that text could be cut into."
    scores = [(word, 0. if word in ('<s>', '</s>') else -float(2 + len(word))) for word in _words]
    return _pieces(scores, lambda words: models.Unigram(words, unk_id=0))


kinds = dict(qwen=qwen_like, smollm=smollm_like, llama3=llama3_like, llama2=llama2_like, both=both_ends,
             unigram=unigram, base=lambda: load_tokenizer('base'))
chats = ('qwen', 'smollm', 'llama3', 'llama2', 'base')
every_kind = pytest.mark.parametrize('kind', kinds)
every_chat = pytest.mark.parametrize('kind', chats)


def tiny(tokenizer, seed=0):
    "A small model with random weights for a tokenizer."
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
                         bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def names(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(map(int, ids)))


def test_the_tokenizers_own_rule_is_asked():
    around = {kind: tuple(names(make(), part) for part in edges(make())) for kind, make in kinds.items()}
    assert around == dict(
        qwen=([], ['<|im_end|>']), smollm=([], ['<|im_end|>']), llama3=(['<|begin_of_text|>'], ['<|end_of_text|>']),
        llama2=(['<s>'], ['</s>']), both=(['<s>'], ['</s>']), unigram=(['<s>'], ['</s>']),
        base=(['<|endoftext|>'], ['<|endoftext|>']))


def test_a_vocabulary_of_digits_is_asked_with_a_digit():
    raw = Tokenizer(models.BPE({'0': 0, '1': 1, '<s>': 2, '</s>': 3}, []))
    raw.add_special_tokens(['<s>', '</s>'])
    raw.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 2)])
    assert edges(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token='<s>', eos_token='</s>')) == ([2], [3])


@every_kind
def test_a_document_begins_and_ends_by_the_rule(kind):
    tokenizer = kinds[kind]()
    begin, end = edges(tokenizer)
    row = encode(['def a b'], tokenizer)[0].tolist()
    inside = tokenizer.encode('def a b', add_special_tokens=False)
    assert row == begin + inside + end
    assert prompt_tokens(['def a b'], tokenizer) == [begin + inside]


@every_kind
def test_what_users_write_never_becomes_a_control_token(kind):
    tokenizer = kinds[kind]()
    steering = control_tokens(tokenizer)
    begin, end = edges(tokenizer)
    for spelled in steering:
        for text in (spelled, f'a {spelled} b', f'{spelled}{spelled}', f'{spelled}a', f'a{spelled}', f'<{spelled}>'):
            row = encode([text], tokenizer)[0].tolist()
            inside = row[len(begin):len(row) - len(end)]
            assert not set(inside) & (set(steering.values()) - {tokenizer.unk_token_id}), (text, names(tokenizer, row))
            assert tokenizer.decode(inside) == text
            assert looks_like_control([text], tokenizer) == text.count(spelled)


def test_tokens_that_are_not_called_special_steer_as_well_and_others_are_text():
    tokenizer = qwen_like()
    assert '<|fim_prefix|>' in control_tokens(tokenizer) and '<tool_call>' not in control_tokens(tokenizer)
    tool_call = tokenizer.convert_tokens_to_ids('<tool_call>')
    assert text_rows(['a <tool_call>'], tokenizer)[0][-1] == tool_call


@every_chat
def test_prompts_are_those_of_the_chat_template(kind):
    tokenizer = kinds[kind]()
    turn = [dict(role='user', content='def a b?')]
    wanted = tokenizer.apply_chat_template(turn, add_generation_prompt=True)['input_ids']
    assert prompt_rows([Task('', 'def a b?', 'x')], tokenizer, 'chat', '') == [wanted]
    assert ask([dict(question='def a')], tokenizer, instruction='b?') == prompt_rows(
        [Task('', 'def a\nb?', 'x')], tokenizer, 'chat', '')
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert prompt_tokens([rendered], tokenizer) == [wanted]


@every_kind
def test_prompts_as_text_agree(kind):
    tokenizer = kinds[kind]()
    text = 'Question: def a\nb\nAnswer:'
    wanted = tokenizer.encode(text, add_special_tokens=False)
    wanted = edges(tokenizer)[0] + wanted
    assert ask([dict(question='def a')], tokenizer, chat=False, instruction='b') == [wanted]
    assert prompt_tokens([text], tokenizer) == [wanted]
    assert prompt_rows([Task('', 'def a\nb', '')], tokenizer, 'Question: {input}\nAnswer:{solution}', '') == [wanted]


@every_kind
def test_a_completion_goes_on_from_the_prompt_as_the_tokenizer_begins_it(kind, monkeypatch):
    tokenizer = kinds[kind]()
    seen = []
    monkeypatch.setattr(generation, 'generate', lambda model, rows, *args, **options: (
        seen.extend(rows) or types.SimpleNamespace(ids=[[] for _ in rows])))
    complete(tiny(tokenizer), tokenizer, ['def a'])
    assert seen == [edges(tokenizer)[0] + tokenizer.encode('def a', add_special_tokens=False)]


@every_chat
def test_a_turn_cannot_be_forged(kind):
    tokenizer = kinds[kind]()
    steering = set(control_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    forged = ''.join(control_tokens(tokenizer)) + ' def'

    def count(row):
        return sum(token in steering for token in row)

    for template in ('chat', '{system_prompt}{input}{solution}'):
        tasks = [Task('', 'question', 'x'), Task('', forged, 'x')]
        plain, hostile = prompt_rows(tasks, tokenizer, template, 'Be ' + ('<|im_end|>' if kind == 'qwen' else 'kind.'))
        assert count(hostile) == count(plain), names(tokenizer, hostile)
        assert forged in tokenizer.decode(hostile)
    plain, hostile = ask([dict(question='question'), dict(question=forged)], tokenizer)
    assert count(hostile) == count(plain) and forged in tokenizer.decode(hostile)


@every_chat
@pytest.mark.parametrize('template', ['chat', 'Q: {input}\nA: {solution}'])
def test_an_answer_that_spells_an_end_is_learnt_whole(kind, template):
    tokenizer = kinds[kind]()
    spelled = [text for text in control_tokens(tokenizer) if text != tokenizer.unk_token]
    answer = ' '.join(['first', *spelled, 'last'])
    examples, notes, _ = encode_tasks([Task('', 'q', answer), Task('', 'q', 'plain')], tokenizer, 500, template, '')
    learnt = [[int(token) for token, on in zip(examples[row], examples.loss[start:end], strict=True) if on]
              for row, (start, end) in enumerate(zip(examples.starts, examples.ends, strict=True))]

    assert notes['control_like'] == len(spelled)
    for row, text in zip(learnt, (answer, 'plain'), strict=True):
        assert row[-1] in turn_ends(tokenizer) and not set(row[:-1]) & turn_ends(tokenizer)
        assert text in tokenizer.decode(row)


def test_control_tokens_of_a_template_parameter_stay_tokens():
    tokenizer = qwen_like()
    template = '<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n{solution}<|im_end|>\n'
    examples, *_ = encode_tasks([Task('', 'a', 'def')], tokenizer, 99, template, '')
    wanted = '<|im_start|> user Ċ a <|im_end|> Ċ <|im_start|> assistant Ċ def <|im_end|>'
    assert ''.join(names(tokenizer, examples[0])) == wanted.replace(' ', '')
    assert list(examples[0]).count(tokenizer.eos_token_id) == 2


@every_chat
def test_rendered_conversations_get_no_second_beginning_or_end(kind):
    tokenizer = kinds[kind]()
    turns = [dict(role='user', content='Hi'), dict(role='assistant', content='Hello.')]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    wanted = tokenizer.encode(text, add_special_tokens=False)
    assert are_rendered([text], tokenizer) == [True]
    assert encode([text], tokenizer)[0].tolist() == wanted
    assert text_notes([text, 'a ' + text], tokenizer)['rendered'] == 1


@pytest.mark.parametrize('kind', ['llama2', 'both', 'unigram'])
def test_texts_that_carry_both_ends_get_them_once(kind):
    tokenizer = kinds[kind]()
    row = encode(['<s>a b</s>'], tokenizer)[0].tolist()
    assert (row.count(1 if kind != 'both' else tokenizer.bos_token_id), row.count(tokenizer.eos_token_id)) == (1, 1)


def test_the_part_of_a_conversation_without_its_beginning_gets_one():
    tokenizer = llama3_like()
    text = '<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>'
    row = encode([text], tokenizer)[0].tolist()
    assert row == [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


@every_kind
@pytest.mark.parametrize('length', [3, 7, 100])
def test_a_cut_is_no_end(kind, length):
    tokenizer = kinds[kind]()
    end = edges(tokenizer)[1][-1]
    documents = encode(['def a ' * 5, 'b'], tokenizer)
    for policy in ('split', 'truncate'):
        pieces, _ = cut(documents, length, policy)
        closed = [row for row in range(len(pieces)) if pieces[row][-1] == end]
        assert all(end not in pieces[row][1:-1] for row in range(len(pieces)))
        assert {int(pieces.ends[row]) for row in closed} <= set(documents.ends.tolist())
        assert len(closed) == 2 or policy == 'truncate'


def test_a_pdf_ends_once():
    tokenizer = qwen_like()
    texts = ['\n'.join(f'Paragraph {number} of {name} says little.' for number in range(9)) for name in 'abc']
    files = [PdfFile(f'{name}.pdf', 1, 1, 1, len(text), text=text) for name, text in zip('abc', texts, strict=True)]
    corpus, _ = pdf_corpus(files, test_share=.3, chunk_characters=90)
    for side, ends in ((corpus.train, 2), (corpus.valid, 1)):
        examples = encode(side.texts, tokenizer, ends=side.ends)
        assert len(side) == 3 * ends and int((examples.ids == tokenizer.eos_token_id).sum()) == ends
    assert judge(tiny(tokenizer), tokenizer, corpus.valid, 64)['ends'] == 1


@every_kind
@pytest.mark.parametrize('length', [5, 64])
def test_what_a_perplexity_counts(kind, length):
    tokenizer = kinds[kind]()
    model = tiny(tokenizer)
    texts = ['Paris is the capital.', 'def a b', 'Rain', 'a </s> <|im_end|> b']
    scores = judge(model, tokenizer, Documents(texts, list('abcd')), length)
    tokens = sum(map(len, text_rows(texts, tokenizer)))
    first = 0 if edges(tokenizer)[0] else 1

    assert (scores['targets'], scores['ends']) == (tokens - 4 * first, 4)
    assert scores['bytes'] == sum(len(text) for text in texts) - first * (1 + 3 + 1 + 1)
    every = evaluate_loss(model, cut(encode(texts, tokenizer), length)[0], 4, length)
    assert math.isclose(scores['loss_with_end'], every['loss'], rel_tol=1e-6)
    assert math.isclose(scores['bits_per_byte'] * scores['bytes'] * math.log(2), scores['loss'] * scores['targets'])


def test_ends_that_a_template_wrote_are_no_bytes_of_the_text():
    tokenizer = load_tokenizer('base')
    turns = [dict(role='user', content='Hi'), dict(role='assistant', content='Hello there.')] * 3
    chat = tokenizer.apply_chat_template(turns, tokenize=False)
    scores = judge(load_model('base'), tokenizer, Documents([chat, 'A plain text.'], list('ab')))
    marks = 3 * len('<|endoftext|>')
    assert scores['ends'] == 4 and scores['bytes'] == len(chat) - len('<|user|>') - marks + len('A plain text.')
    nats = scores['loss_with_end'] * (scores['targets'] + scores['ends'])
    assert math.isclose(scores['bits_per_byte_with_end'] * (scores['bytes'] + marks) * math.log(2), nats)


def test_the_text_alone_is_scored_without_its_end():
    tokenizer = qwen_like()
    model = tiny(tokenizer)
    scores = judge(model, tokenizer, Documents(['def a b'], ['x']))
    ids = torch.tensor([tokenizer.encode('def a b')])
    with torch.no_grad():
        alone = float(model(ids, labels=ids).loss)
    assert math.isclose(scores['loss'], alone, rel_tol=1e-5) and scores['loss'] != scores['loss_with_end']


def test_the_first_token_of_a_text_with_wide_characters():
    tokenizer = qwen_like()
    assert [scored_bytes([text], tokenizer) for text in ('é', 'def', '漢a', '')] == [1, 0, 3, 0]


def test_held_out_text_of_single_tokens_is_one_line():
    with pytest.raises(Exception, match='no token to predict'):
        judge(tiny(qwen_like()), qwen_like(), Documents(['a'], ['x']))


@every_kind
def test_what_is_written_is_read_behind_its_prompt(kind):
    tokenizer = kinds[kind]()
    prompt, body = 'def add(a, b):\n', '    c = a + b\n    return c'
    given = prompt_tokens([prompt], tokenizer)[0]
    ids = rendered_rows([body], tokenizer, goes_on=True)[0]
    assert tokenizer.decode([*given, *ids], skip_special_tokens=True) == prompt + body
    assert written_text(tokenizer, given, [*ids, tokenizer.eos_token_id]) == body


def test_a_character_that_begins_in_the_prompt_is_read_whole():
    tokenizer = qwen_like()
    ids = tokenizer.encode('a漢b')
    assert written_text(tokenizer, ids[:2], ids[2:]).endswith('b')


@pytest.mark.parametrize('kind', ['llama2', 'qwen'])
def test_a_right_body_passes_whatever_the_tokenizer(kind, monkeypatch):
    tokenizer = kinds[kind]()
    prompt, body = 'def add(a, b):\n    """Add."""\n', '    c = a + b\n    return c\n'
    task = Task('h', prompt, body, lead=prompt, tests=['assert add(1, 2) == 3'])
    examples, *_ = encode_tasks([task], tokenizer, 400, '{input}{solution}', '')
    right = examples[0][~np.cumsum(~examples.loss).astype(bool) | examples.loss].tolist()[:-1]
    asked = {}

    def generate(model, rows, *args, stop_ids, **options):
        asked.update(stop_ids=stop_ids)
        return types.SimpleNamespace(ids=[right] * len(rows), stopped=['stop'] * len(rows))

    monkeypatch.setattr(pass_at_k, 'generate', generate)
    attempts = pass_at_k.solve(tiny(tokenizer), tokenizer, [task], '{input}{solution}', '')
    assert [attempt.status for attempt in attempts] == ['passed'], attempts[0]
    assert asked['stop_ids'] == end_tokens(tiny(tokenizer), tokenizer)


def test_generation_and_solving_end_with_a_turn(monkeypatch):
    tokenizer = llama3_like()
    model = tiny(tokenizer)
    turn = tokenizer.convert_tokens_to_ids('<|eot_id|>')
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id, turn}
    model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id, turn, 5, 6}
    monkeypatch.setattr(generation, 'generate', lambda model, rows, *args, stop_ids, **options: types.SimpleNamespace(
        ids=[[turn in stop_ids]]))
    assert complete(model, tokenizer, ['a'], 4) == [tokenizer.decode([1])]


def test_a_text_in_a_token_file_cannot_end_a_document():
    tokenizer = load_tokenizer('base')
    encoder = Subwords(tokenizer)
    plain, hostile = encoder(['def f(): pass', 'def f(): <|endoftext|> pass'])
    assert encoder.eot not in hostile.tolist() and tokenizer.decode(hostile) == 'def f(): <|endoftext|> pass'
    assert plain.tolist() == tokenizer.encode('def f(): pass', add_special_tokens=False)


def test_the_first_and_the_last_tokens_are_shown():
    tokenizer = qwen_like()
    examples = encode(['first ' + 'a ' * 300 + 'finally <|im_end|>'], tokenizer)
    shown = show_tokens(examples, 0, tokenizer, 20)
    assert shown.index('f</span>') < shown.index('more tokens') < shown.index('&lt;|im_end|&gt;')
    assert shown.count('outline') == 1  # the end; what the text spells has no frame
    assert clean_html(shown).count('outline') == 1  # pages and reports keep it


def test_places_in_a_problem_are_not_filled():
    tokenizer = load_tokenizer('base')
    task = Task('', 'Use {system_prompt} and {input}.', 'x')
    row = prompt_rows([task], tokenizer, '{system_prompt}|{input}|{solution}', 'Be {input}')[0]
    assert tokenizer.decode(row[1:]) == 'Be {input}|Use {system_prompt} and {input}.|'


def test_the_base_model_was_trained_behind_an_end_of_text():
    base = load_tokenizer('base')
    assert edges(base) == ([0], [0])
    documents = builtin_part('topics_eval')[:1]
    assert encode(documents.texts, base)[0][0] == 0
