import json
import os

import pytest
import torch

from sd_memguard.core.aggregation import aggregate
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.store import DiskStore, RamStore

NUM_SHARDS, STEPS = 3, 2
WEIGHTS = [3.0, 2.0, 1.0]


def ema(parameters):
    training_utils = pytest.importorskip("diffusers.training_utils")
    return training_utils.EMAModel(parameters, decay=0.9)


def make_store(kind, folder):
    return RamStore() if kind == "ram" else DiskStore(folder / "store")


def make_proxies(model, store, num_shards=NUM_SHARDS):
    return FullProxies(model.parameters, model.optimizer, num_shards, store, model.ema)


def train_round(proxies, model, round_index, shards=range(NUM_SHARDS)):
    for shard in shards:
        proxies.activate(shard)
        for step in range(STEPS):
            model.step(shard, STEPS * round_index + step)


def train_round_apart(models, round_index):
    for shard, model in enumerate(models):
        for step in range(STEPS):
            model.step(shard, STEPS * round_index + step)


def average_apart(models, weights):
    """Average separately trained models, with their EMA if they have one, and return their distances before."""
    states = [{name: p.detach() for name, p in model.parameters.items()} for model in models]
    mean = aggregate(states, weights)
    vectors = [torch.cat([tensor.double().flatten() for tensor in state.values()]) for state in states]
    centre = torch.cat([tensor.double().flatten() for tensor in mean.values()])
    shadows = [{str(i): s for i, s in enumerate(model.ema.shadow_params)} if model.ema else {} for model in models]
    shadow_mean = aggregate(shadows, weights)
    with torch.no_grad():
        for model, shadow in zip(models, shadows, strict=True):
            for name, parameter in model.parameters.items():
                parameter.copy_(mean[name])
            for name, tensor in shadow.items():
                tensor.copy_(shadow_mean[name])
    return [float((vector - centre).norm()) for vector in vectors]


@pytest.fixture(params=["ram", "disk"])
def store(request, tmp_path):
    return make_store(request.param, tmp_path)


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_foreach", "adamw_fused", "amsgrad", "sgd", "shared_table"])
def test_proxies_equal_models_trained_apart(optimizer, averages, store, trained, assert_equal_states):
    model, apart = trained(optimizer), [trained(optimizer) for _ in range(NUM_SHARDS)]
    proxies = make_proxies(model, store)
    for round_index in range(3):
        train_round(proxies, model, round_index)
        train_round_apart(apart, round_index)
        if averages:
            assert proxies.average(WEIGHTS) == pytest.approx(average_apart(apart, WEIGHTS), rel=1e-5)
    for shard in (1, 0, 2):
        proxies.activate(shard)
        assert_equal_states(model.state(), apart[shard].state())


def test_ema_and_its_step_counter_belong_to_the_proxy(store, trained, assert_equal_states):
    model, apart = trained(ema=ema), [trained(ema=ema) for _ in range(NUM_SHARDS)]
    proxies = make_proxies(model, store)
    train_round(proxies, model, 0)
    train_round_apart(apart, 0)
    train_round(proxies, model, 1, shards=[0])  # the first proxy is one round ahead of the others
    for step in range(STEPS):
        apart[0].step(0, STEPS + step)
    for _ in range(2):
        proxies.average(WEIGHTS)
        average_apart(apart, WEIGHTS)
        for shard in range(NUM_SHARDS):
            proxies.activate(shard)
            assert_equal_states(model.state(), apart[shard].state())
        train_round(proxies, model, 5)
        train_round_apart(apart, 5)


def test_switching_keeps_every_storage(store, trained):
    model = trained(ema=ema)
    proxies = make_proxies(model, store)
    references = {name: parameter for name, parameter in model.parameters.items()}
    train_round(proxies, model, 0)

    def pointers():
        state = [s.data_ptr() for p in references.values() for s in model.optimizer.state[p].values()]
        return [p.data_ptr() for p in references.values()] + state + [s.data_ptr() for s in model.ema.shadow_params]

    before = pointers()
    for round_index in range(1, 3):
        train_round(proxies, model, round_index)
        proxies.average(WEIGHTS)
        with proxies.averaged(WEIGHTS):
            pass
    assert pointers() == before
    assert all(model.network.get_parameter(name) is parameter for name, parameter in references.items())


