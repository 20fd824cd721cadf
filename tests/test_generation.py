"Generation against the generate of transformers, which is slower and knows more models: same tokens, same logits, whatever the batch."

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data.tokens import load_tokenizer
from llmft.inference import decoder
from llmft.inference.decoder import LeanDecoder, ModelDecoder, is_lean, linear_map
from llmft.inference.generation import choose, complete, generate
from llmft.models.adapters import add_lora
from llmft.models.load import largest_difference, load_model, presets, rounding
from llmft.models.precisions import use_int4

scaled = dict(
    rope_type='llama3',
    rope_theta=5e5,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
presets['llama-scaled'] = presets['llama-tiny'] | dict(
    rope_parameters=scaled, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, head_dim=32
)
shapes = ('llama-tiny', 'qwen2-tiny', 'llama-scaled', 'gpt2-tiny')
each_shape = pytest.mark.parametrize('shape', shapes)
models = {}


def model_of(shape):
    "A small model whose biases and norms are not the zeros and ones they begin as."
    if shape in models:
        return models[shape]
    model = models[shape] = load_model('base' if shape == 'base' else f'preset:{shape}', seed=1).eval()
    torch.manual_seed(0)
    if shape != 'base':
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.add_(0.3 * torch.randn_like(weight))
                elif 'embed' not in name and 'wte' not in name:
                    weight.mul_(3)
    return model


def theirs(model, prompt, new, **options):
    "New tokens of one prompt by transformers, greedy."
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return out[0, len(prompt) :].tolist()


ragged = st.lists(st.lists(st.integers(1, 511), min_size=1, max_size=20), min_size=1, max_size=5)


@pytest.mark.parametrize('shape', (*shapes, 'base'))
def test_greedy_tokens_are_those_of_transformers(shape):
    model = model_of(shape)
    assert is_lean(model) == (shape != 'gpt2-tiny')

    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(ragged)
    def check(prompts):
        assert generate(model, prompts, 10).ids == [theirs(model, prompt, 10) for prompt in prompts]

    check()


@each_shape
def test_logits_of_ragged_batches_are_those_of_single_rows(shape):
    model, rows = model_of(shape), [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    more = torch.randint(1, 511, (12, 3), generator=torch.Generator().manual_seed(0)).to(model.device)
    ids = torch.tensor([[0] * (7 - len(row)) + row for row in rows], device=model.device)
    decoders = [lambda: ModelDecoder(model, 19)] + [
        lambda steps=steps: LeanDecoder(model, 19, 3, steps) for steps in (0, 16) if is_lean(model)
    ]
    for make_decoder in decoders:
        with torch.no_grad():
            decoder = make_decoder()
            logits = [
                decoder.begin(ids, torch.tensor([7 - len(row) for row in rows], device=model.device)),
                *(decoder.step(step) for step in more),
            ]
            for number, row in enumerate(rows):
                together = torch.tensor([[*row, *more[:, number].tolist()]], device=model.device)
                alone = model(together).logits[0, len(row) - 1 :]
                torch.testing.assert_close(torch.stack([step[number] for step in logits]), alone, atol=1e-4, rtol=0)
    assert logits[0].std() > 0.1


@pytest.mark.parametrize('quantisation', ['none', 'nf4', 'int8'])
@pytest.mark.parametrize('shape', ['llama-tiny', 'qwen2-tiny'])
def test_adapters_and_quantised_layers_decode_as_in_the_model(shape, quantisation):
    model = add_lora(
        load_model(f'preset:{shape}', quantisation=quantisation),
        4,
        8.0,
        0.5,
        ['q_proj', 'v_proj', 'down_proj', 'gate_proj'],
        0,
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(weight, std=0.3)
    made = generate(model, [[5, 6, 7], [8]], 8)
    assert model.training and made.ids == [theirs(model.eval(), prompt, 8) for prompt in ([5, 6, 7], [8])]
    with model.disable_adapter():
        off = generate(model, [[5, 6, 7]], 8).ids
    assert off == generate(load_model(f'preset:{shape}', quantisation=quantisation), [[5, 6, 7]], 8).ids != made.ids[:1]


def name_of(product):
    "The function that made `product`, 'linear' for the usual one."
    return getattr(product, 'func', product).__qualname__.split('.')[0]


@pytest.mark.parametrize('rows', [1, 2, 16])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('maker', ['AuthenticAMD', 'GenuineIntel'])
def test_special_products_are_the_usual_one_and_fit_the_processor(rows, bias, maker, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: True)
    monkeypatch.setattr(decoder, 'processor_maker', lambda: maker)
    monkeypatch.setattr(decoder, '_mkl_reads_slowly', decoder._mkl_reads_slowly.__wrapped__)
    layer, inputs = torch.nn.Linear(1024, 4096, bias=bias), torch.randn(rows, 1024)
    with torch.no_grad():
        products = [linear_map(layer, rows, packs) for packs in (False, True)]
        for product in products:
            torch.testing.assert_close(product(inputs), layer(inputs), atol=1e-4, rtol=0)

    plain = '_in_stripes' if rows <= 2 and 'AMD' in maker else 'linear'
    assert [name_of(product) for product in products] == [plain, '_packed' if rows > 2 else plain]


def middle_llama(bias, joins):
    "A Llama in bfloat16 wide enough for copies; without `joins` its keys do not fill blocks of the kernel."
    shape = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64 if joins else 16)
    presets['llama-middle'] = presets['llama-tiny'] | shape | dict(intermediate_size=1024, attention_bias=bias)
    model = load_model('preset:llama-middle', 'bf16', seed=1).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize('rows', [1, 2, 5])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('joins', [False, True])
@pytest.mark.parametrize('four_bits', [False, True])
def test_copied_weights_of_16_and_of_four_bits_give_the_logits_of_the_model(rows, bias, joins, four_bits):
    if torch.cuda.is_available():
        pytest.skip('these copies are for a CPU; a GPU has its own, which the graph tests read')
    model = middle_llama(bias, joins)
    if four_bits:
        use_int4(model)
    ids = torch.randint(1, 511, (rows, 9), generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        whole = model(ids).logits[:, 5:]
        for steps in (0, 16):
            decoder = LeanDecoder(model, 9, rows, steps)
            logits = [decoder.begin(ids[:, :6], torch.zeros(rows, dtype=torch.long))]
            logits += [decoder.step(ids[:, place]) for place in range(6, 9)]
            assert largest_difference([torch.stack(logits, 1)], [whole]) <= rounding(model)
        qkv = decoder.layers[0].qkv
        if rows == 1 and not four_bits:
            assert qkv.func is torch.nn.functional.linear and decoder.own_products
        else:
            assert qkv.__qualname__.split('.')[0] == (
                ('_four_bit_map' if joins else '_side_by_side') if four_bits else '_packed'
            )


@pytest.mark.parametrize('precision', ['bf16', 'fp32'])
@pytest.mark.parametrize('rows', [1, 2])
def test_single_rows_of_16_bits_are_multiplied_without_onednn_and_nothing_else_is(rows, precision, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip('oneDNN is for a CPU')
    model = load_model('preset:llama-tiny', precision, seed=1).eval()
    decoder = LeanDecoder(model, 9, rows, 16)
    head, states = decoder.head, []
    monkeypatch.setattr(
        decoder, 'head', lambda inputs: (states.append(torch.backends.mkldnn.enabled), head(inputs))[1]
    )
    decoder.begin(torch.tensor([[3, 4, 5]] * rows), torch.zeros(rows, dtype=torch.long))
    decoder.step(torch.tensor([6] * rows))
    alone = rows == 1 and precision == 'bf16'
    assert states == [True, not alone] and torch.backends.mkldnn.enabled
    if alone:
        decoder.select([0, 0])
        decoder.step(torch.tensor([7, 8]))
        monkeypatch.setattr(decoder, 'head', lambda inputs: 1 / 0)
        decoder.select([0])
        with pytest.raises(ZeroDivisionError):
            decoder.step(torch.tensor([6]))
        assert states[2:] == [True] and torch.backends.mkldnn.enabled


@pytest.mark.parametrize('size', [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_a_single_row_is_that_of_many(size, dtype):
    "It errs by two units of the last place at most, next to the norm in 64 bits; a row of zeros stays one."
    model = load_model('preset:llama-tiny', seed=1).to('cpu', dtype)
    decoder = LeanDecoder(model, 4)
    torch.manual_seed(0)
    row, weight = (torch.randn(1, len(decoder.norm)) * size).to(dtype), torch.randn(len(decoder.norm)).to(dtype)
    right = torch.nn.functional.rms_norm(row.double(), row.shape[1:], weight.double(), decoder.epsilon)
    ours = decoder._normed(row, weight)
    assert ours.dtype == dtype and ours.shape == row.shape
    assert (ours - right).abs().max() <= 2 * torch.finfo(dtype).eps * right.abs().max()


def written_out(model):
    "The same model with its eight-bit layers as ordinary ones that hold the same numbers."
    for name, module in list(model.named_modules()):
        if type(module).__name__ == 'Linear8bitLt':
            plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            plain.weight.data = module.weight.data.float() * (scales / 127)[:, None]
            plain.bias = module.bias
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize('rows', [1, 4, 5])
@pytest.mark.parametrize('wide', [176, 192], ids=['beyond blocks', 'whole blocks'])
def test_eight_bits_are_evaluated_as_the_numbers_they_stand_for(wide, rows):
    if torch.cuda.is_available():
        pytest.skip('on a GPU the layers of bitsandbytes are called')
    presets['llama-bytes'] = presets['llama-tiny'] | dict(intermediate_size=wide, attention_bias=True)
    ids = torch.randint(1, 511, (rows, 9), generator=torch.Generator().manual_seed(rows))
    model, exact = (load_model('preset:llama-bytes', quantisation='int8', seed=1).eval() for _ in range(2))
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias, generator=torch.Generator().manual_seed(0))
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        whole = written_out(exact)(ids).logits[:, 5:]
        evaluated = model(ids).logits[:, 5:]
        assert largest_difference([evaluated], [whole]) < 1e-5  # 9 rows and more: exact
        for steps in (0, 16):
            decoder = LeanDecoder(model, 9, rows, steps)
            logits = [decoder.begin(ids[:, :6], torch.zeros(rows, dtype=torch.long))]
            logits += [decoder.step(ids[:, place]) for place in range(6, 9)]
            difference = largest_difference([torch.stack(logits, 1)], [whole])
            assert difference < (1e-5 if rows > 4 else 1e-2)
    assert decoder.layers[0].qkv.__qualname__.split('.')[0] == 'eight_bit_product'
    rounded = model(ids).logits[:, 5:].detach()  # with gradients it is bitsandbytes that evaluates
    assert largest_difference([rounded], [whole]) > max(2 * difference, 1e-3)
    assert largest_difference([model.train()(ids).logits[:, 5:].detach()], [whole]) < 1e-5  # it trains like this


def test_a_packed_batch_gives_the_tokens_of_transformers():
    model, prompts = model_of('base'), [[7 + row, 300 + row, 12] for row in range(5)]
    assert generate(model, prompts, 20).ids == [theirs(model, prompt, 20) for prompt in prompts]


def test_trained_weights_are_read_and_not_remembered():
    model = load_model('preset:llama-tiny')
    before = generate(model, [[5, 6, 7]], 6).ids
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-30)
    after = generate(model, [[5, 6, 7]], 6).ids
    assert before != after == [theirs(model.eval(), [5, 6, 7], 6)]


@each_shape
def test_rows_that_stop_leave_the_batch_and_the_others_do_not_notice(shape):
    model, prompts = model_of(shape), [[row + 3, row + 5] for row in range(12)]
    free = generate(model, prompts, 24).ids
    stops = [free[0][2], free[5][9]]
    made = generate(model, prompts, 24, stop_ids=stops)
    for row, (ids, full) in enumerate(zip(made.ids, free, strict=True)):
        first = next((place for place, token in enumerate(full) if token in stops), None)
        assert ids == full[:first] and made.stopped[row] == ('length' if first is None else 'stop')
    assert (
        made.stopped.count('stop') >= 2
        and made.new_tokens == sum(map(len, made.ids)) + made.stopped.count('stop')
        and made.prompt_tokens == 24
    )
    assert theirs(model, prompts[0], 24, eos_token_id=stops)[:-1] == made.ids[0]


def test_compaction_happens_and_keeps_each_row_its_own(monkeypatch):
    sizes, step = [], LeanDecoder.step
    monkeypatch.setattr(LeanDecoder, 'step', lambda self, ids_B: sizes.append(len(ids_B)) or step(self, ids_B))
    model, prompts = model_of('base'), [[300 + 211 * row, 77 + row, 1000 - row] for row in range(9)]
    free = generate(model, prompts, 12).ids
    sizes.clear()
    stops = {token for ids in free[::2] for token in ids[:6]} - {token for ids in free[1::2] for token in ids}
    made = generate(model, prompts, 12, stop_ids=stops)
    assert sizes[0] == 9 and sizes[-1] <= 4 and len({tuple(ids) for ids in made.ids[1::2]}) == 4
    assert [made.ids[row] for row in (1, 3, 5, 7)] == free[1::2] and all(
        ids == full[: len(ids)] for ids, full in zip(made.ids, free, strict=True)
    )


@each_shape
def test_draws_depend_on_seed_and_row_alone(shape):
    model, prompts = model_of(shape), [[5, 6, 7, 8], [9], [10, 11]]
    options = dict(temperature=1.5, top_p=0.95, seed=7, samples=3)
    state = torch.get_rng_state()
    whole = generate(model, prompts, 8, **options).ids
    for size in (1, 2, 4):
        assert generate(model, prompts, 8, batch_size=size, **options).ids == whole
    assert generate(model, prompts, 8, **options | dict(seed=8)).ids != whole and len({tuple(row) for row in whole}) > 6
    assert generate(model, [[1], *prompts], 8, **options).ids[3:] != whole
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_frequencies_are_the_probabilities():
    model = model_of('llama-tiny')
    with torch.no_grad():
        wanted = (model(torch.tensor([[5, 6]], device=model.device)).logits[0, -1] / 0.7).softmax(-1).cpu()
    drawn = (
        torch.tensor(generate(model, [[5, 6]], 1, temperature=0.7, samples=4000).ids).flatten().bincount(minlength=512)
        / 4000
    )
    assert (drawn - wanted).abs().sum() < 2 * ((wanted * (1 - wanted) / 4000).sqrt()).sum()
    top = generate(model, [[5, 6]], 1, temperature=0.7, top_p=0.2, samples=500).ids
    order = wanted.sort(descending=True)
    kept = int((order.values.cumsum(0) - order.values < 0.2).sum())
    assert {row[0] for row in top} <= set(order.indices[:kept].tolist()) and kept > 1


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.05, 1.0),
)
def test_a_draw_is_never_forbidden(logits, draw, top_p):
    logits_BV = torch.tensor([logits + [-math.inf]])
    chosen = choose(logits_BV, torch.tensor([draw], dtype=torch.float64), top_p=top_p).item()
    chances = logits_BV[0].double().softmax(-1)
    assert chances[chosen] > 0 and chances[chances > chances[chosen]].sum() < top_p + 1e-9


@each_shape
def test_constrained_decoding_sees_rows_of_the_batch_and_permits_only_its_mask(shape):
    model, shown = model_of(shape), []

    def allowed(step, new_BN):
        shown.append((step, new_BN.clone()))
        mask = torch.zeros(len(new_BN), 512, dtype=torch.bool)
        for row in range(len(new_BN)):
            mask[row, 100 + 10 * row + step : 110 + 10 * row] = True
        return mask

    made = generate(model, [[5, 6], [7], [8, 9, 10]], 6, allowed=allowed, stop_ids=[100, 101, 110, 111], pad_id=3)
    for row, ids in enumerate(made.ids):
        assert all(100 + 10 * row + step <= token < 110 + 10 * row for step, token in enumerate(ids))
    assert [step for step, _ in shown] == list(range(len(shown))) and all(
        seen.shape == (3, step) for step, seen in shown
    )
    assert shown[-1][1][2].tolist() == made.ids[2][: len(shown) - 1]
    free = generate(model, [[5, 6]], 6, temperature=1.0, allowed=lambda step, new_BN: torch.arange(512) < 4).ids[0]
    assert max(free) < 4
    with pytest.raises(LabError, match='forbids every token'):
        generate(model, [[5, 6]], 6, allowed=lambda step, new_BN: torch.zeros(1, 512, dtype=torch.bool))


def test_streaming_shows_each_token_when_it_comes():
    model, seen = model_of('llama-tiny'), []
    prompts = [[5, 6, 7], [8], [9, 10]]
    free = generate(model, prompts, 9)
    stop = free.ids[1][4]
    made = generate(
        model, prompts, 9, stop_ids=[stop], pad_id=1, on_token=lambda step, ids_B: seen.append((step, ids_B.tolist()))
    )
    assert [step for step, _ in seen] == list(range(len(seen)))
    for row, ids in enumerate(made.ids):
        shown = [ids_B[row] for _, ids_B in seen]
        ended = [stop] if made.stopped[row] == 'stop' else []
        assert shown[: len(ids) + len(ended)] == ids + ended and set(shown[len(ids) + len(ended) :]) <= {1}


def test_modes_are_put_back_module_by_module_even_after_an_error():
    model = load_model('preset:llama-tiny').train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    generate(model, [[5]], 2)
    with pytest.raises(ZeroDivisionError):
        generate(model, [[5]], 2, on_token=lambda *_: 1 / 0)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(weight.requires_grad for weight in model.parameters()) and torch.is_grad_enabled()


def test_clock_counts_and_batches():
    model = model_of('llama-tiny')
    made = generate(model, [[5] * n for n in (1, 4, 9)], 5, samples=2, batch_size=4)
    assert made.prompt_tokens == 14 and made.new_tokens == 30 and len(made.ids) == 6 and len(made.step_seconds) == 2 * 4
    assert (
        all(second > 0 for second in made.step_seconds)
        and 0 < made.first_token_seconds
        and sum(made.step_seconds) + 2 * made.first_token_seconds <= made.seconds * 1.001
    )


def test_the_clock_waits_for_the_device(monkeypatch):
    import llmft.inference.generation as module

    looks = []
    monkeypatch.setattr(module, 'synchronise', lambda: looks.append('wait'))
    clock = module.time.perf_counter
    monkeypatch.setattr(module.time, 'perf_counter', lambda: looks.append('look') or clock())
    generate(model_of('llama-tiny'), [[5]], 3)
    assert looks == ['wait', 'look'] * 5


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(prompts=[]), 'no prompt'),
        (dict(prompts=[[1], []]), 'prompt 1 has no tokens'),
        (dict(prompts=[[512]]), 'outside 0 to 511'),
        (dict(prompts=[[-1]]), 'outside'),
        (dict(max_new_tokens=0), 'max_new_tokens is 0'),
        (dict(max_new_tokens=2047), '2048 positions'),
        (dict(top_p=0.0), 'top_p is 0'),
        (dict(top_p=1.1), 'top_p'),
        (dict(temperature=-1.0), 'temperature'),
        (dict(temperature=math.nan), 'temperature'),
        (dict(samples=0), 'samples is 0'),
        (dict(batch_size=-1), 'batch_size'),
    ],
)
def test_requests_that_cannot_be_met_are_one_line(wrong, message):
    with pytest.raises(LabError, match=message) as caught:
        generate(**dict(model=model_of('llama-tiny'), prompts=[[5, 6]]) | wrong)
    assert '\n' not in str(caught.value)


