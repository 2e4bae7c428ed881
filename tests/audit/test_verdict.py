"""Verdicts on data of which it is known whether anything was replicated."""

import itertools

import pytest
import torch

from sd_memguard.audit.metrics import evidence, statistics
from sd_memguard.audit.metrics.evidence import above_controls, above_others, above_paired, above_rate, binomial_tail
from sd_memguard.audit.metrics.statistics import Estimate
from sd_memguard.audit.verdict import HELDOUT_IMAGES, CopyBackground, Measured, compare_models, judge

BACKGROUND = CopyBackground(2, 250, HELDOUT_IMAGES)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 50)


def model(generator, *, replicated=0.0, copied=0.0, name="model", num_prompts=32, with_heldout=True):
    """Two images of each prompt, of which a tenth are nearest to their own image by accident; more where replicated."""

    def shares(chance, more):
        hits = torch.rand(num_prompts, 2, generator=generator) < chance
        return (hits | (torch.rand(num_prompts, 1, generator=generator) < more)).double().mean(1)

    kinds = ["duplicated", "unique", *(["heldout"] if with_heldout else [])]
    more = {"duplicated": replicated}
    nearest = {kind: shares(0.1, more.get(kind, 0)) for kind in kinds}
    chance = {kind: 0.2 + 0.1 * torch.rand(num_prompts, generator=generator).double() for kind in kinds}
    agreement = {kind: shares(0.25, more.get(kind, 0)) for kind in kinds}
    copies = {
        kind: torch.rand(num_prompts, generator=generator) < (copied or 0.016) for kind in ("duplicated", "unique")
    }
    return Measured(name, 2, copies, nearest, agreement, chance, None)


@pytest.mark.parametrize("with_heldout", [True, False])
def test_of_models_that_replicate_nothing_few_are_called_replicating(monkeypatch, with_heldout):
    """At most 5%; of 200 models more than 18 are a thing of one in a thousand."""
    monkeypatch.setattr(evidence, "NUM_EXCHANGES", 399)
    generator = torch.Generator().manual_seed(1)
    levels = [judge(model(generator, with_heldout=with_heldout), BACKGROUND, seed).level for seed in range(200)]
    assert 200 - levels.count("none") <= 18


def test_planted_replicas_and_copies_are_found(monkeypatch):
    monkeypatch.setattr(evidence, "NUM_EXCHANGES", 999)
    generator = torch.Generator().manual_seed(2)
    found = [judge(model(generator, replicated=0.4), BACKGROUND, seed) for seed in range(20)]
    assert sum(one.level == "replicates" for one in found) >= 19
    assert all(one.evidence[0].measure == "copies" for one in found)
    found = [judge(model(generator, copied=0.4), BACKGROUND, seed) for seed in range(20)]
    assert {one.level for one in found} == {"copies"}


def test_two_models_are_told_apart_only_where_they_differ(monkeypatch):
    monkeypatch.setattr(evidence, "NUM_EXCHANGES", 999)
    generator = torch.Generator().manual_seed(3)
    plain = model(generator, replicated=0.6, name="plain")
    guarded, other = (model(generator, name=name) for name in ("guarded", "other"))
    first, second = compare_models([guarded, plain], 0)[1:]
    assert (first.models, first.measure, first.kind) == (("guarded", "plain"), "nearest", "duplicated")
    assert first.is_significant
    assert second.is_significant
    assert first.excess.high < 0
    assert not any(one.is_significant for one in compare_models([guarded, other], 0))
    assert not any(one.is_significant for one in compare_models([plain, plain._replace(name="again")], 0))


def test_without_anything_measured_nothing_is_said():
    assert judge(Measured("a", 1, {}, {}, {}, {}, None), BACKGROUND, 0).level == "unknown"


def test_p_values_are_those_of_all_exchanges():
    values, controls = torch.tensor([1.0, 0.5, 1.0, 0.0]), torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5])
    pooled = torch.cat([values, controls])
    sums = [pooled[list(rows)].sum() for rows in itertools.combinations(range(9), 4)]
    exact = sum(one >= values.sum() for one in sums) / len(sums)
    found = above_controls(values, controls, 0, "test")
    assert found.p_value == pytest.approx(float(exact), abs=0.015)
    assert found.excess.value == pytest.approx(values.mean().item() - controls.mean().item())

    others = torch.tensor([0.5, 0.5, 0.25, 0.0])
    signs = list(itertools.product((-1, 1), repeat=4))
    sums = torch.tensor(
        [[sign * value for sign, value in zip(row, values - others, strict=True)] for row in signs]
    ).sum(1)
    one_sided = (sums >= (values - others).sum()).double().mean().item()
    two_sided = (sums.abs() >= (values - others).sum().abs()).double().mean().item()
    assert above_paired(values, others, 0, "test").p_value == pytest.approx(one_sided, abs=0.02)
    assert above_paired(values, others, 0, "test", two_sided=True).p_value == pytest.approx(two_sided, abs=0.02)


def test_copies_are_set_against_a_rate_that_is_not_taken_for_zero():
    none = above_rate(torch.zeros(30), 0, 250, 2, 0, "test")
    assert (none.p_value, none.value.value) == (1, 0)
    one = above_rate(torch.tensor([True] + [False] * 29), 0, 250, 2, 0, "test")
    assert one.p_value == pytest.approx(1 - (1 - 1 / 251) ** 60)
    assert above_rate(torch.ones(30), 0, 250, 2, 0, "test").p_value < 1e-30
    assert binomial_tail(3, 10_000, 0.5) == pytest.approx(1)


def test_an_area_of_one_half_is_no_evidence_and_one_of_one_is():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.rand(40, generator=generator), torch.rand(50, generator=generator)
    auc = Estimate(0.5, 0.4, 0.6, 90)
    assert above_others(positive, negative, auc, 0, "test").p_value > 0.02
    assert above_others(positive + 1, negative, auc, 0, "test").p_value < 0.001
