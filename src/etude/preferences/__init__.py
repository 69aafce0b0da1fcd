"""Human preferences: pools of images, votes on pairs, a reward fitted to them, a blind verdict.

    draw pairs -> vote in a browser -> fit a reward -> train on it -> judge blindly -> vote on more

`pool` keeps images and votes, `pairing` chooses what a rater sees next, `voting_desk` takes the
votes and `voting_server` shows the page; `davidson`, `clustering`, `shares` and `always_valid` are
the statistics, `reward_fit` and `preference_reward` turn votes into a reward, and `verdict` says
which side people prefer.
"""

from __future__ import annotations
