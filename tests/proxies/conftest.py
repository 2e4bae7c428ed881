"""A small network that is trained as a proxy, and the peers: the same networks, each with an optimizer of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional


class SharedTable(torch.optim.SGD):
    """A peer of the 8-bit AdamW: the state of all parameters holds one and the same table."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr, momentum=0.9)
        self.table = torch.linspace(-1, 1, 5)

    def step(self):
        super().step()
        for state in self.state.values():
            state["table"] = self.table


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, fused=False, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "shared_table": lambda p: SharedTable(p, 1e-2),
}


class Trained:
    """A network, its optimizer and perhaps an EMA; `step` depends on the shard and its own number only."""

    def __init__(self, optimizer="adamw", ema=None):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.network.parameters())
        self.ema = ema(list(self.network.parameters())) if ema else None

    def step(self, shard, number):
        generator = torch.Generator().manual_seed(1000 * shard + number)
        inputs, targets = torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)
        functional.mse_loss(self.network(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.network.parameters())

    def state(self):
        """Return everything that belongs to the proxy as one dict of tensors, copied."""
        tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = torch.as_tensor(value).clone()
        if self.ema is not None:
            for name, shadow in zip(self.parameters, self.ema.shadow_params, strict=True):
                tensors[f"{name}/ema"] = shadow.clone()
            tensors["ema_step"] = torch.tensor(self.ema.optimization_step)
        return tensors


@pytest.fixture
def trained():
    return Trained


@pytest.fixture
def assert_equal_states():
    def check(one, other):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name]), name

    return check
