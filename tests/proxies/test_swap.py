import pytest
import torch
from torch import nn

from sd_memguard.proxies.swap import copy_tensors, load_optimizer_tensors, optimizer_tensors


def snapshot(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_foreach", "adamw_fused", "amsgrad", "sgd", "sgd_momentum"])
def test_optimizer_state_round_trip_continues_identically(optimizer, trained, assert_equal_states):
    source, target = trained(optimizer), trained(optimizer)
    for number in range(3):
        source.step(0, number)
    copy_tensors(source.parameters, target.parameters)
    load_optimizer_tensors(optimizer_tensors(source.parameters, source.optimizer), target.parameters, target.optimizer)
    assert_equal_states(source.state(), target.state())
    for each in (source, target):
        each.step(0, 3)
    assert_equal_states(source.state(), target.state())


def test_tensors_are_copied_in_place(trained):
    model = trained()
    model.step(0, 0)
    entries = optimizer_tensors(model.parameters, model.optimizer)
    saved = snapshot(entries)
    pointers = {name: tensor.data_ptr() for name, tensor in entries.items()}
    model.step(0, 1)
    load_optimizer_tensors(saved, model.parameters, model.optimizer)
    after = optimizer_tensors(model.parameters, model.optimizer)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == pointers
    assert all(torch.equal(after[name], saved[name]) for name in saved)


def test_plain_numbers_of_an_optimizer_survive():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"count": 3, "rate": 0.5, "buffer": torch.ones(2)}
    saved = snapshot(optimizer_tensors({"w|x": parameter}, optimizer))
    optimizer.state[parameter] = {"count": 9, "rate": 0.0, "buffer": torch.zeros(2)}
    load_optimizer_tensors(saved, {"w|x": parameter}, optimizer)
    state = optimizer.state[parameter]
    assert (state["count"], state["rate"], state["buffer"].tolist()) == (3, 0.5, [1, 1])
    assert type(state["count"]) is int


def test_parameters_without_a_saved_state_start_anew(trained):
    model = trained("adamw")
    model.step(0, 0)
    saved = snapshot(optimizer_tensors(model.parameters, model.optimizer))
    first_layer = {name: tensor for name, tensor in saved.items() if name.startswith("0.")}
    load_optimizer_tensors(first_layer, model.parameters, model.optimizer)
    assert optimizer_tensors(model.parameters, model.optimizer).keys() == first_layer.keys()
    load_optimizer_tensors({}, model.parameters, model.optimizer)
    assert not model.optimizer.state


def test_a_missing_name_is_an_error(trained):
    with pytest.raises(KeyError):
        copy_tensors({}, trained().parameters)
