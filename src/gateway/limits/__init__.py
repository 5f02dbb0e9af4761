"""How much a caller may use: counters that every process shares, permits leased from them, budgets of runs."""
