"""Rollouts: the sampler, strategies, budgets, and the collector."""
