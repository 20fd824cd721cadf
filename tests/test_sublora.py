"Subspaces, coding, bounds and certificates: the properties that a proof hangs on."

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verifying import assert_computed_again

from llmft.bounds.bounds import (
    kl_bound,
    kl_coins,
    kl_inverse,
    lowest_loss,
    shared_delta,
    smoothed_bits,
    smoothing_width,
    subsampling_bound,
    topk_bound,
)
from llmft.bounds.certificates import (
    MAGIC,
    build_model,
    make_claims,
    prove,
    read_certificate,
    verify,
    write_certificate,
)
from llmft.bounds.coding import decode_message, encode_message, entropy, make_codebook, prefixed_bits, reference_bits
from llmft.bounds.descriptions import check_spec
from llmft.bounds.scoring import Scores, summarise
from llmft.cli import call as cli_call
from llmft.core import LabError, project_root, sha256_of
from llmft.data.hashes import sealed
from llmft.data.token_files import prepare_tokens, read_token_file
from llmft.data.tokens import boundaries, side_facts
from llmft.models.low_rank import add_low_rank, frozen_gpt2
from llmft.models.projections import make_projection, projections
from llmft.models.subspace import SubspaceConfig, attach
from llmft.runs.execute import execute_run
from llmft.runs.params import resolve_params
from llmft.training.fit import fit
from llmft.training.recipe import Recipe

root = project_root()
quick = settings(max_examples=60, deadline=None)
N, M = 8_009_762, 10_000


# ---- bounds


@pytest.mark.parametrize(
    'alpha, width', [(1e-4, 28.904605039990), (0.01, 22.246393844330), (0.1, 18.786965125321), (0.5, 15.617065640352)]
)
def test_widths_are_those_of_the_specification(alpha, width):
    assert smoothing_width(alpha, 50257) == pytest.approx(width, abs=1e-11)


def test_vectors_of_the_specification():
    assert subsampling_bound(10.60, 131_098, N, M, smoothing_width(0.1, 50257), 0.05, 8) == pytest.approx(
        12.314339735, abs=1e-9
    )
    assert subsampling_bound(10.66, 131_098, N, M, smoothing_width(0.25, 50257), 0.05, 8) == pytest.approx(
        12.229710028, abs=1e-9
    )
    assert topk_bound(0.9150, 131_088.999626 + 7, N, M, kl=False) == pytest.approx(1.002560497, abs=1e-9)
    assert topk_bound(0.9150, 131_088.999626 + 7, N, M) == pytest.approx(0.955841317, abs=1e-9)
    assert kl_inverse(0.1, 0.01) == pytest.approx(0.147675539298, abs=1e-11) and kl_inverse(0.9, 0.02) == pytest.approx(
        0.949370846092, abs=1e-11
    )
    assert subsampling_bound(0, 0, N, M, 1.0) - math.sqrt(math.log((M + N) / (M * 0.05)) / (2 * N)) == pytest.approx(
        0.012241282554, abs=1e-11
    )
    counts = [60, 400, 1800, 5200, 10200, 14680, 10200, 5200, 1800, 400, 60]
    assert (
        entropy(counts) == pytest.approx(2.614030285911, abs=1e-11)
        and reference_bits(counts) == 131_055
        and prefixed_bits(131_055) == 131_088
    )
    assert math.log2(50257) == pytest.approx(15.617036934288, abs=1e-11)


situation = st.fixed_dictionaries(
    dict(
        risk=st.floats(0, 1),
        bits=st.floats(0, 1e6),
        n=st.integers(10, 10**8),
        share=st.floats(0.001, 1),
        delta=st.floats(1e-6, 0.9),
        choices=st.integers(1, 100),
    )
)


def both(risk, bits, n, share, delta, choices):
    m = max(1, int(n * share))
    return [form(risk, bits, n, m, 1.0, delta, choices) for form in (subsampling_bound, kl_bound)]


@quick
@given(situation, st.floats(1, 10))
def test_bounds_are_monotone_and_never_below_the_risk(given, factor):
    for before, after in zip(both(**given), both(**{**given, 'bits': given['bits'] * factor}), strict=True):
        assert given['risk'] <= before <= after + 1e-12
    for before, after in zip(both(**given), both(**{**given, 'delta': given['delta'] / factor}), strict=True):
        assert before <= after + 1e-12
    m = max(1, int(given['n'] * given['share']))
    rest = {key: value for key, value in given.items() if key not in ('n', 'share')}
    for form in (subsampling_bound, kl_bound):
        here = form(n=given['n'], m=m, width=1.0, **rest)
        assert form(n=int(given['n'] * factor), m=int(m * factor), width=1.0, **rest) <= here + 1e-9
    assert all(kl <= hoeffding + 1e-9 for hoeffding, kl in [both(**given)])


