"""The chunked loss against the plain one: values, gradients, precision, and peak memory measured on real allocations."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from llmft.training import losses
from llmft.training.losses import head_cross_entropy, linear_cross_entropy, softmax_losses_, token_losses

here = 'cuda' if torch.cuda.is_available() else 'cpu'
chunk_bytes = {'one row': 1, 'three rows': 3 * 4 * 53, 'more than all': 2**25}


def example(rows=17, width=12, words=53, dtype=torch.float32, every=3, seed=0, scale=1.0):
    "hidden_ND, weight_VD, bias_V that need gradients, and targets_N of which each `every`-th is ignored."
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (scale * torch.randn(*shape, generator=generator)).to(here, dtype).requires_grad_()

    targets_N = torch.randint(words, (rows,), generator=generator)
    if every:
        targets_N[::every] = -100
    return draw(rows, width), draw(words, width), draw(words), targets_N.to(here)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])


def plain(hidden_ND, weight_VD, bias_V, targets_N):
    "The same through full logits in fp64."
    hidden_ND, weight_VD, bias_V = (None if x is None else x.double() for x in (hidden_ND, weight_VD, bias_V))
    return F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V), targets_N, reduction='sum')


@pytest.mark.parametrize('every', [0, 3])
@pytest.mark.parametrize('frozen', ['nothing', 'weight', 'hidden', 'no bias'])
@pytest.mark.parametrize('size', chunk_bytes.values(), ids=chunk_bytes.keys())
def test_equals_plain_loss(size, frozen, every):
    hidden_ND, weight_VD, bias_V, targets_N = example(every=every)
    if frozen == 'weight':
        weight_VD.requires_grad_(False)
        bias_V.requires_grad_(False)
    if frozen == 'hidden':
        hidden_ND.requires_grad_(False)
    if frozen == 'no bias':
        bias_V = None
    inputs = [x for x in (hidden_ND, weight_VD, bias_V) if x is not None]
    loss, count = linear_cross_entropy(hidden_ND, weight_VD, targets_N, bias_V, chunk_bytes=size)
    expected = plain(hidden_ND, weight_VD, bias_V, targets_N)
    assert count == (targets_N != -100).sum()
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-5 * expected
    for ours, theirs in zip(gradients(loss * 0.37, *inputs), gradients(expected * 0.37, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', chunk_bytes.values(), ids=chunk_bytes.keys())
def test_gradients_are_those_of_finite_differences(size):
    hidden_ND, weight_VD, bias_V, targets_N = example(rows=5, width=3, words=7, dtype=torch.float64)

    def loss(hidden_ND, weight_VD, bias_V):
        return linear_cross_entropy(hidden_ND, weight_VD, targets_N, bias_V, chunk_bytes=size)[0]

    ours = gradients(loss(hidden_ND, weight_VD, bias_V), hidden_ND, weight_VD, bias_V)
    for which, slope in enumerate(ours):
        for place in range(slope.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [x.detach().clone() for x in (hidden_ND, weight_VD, bias_V)]
                moved[which].view(-1)[place] += step
                ends.append(loss(*moved))
            assert abs((ends[0] - ends[1]) / 2e-6 - slope.view(-1)[place]) < 1e-7


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize('words', [53, 4001])
def test_half_precision_sums_in_fp32(dtype, tolerance, words):
    "Against fp64 from the same half-precision inputs: the loss to rounding of the logits, gradients in the direction of the exact ones, one-row chunks like one chunk."
    hidden_ND, weight_VD, bias_V, targets_N = example(rows=96, words=words, dtype=dtype)
    expected = plain(hidden_ND, weight_VD, bias_V, targets_N)
    exact = gradients(expected, hidden_ND, weight_VD, bias_V)
    found = [linear_cross_entropy(hidden_ND, weight_VD, targets_N, bias_V, chunk_bytes=size)[0] for size in (1, 2**25)]
    assert abs(found[0] - found[1]) < 1e-5 * expected and abs(found[0] - expected) < tolerance * expected / 10
    for loss in found:
        for ours, theirs in zip(gradients(loss, hidden_ND, weight_VD, bias_V), exact, strict=True):
            assert ours.dtype == dtype
            assert (ours.double() - theirs.double()).norm() < tolerance * theirs.double().norm()


def test_small_half_precision_gradients_are_not_lost_over_many_chunks():
    "2,000 equal rows in chunks of one: a bf16 accumulator would stop growing at 256 times one row's gradient."
    hidden_ND, weight_VD = (
        torch.ones(2000, 4, dtype=torch.bfloat16),
        torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True),
    )
    loss, _ = linear_cross_entropy(hidden_ND, weight_VD, torch.zeros(2000, dtype=torch.long), chunk_bytes=1)
    (slope,) = torch.autograd.grad(loss, weight_VD)
    assert abs(slope[1, 0].item() / 250 - 1) < 0.01


def test_extreme_logits_stay_exact():
    logits_RV = torch.tensor([[0.0, 0.0, 3e4], [-3e4, 0.0, 0.0], [-float('inf'), 1.0, 1.0]])
    losses_R = softmax_losses_(logits_RV, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(losses_R, torch.tensor([3e4, 3e4 + 0.6931472, 0.6931472]))


def test_nothing_to_learn_is_zero_with_zero_gradients():
    hidden_ND, weight_VD, bias_V, _ = example()
    nothing = torch.full((17,), -100, device=here)
    for head in (nn.Linear(12, 53).to(here), nn.Sequential(nn.Linear(12, 53)).to(here)):
        if type(head) is not nn.Linear:
            head.weight = head[0].weight
        loss, count = head_cross_entropy(hidden_ND, head, nothing)
        (slope,) = torch.autograd.grad(loss, hidden_ND)
        assert loss.item() == 0 and count == 0 and slope.abs().sum() == 0
    loss, count = linear_cross_entropy(hidden_ND[:0], weight_VD, nothing[:0], bias_V)
    assert loss.item() == 0 and count == 0


@pytest.mark.parametrize('every', [0, 3, 1])
@pytest.mark.parametrize('plain_head', [True, False])
def test_a_known_count_changes_no_bit(every, plain_head):
    "Also for rows that all have a target, and none."
    hidden_ND, weight_VD, _, targets_N = example(every=every)
    head = nn.Linear(12, 53, bias=False).to(here) if plain_head else nn.Sequential(nn.Linear(12, 53)).to(here)
    head.weight = nn.Parameter(weight_VD.detach()) if plain_head else head[0].weight
    count = int((targets_N != -100).sum())
    found = [head_cross_entropy(hidden_ND, head, targets_N, count=known) for known in (None, count)]
    slopes = [gradients(loss, hidden_ND, head.weight) for loss, _ in found]
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] == count
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*slopes, strict=True))
    losses = [token_losses(hidden_ND, head, targets_N, count=known) for known in (None, count)]
    assert torch.equal(*losses)


def test_ignored_rows_cannot_poison_the_loss():
    hidden_ND, weight_VD, _, targets_N = example()
    hidden_ND = hidden_ND.detach().clone()
    hidden_ND[targets_N == -100] = float('nan')
    hidden_ND.requires_grad_()
    loss, _ = linear_cross_entropy(hidden_ND, weight_VD, targets_N)
    slope_ND, slope_VD = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    assert loss.isfinite() and slope_ND.isfinite().all() and slope_VD.isfinite().all()


@pytest.mark.skipif(here == 'cuda', reason='the assertion of a GPU would end every later test of this process')
@pytest.mark.parametrize('wrong', [-1, 53])
def test_targets_outside_the_vocabulary_are_refused(wrong):
    hidden_ND, weight_VD, _, targets_N = example()
    targets_N[1] = wrong
    with pytest.raises((RuntimeError, IndexError), match='out of bounds'):
        linear_cross_entropy(hidden_ND, weight_VD, targets_N)


def test_no_gradient_work_without_gradients(monkeypatch):
    "Under no_grad and with a frozen head the vocabulary-sized gradient is never made."
    hidden_ND, weight_VD, _, targets_N = example()
    with monkeypatch.context() as watched, torch.no_grad():
        watched.setattr(losses, '_subtract_targets_', lambda *_: pytest.fail('a gradient was begun'))
        loss, _ = linear_cross_entropy(hidden_ND, weight_VD, targets_N)
    assert not loss.requires_grad and loss.grad_fn is None
    loss, _ = linear_cross_entropy(hidden_ND, weight_VD.detach(), targets_N)
    assert loss.grad_fn.gradients[0] is not None and loss.grad_fn.gradients[1] is None
    loss.backward()
    assert loss.grad_fn is None or loss.grad_fn.gradients is None


def test_autocast_computes_in_the_autocast_dtype():
    hidden_ND, weight_VD, _, targets_N = example()
    with torch.autocast(here, dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden_ND, weight_VD, targets_N)
    slopes = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    exact = linear_cross_entropy(hidden_ND, weight_VD, targets_N)[0]
    assert 0 < abs(loss - exact) < 1e-2 * exact and all(slope.dtype == torch.float32 for slope in slopes)


@pytest.mark.parametrize('words', [50, 500])
def test_lora_wrapped_head(words):
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(head=nn.Linear(12, words, bias=False))).to(here)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=['head'], init_lora_weights=False), model)
    head = model['head']
    hidden_ND, _, _, targets_N = example(words=words)
    trained = [p for p in head.parameters() if p.requires_grad]
    assert type(head) is not nn.Linear and len(trained) == 2
    expected = F.cross_entropy(head(hidden_ND), targets_N, reduction='sum')
    for size in (1, 4000, 2**25):
        loss, count = head_cross_entropy(hidden_ND, head, targets_N, chunk_bytes=size)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(
            torch.autograd.grad(loss, [hidden_ND, *trained]),
            torch.autograd.grad(expected, [hidden_ND, *trained], retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_lora_dropout_belongs_to_the_loss_that_was_returned():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(head=nn.Linear(12, 50, bias=False))).to(here)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=['head'], init_lora_weights=False, lora_dropout=0.5), model)
    hidden_ND, _, _, targets_N = example(words=50)
    torch.manual_seed(1)
    loss, _ = head_cross_entropy(hidden_ND, model['head'], targets_N, chunk_bytes=4000)
    torch.manual_seed(1)
    parts = [
        F.cross_entropy(model['head'](hidden_ND[index]), targets_N[index], reduction='sum')
        for index in (targets_N != -100).nonzero()[:, 0].split(4000 // (16 * 50))
    ]
    ours, expected = ((x.detach(), *torch.autograd.grad(x, hidden_ND)) for x in (loss, sum(parts)))
    assert len(parts) == 3
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_token_losses(dtype):
    head = nn.Linear(12, 53).to(here, dtype)
    hidden_ND, _, _, targets_N = example(dtype=dtype)
    expected = F.cross_entropy(head(hidden_ND).float(), targets_N, reduction='none')
    for size in (1, 700, 2**25):
        losses_N = token_losses(hidden_ND, head, targets_N, chunk_bytes=size)
        assert losses_N.dtype == torch.float32 and not losses_N.requires_grad
        torch.testing.assert_close(losses_N, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert (losses_N[targets_N == -100] == 0).all()


measure = '''
import sys, torch, torch.nn.functional as F
from pathlib import Path
from llmft.training.losses import head_cross_entropy
torch.set_num_threads(1)
how, rows, words, trained = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == 'trained'
torch.manual_seed(0)
head = torch.nn.Linear(32, words, bias=False).requires_grad_(trained)
hidden_ND, targets_N = torch.randn(rows, 32, requires_grad=True), torch.randint(words, (rows,))
class Wrapped(torch.nn.Module):
    def __init__(self, head): super().__init__(); self.head, self.weight = head, head.weight
    def forward(self, x): return self.head(x)
def step():
    if how == 'plain': F.cross_entropy(head(hidden_ND), targets_N, reduction='sum').backward()
    else: head_cross_entropy(hidden_ND, head if how == 'linear' else Wrapped(head), targets_N, 2**23)[0].backward()
kilobytes = lambda name: next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(name))
small = hidden_ND[:1].detach().requires_grad_(); head_cross_entropy(small, head if how == 'linear' else Wrapped(head), targets_N[:1])[0].backward(); head.weight.grad = None
Path('/proc/self/clear_refs').write_text('5')
before = kilobytes('VmRSS')
step()
print((kilobytes('VmHWM') - before)*1024)
'''


def peak(how, rows, words, trained='frozen'):
    "Bytes by which forward and backward raise the peak of a fresh process."
    return int(
        subprocess.run(
            [sys.executable, '-c', measure, how, str(rows), str(words), trained],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak is read from /proc')
@pytest.mark.parametrize('how', ['linear', 'wrapped'])
def test_peak_does_not_grow_with_vocabulary_times_tokens(how):
    "64 times the logits (2 MB to 128 MB to 512 MB): the peak stays below the chunk, the plain loss's grows with them."
    small, large = peak(how, 512, 4000), peak(how, 2048, 64_000)
    logits = 2048 * 64_000 * 4
    assert large < 2**23 * 1.6 + 2048 * 32 * 4 * 4 + 64_000 * 32 * 4, (
        f'{large / 2**20:.0f} MB for {logits / 2**20:.0f} MB of logits'
    )
    assert large - small < 0.03 * logits
    assert peak('plain', 2048, 64_000) > 1.8 * logits


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak is read from /proc')
def test_peak_of_a_trained_head_is_its_gradient_and_a_chunk():
    assert peak('linear', 2048, 64_000, 'trained') < 64_000 * 32 * 4 * 1.3 + 2**23 * 1.6 + 2048 * 32 * 4 * 4
