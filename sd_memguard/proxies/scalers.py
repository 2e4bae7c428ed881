"""The scale of the gradients under fp16, one for each proxy."""

from typing import Any


class ProxyScalers:
    """The scale of fp16's gradients for each proxy: where one overflows, the others need not train at a lower scale.

    Args:
        scaler: the one ``GradScaler`` of the loop, None without fp16.
        num_shards: number of proxies.
        active: the proxy that is trained first.
    """

    def __init__(self, scaler: Any, num_shards: int, active: int) -> None:
        self.scaler, self.active = scaler, active
        self.states: list[dict[str, Any]] = [] if scaler is None else [scaler.state_dict() for _ in range(num_shards)]

    def activate(self, shard_index: int) -> None:
        """Give the scaler the state of a proxy, and keep that of the one before."""
        if self.scaler is None or shard_index == self.active:
            return
        self.states[self.active] = self.scaler.state_dict()
        self.scaler.load_state_dict(self.states[shard_index])
        self.active = shard_index

    def state(self) -> list[dict[str, Any]]:
        """Return the state of each proxy's scale, numbers alone; nothing without fp16."""
        if self.scaler is not None:
            self.states[self.active] = self.scaler.state_dict()
        return list(self.states)

    def load(self, states: list[dict[str, Any]], active: int) -> None:
        """Take over saved states; a run that had none before begins with new ones."""
        if self.scaler is not None and states:
            self.states, self.active = list(states), active
            self.scaler.load_state_dict(states[active])
