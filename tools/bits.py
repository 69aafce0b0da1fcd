"""Tell whether two checkouts of etude give the same bits: weights, metrics, images and figures.

A change that only moves code promises the same results to the last bit.
This file holds such a change to its promise:

    python tools/bits.py CHECKOUT_A CHECKOUT_B              # record both, then compare
    python tools/bits.py record CHECKOUT --out DIR          # write DIR/bits.json
    python tools/bits.py compare A/bits.json B/bits.json    # print every difference
    python tools/bits.py list                               # print the names of the cases

Each case is a small use of the command line: it trains, resumes, samples, measures or reports.
`bits.json` holds the SHA-256 of every quantity that a case leaves.
The exit code is 1 if any quantity differs or a case fails, and 0 otherwise.

Only the command line is called, since its names stay when modules move.
Nothing of etude is imported here, but the Python that runs this file needs etude's dependencies.
All cases take several minutes on two cores.
Only records of one machine and one set of packages can be compared, because another processor
rounds differently.

Times, memory and versions are left out, because they depend on the clock and the machine.
`report.html` is left out, because it shows them.
`etude advise` is left out, because it sizes its pilots by the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from PIL import Image

Bits = dict[str, str]
"""SHA-256 of each quantity of one case, by the quantity's name."""
Settings = dict[str, Any]
"""Values of `--set`, by key."""

FAILED = "failed"
"""Entry of a case that did not end well. Its value is the reason."""
MACHINE_KEYS = {"seconds", "memory_mb", "peak_memory_mb", "versions", "machine", "started", "finished"}
"""Keys of JSON that depend on the clock, the machine or its packages, at any depth."""
ENVIRONMENT = {
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")},
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",
    "COLUMNS": "160",
    "NO_COLOR": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TERM": "dumb",
}
"""Variables of every case: one thread, so that sums have one order; no hub; one width of print."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that make a process one of several. Cases do not inherit them."""
PRELOADS = [
    "__main__",
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_asym_kl",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "efficientnet_lite_pytorch",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "peft",
    "pydantic",
    "rich.progress",
    "scipy.stats",
    "torch.distributed.tensor",
    "transformers.models.clip.modeling_clip",
    "typer",
]
"""Modules of other packages, whose import would take most of a case's time.

One process imports them once, and each case is a fork of it.
A module that does not exist is passed over.
"""
_FORKS = threading.Lock()
"""Lock around every call of `multiprocessing`, which two threads may not make at once."""
_STOP = threading.Event()
"""Flag that ends every case, because the program ends."""


class CaseFailedError(Exception):
    """Reason, in one line, why a case did not end well."""


# Running the command line.


