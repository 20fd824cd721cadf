"""Quality of rounded weights: llama.cpp's formulas written out a second time, flips of answers, forgetting, replay and seeds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data.corpora import builtin_part
from llmft.data.replay import with_replay
from llmft.data.tokens import cut, encode, load_tokenizer
from llmft.inference.quality import Tokens, compare_tokens, divergence, summary
from llmft.models.load import load_model
from llmft.models.precisions import load_form
from llmft.runs.forgetting import general_text
from llmft.runs.rivals import flips, seed_difference
from llmft.runs.sweep_file import expand, needs, read_sweep
from llmft.studies.finetuning.setup import finetuning_data
from llmft.studies.inference.report import against_reference


def log_softmax(logits):
    "Logarithms of the probabilities of a row, as the C++ program takes them: the largest logit apart."
    top = max(logits)
    total = sum(math.exp(logit - top) for logit in logits)
    return [logit - top - math.log(total) for logit in logits]


def llama_cpp(base_rows, rows, targets):
    "The statistics of llama.cpp's perplexity tool, token by token in plain Python, by its published formulas."
    kld, nll, nll_base, change, same = [], [], [], [], 0
    for base_logits, logits, target in zip(base_rows, rows, targets, strict=True):
        base, own = log_softmax(base_logits), log_softmax(logits)
        kld.append(sum(math.exp(b) * (b - q) for b, q in zip(base, own, strict=True)))
        nll.append(-own[target])
        nll_base.append(-base[target])
        change.append(math.exp(own[target]) - math.exp(base[target]))
        same += base_logits.index(max(base_logits)) == logits.index(max(logits))

    count = len(kld)

    def uncertain(total, total_of_squares):
        "mean_and_uncertainty: the root of the variance over count - 1."
        mean = total / count
        return mean, math.sqrt((total_of_squares / count - mean * mean) / (count - 1))

    def percentile(values, fraction):
        place = fraction * (len(values) - 1)
        index = int(place)
        place -= index
        return (1 - place) * values[index] + place * values[min(index + 1, len(values) - 1)]

    mean, error = uncertain(sum(kld), sum(x * x for x in kld))
    own, own_error = uncertain(sum(nll), sum(x * x for x in nll))
    first, first_error = uncertain(sum(nll_base), sum(x * x for x in nll_base))
    covariance = (sum(x * y for x, y in zip(nll, nll_base, strict=True)) / count - own * first) / (count - 1)
    square, square_error = uncertain(sum(x**2 for x in change), sum(x**4 for x in change))
    share = same / count
    ordered = sorted(kld)
    return dict(
        quality_tokens=count,
        kld=mean,
        kld_se=error,
        kld_median=percentile(ordered, 0.5),
        kld_p99=percentile(ordered, 0.99),
        kld_max=ordered[-1],
        same_top=share,
        same_top_se=math.sqrt(share * (1 - share) / (count - 1)),
        log_perplexity_change=own - first,
        log_perplexity_change_se=math.sqrt(own_error**2 + first_error**2 - 2 * covariance),
        rms_change=math.sqrt(square),
        rms_change_se=0.5 * square_error / math.sqrt(square),
    )


def drawn(seed, rows, words, noise):
    generator = torch.Generator().manual_seed(seed)
    base = 4 * torch.randn(rows, words, generator=generator)
    own = base + noise * torch.randn(rows, words, generator=generator)
    return base, own, torch.randint(words, (rows,), generator=generator)


@pytest.mark.parametrize('noise', [1e-3, 0.1, 3.0])
@pytest.mark.parametrize('rows', [2, 3, 200, 201])
def test_every_statistic_is_that_of_llama_cpp_on_the_same_logits(rows, noise):
    base, own, targets = drawn(rows, rows, 50, noise)
    found = summary(Tokens(*divergence(own, base, targets).numpy(), np.zeros(rows, int)))
    expected = llama_cpp(base.double().tolist(), own.double().tolist(), targets.tolist())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, rel=1e-6), name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 5))
def test_divergence_is_never_negative_and_zero_for_the_same(seed, noise):
    base, own, targets = drawn(seed, 5, 30, noise)
    kld_R = divergence(own, base, targets)[0]
    assert (kld_R >= -1e-12).all() and (divergence(base, base, targets)[0] == 0).all()
    shifted = divergence(own + 100.0, base - 7.0, targets)
    assert torch.allclose(shifted, divergence(own, base, targets), atol=1e-4), 'a constant added to logits counts'


def test_chunks_batches_and_shared_rows_change_nothing():
    tokenizer, documents = load_tokenizer('base'), builtin_part('topics_eval')[-3:]
    reference, own = load_model('base').eval(), load_form('base', 'nf4')
    whole = compare_tokens(own, reference, tokenizer, documents, 96, batch_size=8)
    alone = compare_tokens(own, reference, tokenizer, documents, 96, batch_size=1, chunk_bytes=1)
    for name in ('kld_N', 'loss_N', 'base_loss_N', 'change_N'):
        order = [np.lexsort((each.loss_N.round(3), each.document_N)) for each in (whole, alone)]
        first, second = (getattr(each, name)[rows] for each, rows in zip((whole, alone), order, strict=True))
        assert np.isclose(first.mean(), second.mean(), atol=1e-5), name
    means, tokens = whole.by_document()
    assert tokens.sum() == len(whole.kld_N) and np.average(means, weights=tokens) == pytest.approx(whole.kld_N.mean())
    for place in range(len(documents)):
        single = compare_tokens(own, reference, tokenizer, documents[place:place + 1], 96)
        assert single.kld_N.mean() == pytest.approx(means[place], abs=1e-5) and len(single.kld_N) == tokens[place]


def test_logits_of_all_tokens_are_never_held_at_once():
    "The largest tensor of logits is bounded by chunk_bytes, however long the text."
    tokenizer, documents = load_tokenizer('base'), builtin_part('topics_eval')[-4:]
    model, seen = load_model('base').eval(), []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    found = compare_tokens(model, model, tokenizer, documents, 256, chunk_bytes=2**22)
    hook.remove()
    assert max(seen) * model.config.vocab_size * 48 <= 2**22 and len(found.kld_N) > 10 * max(seen)


def params(**changes):
    usual = dict(model='base', reference='', precision='fp32', max_length=64, seed=0)
    return SimpleNamespace(**usual | changes)


def test_the_reference_is_the_model_itself_another_one_or_none():
    tokenizer, documents, size = load_tokenizer('base'), builtin_part('topics_eval')[-1:], dict(total=4_000_000)
    model = load_model('base').eval()
    assert against_reference(model, tokenizer, documents, params(), size).kld_N.max() == 0
    assert against_reference(model, tokenizer, documents, params(reference='none'), size) is None
    named = against_reference(model, tokenizer, documents, params(reference='base'), size)
    assert named.kld_N.max() == 0
    rounded = load_form('base', 'int8')
    assert against_reference(rounded, tokenizer, documents, params(precision='int8'), size).kld_N.mean() > 0


def test_a_reference_that_does_not_fit_is_left_out_and_said(capsys):
    found = against_reference(None, None, None, params(precision='nf4'), dict(total=10**15))
    assert found is None and 'not compared with full precision' in capsys.readouterr().out


# ---- flips


def mcnemar(lost, won):
    "The exact test by its definition: a fair coin for each question that flipped."
    count = lost + won
    ways = [math.comb(count, k) / 2**count for k in range(count + 1)]
    return min(1.0, 2 * sum(ways[: min(lost, won) + 1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_flips_are_counted_and_tested_exactly(pairs):
    first, second = zip(*pairs, strict=True)
    found = flips(first, second)
    lost = sum(one and not other for one, other in pairs)
    won = sum(other and not one for one, other in pairs)
    assert (found.lost, found.won, found.items) == (lost, won, len(pairs))
    assert found.chance == pytest.approx(mcnemar(lost, won))
    assert (found.outcome == 'tie') == (found.chance >= 0.05 - 1e-12)
    back = flips(second, first)
    opposite = dict(tie='tie', better='worse', worse='better')
    assert back.outcome == opposite[found.outcome]


def test_flips_agree_with_scipy():
    from scipy.stats import binomtest

    for lost, won in ((0, 0), (3, 0), (5, 0), (6, 0), (12, 3), (40, 22)):
        first = np.r_[np.ones(lost), np.zeros(won), np.ones(10)]
        second = np.r_[np.zeros(lost), np.ones(won), np.ones(10)]
        expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
        assert flips(first, second).chance == pytest.approx(expected)


# ---- seeds


def test_the_interval_over_seeds_is_that_of_a_paired_t_test():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 12):
        first, second = rng.normal(size=count), rng.normal(0.3, 1, size=count)
        found, expected = seed_difference(first, second), ttest_rel(first, second).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert found.clear == (ttest_rel(first, second).pvalue < 0.05) and found.items == count


def sweep(tmp_path, text):
    path = tmp_path / 'sweep.yaml'
    path.write_text(text)
    return path


seeded = """name: quick
seeds: [1, 2, 3]
stages:
  - params: [params/finetune/lora.yaml, params/finetune/full.yaml]
    name: quick-{config}
