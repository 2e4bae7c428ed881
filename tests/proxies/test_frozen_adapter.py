"""The second adapter of LoRA proxies: what it adds to a layer, also in a compiled model."""

import copy

import pytest
import torch
from torch import nn

from sd_memguard.proxies.lora import Change, FrozenAdapter
from sd_memguard.proxies.low_rank import best_factors, best_factors_of_product


def random_change(seed, out=6, size=4, rank=1):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, size)))
    return Change(up, down)


def test_it_adds_the_sum_of_its_changes_and_becomes_a_matrix_where_that_is_smaller():
    layer = nn.Linear(4, 6)
    adapter, inputs = FrozenAdapter(layer), torch.randn(3, 5, 4)
    plain, forms = layer(inputs), []
    total = torch.zeros(6, 4, dtype=torch.float64)
    for seed in range(4):
        change = random_change(seed)
        total += change.up @ change.down
        adapter.maps = adapter.plus(change, torch.device("cpu"))
        forms.append(len(adapter.maps))
        torch.testing.assert_close(layer(inputs), plain + inputs @ total.T.float())
        own = adapter.change()
        torch.testing.assert_close(own.up @ own.down, total, rtol=1e-6, atol=1e-6)
    assert forms == [2, 2, 1, 1]  # of rank 3 the factors have 30 numbers, the matrix 24
    adapter.is_on = False
    assert torch.equal(layer(inputs), plain)


def test_the_output_keeps_its_precision_and_gradients_pass():
    layer = nn.Linear(4, 6).to(torch.bfloat16)
    adapter = FrozenAdapter(layer)
    adapter.maps = adapter.plus(random_change(0), torch.device("cpu"))
    inputs = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    output = layer(inputs)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    expected = (layer.weight.detach().float() + (adapter.maps[1] @ adapter.maps[0])).sum(dim=0)
    torch.testing.assert_close(inputs.grad.float(), expected.expand(2, 4), rtol=0.02, atol=0.02)


def test_a_compiled_model_sees_what_an_averaging_has_added():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    adapter = FrozenAdapter(model[0])
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    inputs = torch.randn(3, 4)
    torch.testing.assert_close(compiled(inputs), plain(inputs))
    for seed in range(4):
        change = random_change(seed)
        adapter.maps = adapter.plus(change, torch.device("cpu"))
        plain[0].weight.data += (change.up @ change.down).float()
        torch.testing.assert_close(compiled(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
    adapter.is_on = False
    torch.testing.assert_close(compiled(inputs), model(inputs))


@pytest.mark.parametrize(("inner", "rank"), [(2, 1), (2, 3), (5, 2)])
def test_factors_of_a_product_are_those_of_the_matrix(inner, rank):
    change = random_change(7, out=5, size=4, rank=inner)
    down, up = best_factors_of_product(*change, rank)
    plain_down, plain_up = best_factors(change.up @ change.down, rank)
    assert down.shape == plain_down.shape
    assert up.shape == plain_up.shape
    torch.testing.assert_close(up @ down, plain_up @ plain_down)