@dataclass(frozen=True)
class Bench:
    """Place where one case runs.

    Attributes:
        checkout: root of the repository whose etude runs.
        work: directory that all cases of a record share. A case gives paths relative to it, so that
            its output does not depend on the place of the directory.
        name: the case's.
        limit: seconds that each command may take.
    """

    checkout: Path
    work: Path
    name: str
    limit: float

    def __post_init__(self) -> None:
        (self.work / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def place(self) -> Path:
        """Directory that the case writes to."""
        return self.work / self.name

    def etude(self, *arguments: str) -> str:
        """Run `python -m etude ARGUMENTS` to its end and return its output.

        Raises:
            CaseFailedError: it failed or took longer than the limit.
        """
        process = self.start(*arguments)
        self._finish(lambda: _exit_code(process), lambda: _kill(process))
        return self._log("out").read_text(encoding="utf-8")

    def start(self, *arguments: str) -> BaseProcess:
        """Start `python -m etude ARGUMENTS` as a fork of the process that holds `PRELOADS`."""
        parameters = (str(self.checkout / "src"), str(self.work), str(self._log("")), arguments)
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=become_etude, args=parameters, daemon=True)
        with _FORKS:
            process.start()
        return process

    def launch(self, count: int, *arguments: str) -> None:
        """Run the command line in several processes, as torchrun does.

        Raises:
            CaseFailedError: it failed or took longer than the limit.
        """
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *launcher, "-m", "etude", *arguments]
        place: dict[str, Any] = {"cwd": self.work, "env": environment(self.checkout), "start_new_session": True}
        with open(self._log("out"), "wb") as out, open(self._log("err"), "wb") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, **place)

        def kill() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        try:
            self._finish(process.poll, kill)
        finally:
            kill()  # the workers, which outlive a launcher that fails
            process.wait()

    def kill_when(self, process: BaseProcess, condition: Callable[[], bool]) -> None:
        """Kill the process with SIGKILL as soon as the condition is true.

        Raises:
            CaseFailedError: the process ended before, or the limit passed before.
        """
        deadline = time.monotonic() + self.limit
        while not condition():
            code = _exit_code(process)
            if code is not None:
                raise CaseFailedError(f"it ended before it was killed: {self._last_words(code)}")
            self._tick(deadline, lambda: _kill(process))
        _kill(process)

    def _finish(self, poll: Callable[[], int | None], kill: Callable[[], None]) -> None:
        """Wait until a process has ended well."""
        deadline = time.monotonic() + self.limit
        while (code := poll()) is None:
            self._tick(deadline, kill)
        if code:
            raise CaseFailedError(self._last_words(code))

    def _tick(self, deadline: float, kill: Callable[[], None]) -> None:
        """Pause for a moment, or kill the process if its time is over or the program ends."""
        if _STOP.is_set() or time.monotonic() > deadline:
            kill()
            raise CaseFailedError(f"took longer than {self.limit:g} s")
        time.sleep(0.02)

    def _log(self, stream: str) -> Path:
        return self.work / "logs" / f"{self.name}.{stream}"

    def _last_words(self, code: int) -> str:
        """Return the last error on stderr, or its last line."""
        text = self._log("err").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.split("\n") if line.strip()] or ["it said nothing"]
        errors = [line for line in lines if line.startswith("error: ")]
        return f"exit code {code}: {(errors or lines)[-1]}"


def become_etude(source: str, work: str, log: str, arguments: tuple[str, ...]) -> None:
    """Turn this process into `python -m etude ARGUMENTS` of one checkout.

    Args:
        source: the checkout's `src`.
        work: directory to run in.
        log: path of the files of stdout and stderr, without their last letters `out` and `err`.
    """
    for descriptor, stream in ((1, "out"), (2, "err")):
        with open(f"{log}{stream}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(work)
    sys.path.insert(0, source)
    sys.argv = ["etude", *arguments]
    package = find_spec("etude")
    if "etude" in sys.modules or package is None or not is_under(package.origin, source):
        sys.exit(f"error: etude is not that of {source}")
    runpy.run_module("etude", run_name="__main__", alter_sys=True)


def _exit_code(process: BaseProcess) -> int | None:
    with _FORKS:
        return process.exitcode


def _kill(process: BaseProcess) -> None:
    with _FORKS:
        process.kill()
        process.join()


def environment(checkout: Path) -> dict[str, str]:
    """Return the variables under which a new interpreter runs the checkout's etude."""
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return variables | ENVIRONMENT | {"PYTHONPATH": str(checkout / "src")}


def is_under(file: str | None, directory: str | Path) -> bool:
    """Tell whether a file lies in a directory, at any depth."""
    return file is not None and Path(file).resolve().is_relative_to(Path(directory).resolve())


def check_checkout(checkout: Path) -> None:
    """End the program unless `import etude` gives the checkout's own package."""
    command = [sys.executable, "-c", "import etude; print(etude.__file__)"]
    options: dict[str, Any] = {"env": environment(checkout), "capture_output": True, "text": True}
    with tempfile.TemporaryDirectory() as elsewhere:
        result = subprocess.run(command, cwd=elsewhere, check=False, **options)
    if result.returncode or not is_under(result.stdout.strip(), checkout):
        answer = result.stdout.strip() or result.stderr.strip()
        sys.exit(f"error: '{checkout}' is no checkout of etude: importing etude gives {answer}")


# Hashing what a case leaves.


def digest(data: bytes) -> str:
    """Hash bytes with SHA-256."""
    return hashlib.sha256(data).hexdigest()


def text_digest(text: str) -> str:
    """Hash a text in UTF-8."""
    return digest(text.encode("utf-8"))


def json_digest(value: Any) -> str:
    """Hash a JSON value without the keys in `MACHINE_KEYS`. The order of keys does not count."""
    return text_digest(json.dumps(_portable(value), sort_keys=True, ensure_ascii=False))


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(each) for key, each in value.items() if key not in MACHINE_KEYS}
    return [_portable(each) for each in value] if isinstance(value, list) else value


