"""`etude preferences`: draw pairs, vote in a browser, exchange votes, fit a reward, judge blindly, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.cli import options
from etude.cli.errors import Debug, Group, UsageError
from etude.cli.run_settings import choose_settings
from etude.cli.waiting import heavy_imports, progress, quiet_libraries
from etude.errors import EtudeError

if TYPE_CHECKING:
    from etude.policies import TrainablePolicy
    from etude.preferences.pool import Pool
    from etude.sampling.sampler import Sampler

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tune on human preferences: draw pairs, vote in a browser, fit a reward, judge blindly.\n\n"
    "An afternoon: `draw`, `vote`, `fit`, then `etude train RECIPE --reward preference:DIR`, then `judge`.",
)

PoolDirectory = Annotated[
    Path, typer.Argument(callback=options.expanded, help="Directory of the pool.", show_default=False)
]
Host = Annotated[
    str, typer.Option(help="Address to listen on. An address that other machines can reach needs a token.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
TokenEnv = Annotated[
    str | None,
    typer.Option(
        metavar="VARIABLE",
        help="Environment variable with the token that visitors must give. Default: ETUDE_VOTE_TOKEN, if set.",
        show_default=False,
    ),
]
Votes = Annotated[int, typer.Option(min=0, help="Votes of one rater after which the page says thank you; 0: none.")]
Backbone = Annotated[
    str,
    typer.Option(
        help="Frozen features: embedded (EfficientNet-Lite0 and MiniLM), pickscore, or clip:MODEL with a directory or hub id."
    ),
]


@app.command()
def draw(
    model: options.Model,
    out: Annotated[
        Path, typer.Option(callback=options.expanded, help="Directory of the pool, new or not.", show_default=False)
    ],
    prompts: options.Prompts = "emoji-train",
    images: Annotated[int, typer.Option(min=2, help="Images of each prompt, under each sampler.")] = 4,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to draw, the first ones of the source.")] = 200,
    lora: options.Lora = None,
    eta: Annotated[
        list[float] | None,
        typer.Option(callback=options.finite, help="Stochasticity; may be repeated. Default: 0, the ODE."),
    ] = None,
    solver: options.Solver = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the run's, else 20.")] = None,
    guidance: options.Guidance = None,
    kernel: options.Kernel = None,
    first_step: options.FirstStep = None,
    seed: options.Seed = 0,
    resolution: options.Resolution = None,
    shift: options.Shift = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 32,
    offload: options.Offload = False,
    pipeline_config: options.PipelineConfig = None,
    variant: options.Variant = None,
    debug: Debug = False,
) -> None:
    """Draw images for voting into a pool. Repeat it for other models and samplers; a killed call goes on.

    Example: `etude preferences draw emoji-sd --prompts emoji-train --out runs/pool`
    """
    if solver is not None and any(eta or []):
        raise UsageError(f"--solver {solver} is deterministic: leave out --eta, or --solver to draw with noise")
    with heavy_imports():
        quiet_libraries()
        from dataclasses import replace

        from etude.policies.loading import load_source
        from etude.policies.source import ModelSource
        from etude.preferences.drawing import draw_into
        from etude.preferences.pool import Pool
        from etude.prompts import load_prompts
        from etude.sampling.solvers import Solver
    texts = list(dict.fromkeys(load_prompts(prompts).texts))[:limit]
    source = ModelSource(
        model,
        lora=lora,
        resolution=resolution,
        shift=shift,
        variant=variant,
        pipeline_config=pipeline_config,
        offload=offload,
    )
    source, chosen, etas, step_counts = choose_settings(
        source,
        kernel=kernel,
        etas=eta,
        guidance=guidance,
        steps=None if steps is None else [steps],
        first_step=first_step,
        dtype=dtype,
        etas_without_run=[0.0],
        etas_of_run=False,
    )
    samplers: list[Sampler] = [replace(chosen, eta=each) for each in etas]
    if solver is not None:
        samplers = [Solver(solver, step_counts[0], chosen.guidance)]
    policy = load_source(source)
    for each in samplers:
        each.check(policy)
    count = images * len(texts)
    total = count * sum(each.evaluations for each in samplers)
    with Pool(out, create=True) as pool, progress("drawing") as advance:
        if pool.fact("sides") is not None:
            raise EtudeError(f"the pool '{out}' judges two sides and takes no other images: give another --out.")
        for each in samplers:
            draw_into(
                pool,
                policy,
                source,
                each,
                texts,
                count,
                seed=seed,
                batch_size=batch_size,
                on_step=lambda done: advance(done, total),
            )
        held = len(pool.images())
    typer.echo(f"pool: {out} ({held} images)\nvote: etude preferences vote {out}")


@app.command()
def vote(
    pool: PoolDirectory,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token_env: TokenEnv = None,
    votes: Votes = 100,
    reward: Annotated[
        Path | None,
        typer.Option(
            callback=options.expanded,
            help="Fitted reward: show the pairs whose votes would teach it most. Default: pairs at random.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve the page on which people vote. Ctrl-C ends it; every vote is on the disk before the next pair shows.

    Keys: left and right arrow, T for a tie, S to skip, U to undo. Several people vote at once, each
    under a name. A tenth of the pairs comes back later with sides swapped.

    Example: `etude preferences vote runs/pool --votes 200`
    """
    with heavy_imports():
        from etude.preferences.pool import Pool
    with Pool(pool) as opened:
        unsure = None
        if reward is not None:
            if opened.fact("sides") is not None:
                raise EtudeError(
                    f"the pool '{pool}' judges two sides, and a reward that chooses the pairs would bend the verdict: "
                    "leave out --reward."
                )
            quiet_libraries()
            from etude.preferences.features import pool_features
            from etude.preferences.preference_reward import read_head

            head = read_head(reward)
            with progress("features") as advance:
                features = pool_features(opened, head.backbone, advance)
            unsure = head.unsure(features)
        _serve(opened, host, port, token_env, votes, unsure)


