"""What Prefect runs. Importing this package imports no Prefect: its settings can be given before."""

import os

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The recorder writes one task run at a time by default and falls behind.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # it tells in the terminal of every unsent event
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def set_prefect_defaults() -> None:
    """Call before Prefect is imported; what the user has set stays."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