@quick
@given(st.floats(0, 1), st.floats(0, 5))
def test_the_kl_inverse_inverts(q, c):
    p = kl_inverse(q, c)
    assert (
        q <= p <= 1
        and kl_coins(q, max(q, p - 1e-9)) <= c + 1e-6
        and (p == 1 or kl_coins(q, min(1, p + 1e-6)) >= c - 1e-9)
    )


@quick
@given(st.floats(0, 1), st.floats(1e-6, 0.999), st.integers(2, 100_000))
def test_smoothed_losses_stay_inside_their_interval(p, alpha, vocabulary):
    low, loss = lowest_loss(alpha, vocabulary), smoothed_bits([p], [alpha], vocabulary)[0, 0]
    assert low - 1e-9 <= loss <= low + smoothing_width(alpha, vocabulary) + 1e-9


@pytest.mark.parametrize(
    'call, reason',
    [
        (lambda: smoothing_width(0.0, 16), 'alpha is 0'),
        (lambda: smoothing_width(1.0, 16), 'alpha is 1'),
        (lambda: subsampling_bound(1.0, 9, 100, 10, 1.0, delta=1.0), 'delta is 1'),
        (lambda: subsampling_bound(1.0, 9, 10, 11, 1.0), 'no more than there are'),
        (lambda: make_codebook([1.0, 2.0], 4), 'odd'),
        (lambda: make_codebook([1.0, 2.0], 0), 'odd'),
        (lambda: make_projection('kronecker', 10, 11, ''), 'larger than'),
        (lambda: make_projection('kronecker', 10, 0, ''), 'at least 1'),
        (lambda: SubspaceConfig(mode='fixed', ratio=0.0).check(), 'ratio is 0'),
        (lambda: SubspaceConfig(mode='fixed', ratio=1.0).check(), 'ratio is 1'),
        (lambda: boundaries([1, 9, 9], 9), 'is empty'),
        (lambda: prefixed_bits(0), 'at least 1 bit'),
    ],
)
def test_bad_input_is_one_clear_line(call, reason):
    with pytest.raises(LabError, match=reason) as raised:
        call()
    assert '\n' not in str(raised.value)


def test_all_documents_are_charged_at_their_share_of_delta():
    scores = Scores(
        np.full((50, 8), 2.0),
        np.full((50, 5), 0.5),
        np.full(50, 9),
        (1e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.25, 0.5),
        (1, 5, 10, 50, 100),
    )
    claims = make_claims(scores, b'\1' * 40, 100, 5000, 16, 30)
    assert len(claims) == 4 and all(claim['delta'] == shared_delta(0.05, 4) for claim in claims.values())
    assert claims['bits_per_token']['bits'] == prefixed_bits(320) + 100 + math.log2(30) + 3
    assert claims['top1_error']['bits'] == prefixed_bits(320) + 100 + math.log2(30)


# ---- coding

vectors = st.one_of(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=400),
    st.integers(1, 400).map(lambda n: [0.25] * n),
    st.tuples(st.integers(1, 50_000), st.integers(0, 5)).map(
        lambda pair: np.random.default_rng(pair[1]).choice([0.0, 0.0, 0.0, 1.0, -1.0], pair[0]).tolist()
    ),
)


def test_the_temperature_of_the_gates_is_that_of_plain_arithmetic():
    "To the last bit of float32, at every step; it is computed where the gates lie."
    net = frozen_gpt2(1, 2, 16, 16, 16)
    config = SubspaceConfig(20, 'learned', anneal_steps=777, temperature=0.5, final_temperature=0.01)
    subspace = attach(net, add_low_rank(net, ['q_proj', 'v_proj']), config)
    for step in range(-1, 780):
        subspace.gates.data[-1] = step
        expected = 0.5 * (0.01 / 0.5) ** min(1.0, max(0.0, step) / 777)
        assert subspace.current_temperature().float() == torch.tensor(expected).float(), step


@quick
@given(
    vectors,
    st.sampled_from([1, 3, 11]),
    st.sampled_from(['uniform', 'kmeans', 'optimal']),
    st.lists(st.integers(0, 15), max_size=13),
)
def test_what_is_decoded_is_what_was_coded(values, levels, kind, gates):
    from llmft.bounds.coding import assign

    codebook = make_codebook(values, levels, kind)
    coded = codebook[assign(values, codebook)]
    message = encode_message(coded, codebook, gates, 4)
    again, gates_again = decode_message(message, len(values), len(gates), 4)
    assert np.array_equal(again, coded) and gates_again == gates
    counts = np.unique(coded, return_counts=True)[1]
    head = 8 + len(counts) * (16 + len(values).bit_length()) + 4 * len(gates)
    assert 8 * len(message) <= 1.01 * len(values) * entropy(counts) + 32 + head + 8


@quick
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=60), st.sampled_from([3, 5]))
def test_no_codebook_beats_the_optimal_one(values, levels):
    from llmft.bounds.coding import _kmeans, _optimal, _uniform, assign

    values = np.array(values)

    def error(codebook):
        return ((values - codebook[assign(values, codebook)]) ** 2).sum()

    best = error(np.unique(_optimal(values, levels)))
    assert all(best <= error(np.unique(other(values, levels))) + 1e-9 for other in (_kmeans, _uniform))