@app.command()
def judge(
    a: Annotated[
        str | None,
        typer.Argument(
            metavar="A",
            help="First side: MODEL[,lora=DIR][,SAMPLER], the sampler as in `eta=1.2,steps=10` or `heun,steps=10`.",
            show_default=False,
        ),
    ] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help="Second side.", show_default=False)] = None,
    out: Annotated[
        Path,
        typer.Option(
            callback=options.expanded, help="Directory of the judgement, a pool of its own.", show_default=False
        ),
    ] = Path("runs/judgement"),
    prompts: options.Prompts = "emoji-eval",
    limit: Annotated[int, typer.Option(min=2, help="Prompts, the first ones of the source: one pair each.")] = 200,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of both sides. Default: 20.")] = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    resolution: options.Resolution = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = 32,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token_env: TokenEnv = None,
    votes: Votes = 0,
    draw_only: Annotated[bool, typer.Option("--draw-only", help="Draw both sides and end; serve no page.")] = False,
    verdict: Annotated[
        bool, typer.Option("--verdict", help="Print the verdict of the votes in --out; draw and serve nothing.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(callback=options.expanded, help="Also write the verdict to this file.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Judge two models, adapters or samplers blindly: same prompts, same noise, sides at random.

    The page says when enough votes are in, by an interval that may be looked at after every vote,
    and never which side is which. Ctrl-C ends it and prints the verdict.

    Examples:

    `etude preferences judge emoji-sd,lora=runs/first/lora emoji-sd --out runs/tuned-or-base`

    `etude preferences judge emoji-sd emoji-sd,eta=1.2 --out runs/ode-or-sde`
    """
    options.check_target(json, "--json")
    if not verdict and (a is None or b is None):
        raise UsageError("give two sides, A and B, or --verdict with the --out of a judgement")
    with heavy_imports():
        quiet_libraries()
        from etude.preferences.pool import Pool
    if verdict:
        with Pool(out) as pool:
            _print_verdict(pool, json)
        return
    assert a is not None
    assert b is not None
    _draw_sides(out, [a, b], prompts, limit, steps, guidance, seed, resolution, dtype or "float32", batch_size)
    if draw_only:
        typer.echo(f"judgement: {out}\nvote: etude preferences vote {out}")
        return
    with Pool(out) as pool:
        _serve(pool, host, port, token_env, votes, None)
        _print_verdict(pool, json)


def _draw_sides(
    out: Path,
    sides: list[str],
    prompts: str,
    limit: int,
    steps: int | None,
    guidance: float | None,
    seed: int,
    resolution: int | None,
    dtype: str,
    batch_size: int,
) -> None:
    from etude.config import check_sampler
    from etude.policies.loading import load_source
    from etude.policies.source import ModelSource
    from etude.preferences.drawing import describe, draw_into, parse_side
    from etude.preferences.pool import Pool
    from etude.prompts import load_prompts

    beside = check_sampler({"steps": steps, "guidance": guidance, "size": resolution}, "the sampler of both sides")
    parsed = [parse_side(side, ModelSource("", dtype=dtype), beside) for side in sides]
    if parsed[0] == parsed[1]:
        raise EtudeError(f"A and B are both '{sides[0]}': give two sides that differ.")
    texts = list(dict.fromkeys(load_prompts(prompts).texts))[:limit]
    total = len(texts) * sum(sampler.evaluations for _, sampler in parsed)
    # Models first, so that one that is refused leaves nothing: B by its files, since one is held at a time.
    parsed[1][1].check(load_source(parsed[1][0], outline=True))
    first = load_source(parsed[0][0])
    parsed[0][1].check(first)
    policy: TrainablePolicy | None = first
    makers = []
    with Pool(out, create=True) as pool, progress("drawing both sides") as advance:
        judged = [pool.makers()[number].settings for number in pool.fact("sides") or []]
        for place, (source, sampler) in enumerate(parsed):
            policy = policy or load_source(source)
            if judged and describe(policy, source, sampler, texts, seed) != judged[place]:
                raise EtudeError(f"'{out}' judges other sides already: give another --out.")
            makers.append(
                draw_into(
                    pool,
                    policy,
                    source,
                    sampler,
                    texts,
                    len(texts),
                    seed=seed,
                    batch_size=batch_size,
                    on_step=lambda done: advance(done, total),
                )
            )
            policy = None
        pool.set_fact("sides", makers)


def _serve(pool: Pool, host: str, port: int, token_env: str | None, votes: int, unsure: Any) -> None:
    from etude.preferences.pairing import Pairing
    from etude.preferences.voting_server import LOOPBACK_HOSTS, build_app, check_installed, voting_token
    from etude.rewards.remote.server import address, listen, make_server

    check_installed()
    token = voting_token(token_env, host)
    pairing = Pairing(pool, unsure)
    if not pairing.total:
        raise EtudeError(f"the pool '{pool.root}' holds no two images of one prompt: draw more images.")
    sock = listen(host, port, insecure=True)  # voting_token has asked for a token where one is needed
    hosts = {host.lower(), *LOOPBACK_HOSTS}
    server = make_server(build_app(pool, pairing, token, target=votes, hosts=hosts))
    typer.echo(f"vote at {address(sock)} (Ctrl-C ends it; {pairing.total} pairs, {pool.count()} votes so far)")
    with suppress(KeyboardInterrupt):  # the usual way to end it, so no error
        server.run(sockets=[sock])
    typer.echo(f"{pool.count()} votes in {pool.root}")


def _print_verdict(pool: Pool, json: Path | None) -> None:
    from json import dumps

    from etude.files import atomic_write_text
    from etude.preferences.verdict import judge as judged

    result = judged(pool)
    typer.echo("\n".join(result.lines()))
    if json is not None:
        atomic_write_text(json, dumps(result.to_dict(), indent=2) + "\n")


@app.command()
def fit(
    pool: PoolDirectory,
    out: Annotated[Path, typer.Option(callback=options.expanded, help="Directory of the reward.", show_default=False)],
    backbone: Backbone = "embedded",
    rater_effects: Annotated[
        bool, typer.Option("--rater-effects", help="Give each rater a leaning to a side and a tie rate of their own.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Write a reward that cannot be told from chance, too.")
    ] = False,
    seed: options.Seed = 0,
    debug: Debug = False,
) -> None:
    """Fit a reward to the votes, and say how often it is right on prompts that it has not seen.

    The reward is then called preference:DIR. One that cannot be told from chance is not written.

    Examples:

    `etude preferences fit runs/pool --out runs/taste`

    `etude train emoji-ddpo --reward preference:runs/taste --out runs/tuned`
    """
    with heavy_imports():
        quiet_libraries()
        from etude.preferences.pool import Pool
        from etude.preferences.preference_reward import write_reward
        from etude.preferences.reward_fit import fit_reward
    with Pool(pool) as opened, stages() as advance:
        fitted = fit_reward(opened, backbone, rater_effects=rater_effects, seed=seed, advance=advance)
    typer.echo("\n".join(fitted.lines()))
    if not (fitted.told_from_chance or anyway):
        raise EtudeError(
            f"the reward cannot be told from chance (right on {fitted.accuracy} of held-out votes), so nothing was written: "
            "go on voting, or give --anyway."
        )
    write_reward(fitted, out)
    typer.echo(f"reward: {out}\ntrain: etude train emoji-ddpo --reward preference:{out}")


@app.command("export")
def export_command(
    pool: PoolDirectory,
    out: Annotated[
        Path,
        typer.Option(
            callback=options.expanded, help="File to write, .jsonl (images beside it) or .parquet.", show_default=False
        ),
    ],
    debug: Debug = False,
) -> None:
    """Write the votes with the field names of Pick-a-Pic, for other tools and for DPO.

    Example: `etude preferences export runs/pool --out votes.jsonl`
    """
    options.check_target(out, "--out")
    with heavy_imports():
        from etude.preferences.pool import Pool
        from etude.preferences.vote_exchange import export_votes
    with Pool(pool) as opened, progress("exporting") as advance:
        count = export_votes(opened, out, advance)
    typer.echo(f"{count} votes: {out}")


@app.command("import")
def import_command(
    pool: PoolDirectory,
    source: Annotated[
        Path,
        typer.Argument(
            callback=options.expanded, help="A .jsonl or .parquet file of votes or images.", show_default=False
        ),
    ],
    debug: Debug = False,
) -> None:
    """Add votes with the field names of Pick-a-Pic, or images (`prompt`, `file`), to a pool, new or not.

    Example: `etude preferences import runs/pool votes.jsonl`
    """
    if not source.is_file():
        raise EtudeError(f"'{source}' is no file: give a .jsonl or .parquet file of votes or images.")
    with heavy_imports():
        from etude.preferences.pool import Pool
        from etude.preferences.vote_exchange import import_votes
    with Pool(pool, create=True) as opened, progress("importing") as advance:
        votes, images = import_votes(opened, source, advance)
    typer.echo(f"{votes} new votes and {images} new images: {pool}")


@app.command()
def report(
    pool: PoolDirectory,
    reward: Annotated[
        Path | None,
        typer.Option(callback=options.expanded, help="Fitted reward: its figures, and its ranking of the pool."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(callback=options.expanded, help="Run that was trained on it: its curves.")
    ] = None,
    judgement: Annotated[
        Path | None, typer.Option(callback=options.expanded, help="Pool of a blind judgement: its verdict.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=options.expanded, help="Page to write. Default: preferences.html in the pool.", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one page: votes, agreement, the reward and its ranking, the training, the blind verdict.

    Example: `etude preferences report runs/pool --reward runs/taste --run runs/tuned --judgement runs/verdict`
    """
    options.check_target(out, "--out")
    with heavy_imports():
        quiet_libraries()
        from etude.preferences.pool import Pool
        from etude.preferences.preference_page import write_page
    with Pool(pool) as opened, progress("features") as advance:
        typer.echo(str(write_page(opened, reward, run, judgement, out, advance)))


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage of a long work, where stderr is a terminal."""
    from rich.progress import Progress

    from etude.terminal import make_console

    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], total=total, advance=done)

        yield advance