def test_both_stores_give_the_same_bytes(tmp_path, trained):
    folders = []
    for kind in ("ram", "disk"):
        model = trained(ema=ema)
        proxies = make_proxies(model, make_store(kind, tmp_path))
        for round_index in range(2):
            train_round(proxies, model, round_index)
            proxies.average(WEIGHTS)
        train_round(proxies, model, 2, shards=[1])
        folder = tmp_path / kind
        folder.mkdir()
        folders.append((proxies.save(folder), {file.name: file.read_bytes() for file in folder.iterdir()}))
    assert folders[0] == folders[1]


@pytest.mark.parametrize("with_ema", [False, True])
def test_averaged_shows_what_would_be_exported_and_restores(with_ema, store, trained, assert_equal_states):
    model = trained(ema=ema if with_ema else None)
    proxies = make_proxies(model, store)
    train_round(proxies, model, 0)
    states = []
    for shard in (0, 2, 1):
        proxies.activate(shard)
        states.append(model.state())
    before = model.state()
    suffix = "/ema" if with_ema else ""
    expected = aggregate([{n: s[n + suffix] for n in model.parameters} for s in states], [3.0, 1.0, 2.0])
    with proxies.averaged(WEIGHTS):
        assert_equal_states({n: p.detach() for n, p in model.parameters.items()}, expected)
    assert_equal_states(model.state(), before)

    def fail_inside():
        with proxies.averaged(WEIGHTS):
            raise RuntimeError("while generated image")

    with pytest.raises(RuntimeError, match="while generated image"):
        fail_inside()
    assert_equal_states(model.state(), before)


def test_distances_change_nothing(store, trained, assert_equal_states):
    model = trained()
    proxies = make_proxies(model, store)
    assert proxies.distances(WEIGHTS) == [0.0] * NUM_SHARDS
    train_round(proxies, model, 0)
    before = model.state()
    distances = proxies.distances(WEIGHTS)
    assert min(distances) > 0
    assert_equal_states(model.state(), before)
    assert proxies.average(WEIGHTS) == distances
    assert proxies.distances(WEIGHTS) == [0.0] * NUM_SHARDS


@pytest.mark.parametrize("with_ema", [False, True])
def test_one_proxy_is_the_plain_model_to_the_bit(with_ema, store, trained, assert_equal_states):
    model, plain = (trained(ema=ema if with_ema else None) for _ in range(2))
    proxies = make_proxies(model, store, num_shards=1)
    for round_index in range(2):
        train_round(proxies, model, round_index, shards=[0])
        train_round_apart([plain], round_index)
        assert proxies.average([17.0]) == proxies.distances([17.0]) == [0.0]
    assert_equal_states(model.state(), plain.state())
    with proxies.averaged([17.0]):
        exported = plain.ema.shadow_params if with_ema else list(plain.parameters.values())
        assert all(torch.equal(p, e) for p, e in zip(model.parameters.values(), exported, strict=True))
    assert_equal_states(model.state(), plain.state())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "sgd_momentum", "shared_table"])
@pytest.mark.parametrize(("written_by", "read_by"), [("ram", "disk"), ("disk", "ram"), ("disk", "disk")])
def test_save_and_load_go_on_to_the_same_bytes(written_by, read_by, optimizer, tmp_path, trained, assert_equal_states):
    model, resumed = trained(optimizer, ema), trained(optimizer, ema)
    proxies = make_proxies(model, make_store(written_by, tmp_path / "one"))
    train_round(proxies, model, 0)
    proxies.average(WEIGHTS)
    train_round(proxies, model, 1, shards=[0, 1])
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    index = json.loads(json.dumps(proxies.save(checkpoint)))
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}

    later = make_proxies(resumed, make_store(read_by, tmp_path / "two"))
    train_round(later, resumed, 7)  # whatever it has done before is gone
    later.load(checkpoint, index)
    for each, its_model in ((proxies, model), (later, resumed)):
        train_round(each, its_model, 1, shards=[2])
        each.average(WEIGHTS)
        train_round(each, its_model, 2)
    for shard in range(NUM_SHARDS):
        for each in (proxies, later):
            each.activate(shard)
        assert_equal_states(model.state(), resumed.state())
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == files


def test_a_checkpoint_of_a_fresh_run_loads(store, tmp_path, trained, assert_equal_states):
    model, other = trained(), trained()
    (tmp_path / "checkpoint").mkdir()
    index = make_proxies(model, store).save(tmp_path / "checkpoint")
    later = make_proxies(other, RamStore())
    train_round(later, other, 0)
    later.load(tmp_path / "checkpoint", index)
    for shard in range(NUM_SHARDS):
        later.activate(shard)
        assert_equal_states(other.state(), model.state())


