"""`etude serve-reward`: a reward for trainers on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from etude.cli.errors import Debug
from etude.cli.options import option
from etude.cli.streams import only_shows
from etude.cli.waiting import heavy_imports, quiet_libraries


def serve_reward(
    name: Annotated[str, typer.Argument(help="Reward: a name or module:function.")],
    host: Annotated[
        str, option("Address to listen on. An address that other machines can reach needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    token_env: Annotated[
        str | None,
        option(
            "Environment variable with the token that clients must send. Default: ETUDE_REWARD_TOKEN, if set.",
            metavar="VARIABLE",
        ),
    ] = None,
    max_request_mb: Annotated[int, option("Longest request, in MiB.", min=1)] = 64,
    insecure: Annotated[bool, option("Serve other machines without a token.", "--insecure")] = False,
    debug: Debug = False,
) -> None:
    """Serve a reward: a trainer names this server's url as its reward, and the server scores its images.

    POST /score takes JSON with base64 PNG files. GET /health answers once the reward is ready.
    Ctrl-C ends the server.

    Examples:

    `etude serve-reward pickscore --port 8000`

    `etude train emoji-ddpo --reward http://127.0.0.1:8000/score`
    """
    only_shows()
    with heavy_imports():
        quiet_libraries()
        from etude.rewards.remote.server import address, prepare, server_token
    server, sock = prepare(
        name, host, port, server_token(token_env), insecure=insecure, max_request_bytes=max_request_mb << 20
    )
    typer.echo(f"serving {name} at {address(sock)}/score (Ctrl-C ends it)")
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:  # the usual way to end it, so no error
        raise typer.Exit(130) from None