summary:
  notebook: compare
small:
  seeds: [5, 6]
"""


def test_seeds_make_a_run_for_each_seed_and_the_summary_reads_them_all(tmp_path):
    path = sweep(tmp_path, seeded)
    runs, (page,) = expand(path)
    assert [run.name for run in runs] == [f'quick-{kind}-seed{seed}' for kind in ('lora', 'full') for seed in (1, 2, 3)]
    assert [run.params['seed'] for run in runs] == [1, 2, 3, 1, 2, 3]
    assert page.params['runs'] == [f'outputs/finetune/{run.name}' for run in runs]
    small = expand(path, 'small')
    assert [run.params['seed'] for run in small[0]] == [5, 6, 5, 6] and small[0][0].params['model'] == 'base'
    plain = expand(sweep(tmp_path, seeded.replace('seeds: [1, 2, 3]\n', '')))
    assert [run.name for run in plain[0]] == ['quick-lora', 'quick-full'] and plain[0][0].params['seed'] == 42


def test_later_stages_read_the_run_of_their_own_seed(tmp_path):
    path = sweep(
        tmp_path,
        """name: two
seeds: [1, 2]
stages:
  - params: [params/finetune/lora.yaml]
    name: first
  - params: [params/finetune/lora.yaml]
    name: second
    override: {model: outputs/finetune/first/merged}