def json_file(path: Path) -> str:
    """Hash a JSON file as a value."""
    return json_digest(json.loads(path.read_text(encoding="utf-8")))


def text_file(path: Path) -> str:
    """Hash a text file."""
    return text_digest(path.read_text(encoding="utf-8"))


def tensor_digests(path: Path) -> Bits:
    """Hash the type, the shape and the bytes of each tensor of a safetensors file.

    The file as a whole is not hashed, since its metadata and the order of its tensors may change.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    bits: Bits = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            head = f"{entry['dtype']} {entry['shape']} ".encode()
            bits[name] = digest(head + data[start + begin : start + end])
    return bits


def pixel_digest(path: Path) -> str:
    """Hash the mode, the size and the pixels of an image."""
    with Image.open(path) as image:
        return digest(f"{image.mode} {image.size} ".encode() + image.tobytes())


def read_run(place: Path) -> Bits:
    """Hash the files of a training run, except `report.html`."""
    rows = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    bits = {f"metrics.jsonl, row {number}": json_digest(json.loads(row)) for number, row in enumerate(rows)}
    bits["config.yaml"] = text_file(place / "config.yaml")
    bits["summary.json"] = json_file(place / "summary.json")
    bits["samples/prompts.json"] = json_file(place / "samples" / "prompts.json")
    bits |= {f"samples/{image.name}": pixel_digest(image) for image in place.glob("samples/*.png")}
    for folder in ("lora", "lora-best", "model", "model-best"):
        bits |= _read_export(place, place / folder)
    for checkpoint in sorted(place.glob("checkpoints/iteration-*")):
        bits |= _read_checkpoint(checkpoint)
    return bits


def _read_export(place: Path, folder: Path) -> Bits:
    """Hash the weights that a run exported, tensor by tensor, and their card, less its version."""
    bits: Bits = {}
    for file in sorted(folder.rglob("*.safetensors")):
        bits |= {f"{file.relative_to(place)}, {name}": value for name, value in tensor_digests(file).items()}
    if folder.is_dir():
        card = (folder / "README.md").read_text(encoding="utf-8")
        bits[f"{folder.name}/README.md"] = text_digest(re.sub(r"(by etude) \d[\w.+-]*", r"\1", card))
    return bits


def _read_checkpoint(folder: Path) -> Bits:
    """Hash a checkpoint: its state less the digests of inputs, and its tensors by kind (weights, optimizer, ema, best)."""
    kinds: dict[str, list[str]] = {}
    for name, value in sorted(tensor_digests(folder / "tensors.safetensors").items()):
        kinds.setdefault(name.partition("/")[0], []).append(f"{name} {value}")
    bits = {f"{folder.name}, {kind}": text_digest("\n".join(lines)) for kind, lines in kinds.items()}
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    own = {name: value for name, value in state.items() if name not in {"inputs", "changed_inputs"}}
    return bits | {f"{folder.name}, state.json": json_digest(own)}


def read_study(place: Path) -> Bits:
    """Hash the results of a study, except `report.html`."""
    bits = {"results.json": json_file(place / "results.json")}
    bits |= {name: text_file(place / name) for name in ("tables.md", "results.csv")}
    return bits | {f"figures/{figure.name}": text_file(figure) for figure in place.glob("figures/*.svg")}


# The cases.

Act = Callable[[Bench], Bits]


@dataclass(frozen=True)
class Case:
    """Small use of the command line.

    Attributes:
        act: function that runs it and hashes what it leaves.
        needs: name of the case whose files it reads.
    """

    name: str
    act: Act
    needs: str | None = None


SMALL: Settings = {
    "iterations": 2,
    "sampling.num_steps": 3,
    "rollout.images_per_iteration": 6,
    "rollout.images_per_prompt": 3,
    "objective.updates_per_epoch": 2,
    "evaluation.every": 2,
    "evaluation.num_images": 4,
    "evaluation.grid_images": 4,
}
"""Settings that make a recipe a matter of seconds."""
WINDOW: Settings = {"sampling.num_steps": 6, "sampling.window.size": 2}
PAIR: Settings = {"rollout.images_per_iteration": 8, "rollout.images_per_prompt": 4}
"""Settings of two processes, which share the images of each optimiser step evenly."""
FULL: Settings = {"lora.rank": 0, "optimizer.learning_rate": 1e-5}
RECIPES: dict[str, Settings] = {
    "emoji-ddpo": {},
    "emoji-mixgrpo": WINDOW,
    "emoji-mixgrpo-flash": WINDOW,
    "emoji-flow-grpo": {},
    "emoji-dance-grpo": {},
}
"""Recipes of the embedded models.

