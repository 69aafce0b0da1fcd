"""The voting server: what it answers, whom it refuses, and that a kill between any two votes loses nothing."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from etude.errors import EtudeError
from etude.preferences.pairing import Pairing
from etude.preferences.pool import Pool
from etude.preferences.voting_desk import AHEAD, Desk
from etude.preferences.voting_server import LONGEST_BODY, build_app, voting_token
from support.fuzzing import fuzz
from support.preferences import SimulatedRater, fill, quick
from support.voting import Voter, serving

HOST = "http://127.0.0.1"


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return fill(quick(tmp_path / "pool"), prompts=5, each=4)


@pytest.fixture
def client(pool: Pool) -> Iterator[TestClient]:
    with TestClient(build_app(pool, Pairing(pool, seed=0), target=10), base_url=HOST) as client:
        yield client


def test_a_vote_answers_with_the_next_pairs_and_the_progress(client: TestClient, pool: Pool) -> None:
    state = client.post("/api/pairs", json={"rater": "ann"}).json()
    assert (len(state["queue"]), state["votes"], state["target"], state["enough"]) == (3, 0, 10, None)
    first, second, _ = state["queue"]
    after = client.post("/api/vote", json={"rater": "ann", "pair": first["pair"], "answer": "tie"}).json()
    assert after["votes"] == 1
    assert after["queue"][0] == second  # what the page has loaded shows next
    assert client.get(f"/image/{second['left']}").headers["content-type"] == "image/png"
    back = client.post("/api/undo", json={"rater": "ann"}).json()
    assert (back["queue"][0], back["votes"]) == (first, 0)
    assert client.post("/api/pairs", json={"rater": "ann"}).json() == back  # a refresh shows the same pair


def test_the_answer_to_a_vote_waits_for_one_write_and_the_next_pair_is_chosen_after_it(pool: Pool) -> None:
    desk, statements = Desk(pool, Pairing(pool, seed=0), 0), []
    shown = desk.pairs({"rater": "ann"})["queue"]
    pool._connection.set_trace_callback(statements.append)
    state = desk.vote({"rater": "ann", "pair": shown[0]["pair"], "answer": "left"})
    pool._connection.set_trace_callback(None)
    assert state["queue"] == shown[1:]
    assert statements.count("COMMIT") == 1
    assert len(statements) <= 7  # one of them opens the transaction, three look the pair up, one counts
    desk.choose_ahead()
    assert [pair for pair, *_ in pool.open_pairs("ann")] == [pair["pair"] for pair in shown[1:]] + [AHEAD + 1]
    assert len(desk.pairs({"rater": "ann"})["queue"]) == AHEAD


def test_pairs_are_chosen_in_one_order_however_soon_the_next_vote_comes(tmp_path: Path) -> None:
    queues = []
    for patient in (True, False):
        pool = fill(quick(tmp_path / f"{patient}"), prompts=3, each=4)
        desk, shown = Desk(pool, Pairing(pool, seed=0), 0), []
        state = desk.pairs({"rater": "ann"})
        for number in range(14):
            if patient:
                desk.choose_ahead()
            what = desk.undo if number in (4, 5) else desk.vote
            shown.append(state["queue"][0])
            state = what({"rater": "ann", "pair": state["queue"][0]["pair"], "answer": "tie"})
        queues.append(shown)
    assert queues[0] == queues[1]


def test_an_undo_that_is_sent_again_takes_back_one_vote(client: TestClient, pool: Pool) -> None:
    queue = client.post("/api/pairs", json={"rater": "ann"}).json()["queue"]
    for pair in queue[:2]:
        client.post("/api/vote", json={"rater": "ann", "pair": pair["pair"], "answer": "left"})
    states = [client.post("/api/undo", json={"rater": "ann", "votes": 2}).json() for _ in range(2)]
    assert states[0] == states[1]
    assert (states[0]["votes"], states[0]["queue"][0]) == (1, queue[1])


def test_raters_do_not_see_one_another(client: TestClient) -> None:
    ann, bob = (client.post("/api/pairs", json={"rater": name}).json()["queue"] for name in ("ann", "bob"))
    assert not {pair["pair"] for pair in ann} & {pair["pair"] for pair in bob}
    refused = client.post("/api/vote", json={"rater": "bob", "pair": ann[0]["pair"], "answer": "left"})
    assert refused.status_code == 409


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_foreign_names_origins_and_forms_cannot_vote(
    client: TestClient, pool: Pool, headers: dict[str, str], status: int
) -> None:
    pair = client.post("/api/pairs", json={"rater": "ann"}).json()["queue"][0]["pair"]
    body = json.dumps({"rater": "ann", "pair": pair, "answer": "left"})
    answer = client.post("/api/vote", content=body, headers={"content-type": "application/json", **headers})
    assert answer.status_code == status
    assert pool.count() == 0


def test_the_pages_own_origin_can(client: TestClient, pool: Pool) -> None:
    pair = client.post("/api/pairs", json={"rater": "ann"}).json()["queue"][0]["pair"]
    told = {"origin": HOST, "sec-fetch-site": "same-origin"}
    assert client.post("/api/vote", json={"rater": "ann", "pair": pair, "answer": "left"}, headers=told).is_success
    assert pool.count() == 1


@pytest.mark.parametrize("path", ["/api/pairs", "/api/vote", "/api/undo"])
def test_a_token_is_asked_for_and_a_wrong_one_refused(pool: Pool, path: str) -> None:
    with TestClient(build_app(pool, Pairing(pool, seed=0), "right-token"), base_url="http://here") as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"cookie": "etude-vote=wrong"},
            {"authorization": "Bearer "},
        ):
            answer = client.post(path, json={"rater": "ann"}, headers=headers)
            assert answer.status_code == 401
            assert "token" in answer.json()["error"]
        digest = pool.images()[0].digest
        assert client.get(f"/image/{digest}").status_code == 401
        assert client.get("/").status_code == 401
        assert pool.pairs() == []
        assert client.post(
            "/api/pairs", json={"rater": "ann"}, headers={"authorization": "Bearer right-token"}
        ).is_success


def test_the_token_of_the_address_moves_into_a_cookie_that_scripts_cannot_read(pool: Pool) -> None:
    with TestClient(build_app(pool, Pairing(pool, seed=0), "right-token"), base_url="http://here") as client:
        wrong = client.get("/?token=wrong", follow_redirects=False)
        assert "set-cookie" not in wrong.headers
        answer = client.get("/?token=right-token", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert {"httponly", "samesite=lax"} <= {
            part.strip().lower() for part in answer.headers["set-cookie"].split(";")
        }
        assert client.get("/").status_code == 200
        assert "right-token" not in client.get("/").text
    with TestClient(build_app(pool, Pairing(pool, seed=0), "right-token"), base_url="http://here") as client:
        assert client.get("/").status_code == 401
        assert "not the token" in client.post("/enter", data={"token": "wrong"}).text
        assert client.post("/enter", data={"token": "right-token"}).status_code == 200


def test_beyond_loopback_there_is_a_token_or_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETUDE_VOTE_TOKEN", raising=False)
    assert voting_token(None, "127.0.0.1") == ""
    with pytest.raises(EtudeError, match="lets other machines in, and there is no token"):
        voting_token(None, "0.0.0.0")
    with pytest.raises(EtudeError, match="that environment variable is not set"):
        voting_token("MISSING", "127.0.0.1")
    monkeypatch.setenv("ETUDE_VOTE_TOKEN", "secret")
    assert voting_token(None, "0.0.0.0") == "secret"


@pytest.mark.parametrize(
    "path",
    ["/image/..%2f..%2fvotes.sqlite", "/image/../votes.sqlite", "/static/../pool.py", "/static/pool.py", "/static/voting_server.py",
     "/static/..%2fpool.py", "/image/" + "0" * 64, "/votes.sqlite", "/images/", "/image/%00"],
)  # fmt: skip
def test_no_route_serves_a_file_outside_the_pool(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (404, 405)


def test_every_answer_forbids_other_origins_scripts_frames_and_guessing(client: TestClient, pool: Pool) -> None:
    for path in ("/", "/static/voting.js", f"/image/{pool.images()[0].digest}", "/image/none"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "script-src 'self';" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    page = client.get("/").text
    assert "://" not in page  # no other host
    assert "onclick" not in page


def test_a_long_body_is_refused(client: TestClient) -> None:
    answer = client.post("/api/vote", json={"rater": "x" * LONGEST_BODY})
    assert answer.status_code == 413


def test_a_failing_disk_is_told_to_the_page_and_the_vote_can_be_given_again(client: TestClient, pool: Pool) -> None:
    pair = client.post("/api/pairs", json={"rater": "ann"}).json()["queue"][0]["pair"]
    vote = {"rater": "ann", "pair": pair, "answer": "left"}
    pool._connection.execute("PRAGMA query_only = ON")
    answer = client.post("/api/vote", json=vote)
    assert answer.status_code == 507
    assert "nothing was stored" in answer.json()["error"]
    pool._connection.execute("PRAGMA query_only = OFF")
    assert client.post("/api/vote", json=vote).json()["votes"] == 1


def test_a_full_disk_after_a_vote_fails_the_next_request_alone(client: TestClient, pool: Pool) -> None:
    queue = client.post("/api/pairs", json={"rater": "ann"}).json()["queue"]
    votes = [{"rater": "ann", "pair": pair["pair"], "answer": "left"} for pair in queue]
    add_pair, pool.add_pair = pool.add_pair, _no_space  # type: ignore[method-assign]
    assert client.post("/api/vote", json=votes[0]).status_code == 200  # it is stored, and says so
    assert client.post("/api/vote", json=votes[1]).status_code == 507
    pool.add_pair = add_pair  # type: ignore[method-assign]
    assert client.post("/api/vote", json=votes[1]).json()["votes"] == 2


def _no_space(*pair: object) -> int:
    raise EtudeError("the disk is full: nothing was stored; free some space.")


def _requests() -> dict:
    from hypothesis import strategies as st

    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    fields = st.dictionaries(st.sampled_from(["rater", "pair", "answer", "seconds", "x"]), values, max_size=5)
    return {"body": fields.map(json.dumps) | st.text(max_size=60), "path": st.sampled_from(["pairs", "vote", "undo"])}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    pool = fill(quick(tmp_path_factory.mktemp("requests") / "pool"), prompts=3, each=3)
    with TestClient(build_app(pool, Pairing(pool, seed=0)), base_url=HOST) as client:
        yield client


@fuzz("requests of voters", 150, **_requests())
def test_any_request_is_answered_or_refused_in_a_sentence(shared: TestClient, body: str, path: str) -> None:
    answer = shared.post(
        f"/api/{path}", content=body.encode("utf-8", "surrogatepass"), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 409)
    assert answer.status_code == 200 or answer.json()["error"]


def _whatever_comes(action: partial) -> None:
    with suppress(Exception):
        action()


@pytest.mark.slow
def test_a_kill_between_any_two_votes_loses_none_that_was_acknowledged(tmp_path: Path) -> None:
    """Two servers in turn, each killed by SIGKILL after some votes while another request is under way."""
    fill(Pool(tmp_path / "pool", create=True), prompts=8, each=5).close()
    rater, acknowledged, doubtful = SimulatedRater(np.mean, sharpness=0.05), {}, set()
    for votes in (2, 3):
        with serving(tmp_path / "pool") as (process, address), httpx2.Client(base_url=address, timeout=60) as client:
            voter = Voter(client, "ann")
            state = voter.ask("pairs")
            for _ in range(votes):
                pair = state["queue"][0]
                answer = rater.answer(pair["left"], pair["right"], voter.pixels)
                state = voter.ask("vote", pair=pair["pair"], answer=answer)
                acknowledged[pair["pair"]] = answer
            doubtful.add(state["queue"][0]["pair"])
            vote = partial(voter.ask, "vote", pair=state["queue"][0]["pair"], answer="tie")
            under_way = threading.Thread(target=_whatever_comes, args=(vote,))
            under_way.start()
            process.send_signal(signal.SIGKILL)
            process.wait()
            under_way.join()
    with Pool(tmp_path / "pool") as pool:
        stored = dict(zip(pool.ballots().pair.tolist(), pool.ballots().outcome.tolist(), strict=True))
        kept = {pair: {"left": 1, "tie": 0, "right": -1}[answer] for pair, answer in acknowledged.items()}
        assert {pair: stored[pair] for pair in kept} == kept
        assert set(stored) - set(kept) <= doubtful  # whole or not at all
        assert all(stored[pair] == 0 for pair in set(stored) - set(kept))
        assert pool._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
def test_two_servers_share_a_pool(tmp_path: Path) -> None:
    """Two raters at once, one at each server, and a third who goes from one to the other and back."""
    fill(Pool(tmp_path / "pool", create=True), prompts=8, each=5).close()
    with (
        serving(tmp_path / "pool") as (_, one),
        serving(tmp_path / "pool") as (_, two),
        httpx2.Client(base_url=one, timeout=60) as first,
        httpx2.Client(base_url=two, timeout=60) as second,
    ):
        voters = [Voter(first, "ann"), Voter(second, "bob")]
        raters = [SimulatedRater(np.mean, sharpness=0.05, seed=seed) for seed in (1, 2)]
        threads = [
            threading.Thread(target=voter.vote_all, args=(rater, 12))
            for voter, rater in zip(voters, raters, strict=True)
        ]
        for thread in threads:
            thread.start()
        given = {}
        for i in range(8):
            here = Voter((first, second)[i % 2], "cal")
            pair = here.ask("pairs")["queue"][0]["pair"]
            given[pair] = "left"
            assert here.ask("vote", pair=pair, answer="left")["votes"] == i + 1
        for thread in threads:
            thread.join()
    with Pool(tmp_path / "pool") as pool:
        assert [pool.count(name) for name in ("ann", "bob", "cal")] == [12, 12, 8]
        ballots = pool.ballots()
        assert set(ballots.pair[ballots.rater == "cal"].tolist()) == set(given)
        fresh = [(rater, *sorted(images)) for _, *images, rater, repeats in pool.pairs() if not repeats]
        assert len(set(fresh)) == len(fresh)  # each server knows what the other one has shown
        assert pool._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
