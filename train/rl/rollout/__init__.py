"""How rows are made: sampling, turns, budgets."""