# ---- projections


@pytest.mark.parametrize('kind', sorted(set(projections) - {'identity'}))
@pytest.mark.parametrize('rows, columns', [(200, 16), (203, 17), (64, 64), (31, 1)])
def test_projections_have_exact_adjoints_full_rank_and_no_dead_row(kind, rows, columns):
    made = make_projection(kind, rows, columns, 'test')
    matrix = made.matrix().double()
    y = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    assert (made.transpose(y).double() - matrix.T @ y.double()).abs().max() < 1e-5 * matrix.abs().sum(0).max()
    assert (matrix.abs().sum(1) > 0).all()
    if kind in ('kronecker', 'fastfood') or rows > 2 * columns:
        assert torch.linalg.matrix_rank(matrix) == columns


def test_a_projection_is_the_same_in_another_process():
    made = {kind: make_projection(kind, 300, 20, 'test').hash() for kind in sorted(set(projections) - {'identity'})}
    text = f"from llmft.models.projections import make_projection; print({{k: make_projection(k, 300, 20, 'test').hash() for k in {sorted(made)}}} == {made})"
    assert (
        subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, cwd=root).stdout.strip() == 'True'
    )
    assert (
        made['kronecker'] == 'b78b7c0f6c8c2edf'
    )  # the documented layout: another value means that every certificate breaks


# ---- training in a subspace


def spec(mode='learned', d=60, **subspace):
    return dict(
        base=dict(model='random', layers=2, heads=2, width=16, block=65, vocabulary=16, seed=1, scale=0.1),
        lora=dict(targets=['q_proj', 'v_proj', 'lm_head'], rank=4, alpha=16.0, dropout=0.1, seed=1),
        subspace=asdict(SubspaceConfig(d, mode, anneal_steps=6, **subspace)),
    )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokens') / 'pp'
    prepare_tokens(folder, 'simulated:predator_prey', 'characters:abcdefghijklmno', 400, 20)
    return folder


recipe = Recipe(
    learning_rate=0.03,
    max_steps=6,
    batch_size=4,
    gradient_accumulation=2,
    max_length=65,
    layout='bucketed',
    save_every=2,
    keep_best=False,
    log_every=1,
)


def train(folder, data, mode='learned', steps=6, stop=None, plain=False):
    model, subspace = build_model(
        spec(mode) | (dict(subspace=asdict(SubspaceConfig(projection='identity'))) if plain else {})
    )
    if subspace.gates is not None:
        subspace.gates.learning_rate_ratio, subspace.gates.decayed = 2.0, False

    def on_log(entry):
        if stop and entry['step'] == stop:
            raise KeyboardInterrupt

    try:
        fit(model, read_token_file(data).examples(), None, folder, replace(recipe, max_steps=steps), on_log)
    except KeyboardInterrupt:
        pass
    return model, subspace


def test_a_resumed_subspace_ends_with_the_same_bits(data, tmp_path):
    _, whole = train(tmp_path / 'whole', data)
    train(tmp_path / 'stopped', data, stop=3)
    _, resumed = train(tmp_path / 'stopped', data)
    assert torch.equal(whole.v, resumed.v) and torch.equal(whole.gates, resumed.gates) and whole.gates[-1].item() == 5
    assert whole.v.abs().max() > 0 and whole.gates[:-1].abs().max() > 0 and len(set(whole.gates[:-1].tolist())) > 1
    with pytest.raises(LabError, match='belongs to another run'):
        train(tmp_path / 'stopped', data, mode='uniform')


def test_identity_is_plain_training_of_the_factors(data, tmp_path):
    "Full-dimensional and subspace training go through the same gradient: P = I moves the factors as plain AdamW on them does."
    from llmft.models.low_rank import add_low_rank, frozen_gpt2

    given = spec()
    model, subspace = build_model(
        given | dict(subspace=asdict(SubspaceConfig(projection='identity')), lora=given['lora'] | dict(dropout=0.0))
    )
    plain = frozen_gpt2(**{k: v for k, v in given['base'].items() if k != 'model'})
    factors = add_low_rank(plain, **given['lora'] | dict(dropout=0.0))
    for p in factors.values():
        p.requires_grad_(True)
        p.decayed = False
    subspace.v.decayed = False
    examples, settings_ = read_token_file(data).examples(), replace(recipe, max_steps=4)
    fit(model, examples, None, tmp_path / 'a', settings_)
    fit(plain, examples, None, tmp_path / 'b', settings_)
    with torch.no_grad():
        subspace.write()
    moved = torch.cat([factors[name].detach().flatten() for name in subspace.names])
    assert (moved - subspace.start).abs().max() > 0.01
    assert (torch.cat([p.flatten() for p in subspace.parameters_of]) - moved).abs().max() < 1e-4