""",
    )
    first, second = expand(path)
    assert [run.params['model'] for run in second] == [f'outputs/finetune/first-seed{seed}/merged' for seed in (1, 2)]


certified = """name: both
seeds: [1, 2]
stages:
  - params: [params/sublora_train/functions.yaml]
  - params: [params/sublora_bounds/functions.yaml]
"""


def test_a_run_that_is_named_without_its_folder_is_that_of_the_same_seed(tmp_path):
    trained, bounds = expand(sweep(tmp_path, certified))
    assert [point.params['trained'] for point in bounds] == ['functions-seed1', 'functions-seed2']
    assert [needs(point, trained) for point in bounds] == [[point] for point in trained]
    with pytest.raises(LabError, match='a stage reads only what stages before it leave'):
        together = 'stages:\n  - params: [params/sublora_train/functions.yaml, params/sublora_bounds/functions.yaml]\n'
        expand(sweep(tmp_path, f'name: one\n{together}'))


@pytest.mark.parametrize(
    'old, new, words',
    [
        ('[1, 2, 3]', '[1, 1]', r'sweep.yaml:2: seeds is \[1, 1\]: give different whole numbers'),
        ('[1, 2, 3]', '[1.5]', 'give different whole numbers'),
        ('[1, 2, 3]', '[true]', 'give different whole numbers'),
        ('[1, 2, 3]', '3', 'seeds must be a list'),
        ('quick-{config}', 'quick-{config}-{seed}', r'leave \{seed\} out'),
        ('    name: quick', '    matrix: {seed: [7]}\n    name: quick', 'keep one'),
        ('    name: quick', '    override: {seed: 7}\n    name: quick', 'keep one'),
    ],
)
def test_seeds_that_make_no_sense_are_refused_with_their_line(old, new, words, tmp_path):
    with pytest.raises(LabError, match=words) as caught:
        expand(sweep(tmp_path, seeded.replace(old, new)))
    assert '\n' not in str(caught.value)


def test_a_seed_on_the_command_line_is_refused_beside_seeds(tmp_path):
    with pytest.raises(LabError, match='the sweep has seeds of its own'):
        expand(sweep(tmp_path, seeded), overrides=['seed=4'])
    assert read_sweep(sweep(tmp_path, seeded))['seeds'] == [1, 2, 3]


# ---- forgetting and replay


def test_general_text_is_in_nothing_that_is_trained_on():
    pieces = [text.strip() for text in general_text().texts]
    assert len(pieces) >= 30 and all(len(piece) > 200 for piece in pieces)
    for part in ('base', 'topics', 'functions'):
        trained = '\n'.join(builtin_part(part).texts)
        assert not [piece for piece in pieces if piece in trained], part


@pytest.mark.parametrize('share', [0.05, 0.5])
def test_replay_is_a_share_of_positions_and_the_same_for_one_seed(share):
    tokenizer = load_tokenizer('base')
    rows, _ = cut(encode(builtin_part('topics').texts[:12], tokenizer), 64)
    mixed, counts = with_replay(rows, share, tokenizer, 64, seed=3)
    again, _ = with_replay(rows, share, tokenizer, 64, seed=3)
    own = int(rows.slots.sum())
    assert counts['share'] == pytest.approx(share, abs=1 / own)
    assert int(mixed.slots.sum()) == own + counts['positions'] and mixed.slots.max() <= 64
    assert (mixed.ids == again.ids).all() and (mixed.starts == again.starts).all()
    assert [mixed[row].tolist() for row in range(len(rows))] == [rows[row].tolist() for row in range(len(rows))]
    general = tokenizer.decode(mixed[len(rows)][:40])
    beginning = general.removeprefix(tokenizer.eos_token)[:60]
    assert any(text.startswith(beginning) for text in builtin_part('base').texts), general


def data_params(**changes):
    usual = dict(
        model='base', data='builtin:topics', data_config='', text_field='text', num_samples=6, valid_share=0.1,
        num_eval_samples=2, max_length=64, too_long='split', seed=1, replay_share=0.0,
    )
    return SimpleNamespace(**usual | changes)


def test_replay_changes_training_rows_only_and_reaches_the_report():
    plain, mixed = finetuning_data(data_params()), finetuning_data(data_params(replay_share=0.2))
    assert len(mixed.train) == len(plain.train) + mixed.replay['examples'] and plain.replay == {}
    assert (mixed.valid.ids == plain.valid.ids).all() and mixed.notes['replay'] == mixed.replay
    from llmft.studies.finetuning.report import data_table

    shown = [data_table(data, 64)._repr_html_() for data in (mixed, plain)]
    assert 'general text, 2' in shown[0] and 'general text' not in shown[1]


def test_more_general_text_than_there_is_is_refused():
    rows = SimpleNamespace(slots=np.array([10**11]))
    with pytest.raises(LabError, match='lower replay_share') as caught:
        with_replay(rows, 0.5, None, 64, seed=0)
    assert '\n' not in str(caught.value)
