"""What a run reads by name: prompts, model, rewards and code, as digests that a checkpoint keeps.

A configuration names its inputs and does not hold them, and what stands under a name can change
between two sessions of a run. A resumed run is the same run only if nothing of it has.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.files import fingerprints
from etude.policies import TrainablePolicy
from etude.policies.loading import split_revision
from etude.policies.source import ModelSource, source_files
from etude.prompts import PromptSet
from etude.registry import ADVANTAGES, KERNELS, OBJECTIVES, POLICIES, WINDOWS
from etude.rewards import files, get, revisions
from etude.runs.checkpoint import Checkpoints

Digests = dict[str, dict[str, str]]
"""By input, as an error names it, and by part of the input: a digest. The part of a whole is ""."""
_COMMIT = "commit"


class Inputs:
    """The digests of a run's inputs. Each `take` compares with those of the checkpoint that it resumes.

    Args:
        resume: whether the run goes on from the newest checkpoint in `out`, if there is one.
        accept_changes: go on with inputs that have changed, and note which.

    Attributes:
        digests: the digests of this session.
        changes: clauses on the changes that were accepted, in this session or before.
        accepted: those of this session.
        unknown: whether the checkpoint was written by a version of etude that kept no digests.
    """

    def __init__(self, config: TrainConfig, out: Path, resume: bool = False, accept_changes: bool = False) -> None:
        self.out, self.accept_changes = out, accept_changes
        self.iteration, state = (Checkpoints(out, config).peek() if resume else None) or (0, {})
        stored = _as(dict, state.get("inputs"))
        self._before: Digests = {name: _as(dict, parts) for name, parts in stored.items()}
        self.unknown = bool(state) and "inputs" not in state
        self.changes: list[str] = _as(list, state.get("changed_inputs"))
        self.accepted: list[str] = []
        self.digests: Digests = {}

    def take(self, digests: Digests) -> None:
        """Adds digests.

        Raises:
            EtudeError: one differs from that of the checkpoint, and changes are not accepted.
        """
        self.digests |= digests
        compared = {name: parts for name, parts in digests.items() if name in self._before}
        changed = [text for name, parts in compared.items() for text in _changes(name, self._before[name], parts)]
        if changed and not self.accept_changes:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise EtudeError(
                f"{changed[0]}{more} since the run in '{self.out}' wrote its checkpoint of iteration {self.iteration}, so that it would "
                "not go on as the same run: put the old content back, start another run in another directory, or accept the change "
                f"with `etude train --resume --accept-changes --out {shlex.quote(str(self.out))}`, and the results will mention it."
            )
        self.accepted += changed
        self.changes += [f"{text} after iteration {self.iteration}" for text in changed]

    def pinned(self, source: ModelSource) -> ModelSource:
        """The source, at the commit from which the run read it before if it comes from the hub."""
        commit = self._before.get(f"model '{source.name}'", {}).get(_COMMIT)
        name = split_revision(str(source.name))[0]
        return replace(source, name=f"{name}@{commit}") if isinstance(commit, str) else source

    @property
    def number(self) -> int:
        """A number that differs between two processes that have read different inputs."""
        text = json.dumps(self.digests, sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def digests_before_loading(
    config: TrainConfig, source: ModelSource | None, trained: PromptSet, evaluated: PromptSet
) -> Digests:
    """The digests of prompts, of files and of code: all that is known before a model is loaded."""
    found = {
        f"prompts.train '{config.prompts.train}'": {"": prompts_digest(trained)},
        f"prompts.evaluation '{config.prompts.evaluation}'": {"": prompts_digest(evaluated)},
    }
    # Named as in the configuration, also for a policy that was loaded from somewhere else.
    titles = {"model": f"model '{config.model}'", "pipeline_config": f"pipeline_config '{config.pipeline_config}'"}
    read = {} if source is None else {titles.get(what, what): paths for what, paths in source.files().items()}
    if config.lora.init is not None:
        read |= {f"lora.init '{config.lora.init}'": source_files(config.lora.init)}
    read |= {f"reward '{name}'": files(name) for name in _rewards(config)} | dict(_code(config))
    return found | {name: parts for name, paths in read.items() if (parts := fingerprints(paths))}


def digests_after_loading(config: TrainConfig, policy: TrainablePolicy) -> Digests:
    """The commits that model and rewards were read from on the hub, and the names that reward servers give."""
    found = {} if policy.revision is None else {f"model '{config.model}'": {_COMMIT: policy.revision}}
    for name, commits in revisions(_rewards(config)).items():
        found |= {f"reward '{name}', read from {source},": {_COMMIT: commit} for source, commit in commits.items()}
    served = {name: getattr(get(name), "served", None) for name in _rewards(config)}
    return found | {f"what the server of reward '{name}' computes": {"": it} for name, it in served.items() if it}


def prompts_digest(prompts: PromptSet) -> str:
    """SHA-256 of prompts in their order, with their metadata."""
    metadata = dict(sorted(prompts.metadata.items()))
    try:
        text = json.dumps([prompts.texts, metadata], sort_keys=True, default=_plain)
    except (TypeError, ValueError, RecursionError):  # a function returned what is no data
        text = json.dumps(prompts.texts)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value that JSON does not have, from a function or a dataset: its content, or else its type alone."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, bytes):
        return value.hex()
    for method in ("tolist", "isoformat", "tobytes"):  # arrays and tensors, dates, pictures
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    return type(value).__name__


def _as(kind: Any, value: Any) -> Any:
    """A value of a checkpoint, which is of that kind unless somebody else wrote it; then an empty one."""
    return value if isinstance(value, kind) else kind()


def _rewards(config: TrainConfig) -> list[str]:
    return [*config.rewards, *config.evaluation.held_out_rewards]


def _code(config: TrainConfig) -> Iterator[tuple[str, dict[str, Path]]]:
    """The files of the user's own kernel, window, objective, advantage and pipeline family."""
    window = config.sampling.window
    yield f"sampling.kernel '{config.sampling.kernel}'", KERNELS.files(config.sampling.kernel)
    if window is not None:
        yield f"sampling.window.strategy '{window.strategy}'", WINDOWS.files(window.strategy)
    yield f"objective.kind '{config.objective.kind}'", OBJECTIVES.files(config.objective.kind)
    yield f"advantage.kind '{config.advantage.kind}'", ADVANTAGES.files(config.advantage.kind)
    if config.family is not None:
        yield f"family '{config.family}'", POLICIES.files(config.family)


def _changes(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Clauses on the parts of an input that differ."""
    for part in dict.fromkeys([*before, *now]):
        old, new = before.get(part), now.get(part)
        how = "is gone" if new is None else "is new" if old is None else "has changed"
        if old != new:
            yield f"{part} of {name} {how}" if part else f"{name} {how}"