def test_token_preparation_goes_on_where_it_was_killed(tmp_path):
    text = f"""
import os, signal, llmft.data.token_files as t
real, calls = t.write_json, []
def write_json(path, value):
    real(path, value)
    calls.append(path)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
t.write_json = write_json
t.prepare_tokens({str(tmp_path / 'a')!r}, 'simulated:predator_prey', 'characters:abcdefghijklmno', 300, 8, batch=10)"""
    assert subprocess.run([sys.executable, '-c', text], cwd=root, capture_output=True).returncode == -signal.SIGKILL
    left = (tmp_path / 'a' / '.train.bin.partial').stat().st_size
    assert 0 < left < 300 * 65 * 2
    for part in ('bin', 'sizes'):  # what was written after the last note
        with (tmp_path / 'a' / f'.train.{part}.partial').open('ab') as file:
            file.write(bytes(range(48)))
    resumed = prepare_tokens(tmp_path / 'a', 'simulated:predator_prey', 'characters:abcdefghijklmno', 300, 8, batch=10)
    fresh = prepare_tokens(tmp_path / 'b', 'simulated:predator_prey', 'characters:abcdefghijklmno', 300, 8, batch=10)
    assert (
        resumed == fresh and (tmp_path / 'a' / 'train.bin').read_bytes() == (tmp_path / 'b' / 'train.bin').read_bytes()
    )
    assert np.array_equal(
        np.load(tmp_path / 'a' / 'eot_indices.npy'),
        np.flatnonzero(np.fromfile(tmp_path / 'a' / 'train.bin', np.uint16) == 15),
    )


# ---- certificates


@pytest.fixture(scope='module')
def certified(data, tmp_path_factory):
    model, subspace = train(tmp_path_factory.mktemp('run'), data)
    gates = subspace.code_gates()
    subspace.quantise(make_codebook(subspace.v.detach().numpy(), 5, 'optimal'), train=False)
    levels = subspace.finish()
    message = encode_message(subspace.v.detach().numpy(), levels, gates, 4)
    choices = dict(samples=100, token_samples=50, configurations=3, delta=0.05, block=65)
    claims, scores = prove(model, spec(), data, message, **choices)
    return (
        write_certificate(
            tmp_path_factory.mktemp('out') / 'c.llmft', spec(), subspace, model, message, claims, data, choices
        ),
        claims,
        scores,
        model,
        message,
        choices,
    )


def test_scoring_twice_gives_identical_numbers(certified, data):
    _, claims, scores, model, message, choices = certified
    again, scores_again = prove(model.train(), spec(), data, message, **choices)
    assert claims == again and np.array_equal(scores.bits, scores_again.bits)


def test_verify_holds_from_the_file_alone(certified, data):
    path, claims, *_ = certified
    text = f"import sys; from llmft.cli import call; sys.exit(call(['verify', {str(path)!r}, '--data', {str(data)!r}]))"
    done = subprocess.run([sys.executable, '-c', text], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and 'every claim, all of them together, holds with probability 0.95' in done.stdout, done.stderr
    assert len(claims) == 5 and len(path.read_bytes()) < 6000


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_changed_byte_is_refused(certified, draw):
    path = certified[0]
    content = path.read_bytes()
    at, flip = draw.draw(st.integers(0, len(content) - 1)), draw.draw(st.integers(1, 255))
    changed = path.with_name('changed.llmft')
    changed.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
    with pytest.raises(LabError, match='changed'):
        read_certificate(changed)


def test_a_claim_that_is_too_good_is_found_out(certified, data):
    path, claims, _, model, message, choices = certified
    subspace = next(module for module in model.modules() if type(module).__name__ == 'Subspace')
    better = {name: claim | dict(bound=claim['bound'] - 0.01) for name, claim in claims.items()}
    forged = write_certificate(path.with_name('forged.llmft'), spec(), subspace, model, message, better, data, choices)
    assert not any(claim['holds'] for claim in verify(forged, data).values())
    cheap = {name: claim | dict(bits=claim['bits'] - 8) for name, claim in claims.items()}
    assert not any(
        claim['holds']
        for claim in verify(
            write_certificate(path.with_name('cheap.llmft'), spec(), subspace, model, message, cheap, data, choices),
            data,
        ).values()
    )


def signed(header, message, magic=None):
    "The bytes of a certificate with any header and message; its hash is right."
    from llmft.bounds.certificates import MAGIC

    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True).encode()
    body = (magic or MAGIC) + len(text).to_bytes(8, 'big') + text + message
    return body + bytes.fromhex(sha256_of(body))


def changed(header, path, value):
    "A copy of a header with one field changed; `...` removes it."
    copy = json.loads(json.dumps(header))
    *above, last = path.split('.')
    place = copy
    for name in above:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


