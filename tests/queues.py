"""Simulated open loops whose load is known: c servers in parallel, served in the order of arrival."""

import heapq

import numpy as np


def queue(load, servers, requests, seed, service="M"):
    """(due, end) of Poisson arrivals at `load` times what the servers can take; service 1 s (D) or of mean 1 s (M)."""
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / (load * servers), requests))
    takes = np.ones(requests) if service == "D" else rng.exponential(1, requests)
    free, end = [0.0] * servers, np.empty(requests)
    for i in range(requests):
        end[i] = max(due[i], heapq.heappop(free)) + takes[i]
        heapq.heappush(free, end[i])
    return due, end
