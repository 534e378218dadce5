"""Chunked loss against torch's cross entropy, and proof that the logits of all tokens never exist."""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import muse_lightning.training.loss as loss
from muse_lightning.training.loss import next_token_nats, total_nats
from tests.tiny import LargestTensor

VOCAB, HIDDEN = 37, 12


@pytest.fixture(params=["plain", "traced", pytest.param("compiled", marks=pytest.mark.slow)])
def way(request, monkeypatch):
    """Keywords that choose what follows the matrix product: plain, compiled, or compiled without a C compiler."""
    torch._dynamo.reset()
    counters.clear()
    if request.param == "traced":
        monkeypatch.setattr(loss, "_compiled_nats", cache(partial(torch.compile, loss._nats, backend="aot_eager")))
    yield {"compiled": request.param != "plain"}
    torch._dynamo.reset()


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
def test_equals_cross_entropy_with_gradients(chunk, ignored, way):
    hidden, weight, labels = problem(ignored=ignored)
    expected = reference(hidden, weight, labels)
    expected_gradients = torch.autograd.grad(0.3 * expected.sum(), (hidden, weight))

    nats = next_token_nats(hidden, weight, labels, chunk=chunk, **way)
    total = total_nats(hidden, weight, labels, chunk=chunk, **way)
    gradients = torch.autograd.grad(0.3 * total, (hidden, weight))

    torch.testing.assert_close(nats, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(gradients, expected_gradients)
    assert (nats[labels == -100] == 0).all()
    assert not nats.requires_grad


def test_a_last_chunk_of_any_length_takes_one_more_compilation(way):
    for tokens in (10, 12, 13, 19):
        hidden, weight, labels = problem(shape=(tokens,))
        total_nats(hidden, weight, labels, chunk=5, **way).backward()
    assert counters["stats"]["unique_graphs"] == (2 if way["compiled"] else 0)
    next_token_nats(*problem(shape=(13,)), chunk=5, **way)
    assert counters["stats"]["unique_graphs"] <= (4 if way["compiled"] else 0)
    assert not counters["graph_break"]


def test_labels_that_are_all_but_certain_keep_their_gradient(way):
    """Of softmax - 1 nothing would be left if softmax were rounded to bf16 first."""
    hidden = torch.tensor([[8.0, 0, 0, 0]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total_nats(hidden, torch.eye(4), torch.tensor([0]), chunk=1, **way).backward()
    rest = math.exp(-8)
    exact = torch.tensor([[-3 * rest, rest, rest, rest]]) / (1 + 3 * rest)
    torch.testing.assert_close(hidden.grad, exact, rtol=2**-8, atol=0)


def test_nothing_is_saved_without_grad_mode(monkeypatch):
    monkeypatch.setattr(loss._TotalNats, "apply", None)
    hidden, weight, labels = problem()
    with torch.no_grad():
        total = total_nats(hidden, weight, labels, chunk=8)
    torch.testing.assert_close(total, reference(hidden, weight, labels).sum().detach())
    assert not total.requires_grad


def test_a_second_backward_pass_is_refused():
    total = total_nats(*problem(), chunk=8)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_tensor_of_all_logits():
    hidden, weight, labels = problem(shape=(4, 64))
    with LargestTensor() as watched:
        total_nats(hidden, weight, labels, chunk=16).backward()
    assert watched.elements == max(4 * 64 * HIDDEN, 16 * VOCAB)
    assert watched.elements < 4 * 64 * VOCAB

    with LargestTensor() as unchunked:
        reference(hidden, weight, labels).sum().backward()
    assert unchunked.elements == 4 * 64 * VOCAB, "the watcher must see what it is there to see"


def test_autocast_uses_its_precision_and_keeps_float32_gradients(way):
    hidden, weight, labels = problem(shape=(2, 16), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats = next_token_nats(hidden, weight, labels, chunk=5, **way)
        total = total_nats(hidden, weight, labels, chunk=5, **way)
        logits = F.linear(hidden, weight)  # bf16, by autocast
    total.backward()

    expected = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    assert nats.dtype == total.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(nats, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    exact = torch.autograd.grad(reference(hidden, weight, labels).sum(), (hidden, weight))
    # bf16 has 8 bits of mantissa: a product of a few rounded factors is off by a few times 2^-8.
    for gradient, right in zip((hidden.grad, weight.grad), exact, strict=True):
        assert (gradient - right).norm() < 4 * 2**-8 * right.norm()


def test_tied_weight_collects_both_gradients():
    _, weight, labels = problem()
    tokens = torch.randint(VOCAB, labels.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(reference(F.embedding(tokens, weight).tanh(), weight, labels).sum(), weight)
    hidden = F.embedding(tokens, weight).tanh()
    gradient = torch.autograd.grad(total_nats(hidden, weight, labels, chunk=7), weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_only_where_asked(frozen):
    hidden, weight, labels = problem()
    tensors = {"hidden": hidden, "weight": weight}
    tensors[frozen] = tensors[frozen].detach()
    total_nats(tensors["hidden"], tensors["weight"], labels, chunk=8).backward()
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
@pytest.mark.parametrize("function", [next_token_nats, total_nats])
def test_bad_arguments(function, change, message):
    hidden, weight, labels = problem()
    arguments = {"hidden": hidden, "head_weight": weight, "labels": labels, "chunk": 8} | change
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_on_a_gpu_under_autocast(dtype, compiled):
    hidden, weight, labels = (tensor.detach().cuda() for tensor in problem(shape=(4, 256), vocab=1000, width=64))
    exact_hidden, exact_weight = hidden.requires_grad_(), weight.requires_grad_()
    expected = reference(exact_hidden, exact_weight, labels)
    gradients = torch.autograd.grad(expected.sum(), (exact_hidden, exact_weight))
    low_hidden, low_weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    with torch.autocast("cuda", dtype=dtype):
        nats = next_token_nats(low_hidden, low_weight, labels, chunk=100, compiled=compiled)
        total = total_nats(low_hidden, low_weight, labels, chunk=100, compiled=compiled)
    total.backward()
    assert (nats - expected).norm() < 4 * 2**-8 * expected.norm()
    torch.testing.assert_close(total, nats.sum())
    for gradient, right in zip((low_hidden.grad, low_weight.grad), gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - right).norm() < 4 * 2**-8 * right.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("compiled", "bytes_per_logit"), [(False, 10), (True, 2)], ids=["plain", "compiled"])
def test_memory_on_a_gpu_is_that_of_a_chunk(compiled, bytes_per_logit):
    num_tokens, vocab, width, chunk = 16384, 32768, 64, 2048
    hidden = torch.randn(num_tokens, width, device="cuda", requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", requires_grad=True)
    labels = torch.randint(vocab, (num_tokens,), device="cuda")

    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            total_nats(hidden, weight, labels, chunk=chunk, compiled=compiled).backward()
        hidden.grad = weight.grad = None

    run()  # compiles, and takes what cuBLAS needs
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    grown = torch.cuda.max_memory_allocated() - before
    # The logits of a chunk, beside the gradients and the head in bf16; all logits in bf16 would be 1 GiB.
    assert grown < bytes_per_logit * chunk * vocab + 2 * (hidden.nbytes + weight.nbytes)