Between them they have the kernels gddim, flow_sde and dance_sde, every kind of advantage, a window
that moves progressively, Flash's compression and a KL penalty.
"""
VARIANTS: dict[str, tuple[str, Settings]] = {
    "ddpo-full": ("emoji-ddpo", {**FULL, "objective.kl_coef": 0}),
    "ddpo-full-kl": ("emoji-ddpo", {**FULL, "objective.kl_coef": 0.05}),
    "ddpo-ema": ("emoji-ddpo", {"ema.decay": 0.9}),
    "ddpo-best": ("emoji-ddpo", {"checkpoint.best": "colorfulness", "checkpoint.keep": 1, "evaluation.every": 1}),
    "ddpo-reinforce": (
        "emoji-ddpo",
        {"objective.kind": "reinforce", "objective.updates_per_epoch": 1, "objective.kl_coef": 0},
    ),
    "ddpo-replay": ("emoji-ddpo", {"objective.old_log_prob": "replay", "objective.num_inner_epochs": 2}),
    "ddpo-sum": (
        "emoji-ddpo",
        {
            "objective.logprob_reduction": "sum",
            "objective.timestep_fraction": 0.5,
            "optimizer.learning_rate": 1e-5,
        },
    ),
    "ddpo-memory": (
        "emoji-ddpo",
        {
            "memory.gradient_checkpointing": True,
            "memory.offload": True,
            "memory.decode_batch_size": 3,
            "rollout.batch_size": 3,
            "objective.batch_size": 5,
        },
    ),
    "ddpo-per-prompt": ("emoji-ddpo", {"prompts.train": "emoji-8", "advantage.min_count": 2}),
    "ddpo-group": ("emoji-ddpo", {"advantage.kind": "group", "rollout.shared_noise": True}),
    "ddpo-rewards": (
        "emoji-ddpo",
        {"rewards": "{colorfulness: 1, jpeg_compressibility: 0.5}", "evaluation.stop_on_fall": "{alignment: 50}"},
    ),
    "ddpo-ddim": ("emoji-ddpo", {"sampling.kernel": "ddim", "sampling.eta": 0.9}),
    "ddpo-eta-over-iterations": ("emoji-ddpo", {"sampling.eta_schedule": "{kind: cosine, end: 0.5}"}),
    "ddpo-eta-over-steps": ("emoji-ddpo", {"sampling.eta_schedule": "{kind: linear, over: steps, end: 0}"}),
    "ddpo-eta-by-step": ("emoji-ddpo", {"sampling.eta": "[1.5, 0.5, 0]"}),
    "mixgrpo-bfloat16": ("emoji-mixgrpo", {**WINDOW, "dtype": "bfloat16"}),
    "mixgrpo-bfloat16-rollout": ("emoji-mixgrpo", {**WINDOW, "rollout.dtype": "bfloat16"}),
    "mixgrpo-full": ("emoji-mixgrpo", {**WINDOW, **FULL}),
    "mixgrpo-random": ("emoji-mixgrpo", {**WINDOW, "sampling.window.strategy": "random"}),
    "mixgrpo-decay": (
        "emoji-mixgrpo",
        {**WINDOW, "sampling.window.strategy": "decay", "sampling.window.decay_threshold": 0},
    ),
    "mixgrpo-fixed": (
        "emoji-mixgrpo",
        {**WINDOW, "sampling.window.strategy": "fixed", "sampling.shift": 3, "evaluation.num_steps": 8},
    ),
    "mixgrpo-cps": ("emoji-mixgrpo", {**WINDOW, "sampling.kernel": "cps", "sampling.eta": 0.8}),
}
"""Recipe and settings by name. Each exercises a part of the loop that the recipes leave alone."""
STUDIES = ("eta", "eta-mixgrpo", "flash")
TINY_STUDY = """\
name: A study of two cells
base: emoji-ddpo
overrides: {iterations: 1, rollout.images_per_iteration: 6, rollout.images_per_prompt: 3, sampling.num_steps: 4,
  objective.updates_per_epoch: 1, evaluation.num_images: 4, evaluation.grid_images: 4, checkpoint.best: colorfulness}