def test_weights_that_are_not_finite_are_said():
    model = load_model('preset:llama-tiny')
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(LabError, match='not finite'):
        generate(model, [[5]], 2)


def test_texts_end_at_the_end_of_text():
    model, tokenizer = model_of('base'), load_tokenizer('base')
    text = complete(model, tokenizer, ['import os\n', 'def f(x):\n    return '], 40)
    prompt = [0] + tokenizer('import os\n', add_special_tokens=False)['input_ids']
    assert text[0] == tokenizer.decode([token for token in theirs(model, prompt, 40, eos_token_id=0) if token])


@pytest.fixture
def compiler(monkeypatch):
    "The real tracer without the code generator, which takes tens of seconds; how many graphs it made."
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    real = torch.compile
    monkeypatch.delenv('TORCHDYNAMO_DISABLE', raising=False)
    monkeypatch.setattr(
        torch, 'compile', lambda call, **options: real(call, backend='eager', dynamic=options.get('dynamic'))
    )
    with dynamo.config.patch(disable=False):
        yield lambda: counters['stats']['unique_graphs']
    dynamo.reset()


@pytest.mark.parametrize('shape', ['llama-tiny', 'gpt2-tiny'])
def test_compiled_steps_make_the_same_tokens_and_are_compiled_once(shape, compiler):
    model, prompts = load_model(f'preset:{shape}').eval(), [[5, 6, 7, 8], [9], [10, 11]]
    stop = generate(model, prompts, 9).ids[0][4]
    plain = [
        generate(model, prompts, 9, **options)
        for options in (dict(stop_ids=[stop]), dict(temperature=0.9, samples=2, seed=3))
    ]
    assert compiler() == 0
    compiled = [
        generate(model, prompts, 9, compiled=True, **options)
        for options in (dict(stop_ids=[stop]), dict(temperature=0.9, samples=2, seed=3))
    ]
    assert [one.ids for one in compiled] == [one.ids for one in plain] and compiled[0].stopped == plain[0].stopped
    graphs = compiler()
    assert (
        graphs > 0 and generate(model, prompts[::-1], 12, compiled=True).ids == generate(model, prompts[::-1], 12).ids
    )
    assert compiler() == graphs, 'other prompts of the same number are not compiled again'


