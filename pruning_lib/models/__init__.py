"""Models: loading, their structure, cutting parts out of them, saving."""

from typing import Any


def __getattr__(name: str) -> Any:
    from pruning_lib._renamed import old_name

    return old_name("models", name)
