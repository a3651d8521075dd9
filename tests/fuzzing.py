"""How the fuzz tests run: the same examples every time, without a clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FUZZED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    # Every example writes its files anew; drawing a whole document takes its time.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
