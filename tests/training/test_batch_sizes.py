"""Sizes that are `auto` are the largest that fit, equal in a resumed run, and change nothing that is promised."""

from __future__ import annotations

import pytest
import torch

from etude.batching import AUTO, UNTRIED, MicroBatch
from etude.config import load_config, parse_config
from etude.errors import EtudeError
from etude.training.sizes import BatchSizes
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, outcome, same, train_until, weights


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fails_above(limit, tried=None):
    def work(count):
        if tried is not None:
            tried.append(count)
        if count > limit:
            raise out_of_memory()

    return work


@pytest.mark.parametrize(
    ("limit", "largest", "size", "tries"),
    [
        (100, 12, 12, [1, 2, 4, 8, 12]),
        (9, 12, 8, [1, 2, 4, 8, 12]),
        (5, 100, 4, [1, 2, 4, 8]),
        (1, 8, 1, [1, 2]),
        (7, 1, 1, [1]),
    ],
)
def test_a_size_grows_until_it_does_not_fit(limit, largest, size, tries):
    batches, tried = MicroBatch.of(AUTO, "rollout.batch_size"), []
    batches.find(fails_above(limit, tried), largest)
    assert (batches.size, tried) == (size, tries)


def test_a_sample_that_does_not_fit_alone_is_one_clear_error_and_other_errors_pass():
    batches = MicroBatch.of(AUTO, "rollout.batch_size")
    with pytest.raises(EtudeError, match="a single sample does not fit"):
        batches.find(fails_above(0), 8)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        batches.find(lambda count: torch.zeros(2) @ torch.zeros(3), 8)


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "large", "true"])
@pytest.mark.parametrize("key", ["rollout.batch_size", "objective.batch_size", "memory.decode_batch_size"])
def test_a_size_is_a_number_from_one_on_or_auto(key, value):
    assert load_config("emoji-ddpo", [f"{key}=auto"]).model_dump()[key.split(".")[0]][key.split(".")[1]] == AUTO
    with pytest.raises(EtudeError, match=rf"{key} = "):
        load_config("emoji-ddpo", [f"{key}={value}"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    tree = brief_settings(tmp_path_factory.mktemp("model"))
    tree["rollout"] |= {"images_per_iteration": 8, "batch_size": AUTO}
    tree["objective"] |= {"batch_size": AUTO}
    return tree | {"memory": {"decode_batch_size": AUTO}}


def limited(settings, out, monkeypatch, forward=5, backward=2, decoding=3, resume=False):
    """A trainer on a device whose memory holds so many rows: without and with gradients, and in the decoder."""
    monkeypatch.setattr("etude.training.sizes.RUN_OUT", ("cpu",))
    trainer = Trainer(parse_config(settings), out, resume)
    predict, decode, calls = trainer.policy.predict, trainer.policy.pipeline.vae.decode, []

    def limited_predict(x, *arguments):
        calls.append(len(x))
        if len(x) > (backward if torch.is_grad_enabled() else forward):
            raise out_of_memory()
        return predict(x, *arguments)

    def limited_decode(x, **options):
        if len(x) > decoding:
            raise out_of_memory()
        return decode(x, **options)

    trainer.policy.predict, trainer.policy.pipeline.vae.decode = limited_predict, limited_decode
    return trainer, calls


def sizes(trainer):
    return trainer.sizes.rollout.size, trainer.sizes.replay.size, trainer.policy.decode_batch.size


@pytest.mark.filterwarnings("error:.*does not fit into memory")
def test_a_run_finds_its_sizes_once_and_ends_with_the_bits_of_a_run_that_was_given_them(
    settings, tmp_path, monkeypatch
):
    trainer, calls = limited(settings, tmp_path / "found", monkeypatch)
    trainer.train()
    assert sizes(trainer) == (4, 2, 2)
    assert calls[:7] == [1, 2, 4, 8, 1, 2, 4]
    assert max(calls[7:]) == 4
    given = {**settings, "memory": {"decode_batch_size": 2}}
    given["rollout"], given["objective"] = (
        settings["rollout"] | {"batch_size": 4},
        settings["objective"] | {"batch_size": 2},
    )
    reference = Trainer(parse_config(given), tmp_path / "given")
    reference.train()
    assert same(weights(trainer), weights(reference))
    assert outcome(tmp_path / "found") == outcome(tmp_path / "given")


def test_a_resumed_run_repeats_the_sizes_also_with_more_memory(settings, tmp_path, monkeypatch):
    whole, _ = limited(settings, tmp_path / "whole", monkeypatch)
    whole.train()
    broken, _ = limited(settings, tmp_path / "broken", monkeypatch)
    train_until(broken, 2)
    resumed, calls = limited(settings, tmp_path / "broken", monkeypatch, 100, 100, 100, resume=True)
    resumed.train()
    assert sizes(resumed) == (4, 2, 2)
    assert max(calls) == 4
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_the_processes_take_the_smallest_size(settings, tmp_path, monkeypatch):
    trainer, _ = limited(settings, tmp_path / "run", monkeypatch)
    found = BatchSizes(trainer.config, trainer.policy)
    others = torch.tensor([[4, 8, 8], [8, 2, 8], [8, 8, 16]])
    monkeypatch.setattr("etude.training.sizes.gather", lambda accelerator, own, count: others)
    found.agree(trainer.accelerator)
    assert [batch.size for batch in found.automatic] == [4, 2, 8]


def test_sizes_are_not_tried_where_memory_cannot_run_out_nor_where_the_network_is_divided(
    settings, tmp_path, monkeypatch
):
    trainer = Trainer(parse_config(settings), tmp_path / "run")
    assert not trainer.sizes.to_find
    assert sizes(trainer) == (UNTRIED, UNTRIED, 32)
    trainer.sizes.check(in_parts=True)
    trainer, _ = limited(settings, tmp_path / "run", monkeypatch)
    with pytest.raises(EtudeError, match=r"rollout\.batch_size = auto cannot be tried out .*FSDP"):
        trainer.sizes.check(in_parts=True)