def refusal(path, data):
    "Exit status of `llmft verify`, its lines on standard error, and processor seconds."
    began = time.process_time()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = cli_call(['verify', str(path), '--data', str(data)])
    return status, errors.getvalue().splitlines(), time.process_time() - began


HOSTILE_FIELDS = [
    ('spec.base.layers', 100_000), ('spec.base.layers', 0), ('spec.base.layers', 2.0), ('spec.base.layers', True),
    ('spec.base.width', 2**14), ('spec.base.width', -16), ('spec.base.width', 17), ('spec.base.heads', 0),
    ('spec.base.block', 2**40), ('spec.base.block', 64), ('spec.base.vocabulary', 3), ('spec.base.vocabulary', '16'),
    ('spec.base.seed', -1), ('spec.base.seed', 10**400), ('spec.base.scale', 1e300), ('spec.base.scale', [1]),
    ('spec.base.model', 7), ('spec.base.model', '../' * 400), ('spec.base', {}), ('spec.base', []), ('spec', {}),
    ('spec.lora.rank', 1_000_000), ('spec.lora.rank', 0), ('spec.lora.targets', 'q_proj'),
    ('spec.lora.targets', ['no_such_layer']), ('spec.lora.targets', ['q_proj'] * 100_000), ('spec.lora.dropout', 1),
    ('spec.subspace.dimension', 2**60), ('spec.subspace.dimension', 61), ('spec.subspace.mode', 'any'),
    ('spec.subspace.projection', '__class__'), ('spec.subspace.gate_bits', 10**6), ('spec.subspace.more', 1),
    ('spec.subspace.temperature', -1), ('model', {}), ('model.base', '0' * 16), ('model.parameters', 1), ('model.more', 'ff'),
    ('model.start', ...), ('model.projection_hash', 'ff' * 8), ('gates', -1), ('data', None), ('data.documents', '400'),
    ('data.documents', 401), ('data.vocabulary', 17), ('data.source', {}), ('data.folder', 'a\x00b'),
    ('data.sha256', 'xyz'), ('settings.samples', -1), ('settings.samples', 401), ('settings.samples', 2**70),
    ('settings.token_samples', 10**9), ('settings.delta', 0), ('settings.delta', 1.5), ('settings.delta', '0.05'),
    ('settings.configurations', 0), ('settings.configurations', 0.5), ('settings.block', 10**7), ('settings', []),
    ('claims', {}), ('claims', []), ('claims.top1_error', ...), ('claims.top1_error.bound', '0'),
    ('claims.top1_error.forms', None), ('claims.top1_error.n', -5), ('claims.top1_error.more', 1),
]  # fmt: skip


@pytest.mark.parametrize('path, value', HOSTILE_FIELDS, ids=lambda what: str(what)[:30])
def test_a_malformed_field_is_refused_in_one_line(certified, data, tmp_path, path, value):
    header, message = read_certificate(certified[0])
    hostile = tmp_path / 'hostile.llmft'
    hostile.write_bytes(signed(changed(header, path, value), message))
    status, lines, seconds = refusal(hostile, data)
    assert status == 2 and len(lines) == 1 and len(lines[0]) < 600, lines
    assert seconds < 10


def hostile_bytes(header, message):
    "Name -> bytes of a file that is no certificate, or has a message that is none."
    text = json.dumps(header, sort_keys=True)
    whole = signed(header, message)
    deep = text[:-1] + ', "x": ' + '[' * 200_000 + '}'
    return {
        'empty': b'', 'only the mark': MAGIC, 'no header': signed(b'', message), 'no message': signed(header, b''),
        'header beyond the file': whole[: len(MAGIC)] + (2**62).to_bytes(8, 'big') + whole[len(MAGIC) + 8 :],
        'another format': signed(header, message, b'llmft certificate 1\n'), 'cut': whole[:-7], 'longer': whole + b'1',
        'not JSON': signed(b'{]', message), 'not UTF-8': signed(b'\xff\xfe', message), 'a list': signed([], message),
        'NaN': signed(text.replace('0.05', 'NaN').encode(), message), 'a name twice': signed(
            text.replace('{', '{"spec": {}, ', 1).encode(), message), 'deep': signed(deep.encode(), message),
        'long number': signed(text.replace('400', '4' * 5000).encode(), message),
        'byte behind the message': signed(header, message + b'\0'),
        'bytes behind the message': signed(header, message + b'kind sample 17'),
        'half a message': signed(header, message[: len(message) // 2]), 'random message': signed(header, bytes(range(60))),
        'no levels': signed(header, b'\0' * 40), 'ones': signed(header, b'\xff' * 4000),
        'levels that are not finite': signed(header, message[:1] + b'\x7e\x00' + message[3:]),
        'levels turned round': signed(header, message[:1] + b'\x7b\xff' + message[3:]),
        'long header': signed(b' ' * 2**21 + text.encode(), message),
    }  # fmt: skip


HOSTILE_FILES = list(hostile_bytes({}, bytes(50)))


@pytest.mark.parametrize('name', HOSTILE_FILES)
def test_a_file_that_is_no_certificate_is_refused_in_one_line(certified, data, tmp_path, name):
    hostile = tmp_path / 'hostile.llmft'
    hostile.write_bytes(hostile_bytes(*read_certificate(certified[0]))[name])
    status, lines, seconds = refusal(hostile, data)
    assert status == 2 and len(lines) == 1 and len(lines[0]) < 600, lines
    assert seconds < 10


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'missing', 'null byte'])
def test_what_is_no_file_is_no_certificate(data, tmp_path, kind):
    path = tmp_path / kind
    if kind == 'folder':
        path.mkdir()
    if kind == 'pipe':
        os.mkfifo(path)
    status, lines, _ = refusal('a\0b' if kind == 'null byte' else path, data)
    assert status == 2 and len(lines) == 1, lines