measurement: {num_images: 4, steps: [6], matrix: {solvers: [heun], etas: [0.5]}}
grids: [{keys: {sampling.eta: [0.5, 1.0]}}]
"""
GAP = ("--steps", "4", "--steps", "6", "--samples", "8", "--reward", "colorfulness", "--reward", "alignment")
DRAWING = ("--prompt", "red heart", "--prompt", "pizza", "--steps", "5")
THEORIES: dict[str, tuple[str, ...]] = {
    "theory": ("--format", "svg"),
    "theory-score-error": (
        *("--schedule", "ddpm", "--spacing", "leading", "--kernel", "ddim", "--steps", "20", "--eta", "0.5"),
        *("--bias", "0.05", "--gain", "0.02", "--white", "0.1", "--no-figures"),
    ),
    "theory-two-dimensions": (
        *("--mean", "1,0", "--variance", "1,0.25", "--center", "2,1", "--linear", "0,1", "--beta", "1"),
        *("--schedule", "flow", "--no-figures"),
    ),
    "theory-euler-maruyama": ("--kernel", "euler-maruyama", "--spacing", "log-snr", "--steps", "20", "--no-figures"),
}
PEERS: dict[str, tuple[str, ...]] = {
    "theory-peers": (),
    "theory-peers-sd3": ("--steps", "10", "--pipeline", "sd3", "--level", "flow_sde=0.9", "--markdown"),
}


def cases() -> list[Case]:
    """List all cases, long ones first, each after the one that it needs."""
    return [
        *(Case(f"study-{name}", report_study(name)) for name in STUDIES[:2]),
        Case("emoji-ddpo", train("emoji-ddpo", RECIPES["emoji-ddpo"])),
        Case("emoji-mixgrpo", train("emoji-mixgrpo", RECIPES["emoji-mixgrpo"])),
        Case("two-processes-ddpo", train("emoji-ddpo", PAIR, processes=2)),
        Case("two-processes-mixgrpo", train("emoji-mixgrpo", {**WINDOW, **PAIR}, processes=2)),
        Case("killed-ddpo", kill_and_resume("emoji-ddpo"), needs="emoji-ddpo"),
        Case("killed-mixgrpo", kill_and_resume("emoji-mixgrpo"), needs="emoji-mixgrpo"),
        Case("study-tiny", run_tiny_study),
        *(Case(name, train(recipe, settings)) for name, (recipe, settings) in VARIANTS.items()),
        *(Case(name, train(name, RECIPES[name])) for name in list(RECIPES)[2:]),
        Case("gap", measure_gap("emoji-sd", *GAP, "--eta", "0.5", "--eta", "1.2")),
        Case("gap-lora", measure_gap("emoji-sd", *GAP, "--lora", "emoji-ddpo/lora"), needs="emoji-ddpo"),
        Case("gap-flux", measure_gap("emoji-flux", *GAP, "--kernel", "dance_sde", "--eta", "0.3", "--eta", "0.5")),
        *_drawings(),
        Case(f"study-{STUDIES[2]}", report_study(STUDIES[2])),
        *(Case(name, compute_theory(*options)) for name, options in THEORIES.items()),
        *(Case(name, show("theory", "peers", *options)) for name, options in PEERS.items()),
        *(Case(f"dry-run-{name}", show("train", name, "--dry-run", "--out", "unmade")) for name in RECIPES),
        Case("recipes", show("recipes")),
    ]


def _drawings() -> Iterator[Case]:
    yield Case("sample", draw("emoji-sd", *DRAWING))
    yield Case("sample-etas", draw("emoji-sd", *DRAWING, "--eta", "0", "--eta", "1.2", "--images", "2"))
    yield Case("sample-lora", draw("emoji-flux", *DRAWING, "--lora", "emoji-mixgrpo/lora"), needs="emoji-mixgrpo")
    for model, solvers in (("emoji-sd", ("dpmsolver++", "euler")), ("emoji-flux", ("heun", "unipc"))):
        for solver in solvers:
            yield Case(f"sample-{solver}", draw(model, *DRAWING, "--solver", solver))


def train(recipe: str, settings: Settings, processes: int = 1) -> Act:
    """Train a recipe under settings that make it small, in one process or several."""

    def act(bench: Bench) -> Bits:
        command = _training(recipe, settings, bench.name)
        if processes > 1:
            bench.launch(processes, *command)
        else:
            bench.etude(*command)
        return read_run(bench.place)

    return act


def _training(recipe: str, settings: Settings, out: str) -> list[str]:
    options = [word for key, value in {**SMALL, **settings}.items() for word in ("--set", f"{key}={value}")]
    return ["train", recipe, *options, "--out", out, "--quiet"]


def kill_and_resume(recipe: str) -> Act:
    """Train a recipe, kill the run once its second row of metrics is written, and resume it.

    The resumed run must end with the bits of the case that has the recipe's name.
    """

    def act(bench: Bench) -> Bits:
        metrics = bench.place / "metrics.jsonl"
        process = bench.start(*_training(recipe, RECIPES[recipe], bench.name))
        bench.kill_when(process, lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2)
        bench.etude("train", "--resume", "--out", bench.name, "--quiet")
        bits = read_run(bench.place)
        quantities = [quantity for quantity, _ in differences(bits, read_run(bench.work / recipe))]
        if quantities:
            bits[FAILED] = f"differs from the run that was not killed in {', '.join(quantities[:5])}"
        return bits

    return act


def measure_gap(model: str, *options: str) -> Act:
    """Measure a gap with `etude gap`."""

    def act(bench: Bench) -> Bits:
        file = f"{bench.name}.json"
        bits = {"output": text_digest(bench.etude("gap", model, *options, "--json", file))}
        report = json.loads((bench.work / file).read_text(encoding="utf-8"))
        bits["settings"] = json_digest(report["settings"])
        for row in report["rows"]:
            bits[f"{row['num_steps']} steps, eta {row['eta']:g}, {row['reward']}"] = json_digest(row)
        return bits

    return act


def draw(model: str, *options: str) -> Act:
    """Draw a picture with `etude sample`, and hash the whole file."""

    def act(bench: Bench) -> Bits:
        bench.etude("sample", model, *options, "--out", f"{bench.name}.png")
        return {f"{bench.name}.png": digest((bench.work / f"{bench.name}.png").read_bytes())}

    return act


def compute_theory(*options: str) -> Act:
    """Compute `etude theory`, and hash its output and every file that it writes."""

    def act(bench: Bench) -> Bits:
        bits = {"output": text_digest(bench.etude("theory", *options, "--out", bench.name))}
        return bits | {file.name: digest(file.read_bytes()) for file in bench.place.iterdir()}

    return act


def show(*arguments: str) -> Act:
    """Hash the output of a command."""
    return lambda bench: {"output": text_digest(bench.etude(*arguments))}


def report_study(name: str) -> Act:
    """Write the results of a study of the checkout anew, from a copy of its cells."""

    def act(bench: Bench) -> Bits:
        source = bench.checkout / "studies" / name
        if not source.is_dir():
            raise CaseFailedError(f"there is no folder studies/{name}")
        shutil.copytree(source, bench.place)
        results = bench.place / "results"
        for old in [*results.glob("results.*"), *results.glob("figures/*"), results / "tables.md"]:
            old.unlink()  # so that only files of this run are hashed
        study = f"{bench.name}/study.yaml"
        bench.etude("study", study, "--out", f"{bench.name}/results", "--report-only", "--quiet")
        return read_study(results)

    return act


def run_tiny_study(bench: Bench) -> Bits:
    """Run a study of two cells with all its measurements."""
    bench.place.mkdir()
    (bench.place / "study.yaml").write_text(TINY_STUDY, encoding="utf-8")
    bench.etude("study", f"{bench.name}/study.yaml", "--out", f"{bench.name}/results", "--quiet")
    bits = read_study(bench.place / "results")
    del bits["results.csv"]  # it has a column of seconds
    for scores in sorted(bench.place.glob("results/cells/*/scores.json")):
        bits[f"{scores.parent.name}, scores.json"] = json_file(scores)
        bits |= {f"{scores.parent.name}, {name}": value for name, value in read_run(scores.parent).items()}
    for file in sorted(bench.place.glob("results/base/*.json")):
        bits[f"base/{file.name}"] = json_file(file)
    return bits


# Recording and comparing.


def select(names: Iterable[str]) -> list[Case]:
    """Return the cases of these names and those that they need, or all if no name is given.

    Raises:
        SystemExit: a name is no case's.
    """
    by_name = {case.name: case for case in cases()}
    selection = set(names) or set(by_name)
    strangers = selection - set(by_name)
    if strangers:
        sys.exit(f"error: no case is called {', '.join(sorted(strangers))}: the list command prints the names")
    selection |= {needs for name in selection if (needs := by_name[name].needs)}
    return [case for case in by_name.values() if case.name in selection]


def record(checkout: Path, out: Path, only: Iterable[str], jobs: int, limit: float, keep: bool) -> Path:
    """Run the cases on a checkout and write `out/bits.json`. Return its path."""
    selection, work = select(only), out.resolve() / "work"
    shutil.rmtree(work, ignore_errors=True)
    results: dict[str, Bits] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[str, Future[tuple[Bits, float]]] = {}
        for case in selection:
            source = futures[case.needs] if case.needs else None  # earlier in the queue: no deadlock
            bench = Bench(checkout.resolve(), work, case.name, limit)
            futures[case.name] = pool.submit(attempt, case, bench, source)
        names = {future: name for name, future in futures.items()}
        try:
            for future in as_completed(names):
                results[names[future]], seconds = future.result()
                _tell(f"[{len(results)}/{len(names)}]", names[future], results[names[future]], seconds)
        except BaseException:
            _STOP.set()
            pool.shutdown(cancel_futures=True)
            raise
    path = out / "bits.json"
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if not keep and not any(FAILED in bits for bits in results.values()):
        shutil.rmtree(work)
    return path


def attempt(case: Case, bench: Bench, source: Future[tuple[Bits, float]] | None) -> tuple[Bits, float]:
    """Return the bits of a case, or the reason of its failure, and the seconds it took.

    Args:
        source: result of the case that it needs.
    """
    if source is not None and FAILED in source.result()[0]:
        return {FAILED: f"it needs {case.needs}, which failed"}, 0.0
    start = time.monotonic()
    try:
        bits = case.act(bench)
    except CaseFailedError as error:
        bits = {FAILED: str(error)}
    except (OSError, KeyError, ValueError) as error:  # a file is missing or is not what it should be
        bits = {FAILED: f"{type(error).__name__}: {error}"}
    return bits, time.monotonic() - start


def _tell(count: str, name: str, bits: Bits, seconds: float) -> None:
    state = f"failed: {bits[FAILED]}" if FAILED in bits else f"{len(bits)} quantities"
    print(f"{count} {name}: {state}, {seconds:.0f} s", flush=True)


def differences(a: Bits, b: Bits) -> Iterator[tuple[str, str]]:
    """Yield each quantity in which two cases differ, and how. A case that failed always differs."""
    for quantity in sorted({*a, *b}):
        if quantity == FAILED:
            reasons = {side: bits[FAILED] for side, bits in (("A", a), ("B", b)) if FAILED in bits}
            yield quantity, "; ".join(f"in {side}, {reason}" for side, reason in reasons.items())
        elif quantity not in a or quantity not in b:
            yield quantity, f"only in {'A' if quantity in a else 'B'}"
        elif a[quantity] != b[quantity]:
            yield quantity, "differs"


def read_record(path: Path) -> dict[str, Bits]:
    """Read a `bits.json`.

    Raises:
        SystemExit: the file cannot be read or is no JSON.
    """
    try:
        bits_by_case: dict[str, Bits] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: '{path}' is no record: {error}")
    return bits_by_case


def compare(first: Path, second: Path) -> int:
    """Print every difference of two records. Return the exit code."""
    a, b = read_record(first), read_record(second)
    names = sorted({*a, *b})
    rows = [(name, *row) for name in names for row in differences(a.get(name, {}), b.get(name, {}))]
    for name, quantity, how in rows:
        print(f"{name}: {quantity}: {how}")
    if rows:
        print(f"{len(rows)} differences in {len({row[0] for row in rows})} of {len(names)} cases")
        return 1
    print(f"equal: {sum(map(len, a.values()))} quantities of {len(a)} cases")
    return 0


def summarise(path: Path) -> int:
    """Print the size of a record. Return 1 if a case failed, else 0."""
    bits_by_case = read_record(path)
    failures = sum(FAILED in bits for bits in bits_by_case.values())
    count = sum(map(len, bits_by_case.values()))
    print(f"{path}: {count} quantities of {len(bits_by_case)} cases, {failures} failed")
    return int(failures > 0)


COMMANDS = ("record", "compare", "list", "both")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    whole = argparse.ArgumentParser(
        description="Tell whether two checkouts of etude give the same bits.",
        epilog="`bits.py CHECKOUT_A CHECKOUT_B` is short for `bits.py both CHECKOUT_A CHECKOUT_B`.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("record", help="run the cases on a checkout and write DIR/bits.json")
    one.add_argument("checkouts", type=Path, nargs=1, metavar="CHECKOUT", help="root of a checkout of etude")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="for bits.json; DIR/work is replaced")
    two = commands.add_parser("compare", help="print every difference of two records; exit code 1 if there is any")
    two.add_argument("records", type=Path, nargs=2, metavar="BITS_JSON", help="files that record wrote")
    commands.add_parser("list", help="print the names of the cases")
    both = commands.add_parser("both", help="record two checkouts, then compare them")
    both.add_argument("checkouts", type=Path, nargs=2, metavar="CHECKOUT", help="root of a checkout of etude")
    both.add_argument("--out", type=Path, metavar="DIR", help="for DIR/a and DIR/b. Default: a temporary directory")
    for command in (one, both):
        add = command.add_argument
        add("--only", nargs="+", default=[], metavar="NAME", help="run these cases alone, and those that they need")
        add("--jobs", type=int, default=2, metavar="N", help="cases that run at the same time. Default: %(default)s")
        add("--limit", type=float, default=1800, metavar="S", help="seconds for a command. Default: %(default)s")
        add("--keep", action="store_true", help="keep the files of the cases, in `work` beside bits.json")
    return whole


def main(arguments: list[str]) -> int:
    """Run the command that the arguments name. Return the exit code."""
    if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        arguments = ["both", *arguments]
    options = parser().parse_args(arguments)
    if options.command == "list":
        print("\n".join(case.name for case in cases()))
        return 0
    if options.command == "compare":
        return compare(*options.records)
    for checkout in options.checkouts:
        check_checkout(checkout.resolve())
    prepare()
    out = options.out or Path(tempfile.mkdtemp(prefix="bits-"))
    places = [out] if options.command == "record" else [out / "a", out / "b"]
    records = []
    for checkout, place in zip(options.checkouts, places, strict=True):
        print(f"{checkout}: recording into {place}", flush=True)
        records.append(record(checkout, place, options.only, options.jobs, options.limit, options.keep))
    return compare(*records) if options.command == "both" else summarise(records[0])


def prepare() -> None:
    """Give this process the variables of `ENVIRONMENT`, which its forks inherit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the cases too
    os.environ.update(ENVIRONMENT)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADS)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
