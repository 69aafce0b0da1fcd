"""The command `etude`: `app` gathers the commands of the other modules."""