def test_there_are_enough_hostile_files():
    assert len(HOSTILE_FIELDS) + len(HOSTILE_FILES) >= 90


@pytest.mark.parametrize('field, by', [('risk', -0.5), ('n', 1), ('m', -1), ('delta', 0.01), ('alpha', 0.003),
                                       ('width', -1.0), ('bits', -8.0), ('bound', -0.01), ('bound', 5.0)])  # fmt: skip
def test_every_field_of_a_claim_is_compared(certified, data, tmp_path, field, by):
    header, message = read_certificate(certified[0])
    claim = header['claims']['bits_per_token']
    forged = tmp_path / 'forged.llmft'
    forged.write_bytes(signed(changed(header, f'claims.bits_per_token.{field}', claim[field] + by), message))
    checked = verify(forged, data)
    assert checked['bits_per_token']['differs'] == [field]
    assert [name for name, claim in checked.items() if not claim['holds']] == ['bits_per_token']
    assert refusal(forged, data)[0] == 1


@pytest.mark.parametrize('form', ['hoeffding', 'kl', 'bernstein', 'betting'])
def test_every_form_of_a_claim_is_compared(certified, data, tmp_path, form):
    header, message = read_certificate(certified[0])
    forged = tmp_path / 'forged.llmft'
    for value in (header['claims']['bits_per_token']['forms'][form] - 0.01, ...):
        forged.write_bytes(signed(changed(header, f'claims.bits_per_token.forms.{form}', value), message))
        assert verify(forged, data)['bits_per_token']['differs'] == [form]


def test_fewer_settings_or_another_sample_than_were_paid_for_do_not_verify(certified, data, tmp_path):
    header, message = read_certificate(certified[0])
    forged = tmp_path / 'forged.llmft'
    for field, value in (('configurations', 1), ('samples', 90), ('delta', 0.2)):
        forged.write_bytes(signed(changed(header, f'settings.{field}', value), message))
        assert not all(claim['holds'] for claim in verify(forged, data).values())


def test_a_base_that_memorised_is_named_as_a_condition(certified):
    from llmft.bounds.certificates import condition

    header, _ = read_certificate(certified[0])
    assert 'provided' not in condition(header) and 'whatever seeds and settings were tried' in condition(header)
    header['spec']['base'] = dict(model='/some/where/memorised')
    said = condition(header)
    assert f"provided that base /some/where/memorised (hash {header['model']['base']})" in said
    assert 'the settings that were tried (at most 3) were fixed before these documents were drawn' in said and '0.95' in said


def test_the_seed_of_a_random_base_is_paid_for():
    from llmft.bounds.descriptions import description_bits

    cheap, dear = spec(), spec()
    dear['base']['seed'] = 2**31
    assert description_bits(dear) - description_bits(cheap) == 60


@quick
@given(st.binary(max_size=300), st.integers(1, 5000), st.integers(0, 5))
def test_any_bytes_are_a_message_in_one_way_or_refused(message, d, gates):
    try:
        values, gate_values = decode_message(message, d, gates, 4)
    except LabError as error:
        assert '\n' not in str(error)
    else:
        assert encode_message(values, np.unique(values), gate_values, 4) == message


# ---- scoring


def test_the_toy_of_the_specification():
    toy = summarise(
        np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]),
        [0.5, 0.25, 0.01, 0.001, 0.2, 1e-6, 0.9, 0.3, 0.05],
        [0, 1, 12, 150, 2, 40000, 0, 1, 9],
        3,
        50257,
    )
    assert toy.bits.mean(0)[[5, 7]] == pytest.approx([5.309209195, 5.927433335], abs=1e-9)
    assert 1 - toy.errors.mean(0)[[0, 1, 2, 4]] == pytest.approx([7 / 36, 5 / 9, 23 / 36, 3 / 4])


# ---- the study, as small as it goes

TEN = {
    'pareto_frontier_d1000.png',
    'pareto_frontier_d2000.png',
    'compression_comparison_d1000.png',
    'compression_comparison_d2000.png',
    'allocation_comparison_grid.png',
    'learned_gating_heatmap_d1000.png',
    'learned_gating_heatmap_d2000.png',
    'learned_gating_trend.png',
}


