"""The command `etude`: `app` has its commands, the other modules what they share."""