def test_a_compiled_step_takes_no_number_as_input(monkeypatch, compiler):
    "A number among the inputs would be another graph on a GPU for every value that it takes."
    numbers, graphs = [], []

    def backend(graph, inputs):
        numbers.extend(value for value in inputs if isinstance(value, (int, torch.SymInt)))
        graphs.append(graph)
        return graph.forward

    model, tracer = load_model('preset:llama-tiny').eval(), torch.compile.__closure__[0].cell_contents
    monkeypatch.setattr(torch, 'compile', lambda call, **options: tracer(call, backend=backend, dynamic=None))
    for prompts in ([[1, 2, 3]], [[1, 2, 3, 4, 5]]):
        generate(model, prompts, 12, compiled=True)
    assert graphs and not numbers


def test_an_adapter_on_the_norms_is_decoded(tmp_path):
    net = peft.get_peft_model(load_model('base'), peft.LNTuningConfig(task_type='CAUSAL_LM'))
    torch.manual_seed(0)
    for weight in net.parameters():
        if weight.requires_grad:
            weight.data.mul_(torch.rand_like(weight) * 3)
    prompt = [5, 77, 900]
    assert not is_lean(net) and generate(net.eval(), [prompt], 12).ids[0] == theirs(net, prompt, 12)
    assert generate(net, [prompt], 12).ids != generate(load_model('base').eval(), [prompt], 12).ids
