"""All cases by name."""

from .cache_cases import CACHE_CASES
from .fleet_cases import FLEET_CASES
from .limit_cases import LIMIT_CASES
from .process_cases import PROCESS_CASES
from .upstream_cases import UPSTREAM_CASES

CASES = {case.name: case for case in CACHE_CASES + LIMIT_CASES + UPSTREAM_CASES + FLEET_CASES + PROCESS_CASES}
