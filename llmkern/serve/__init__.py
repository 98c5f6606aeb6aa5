"""Requests that arrive at a server with continuous batching: when, what each costs, and what waiting for them costs."""