def test_the_sweep_is_the_study():
    from llmft.runs.sweep_file import expand
    from llmft.runs.sweeps import needs

    train_stage, bound_stage, summary = expand(root / 'params/sweeps/sublora_allocation.yaml', 'small')
    seen = {
        (
            p.params['intrinsic_dim'],
            p.params['allocation_mode'],
            p.params['b_ratio'] if p.params['allocation_mode'] == 'fixed' else None,
            p.params['seed'],
        )
        for p in train_stage
    }
    assert seen == {
        (d, mode, ratio, seed)
        for d in (1000, 2000)
        for mode, ratio in (('uniform', None), ('fixed', 0.2), ('fixed', 0.5), ('fixed', 0.8), ('learned', None))
        for seed in (42, 123, 999)
    }
    assert len(bound_stage) == 30 and all(
        p.params['configurations'] == 30 and [q.name for q in needs(p, train_stage)] == [p.name] for p in bound_stage
    )


def test_a_model_that_no_certificate_can_describe_is_refused_before_training(tmp_path):
    base = dict(model='random', layers=12, heads=12, width=768, block=1024, vocabulary=50257, seed=0, scale=0.02)
    lora = dict(targets=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'c_fc', 'lm_head'], rank=80, alpha=32.0, dropout=0.0,
                seed=0)
    subspace = dict(dimension=1000, mode='uniform', ratio=0.5, projection='kronecker', seed=0, gate_bits=4,
                    temperature=0.2, final_temperature=0.02, anneal_steps=10)
    assert check_spec(dict(base=base, lora=lora, subspace=subspace))  # only the head's factors have a vocabulary
    for wrong in (dict(layers=24, width=1024), dict(vocabulary=2**20)):
        with pytest.raises(LabError, match='the description stands for up to'):
            check_spec(dict(base=base | wrong, lora=lora | dict(rank=400), subspace=subspace))

    texts = ['layers=24', 'heads=16', 'width=1024', 'max_length=1024', 'tokenizer=base', 'documents=200']
    notebook, params = resolve_params([root / 'nbs/experiments/sublora_train.ipynb'], texts)
    record = execute_run(notebook, params | dict(outputs=str(tmp_path)), on_line=lambda line: None)
    assert record['run']['status'] == 'failed' and 'the description stands for up to' in record['run']['error']
    assert not list((tmp_path / 'sublora_train').rglob('log.jsonl'))


def test_train_bound_and_analysis_notebooks(tmp_path):
    from llmft.runs.execute import execute_run
    from llmft.runs.params import resolve_params
    from llmft.studies.sublora.again import bounds_again

    def run(path, **values):
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        notebook, params = resolve_params([root / path], [f'{name}={text}' for name, text in texts.items()], 'small')
        record = execute_run(notebook, params | dict(outputs=str(tmp_path)), on_line=lambda line: None)
        assert record['run']['status'] == 'done', record['run']['error']
        return json.loads((tmp_path / notebook.stem / params['name'] / 'metrics.json').read_text())

    for d, mode in ((1000, 'learned'), (2000, 'learned')):
        run(
            f'params/sublora_train/d{d}_{mode}.yaml',
            documents=3000,
            num_eval_samples=100,
            max_steps=4,
            eval_every=2,
            save_every=2,
            log_every=1,
        )
        found = run(
            'params/sublora_bounds/d1000_uniform.yaml',
            name=f'd{d}_{mode}',
            trained=f'd{d}_{mode}',
            retrain_steps=2,
            samples=100,
            num_eval_samples=1000,  # more than there are
            configurations=2,
        )
        assert (
            found['verified']
            and found['bound_value'] > found['empirical_bpd']
            and found['kl_divergence'] == pytest.approx(found['charged_bits'] * math.log(2))
        )
        folder = tmp_path / 'sublora_bounds' / f'd{d}_{mode}'
        assert_computed_again('sublora_train', tmp_path / 'sublora_train' / f'd{d}_{mode}')
        assert_computed_again('sublora_bounds', folder)
        numbers = bounds_again(folder, json.loads((folder / 'run.json').read_text()))
        assert {'bound_value', 'top1_error', 'held_out_bpd', 'verified'} <= set(numbers)
        assert {name: found[name] for name in numbers} == pytest.approx({name: n for name, (n, _) in numbers.items()})
        assert set(json.loads((folder / 'bounds_metrics.json').read_text())) == {
            'kl_divergence',
            'empirical_bpd',
            'bound_value',
            'compressed_size_bits',
        }
        assert {
            'best_ckpt.safetensors',
            'trainable_initparams.safetensors',
            'names.json',
            'gate_trace.safetensors',
            'spec.json',
        } <= {p.name for p in (tmp_path / 'sublora_train' / f'd{d}_{mode}').iterdir()}
        assert 8 * (folder / 'message.bin').stat().st_size == found['compressed_size_bits']
    found = run(
        'params/sublora_analysis/allocation.yaml', coverage_games=20, coverage_documents=90, coverage_samples=30
    )
    folder = tmp_path / 'sublora_analysis' / 'allocation'
    assert (
        found['runs'] == 2
        and {p.name for p in (folder / 'figures').iterdir()} == TEN
        and {'summary_table.csv', 'summary_table.tex'} <= {p.name for p in folder.iterdir()}
    )


