"""What ``auto`` comes to, from the images and the length of the training."""

import pytest

from sd_memguard.training.plan import make_plan, num_different, plan_rounds


@pytest.fixture
def plan(configure):
    """Return a function that plans a run on the demo set, 992 samples of 502 different images, in batches of 4."""

    def planned(**settings):
        settings = {"num_shards": "auto", "steps_per_round": "auto", "group_duplicates": "balance", **settings}
        return make_plan(configure(train_data_dir="bundled", **settings))

    return planned


def test_a_longer_training_is_shared_by_more_shards(plan):
    short = plan(max_train_steps=3765)  # 30 passes over 502 images
    assert num_different(short.samples) == 502
    assert short.schedule.num_shards == 1
    assert plan(max_train_steps=3766).schedule.num_shards == 2
    assert plan(max_train_steps=None, num_train_epochs=31).schedule.num_shards == 2
    assert plan(max_train_steps=3765, gradient_accumulation_steps=3).schedule.num_shards == 3
    assert plan(max_train_steps=100_000).schedule.num_shards == 4
    assert plan(max_train_steps=100_000, max_train_samples=100).schedule.num_shards == 1


def test_a_run_that_goes_on_for_longer_keeps_its_shards(plan):
    longer = plan(max_train_steps=100_000)
    _, schedule = plan_rounds(longer.config, longer.samples, 1, {"num_shards": 2, "steps_per_round": 70})
    assert (schedule.num_shards, schedule.steps_per_round) == (2, 70)
