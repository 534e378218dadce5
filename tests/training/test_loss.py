"""Chunked loss against torch's cross entropy, and proof that the logits of all tokens never exist."""

import pytest
import torch
import torch.nn.functional as F

from muse_lightning.training.loss import next_token_nats
from tests.tiny import LargestTensor

VOCAB, HIDDEN = 37, 12


def problem(shape=(3, 11), dtype=torch.float64, ignored=0.3, vocab=VOCAB, width=HIDDEN):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return hidden, weight, labels


def reference(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


@pytest.mark.parametrize("chunk", [1, 4, 33, 1000], ids=lambda chunk: f"chunk{chunk}")
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0], ids=lambda share: f"ignored{share}")
def test_equals_cross_entropy_with_gradients(chunk, ignored):
    hidden, weight, labels = problem(ignored=ignored)
    factors = torch.rand(labels.shape, dtype=torch.float64)
    expected = reference(hidden, weight, labels)
    expected_gradients = torch.autograd.grad((expected * factors).sum(), (hidden, weight))

    nats = next_token_nats(hidden, weight, labels, chunk=chunk)
    gradients = torch.autograd.grad((nats * factors).sum(), (hidden, weight))

    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert (nats[labels == -100] == 0).all()


def test_gradcheck():
    hidden, weight, labels = problem(shape=(2, 3), vocab=5, width=3)
    assert torch.autograd.gradcheck(lambda h, w: next_token_nats(h, w, labels, chunk=4), (hidden, weight))


def test_no_tensor_of_all_logits():
    hidden, weight, labels = problem(shape=(4, 64))
    with LargestTensor() as watched:
        next_token_nats(hidden, weight, labels, chunk=16).sum().backward()
    assert watched.elements == max(4 * 64 * HIDDEN, 16 * VOCAB)
    assert watched.elements < 4 * 64 * VOCAB

    with LargestTensor() as unchunked:
        reference(hidden, weight, labels).sum().backward()
    assert unchunked.elements == 4 * 64 * VOCAB, "the watcher must see what it is there to see"


def test_autocast_uses_its_precision_and_keeps_float32_gradients():
    hidden, weight, labels = problem(shape=(2, 16), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats = next_token_nats(hidden, weight, labels, chunk=5)
        logits = F.linear(hidden, weight)  # bf16, by autocast
    nats.sum().backward()

    expected = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    assert nats.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(nats, expected)
    exact = torch.autograd.grad(reference(hidden, weight, labels).sum(), (hidden, weight))
    # bf16 has 8 bits of mantissa: a product of a few rounded factors is off by a few times 2^-8.
    for gradient, right in zip((hidden.grad, weight.grad), exact, strict=True):
        assert (gradient - right).norm() < 4 * 2**-8 * right.norm()


def test_tied_weight_collects_both_gradients():
    _, weight, labels = problem()
    tokens = torch.randint(VOCAB, labels.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(reference(F.embedding(tokens, weight).tanh(), weight, labels).sum(), weight)
    hidden = F.embedding(tokens, weight).tanh()
    gradient = torch.autograd.grad(next_token_nats(hidden, weight, labels, chunk=7).sum(), weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_only_where_asked(frozen):
    hidden, weight, labels = problem()
    tensors = {"hidden": hidden, "weight": weight}
    tensors[frozen] = tensors[frozen].detach()
    next_token_nats(tensors["hidden"], tensors["weight"], labels, chunk=8).sum().backward()
    assert [tensor.grad is None for tensor in (hidden, weight)] == [frozen == "hidden", frozen == "weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"labels": torch.zeros(3, 10, dtype=torch.long)}, r"hidden \(3, 11, 12\).*labels \(3, 10\)"),
        ({"head_weight": torch.zeros(VOCAB, 5)}, r"head_weight \(37, 5\)"),
    ],
    ids=["chunk", "labels", "head"],
)
def test_bad_arguments(change, message):
    hidden, weight, labels = problem()
    arguments = {"hidden": hidden, "head_weight": weight, "labels": labels, "chunk": 8} | change
    with pytest.raises(ValueError, match=message):
        next_token_nats(**arguments)


@pytest.mark.gpu
def test_on_a_gpu_under_autocast():
    hidden, weight, labels = (tensor.detach().cuda() for tensor in problem(shape=(4, 256)))
    exact_hidden, exact_weight = hidden.requires_grad_(), weight.requires_grad_()
    expected = reference(exact_hidden, exact_weight, labels)
    gradients = torch.autograd.grad(expected.sum(), (exact_hidden, exact_weight))
    low_hidden, low_weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        nats = next_token_nats(low_hidden, low_weight, labels, chunk=100)
    nats.sum().backward()
    assert (nats - expected).norm() < 4 * 2**-8 * expected.norm()
    for gradient, right in zip((low_hidden.grad, low_weight.grad), gradients, strict=True):
        assert (gradient - right).norm() < 4 * 2**-8 * right.norm()


@pytest.mark.gpu
def test_memory_on_a_gpu_is_that_of_a_chunk():
    num_tokens, vocab, width, chunk = 16384, 32768, 64, 512
    hidden = torch.randn(num_tokens, width, device="cuda", requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", requires_grad=True)
    labels = torch.randint(vocab, (num_tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    next_token_nats(hidden, weight, labels, chunk=chunk).sum().backward()
    grown = torch.cuda.max_memory_allocated() - before
    # Logits of a chunk in float32 and a few tensors of their size, beside the gradients; all logits would be 2 GiB.
    assert grown < 5 * chunk * vocab * 4 + 3 * (hidden.nbytes + weight.nbytes)
