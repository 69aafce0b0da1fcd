"""A signal ends a run where nothing is lost: what was finished is saved, what was broken off is done again with the same bits."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from etude import terminal
from etude.config import parse_config
from etude.training import supervision
from etude.training.progress import SilentDisplay
from etude.training.supervision import COMMANDS, WARNINGS, Interrupted, Interruption
from etude.training.trainer import Trainer
from support.small_runs import metrics, same, weights
from support.tiny import save_stable_diffusion


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    prompts = root / "prompts.txt"
    prompts.write_text("red heart\npizza\n")
    return {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": 3,
        "rewards": {"colorfulness": 1.0},
        "prompts": {"train": str(prompts), "evaluation": str(prompts)},
        "sampling": {"eta": 1.2, "num_steps": 2, "guidance_scale": 1.0},
        "rollout": {"images_per_iteration": 4, "images_per_prompt": 2},
        "objective": {"clip_range": None, "clip_nats": 1.6},
        "advantage": {"kind": "per_prompt", "min_count": 2},
        "evaluation": {"every": 3, "num_images": 2, "grid_images": 2},
    }


@pytest.fixture(autouse=True)
def _signals_are_on():
    """A shell that starts tests in the background switches SIGINT off for them, and `nohup` SIGHUP."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (*COMMANDS, *WARNINGS)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class SignalAt(SilentDisplay):
    """Sends a signal to this process when a phase begins for the k-th time."""

    def __init__(self, name, count, signum):
        self.name, self.count, self.signum = name, count, signum

    def phase(self, name, total=None):
        self.count -= name == self.name
        if name == self.name and self.count == 0:
            os.kill(os.getpid(), self.signum)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    trainer = Trainer(parse_config(settings), out)
    trainer.train()
    return weights(trainer), metrics(out)


@pytest.mark.parametrize(
    ("phase", "count", "every", "saved", "signum"),
    [
        ("rollout", 3, 1, 2, signal.SIGTERM),
        ("rollout", 3, 9, 2, signal.SIGUSR1),  # nothing has changed since iteration 2, which is saved now
        ("update", 2, 1, 1, signal.SIGTERM),  # iteration 1 is on the disk: 2 is broken off
        ("update", 2, 9, 2, signal.SIGHUP),  # iteration 1 is not, so that 2 is finished first
        ("evaluation", 2, 1, 3, signal.SIGTERM),  # only the figures are missing, which the resumed run measures
    ],
)
def test_a_signal_saves_what_is_finished_and_the_resumed_run_ends_with_the_same_bits(
    settings, whole, tmp_path, phase, count, every, saved, signum
):
    config = parse_config({**settings, "checkpoint": {"every": every}})
    handlers = [signal.getsignal(number) for number in (*COMMANDS, *WARNINGS)]
    with pytest.raises(
        Interrupted, match=f"{signum.name}.* continues from the checkpoint of iteration {saved}"
    ) as caught:
        Trainer(config, tmp_path / "run", display=SignalAt(phase, count, signum)).train()
    assert caught.value.signum == signum
    assert [signal.getsignal(number) for number in (*COMMANDS, *WARNINGS)] == handlers
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == f"iteration-{saved:06d}"
    resumed = Trainer(config, tmp_path / "run", resume=True)
    resumed.train()
    assert same(weights(resumed), whole[0])
    assert metrics(tmp_path / "run") == whole[1]


def test_every_number_of_a_row_is_explained(whole):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "read-metrics.md").read_text()
    keys = {key for row in whole[1] for key in row} | {"seconds", "memory_mb"}
    explained = set(re.findall(r"`(\w+)", "".join(line for line in page.splitlines() if line.startswith("| `"))))
    assert keys <= explained


def test_a_run_interrupted_before_its_first_checkpoint_says_so_and_starts_over(settings, whole, tmp_path):
    config = parse_config(settings)
    with pytest.raises(Interrupted, match=r"SIGINT in iteration 0: there is no checkpoint yet.* starts over"):
        Trainer(config, tmp_path / "run", display=SignalAt("evaluation", 1, signal.SIGINT)).train()
    Trainer(config, tmp_path / "run", resume=True).train()
    assert metrics(tmp_path / "run") == whole[1]


def test_a_signal_while_the_results_are_written_lets_a_finished_run_finish(settings, tmp_path):
    class AtTheEnd(SilentDisplay):
        def iteration(self, row):
            if row["iteration"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    Trainer(parse_config(settings), tmp_path / "run", display=AtTheEnd()).train()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_etude_program_at_once(signum):
    child = os.fork()
    if child == 0:
        terminal.own_program = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with Interruption():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signum)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signum


def test_the_second_sigint_in_another_program_is_its_keyboard_interrupt():
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_sigterm_in_another_program_is_for_its_own_handler():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        with Interruption() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert asked.signum == signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("signum", WARNINGS)
def test_a_warning_may_come_several_times_and_the_command_after_it_is_the_first(signum):
    with Interruption() as asked:
        for _ in range(3):
            os.kill(os.getpid(), signum)
        assert asked.signum == signum
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.signum == signal.SIGTERM


def test_a_warning_for_which_the_program_has_a_handler_stays_the_programs():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: heard.append(signum))
    try:
        with Interruption() as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (heard, asked.signum) == ([signal.SIGUSR1], None)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_amid_an_exchange_is_told_to_all_in_the_next_one(monkeypatch):
    """One process alone must not end, and must not forget either."""
    coming = [True, False]

    def exchange(accelerator, own, count):
        if coming.pop(0):
            os.kill(os.getpid(), signal.SIGTERM)
        return own

    monkeypatch.setattr(supervision, "gather", exchange)
    with Interruption() as asked:
        assert not asked.arrived(SimpleNamespace(num_processes=2))
        assert asked.arrived(SimpleNamespace(num_processes=2))
        assert asked.signum == signal.SIGTERM


def test_hearing_of_a_signal_and_then_getting_it_is_not_two(monkeypatch):
    told = torch.tensor([0, signal.SIGTERM])
    monkeypatch.setattr(supervision, "gather", lambda accelerator, own, count: told)
    with Interruption() as asked:
        assert asked.arrived(SimpleNamespace(num_processes=2))
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.signum == signal.SIGTERM


def test_a_signal_that_was_switched_off_stays_off():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.signum is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