def test_checkpoints_link_the_resting_proxies(tmp_path, trained):
    model = trained()
    proxies = make_proxies(model, DiskStore(tmp_path / "store"))
    train_round(proxies, model, 0)
    proxies.average(WEIGHTS)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        index = proxies.save(folder)
    # All proxies but the active one share an entry of weights: one file, linked by the store and both checkpoints.
    names = {index["entries"][shard]["weights"] for shard in (0, 1)}
    assert len(names) == 1
    shared = names.pop()
    for folder in folders:
        assert os.stat(folder / shared).st_nlink == 3
        assert os.stat(folder / index["entries"][2]["weights"]).st_nlink == 1
        assert {file.name for file in folder.iterdir()} == {
            file for files in index["entries"] for file in files.values()
        }


def test_the_store_does_not_grow(tmp_path, trained):
    model = trained(ema=ema)
    proxies = make_proxies(model, DiskStore(tmp_path / "store"))
    counts = []
    for round_index in range(10):
        train_round(proxies, model, round_index)
        if round_index % 2:
            proxies.average(WEIGHTS)
        counts.append(len(list((tmp_path / "store").rglob("*.safetensors"))))
    assert max(counts) <= 3 * (NUM_SHARDS - 1)  # three parts of each offloaded proxy
    assert counts[-1] == 2 + NUM_SHARDS - 1  # after an average: one of weights, one of EMA, the others' optimizers
    (tmp_path / "checkpoint").mkdir()
    index = proxies.save(tmp_path / "checkpoint")
    for _ in range(3):
        proxies.load(tmp_path / "checkpoint", index)
        assert len(list((tmp_path / "store").rglob("*.safetensors"))) <= 3 * NUM_SHARDS


@pytest.mark.parametrize(("num_shards", "with_ema"), [(2, False), (NUM_SHARDS, True)])
def test_a_checkpoint_of_other_proxies_is_refused_before_anything_changes(
    num_shards, with_ema, store, tmp_path, trained, assert_equal_states
):
    other = trained(ema=ema if with_ema else None)
    (tmp_path / "checkpoint").mkdir()
    index = make_proxies(other, RamStore(), num_shards).save(tmp_path / "checkpoint")
    model = trained()
    proxies = make_proxies(model, store)
    train_round(proxies, model, 0)
    before = model.state()
    message = f"the checkpoint holds {num_shards} proxies with the parts .*, this run has 3"
    with pytest.raises(ValueError, match=message):
        proxies.load(tmp_path / "checkpoint", index)
    assert_equal_states(model.state(), before)
    assert proxies.active == NUM_SHARDS - 1


def test_the_store_holds_the_resting_proxies_alone(trained, tmp_path):
    model = trained()
    store = RamStore()
    proxies = make_proxies(model, store)
    held = []
    original = store.put

    def put(key, tensors):
        original(key, tensors)
        held.append(len(store._entries))

    store.put = put
    train_round(proxies, model, 0)
    # Weights and moments of the two that rest; while one part is switched, its old and its new entry.
    assert len(store._entries) == 2 * (NUM_SHARDS - 1)
    train_round(proxies, model, 1)
    assert max(held) == 2 * (NUM_SHARDS - 1) + 1
    proxies.average(WEIGHTS)
    assert len(store._entries) == 1 + (NUM_SHARDS - 1)  # the weights are shared
    index = proxies.save(tmp_path)
    proxies.load(tmp_path, index)
    assert len(store._entries) == 1 + (NUM_SHARDS - 1)
    proxies.activate((proxies.active + 1) % NUM_SHARDS)
    assert len(store._entries) == 2 + (NUM_SHARDS - 1)  # the one that trained alone is no longer shared


def test_the_resident_weights_wait_in_the_store_while_the_mean_is_in_their_place(trained, store, monkeypatch):
    model = trained()
    proxies = make_proxies(model, store)
    train_round(proxies, model, 0)
    own = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    kept, put = [], store.put
    monkeypatch.setattr(store, "put", lambda key, tensors: (kept.append(key), put(key, tensors)))

    def fail_while_averaged():
        with proxies.averaged(WEIGHTS):
            assert all(torch.equal(store.get(kept[0])[name], tensor) for name, tensor in own.items())
            raise RuntimeError("generated image failed")

    with pytest.raises(RuntimeError, match="generated image"):
        fail_while_averaged()
    assert all(torch.equal(parameter, own[name]) for name, parameter in model.parameters.items())
    (key,) = kept
    with pytest.raises((KeyError, FileNotFoundError)):
        store.drop(key)
