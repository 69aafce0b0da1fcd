"""Code of others around a run: its state, its thread, and the files that it is read from."""

from __future__ import annotations

import io
import os
import random
import sqlite3
import sys
import threading
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.live import Live

from etude.errors import EtudeError
from etude.prompts import load_prompts
from etude.registry import import_callable
from etude.rewards import WeightedRewards, get, register, score, score_one
from etude.rewards.background import LOCAL
from etude.undisturbed import begin_draws, undisturbed

IMAGES = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
PROMPTS = ["a cat", "the sea"]
METADATA = {"boxes": [{"at": [1, 2]}, {"at": [3]}], "tag": ["x", "y"]}


def state() -> list[object]:
    """What a thread and its process share with the code that they call."""
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        (torch.is_autocast_cache_enabled(), torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_anomaly_enabled(),
        [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision],
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        np.geterr(),
        [*warnings.filters],
        (warnings.showwarning, warnings.formatwarning),
        os.getcwd(),
        sys.getrecursionlimit(),
        (getattr(sys.stdout, "_stream", sys.stdout), getattr(sys.stderr, "_stream", sys.stderr)),
    ]


held = ExitStack()  # an inference mode ends with its last reference
HOSTILE = {
    "default dtype": lambda: torch.set_default_dtype(torch.bfloat16),
    "default device": lambda: torch.set_default_device("meta"),
    "gradients": lambda: torch.set_grad_enabled(False),
    "no_grad": lambda: torch.no_grad().__enter__(),
    "inference": lambda: held.enter_context(torch.inference_mode()),
    "autocast": lambda: torch.autocast("cpu").__enter__(),
    "autocast of another kind": lambda: torch.autocast("cuda", torch.float16, cache_enabled=False).__enter__(),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "precision by kind": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "determinism": lambda: torch.use_deterministic_algorithms(True),
    "only warns": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "torch's seed": lambda: torch.manual_seed(5),
    "torch's draws": lambda: torch.rand(3),
    "Python's seed": lambda: random.seed(5),
    "NumPy's seed": lambda: np.random.seed(5),
    "NumPy's errors": lambda: np.seterr(all="raise"),
    "warnings": lambda: warnings.simplefilter("ignore"),
    "no filters": lambda: warnings.resetwarnings(),
    "show": lambda: setattr(warnings, "showwarning", print),
    "directory": lambda: os.chdir("/"),
    "recursion": lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 1),
    "output": lambda: setattr(sys, "stdout", io.StringIO()),
    "no error stream": lambda: setattr(sys, "stderr", None),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_state_of_the_process_is_as_before_after_the_code_of_others(kind: str) -> None:
    before = state()
    with undisturbed():
        HOSTILE[kind]()
        changed = state() != before
    assert changed, "the case changes nothing"
    assert state() == before
    with suppress(RuntimeError), undisturbed():
        HOSTILE[kind]()
        raise RuntimeError
    assert state() == before


def test_the_state_is_put_back_whichever_method_of_a_reward_changes_it() -> None:
    seen: list[list[object]] = []

    def disturb() -> None:
        seen.append(state())
        for change in HOSTILE.values():
            change()

    @register("hostile")
    class Hostile:
        def __init__(self) -> None:
            disturb()

        def load(self) -> None:
            disturb()

        def __call__(self, images, prompts, **metadata):
            disturb()
            return [1.0] * len(prompts)

        def offload(self) -> None:
            disturb()

    own, theirs = state(), LOCAL.call(state)
    rewards = WeightedRewards({"hostile": 1.0}, offload=True)
    rewards.load()
    for _ in range(2):
        rewards(IMAGES, PROMPTS)
        assert state() == own
        assert LOCAL.call(state) == theirs
    assert len(seen) == 6
    own_to_the_call = (2, 14, 15, 16)  # it computes no gradients, and goes on with draws of its own
    for each in seen:
        assert all(a == b for i, (a, b) in enumerate(zip(each, theirs, strict=True)) if i not in own_to_the_call)


def test_what_the_code_of_others_writes_is_shown_and_it_closes_no_stream_of_the_program(capsys) -> None:
    @undisturbed()
    def closes() -> None:
        print("from a reward")
        print("aloud", file=sys.stderr)
        sys.stdout.close()
        sys.stderr.close()
        with suppress(io.UnsupportedOperation):
            sys.stdout.detach()

    before = sys.stdout, sys.stderr
    for _ in range(2):
        closes()
        print("from the program", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("from a reward\n" * 2, "aloud\nfrom the program\n" * 2)


def test_a_display_that_holds_the_output_during_a_call_holds_it_afterwards() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True)
    plain = sys.stdout
    with Live("training", console=console, auto_refresh=False):
        held = sys.stdout
        with undisturbed():
            print("from a reward")
            sys.stdout = io.StringIO()
        assert sys.stdout is held
    assert sys.stdout is plain
    assert "from a reward" in shown.getvalue()


def test_draws_of_the_code_of_others_go_on_and_begin_anew_with_the_program() -> None:
    @undisturbed()
    def draw() -> float:
        return torch.rand(()).item()

    begin_draws()
    alone = torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist()
    torch.manual_seed(3)
    assert [draw() for _ in range(3)] == alone
    begin_draws()
    assert draw() == alone[0]
    assert torch.rand(()).item() == alone[0], "the program's own draws are those without any other code"
    assert draw() == alone[1], "a draw of the program lets the others begin anew, where it is"


