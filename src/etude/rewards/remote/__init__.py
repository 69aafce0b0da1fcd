"""Rewards on another machine: the wire format, the client and the server."""
