"""Races: training methods compared at equal budgets, each with hyper-parameters from equally many pilots."""