def test_shared_state_waits_for_the_last_thread_that_is_inside() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with undisturbed():
            torch.set_default_dtype(torch.float64)
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with undisturbed():
        pass
    assert torch.get_default_dtype() == torch.float64, "the other thread is still at work with it"
    leave.set()
    thread.join()
    assert torch.get_default_dtype() == torch.float32


def test_what_a_reward_is_given_is_its_own() -> None:
    @register("in_place")
    def in_place(images, prompts, boxes, **metadata):
        images.zero_()
        prompts[:] = ["gone"] * len(prompts)
        boxes[0]["at"].clear()
        metadata["tag"][0] = "gone"
        return [0.0] * len(prompts)

    @register("watching")
    def watching(images, prompts, boxes, tag):
        return (
            images.float().mean((1, 2, 3)) + sum(map(len, prompts)) + sum(sum(box["at"]) for box in boxes) + len(tag[0])
        )

    images, prompts, metadata = IMAGES.clone(), [*PROMPTS], {"boxes": [{"at": [1, 2]}, {"at": [3]}], "tag": ["x", "y"]}
    alone = score_one("watching", get("watching"), IMAGES, PROMPTS, METADATA)
    rewards = WeightedRewards({"in_place": 1.0, "watching": 1.0})
    for scores in (rewards(images, prompts, metadata), rewards.start(images, prompts, metadata).result(60)):
        assert torch.equal(scores["watching"], alone)
    score(["in_place"], images, prompts, metadata)
    assert (torch.equal(images, IMAGES), prompts, metadata) == (True, PROMPTS, METADATA)


def test_local_rewards_are_built_loaded_and_called_on_one_thread() -> None:
    threads: list[int] = []

    @register("of_a_thread")
    class OfAThread:
        def __init__(self) -> None:
            threads.append(threading.get_ident())
            self.store = sqlite3.connect(":memory:")

        def load(self) -> None:
            threads.append(threading.get_ident())
            self.store.execute("create table s (v)")

        def __call__(self, images, prompts, **metadata):
            threads.append(threading.get_ident())
            self.store.execute("insert into s values (?)", (len(prompts),))
            return [1.0] * len(prompts)

        def offload(self) -> None:
            threads.append(threading.get_ident())
            self.store.commit()

    for _ in range(2):  # two runs of one process
        rewards = WeightedRewards({"of_a_thread": 1.0}, offload=True)
        if len(threads) < 2:
            rewards.load()
        started = [rewards.start(IMAGES, PROMPTS) for _ in range(3)]
        assert all(scoring.result(60)["of_a_thread"].tolist() == [1.0, 1.0] for scoring in started)
        rewards.evaluate(IMAGES, PROMPTS)
        score("of_a_thread", IMAGES, PROMPTS)
    assert len(threads) > 10
    assert set(threads) == {threads[0]} != {threading.get_ident()}


def test_a_reward_may_call_other_rewards() -> None:
    @register("sum_of_two")
    def sum_of_two(images, prompts, **metadata):
        scores = score(["colorfulness", "jpeg_compressibility"], images, prompts)
        return (
            scores["colorfulness"]
            + WeightedRewards({"jpeg_compressibility": 1.0})(images, prompts)["jpeg_compressibility"]
        )

    assert len(WeightedRewards({"sum_of_two": 1.0}).start(IMAGES, PROMPTS).result(60)["sum_of_two"]) == 2


def test_a_call_that_was_given_up_and_hangs_holds_up_no_other() -> None:
    end, began = threading.Event(), threading.Event()

    @register("hanging")
    def hanging(images, prompts, **metadata):
        began.set()
        assert end.wait(120)
        return [0.0] * len(prompts)

    try:
        scoring = WeightedRewards({"hanging": 1.0}).start(IMAGES, PROMPTS)
        assert began.wait(60)
        with pytest.raises(EtudeError, match="has not finished"):
            scoring.result(timeout=0)
        assert WeightedRewards({"colorfulness": 1.0}).start(IMAGES, PROMPTS).result(60)["colorfulness"].tolist() == [
            0.0,
            0.0,
        ]
    finally:
        end.set()


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "attribute"), [("statistics", "mean"), ("statistics", "absent"), ("time", "time"), ("json", "dumps")]
)
def test_a_file_that_another_module_hides_is_named(beside: Path, name: str, attribute: str) -> None:
    (beside / f"{name}.py").write_text("def mean(images, prompts): return [1.0] * len(prompts)\n")
    with pytest.raises(EtudeError, match=rf"module '{name}' is .*, not '{beside}/{name}.py': rename"):
        import_callable(f"{name}:{attribute}", "reward", "a function")


def test_a_missing_attribute_names_the_file_that_was_read(beside: Path) -> None:
    with pytest.raises(EtudeError, match=r"module 'statistics' \(/.*statistics.py\) has no attribute 'absent'"):
        import_callable("statistics:absent", "reward", "a function")


def test_a_module_changes_no_state_when_it_is_imported(beside: Path) -> None:
    (beside / "my_hostile_module.py").write_text(
        "import torch, warnings\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float16)\ntorch.manual_seed(1)\n"
        "warnings.simplefilter('ignore')\nRECORDS = [{'prompt': 'a', 'k': [1]}]\n"
        "def prompts():\n    torch.set_default_dtype(torch.float64)\n    return RECORDS\n"
    )
    before = state()
    prompts = load_prompts("my_hostile_module:prompts")
    assert state() == before
    sys.modules["my_hostile_module"].RECORDS[0]["k"].append(2)
    assert prompts.metadata == {"k": [[1]]}
