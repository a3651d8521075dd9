"""Searches over configurations: Ray Tune runs the trials, Optuna proposes them."""
