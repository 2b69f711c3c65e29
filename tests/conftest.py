"""What every tier shares: how property tests run."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A slow machine is no failure, and what a merge is judged by must not depend on chance: chance is for people's runs.
settings.register_profile(
    "hostler", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hostler")