def test_two_processes_train_the_same_subspace(tmp_path):
    from safetensors.torch import load_file

    from llmft.runs.execute import execute_run
    from llmft.runs.params import resolve_params

    found = {}
    for name, more in (('alone', []), ('two', ['nproc=2', 'strategy=ddp'])):
        notebook, params = resolve_params(
            [root / 'params/sublora_train/d1000_learned.yaml'],
            [
                f'name={name}',
                'documents=2000',
                'num_eval_samples=50',
                'max_steps=4',
                'eval_every=2',
                'save_every=2',
                'log_every=1',
                *more,
            ],
            'small',
        )
        record = execute_run(notebook, params | dict(outputs=str(tmp_path)), on_line=lambda line: None)
        assert record['run']['status'] == 'done', record['run']['error']
        folder = tmp_path / 'sublora_train' / name
        page = (folder / 'report.html').read_text()
        assert f'{name}, step 0: held-out loss ' in page and 'Length of training documents' in page
        found[name] = load_file(folder / 'best_ckpt.safetensors') | load_file(folder / 'gate_trace.safetensors')
    assert found['alone']['step'].tolist() == [1, 2, 3, 4] and set(found['alone']) == set(found['two']) == {
        'v',
        'gates',
        'step',
        'shares',
    }
    for key, value in found['alone'].items():
        torch.testing.assert_close(found['two'][key], value, rtol=1e-3, atol=1e-5)
    assert (found['alone']['shares'][0] != found['alone']['shares'][-1]).any()


def test_a_tie_is_no_hit():
    from llmft.bounds.scoring import _score_targets

    head = torch.nn.Linear(4, 6, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0, 0, 0]] * 3 + [[2.0, 0, 0, 0]] + [[0.0] * 4] * 2))
    _, ranks = _score_targets(torch.ones(4, 4), head, torch.tensor([0, 3, 4, 2]), 2**20)
    assert ranks.tolist() == [3, 0, 5, 3]
    head.weight.data.zero_()
    assert _score_targets(torch.ones(2, 4), head, torch.tensor([0, 5]), 2**20)[1].tolist() == [5, 5]


def test_pieces_of_logits_give_the_scores_of_all_at_once():
    from llmft.bounds.scoring import _pieces, _score_targets

    torch.manual_seed(0)
    head = torch.nn.Linear(8, 2048, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randint(-3, 4, (2048, 8)))  # whole numbers: products are exact in any order
    hidden_RD, targets_R = torch.randint(-3, 4, (300, 8)).float(), torch.randint(2048, (300,))
    logits_RV = head(hidden_RD)
    assert [piece.stop for piece in _pieces(logits_RV)] == [128, 256, 300]  # of 2**20 bytes at most
    assert _pieces(logits_RV.to('meta')) == [slice(0, 300)]
    logs, ranks = _score_targets(hidden_RD, head, targets_R, 200 * 2048 * 8)  # two products, several pieces in each
    assert torch.equal(logs, -torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction='none'))
    assert torch.equal(ranks, (logits_RV >= logits_RV.gather(1, targets_R[:, None])).sum(1) - 1)


def test_two_runs_of_one_seed_are_not_averaged_in_silence():
    from llmft.studies.sublora.allocation import MEASURES, aggregate

    row = dict(intrinsic_dim=1000, allocation_mode='uniform', b_ratio=None, seed=42, **{key: 1.0 for key in MEASURES})
    assert aggregate([row, row | dict(seed=43)])[0]['n'] == 2
    with pytest.raises(LabError, match='have the same seed'):
        aggregate([row, row])


@pytest.mark.parametrize('file', ['train_offsets.npy', 'train.bin'])
def test_a_certificate_is_about_these_documents(certified, data, tmp_path, file):
    "Other documents are seen although the facts about the folder were written anew for them."
    other = tmp_path / 'data'
    shutil.copytree(data, other)
    if file == 'train.bin':
        ids = np.fromfile(other / file, np.uint16)
        ids[0] = (ids[0] + 1) % 15
        ids.tofile(other / file)
    else:
        offsets = np.load(other / file)
        offsets[1] += 1
        np.save(other / file, offsets)
    facts = json.loads((other / 'tokens.json').read_text())
    facts['train'] = side_facts(other, 'train')
    (other / 'tokens.json').write_text(json.dumps(sealed(facts)))
    with pytest.raises(LabError, match='another corpus' if file == 'train.bin' else 'other documents'):
        verify(certified[0], other)
